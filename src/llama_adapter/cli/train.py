"""`llama-adapter train`."""

import argparse
import dataclasses
import sys
from typing import Any

from llama_adapter.cli import output
from llama_adapter.cli.parser import add_command
from llama_adapter.cli.recipe import USAGE, add_recipe_arguments, recipe_from
from llama_adapter.conditions.config import is_python

EXAMPLES = """
llama-adapter train bundled --output-dir runs/first
llama-adapter train recipes/alpaca-7b.yaml --model ./Llama-2-7b-hf --data alpaca_data.json
llama-adapter train --output-dir runs/first --resume
llama-adapter train --output-dir runs/first --resume --epochs 8
llama-adapter train --streaming --max-steps 20000 --data "shards/*.jsonl.gz" --val-size 500
llama-adapter train --init-from runs/first --data more.jsonl --output-dir runs/more
llama-adapter train --model BASE --data llava.json --condition image --tower python:encoder.py:factory
llama-adapter train --method dpo --beta 0.1 --data pairs.jsonl --init-from runs/first --output-dir runs/preferred
accelerate launch -m llama_adapter train recipes/alpaca-7b.yaml
accelerate launch --use_fsdp --num_processes 8 -m llama_adapter train recipes/alpaca-70b.yaml
torchrun --nproc_per_node 4 -m llama_adapter train recipes/alpaca-70b.yaml --tensor-parallel
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Train an adapter. Settings come from a RECIPE, from flags, or both; flags win."
    add_recipe_arguments(add_command(commands, "train", run, description, EXAMPLES, USAGE.format("train")))


def run(args: argparse.Namespace) -> None:
    """Train, then say where the adapter is."""
    config = recipe_from(args)
    from llama_adapter.training.loop import train
    from llama_adapter.training.processes import leave_processes

    result = train(config)
    if not leave_processes():
        return
    if args.as_json:
        output.print_json({**dataclasses.asdict(result), "output_dir": str(result.output_dir)})
        return
    if result.base_val_loss is not None:
        print(f"validation loss {result.base_val_loss:.4f} -> {result.best_val_loss:.4f} at step {result.best_step}")
    print(f"adapter in {result.output_dir}, with loss.png and gates.png")
    print(
        "ask it:",
        output.copyable("llama-adapter", "generate", "--adapter", result.output_dir, *tower_flag(config.tower)),
        '"..."',
        file=sys.stderr,
    )


def tower_flag(tower: str | None) -> list[str]:
    """What an answer needs beside the adapter: a tower that is code runs only where it is named."""
    return ["--tower", str(tower)] if is_python(tower) else []
