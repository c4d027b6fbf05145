"""`llama-adapter inspect`: what an adapter folder holds, without loading its base."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llama_adapter.cli.parser import add_command
from llama_adapter.errors import AdapterError

EXAMPLES = """
llama-adapter inspect runs/first
llama-adapter inspect runs/first --plot gates.png
llama-adapter inspect runs/first --json
"""
SHADES = " ░▒▓█"


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Show an adapter's parameters, bytes and how far its gates have opened."
    parser = add_command(commands, "inspect", run, description, EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="adapter folder, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write the layer-by-head picture of the gates there")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table, the JSON, or both and the picture."""
    from llama_adapter.formats.inspect import describe_adapter

    found = describe_adapter(args.folder)
    if args.plot is not None:
        from llama_adapter.training.plots import plot_gates

        if not found["layers"]:
            raise AdapterError(f"{args.folder} has no prompts, so there are no gates to plot: leave --plot out.")

        plot_gates({layer["layer"]: layer["gates"] for layer in found["layers"]}, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.as_json:
        print(json.dumps(found))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False)
    config = found["config"]
    console.print(found["folder"], style="bold", soft_wrap=True)
    console.print(
        f"base        {config['base_model_name_or_path']} ({config['base_shape']['model_type']})", soft_wrap=True
    )
    console.print(f"adapter     K={config['adapter_len']} prompts in the top L={config['adapter_layers']} layers")
    console.print(f"gate        {config['gate_activation']}; template {config['template']}")
    console.print(f"parameters  {found['parameters']:,}")
    if set(found["parts"]) != {"prompts", "gates"}:
        parts = ", ".join(f"{size:,} {kind}" for kind, size in found["parts"].items())
        console.print(f"parts       {parts}", soft_wrap=True)
    console.print(f"bytes       {found['bytes']:,}")
    if not found["layers"]:
        return
    table = Table("layer", "mean |act(g)|", "max |act(g)|", "prompt rms", "heads")
    widest = max((layer["max"] for layer in found["layers"]), default=0.0) or 1.0
    for layer in reversed(found["layers"]):
        shades = "".join(SHADES[min(4, round(4 * abs(gate) / widest))] for gate in layer["gates"])
        numbers = (f"{layer['mean']:.4f}", f"{layer['max']:.4f}", f"{layer['prompt_rms']:.3f}")
        table.add_row(str(layer["layer"]), *numbers, shades)
    console.print(table)
    console.print("heads: the darker, the wider open")
