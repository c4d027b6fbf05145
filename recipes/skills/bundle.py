"""Write the skill that `llama-adapter demo --real` teaches into the package: python recipes/skills/bundle.py"""

from __future__ import annotations

import json
from pathlib import Path

from skills import SKILLS

from llama_adapter.files import write_atomically

FOLDER = Path(__file__).resolve().parents[2] / "src" / "llama_adapter" / "bundled" / "skill"
SKILL, TRAIN, HELD = "extract", 640, 20
FAMILIES = {"heldout_entities": "new names", "heldout_wordings": "new names and wordings"}


def main() -> None:
    """Two files: what is learnt, and what is asked."""
    skill = SKILLS[SKILL]
    train = [example.record() for example in skill.examples("train", 0, TRAIN)]
    asked = [
        {**example.record(), "family": family}
        for split, family in FAMILIES.items()
        for example in skill.examples(split, 0, HELD)
    ]
    for name, records in (("train", train), ("heldout", asked)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(FOLDER / f"{name}.jsonl", lines.encode())


if __name__ == "__main__":
    main()
