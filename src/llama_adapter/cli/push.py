"""`llama-adapter push`: an adapter to the hub."""

import argparse
from typing import Any

from llama_adapter.cli.parser import add_command

EXAMPLES = """
llama-adapter push runs/first my-name/first
llama-adapter push runs/first my-name/first --public --revision v2
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    description = (
        "Push an adapter to the hub. Its two files and its card go up, nothing else; log in with 'hf auth login' first."
    )
    parser = add_command(commands, "push", run, description, EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="adapter folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository; made, private, where there is none")
    parser.add_argument("--public", action="store_true", help="everybody may see it")
    parser.add_argument("--revision", metavar="BRANCH", help="branch (default: main)")
    parser.add_argument("--commit-message", metavar="TEXT", default="Upload adapter with llama-adapter")


def run(args: argparse.Namespace) -> None:
    """Push, then print where it is."""
    from llama_adapter.formats.push import push_adapter

    options = {"private": not args.public, "revision": args.revision, "commit_message": args.commit_message}
    print(push_adapter(args.folder, args.repository, **options))
