"""Write a skill's splits as JSON lines of instruction, input and output.

    python recipes/skills/write.py --skill dates --out data/dates
    llama-adapter train -m FOLDER --template chat --data data/dates/train.jsonl -o adapters/dates

`--skill all` writes every skill into a folder of its name. Files of that name are replaced, each in one go.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from skills import SKILLS, SPLITS, Skill

from llama_adapter.errors import AdapterError
from llama_adapter.files import write_atomically, writing


def number(text: str) -> int:
    """A count of at least one.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above zero")
    return int(text)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description="Write a skill's splits as JSON lines, for llama-adapter train --data.",
        epilog="Example: python recipes/skills/write.py --skill dates --out data/dates --train 1600",
    )
    parser.add_argument("--skill", required=True, choices=[*SKILLS, "all"], help="which one")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other examples (default: 0)")
    parser.add_argument("--train", type=number, default=1600, metavar="N", help="training examples (default: 1600)")
    parser.add_argument("--held", type=number, default=100, metavar="N", help="of each other split (default: 100)")
    return parser.parse_args(given)


def write(skill: Skill, folder: Path, seed: int, train: int, held: int) -> None:
    """A file a split.

    Raises:
        AdapterError: the folder cannot be written, or the skill has fewer examples.
    """
    try:
        sets = {split: skill.examples(split, seed, train if split == "train" else held) for split in SPLITS}
    except ValueError as error:
        raise AdapterError(str(error)) from None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for split, examples in sets.items():
            lines = "".join(json.dumps(example.record(), ensure_ascii=False) + "\n" for example in examples)
            write_atomically(folder / f"{split}.jsonl", lines.encode())
            print(f"{folder / split}.jsonl: {len(examples)} records")


def main(given: Sequence[str] | None = None) -> int:
    """Write the files; 2 where that cannot be done."""
    args = arguments(given)
    try:
        for name in SKILLS if args.skill == "all" else [args.skill]:
            folder = args.out / name if args.skill == "all" else args.out
            write(SKILLS[name], folder, args.seed, args.train, args.held)
    except AdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
