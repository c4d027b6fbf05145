"""`llama-adapter train-many`."""

import argparse
import dataclasses
from typing import Any

from llama_adapter.cli import output
from llama_adapter.cli.parser import add_command

EXAMPLES = """
llama-adapter train-many experts.yaml
llama-adapter train-many experts.yaml --resume
accelerate launch -m llama_adapter train-many experts.yaml
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = (
        "Train many adapters in one run on one base. RUNS names the base and what all share, and under 'runs' a recipe "
        "for each, with its own output_dir, data, seed, rate, K and L; the rows of all are mixed in each forward."
    )
    parser = add_command(commands, "train-many", run, description, EXAMPLES)
    parser.add_argument("runs", metavar="RUNS", help="YAML file: shared settings, and a list of recipes under 'runs'")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the results as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that have begun; the others start")
    parser.add_argument("--overwrite", action="store_true", help="delete the runs in the folders first")


def run(args: argparse.Namespace) -> None:
    """Train, then say where the adapters are."""
    from llama_adapter.training.many import load_runs, train_many
    from llama_adapter.training.processes import leave_processes

    results = train_many(load_runs(args.runs, args.resume, args.overwrite))
    if not leave_processes():
        return
    if args.as_json:
        found = {name: {**dataclasses.asdict(r), "output_dir": str(r.output_dir)} for name, r in results.items()}
        output.print_json(found)
        return
    width = max(len(name) for name in results)
    for name, result in results.items():
        loss = ""
        if result.base_val_loss is not None:
            loss = (
                f"validation loss {result.base_val_loss:.4f} -> {result.best_val_loss:.4f} at step {result.best_step}, "
            )
        print(f"{name:<{width}}  {loss}{result.steps} steps, adapter in {result.output_dir}")
