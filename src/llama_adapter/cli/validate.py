"""`llama-adapter validate`."""

import argparse
from typing import Any

from llama_adapter.cli import output
from llama_adapter.cli.parser import add_command
from llama_adapter.cli.recipe import USAGE, add_recipe_arguments, recipe_from

EXAMPLES = """
llama-adapter validate recipes/alpaca-7b.yaml
llama-adapter validate --data mine.jsonl --max-length 256 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Check a recipe and its data without loading the base's weights."
    add_recipe_arguments(add_command(commands, "validate", run, description, EXAMPLES, USAGE.format("validate")))


def run(args: argparse.Namespace) -> None:
    """Print what a run would be."""
    config = recipe_from(args)
    from llama_adapter.training.plan import plan_run

    report = plan_run(config)
    if args.as_json:
        output.print_json(report)
        return
    del report["notes"]  # they were said on the way, as `train` says them
    width = max(map(len, report))
    for key, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else ", ".join(value) if isinstance(value, list) else value
        print(f"{key.replace('_', ' '):<{width}}  {shown}")
    print("valid")
