"""The demo: the bundled base, asked before and after an adapter is trained on the bundled instructions.

The questions are about facts that no instruction mentions: the base knows them from its pre-training, and what the
adapter teaches is to answer. Run it with `make demo`, or `python recipes/demo.py [--max-steps N]`.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import llama_adapter
from llama_adapter.evaluation.instructions import FamilyScore, Task, evaluate_instructions, read_tasks
from llama_adapter.inference.session import default_device, load_session
from llama_adapter.training.config import load_recipe
from llama_adapter.training.loop import train

HELD_OUT = Path(llama_adapter.__file__).parent / "bundled" / "heldout_facts.json"


def main() -> None:
    """Ask, train, ask again, and show the difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, help="stop the training early")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama_adapter").setLevel(logging.INFO)
    began = time.perf_counter()
    tasks = read_tasks(str(HELD_OUT))
    config = load_recipe("bundled", {"overwrite": True} | ({"max_steps": args.max_steps} if args.max_steps else {}))
    before, old = ask(tasks, None)
    result = train(config)
    after, new = ask(tasks, config.output_dir)

    console = Console()
    table = Table("question (no instruction mentions the fact)", "right", "before", "after", title="bundled base")
    for task, first, second in spread(list(zip(tasks, old, new, strict=True))):
        question = " ".join(filter(None, (task.prompt.messages[-1].content, task.prompt.input)))
        table.add_row(question, task.answer, shorten(first), shorten(second))
    console.print(table)
    console.print(
        f"right answers to {len(tasks)} questions about facts that no instruction mentions: "
        f"{before.exact_match:.0%} before, {after.exact_match:.0%} after"
    )
    console.print(f"loss on the right answers: {before.loss:.3f} before, {after.loss:.3f} after")
    console.print(f"adapter, loss.png and gates.png are in {result.output_dir} ({time.perf_counter() - began:.0f} s)")
    console.print(f"talk to it: llama-adapter chat --adapter {result.output_dir}")


def ask(tasks: Sequence[Task], adapter: str | None) -> tuple[FamilyScore, list[str]]:
    """Score and greedy answers of the bundled base, with an adapter or without."""
    adapters = {} if adapter is None else {"demo": adapter}
    session = load_session("bundled", adapters, default_device(), "fp32", template="alpaca")
    scores, answers = evaluate_instructions(session, "demo" if adapters else None, tasks)
    return scores[-1], answers


def spread(rows: list[tuple[Task, str, str]], count: int = 10) -> list[tuple[Task, str, str]]:
    """`count` rows of as many different fact families."""
    by_family = {row[0].family: row for row in rows}
    return list(by_family.values())[:: max(1, len(by_family) // count)][:count]


def shorten(text: str) -> str:
    """One line of at most 40 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:37] + "..."


if __name__ == "__main__":
    main()
