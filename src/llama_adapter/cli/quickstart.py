"""`llama-adapter quickstart`: the recipe and the command that fit somebody's data and base."""

import argparse
import dataclasses
import json
import shlex
import sys
from typing import Any

from llama_adapter.cli.parser import add_command
from llama_adapter.settings import BUNDLED

EXAMPLES = """
llama-adapter quickstart mine.jsonl --model ./Llama-2-7b-hf
llama-adapter quickstart mine.jsonl --model ./Llama-2-7b-hf --output recipe.yaml
llama-adapter quickstart mine.jsonl --json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Look at your data and print a recipe that fits, with reasons. No weights are read."
    parser = add_command(commands, "quickstart", run, description, EXAMPLES)
    parser.add_argument("data", metavar="FILE", help="your data, as train --data takes them")
    parser.add_argument(
        "-m", "--model", default=BUNDLED, metavar="TEXT", help="folder, hub name or 'bundled' (default: bundled)"
    )
    parser.add_argument("-o", "--output", metavar="YAML", help="write the recipe there")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Print facts, recipe and command on stdout, warnings on stderr."""
    from llama_adapter.training.quickstart import look_at

    result = look_at(args.data, args.model)
    command = _command(result.recipe, args.output)
    if args.output is not None:
        result.write(args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    for sentence in result.warnings:
        print(f"warning: {sentence}", file=sys.stderr)
    if args.as_json:
        print(json.dumps({**dataclasses.asdict(result), "command": command}))
        return
    for line in _facts(result.found):
        print(line)
    print("\nrecipe")
    for key, value in result.recipe.items():
        shown = " ".join(value) if isinstance(value, list) else value
        print(f"  {key + ':':<18} {shown!s:<10}" + (f"  {result.reasons[key]}" if key in result.reasons else ""))
    print(f"\n{command}")


def _facts(found: dict[str, Any]) -> list[str]:
    lengths = ", ".join(f"{key[1:]} % up to {value:,}" for key, value in found["tokens"].items())
    gib = {key: f"{found[key] / 2**30:.2f} GiB" for key in found if "bytes" in key}
    minutes = found["estimated_seconds"] / 60
    return [
        f"records     {found['usable_records']:,} of {found['records']:,} usable: {found['format']}",
        f"tokens      {lengths}; {found['truncated_share']:.1%} truncated at max_length",
        f"base        {found['parameters']:,} parameters, context {found['context'] or 'not said'}",
        f"memory      {gib['weights_bytes']} weights ({gib['weights_bytes_4bit']} in 4 bits) and about "
        f"{gib['activations_bytes']} for a micro-batch, on {found['device']}",
        f"time        about {minutes:,.1f} minutes for {found['steps']:,} steps: estimated from parameters, tokens and "
        "the measured speed of a matrix product",
    ]


def _command(recipe: dict[str, Any], file: str | None) -> str:
    if file is not None:
        return f"llama-adapter train {shlex.quote(file)}"
    words = []
    for key, value in recipe.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        else:
            words += [word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))]
    return f"llama-adapter train {shlex.join(words)}"
