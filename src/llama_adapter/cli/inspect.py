"""`llama-adapter inspect`: what an adapter folder holds, without loading its base."""

import argparse
import os
import sys
from typing import Any

from llama_adapter.cli import output
from llama_adapter.cli.options import path_of
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import AdapterError

EXAMPLES = """
llama-adapter inspect runs/first
llama-adapter inspect runs/first --plot gates.png
llama-adapter inspect runs/first --json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Show an adapter's parameters, bytes and how far its gates have opened."
    parser = add_command(commands, "inspect", run, description, EXAMPLES)
    parser.add_argument(
        "folder",
        metavar="ADAPTER",
        help="adapter folder, OWNER/NAME[@REVISION] on the hub, or a file of the authors, PEFT, LitGPT",
    )
    parser.add_argument(
        "--plot", type=path_of, metavar="PNG", help="write the layer-by-head picture of the gates there"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table, the JSON, or both and the picture."""
    from llama_adapter.formats.inspect import describe_adapter

    found = describe_adapter(os.path.expanduser(args.folder))
    if args.plot is not None:
        from llama_adapter.training.plots import plot_gates

        if not found["layers"]:
            raise AdapterError(f"{args.folder} has no prompts, so there are no gates to plot: leave --plot out.")

        plot_gates({layer["layer"]: layer["gates"] for layer in found["layers"]}, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.as_json:
        output.print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    console, dark = output.console(), output.PLAIN_SHADES if output.is_narrow(sys.stdout) else output.SHADES
    config = found["config"]
    console.print(found["folder"], style="bold", soft_wrap=True)
    console.print(
        f"base        {config['base_model_name_or_path']} ({config['base_shape'].get('model_type', 'unknown')})",
        soft_wrap=True,
    )
    if config["adapter_layers"]:
        console.print(f"adapter     K={config['adapter_len']} prompts in the top L={config['adapter_layers']} layers")
        console.print(f"gate        {config['gate_activation']}; template {config['template']}")
    else:
        console.print(f"adapter     no prompts and no gates; template {config['template']}")
    if found["format"] != "llama-adapter":
        console.print(f"format      {found['format']}")
    for note in found["notes"]:
        console.print(f"note        {note}", soft_wrap=True)
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
        shades = "".join(dark[min(4, round(4 * abs(gate) / widest))] for gate in layer["gates"])
        rms = "condition" if layer["prompt_rms"] is None else f"{layer['prompt_rms']:.3f}"
        numbers = (f"{layer['mean']:.4f}", f"{layer['max']:.4f}", rms)
        table.add_row(str(layer["layer"]), *numbers, shades)
    console.print(table)
    console.print("heads: the darker, the wider open")
