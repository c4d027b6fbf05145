"""`llama-adapter convert`: adapters of the authors, PEFT and LitGPT to ours, and back."""

import argparse
import json
from typing import Any, get_args

from llama_adapter.cli import options
from llama_adapter.cli.parser import add_command
from llama_adapter.core.config import GateActivation

EXAMPLES = """
llama-adapter convert llama_adapter_len10_layer30_release.pth --output adapters/alpaca
llama-adapter convert adapters/peft --output adapters/ours --verify
llama-adapter convert BIAS-7B.pth --output adapters/v2 --base Llama-2-7b-hf --verify
llama-adapter convert adapters/v2 --to official --output adapters/theirs
"""
LISTED = 8
"""Left-over names that are shown; --json has all."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = "Convert an adapter of the authors, PEFT or LitGPT to ours, or ours to theirs."
    parser = add_command(commands, "convert", run, description, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="file, folder or hub name; its format is told by its content")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="new folder for the converted adapter")
    parser.add_argument("--to", choices=("peft", "official", "litgpt"), help="format to write (default: ours)")
    parser.add_argument(
        "--base", "-m", "--model", metavar="BASE", help="base of the adapter: checked, named in what is written"
    )
    parser.add_argument(
        "--gate-activation", choices=get_args(GateActivation),
        help="how the gates of an authors' V1 file are meant, which it does not say (default: tanh for training "
        "checkpoints, identity for the release's layout)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-len", type=int, metavar="K", help="prompts of a layer, where the file does not say (default: 10)"
    )
    parser.add_argument(
        "--block-heads", type=int, metavar="N", help="attention heads of a V2 projector's blocks (default: 16)"
    )
    parser.add_argument("--verify", action="store_true", help="read it back and compare, with --base the logits too")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the account as JSON")


def run(args: argparse.Namespace) -> None:
    """Convert, and print the account."""
    options.at_least_one(args, "adapter_len", "block_heads")
    from llama_adapter.formats.convert import convert
    from llama_adapter.formats.stored import Hints

    hints = Hints(gate_activation=args.gate_activation, adapter_len=args.adapter_len, block_heads=args.block_heads)
    account = convert(args.source, args.output, to=args.to, base=args.base, hints=hints, verify=args.verify)
    if args.as_json:
        print(json.dumps(account))
        return
    left = account["left_over"]
    more = f", ... ({len(left) - LISTED} more; --json has all)" if len(left) > LISTED else ""
    print(f"source      {account['source']}: {account['kind']}")
    print(f"output      {account['output']}: {', '.join(account['files'])}")
    print(f"read        {account['read']} tensors")
    print(f"mapped      {account['mapped']} tensors of ours")
    print(f"left over   {len(left)}{': ' if left else ''}{', '.join(left[:LISTED])}{more}")
    print(f"parameters  {account['parameters']:,}")
    print(f"digest      {account['digest']}")
    for note in account["notes"]:
        print(f"note        {note}")
    if "verified" in account:
        print("verified    " + ", ".join(f"{what} differ by {apart:g}" for what, apart in account["verified"].items()))
