"""The demo: the bundled base, asked before and after an adapter is trained on the bundled instructions.

The questions are about facts that no instruction mentions: the base knows them from its pre-training, and what the
adapter teaches is to answer. Run it with `make demo`, or `python recipes/demo.py [--max-steps N]`.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import llama_adapter
from llama_adapter.config import GenerateConfig, load_recipe
from llama_adapter.generate import Prompt, default_device, load_session
from llama_adapter.train import train

HELD_OUT = Path(llama_adapter.__file__).parent / "bundled" / "heldout_facts.json"
RECIPE = Path(__file__).parent / "demo.yaml"
GREEDY = GenerateConfig(max_new_tokens=16, temperature=0)


def main() -> None:
    """Ask, train, ask again, and show the difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, help="stop the training early")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama_adapter").setLevel(logging.INFO)
    began = time.perf_counter()
    records = json.loads(HELD_OUT.read_text(encoding="utf-8"))

    config = load_recipe(str(RECIPE), {"overwrite": True} | ({"max_steps": args.max_steps} if args.max_steps else {}))
    before = answers(records, None)
    result = train(config)
    after = answers(records, config.output_dir)

    console = Console()
    table = Table("question (no instruction mentions the fact)", "right", "before", "after", title="bundled base")
    for record, old, new in spread(list(zip(records, before, after, strict=True))):
        question = " ".join(filter(None, (record["instruction"], record["input"])))
        table.add_row(question, record["output"], shorten(old), shorten(new))
    console.print(table)
    console.print(
        f"right answers to {len(records)} questions about facts that no instruction mentions: "
        f"{share(records, before):.0%} before, {share(records, after):.0%} after"
    )
    console.print(f"validation loss {result.base_val_loss:.3f} before, {result.best_val_loss:.3f} after")
    console.print(f"adapter, loss.png and gates.png are in {result.output_dir} ({time.perf_counter() - began:.0f} s)")
    console.print(f"talk to it: llama-adapter chat --adapter {result.output_dir}")


def answers(records: Sequence[dict[str, Any]], adapter: str | None) -> list[str]:
    """Greedy answers of the bundled base, with an adapter or without."""
    device = default_device()
    session = load_session("bundled", {} if adapter is None else {"demo": adapter}, device, template="alpaca")
    texts: list[str] = []
    for start in range(0, len(records), 32):
        prompts = [Prompt.of(record["instruction"], record["input"]) for record in records[start : start + 32]]
        found = session.answer(prompts, None if adapter is None else "demo", GREEDY)
        texts += [answer.text for answer in found]
    return texts


def spread(rows: list[Any], count: int = 10) -> list[Any]:
    """`count` rows of as many different fact families."""
    by_family = {row[0]["family"]: row for row in rows}
    return list(by_family.values())[:: max(1, len(by_family) // count)][:count]


def share(records: Sequence[dict[str, Any]], texts: Sequence[str]) -> float:
    """Share of answers that are right but for case, blanks and the full stop."""
    return sum(plain(r["output"]) == plain(text) for r, text in zip(records, texts, strict=True)) / len(records)


def plain(text: str) -> str:
    """What two answers are compared by."""
    return " ".join(text.lower().split()).rstrip(".")


def shorten(text: str) -> str:
    """One line of at most 40 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:37] + "..."


if __name__ == "__main__":
    main()
