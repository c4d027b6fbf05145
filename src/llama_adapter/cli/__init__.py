"""The command line: thin. It parses, calls, prints; results go to stdout, everything else to stderr.

Importing this package reads neither torch nor transformers; commands import what they need when they run.
"""

import errno
import logging
import os
import sys
from collections.abc import Sequence

from llama_adapter import __version__
from llama_adapter.cli import chat, evaluate, generate, inspect, push, train, validate
from llama_adapter.cli.parser import Parser
from llama_adapter.errors import LlamaAdapterError

PLACES_THAT_REFUSE = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
}  # fmt: skip
EPILOG = """\
start with:
  llama-adapter train bundled --output-dir runs/first
  llama-adapter generate --adapter runs/first "What is the capital of France?"
"""


def build_parser() -> Parser:
    """The parser of `llama-adapter`; `args.run` is the chosen command."""
    parser = Parser(
        prog="llama-adapter",
        description="Fine-tune a frozen language model with zero-init attention (LLaMA-Adapter), and talk to it.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"llama-adapter {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for command in (train, validate, generate, chat, evaluate, inspect, push):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: a `LlamaAdapterError` becomes one sentence and its exit code, never a traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama_adapter").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what failed is said once, by us
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except LlamaAdapterError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("Stopped.", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in PLACES_THAT_REFUSE:
            raise
        _fail(f"{error.filename or 'A file'}: {error.strerror}. Free space, or choose another place.", 2)


def _fail(message: str, code: int) -> None:
    prefix = "Error: " if code == 2 else ""
    if prefix and sys.stderr.isatty():
        prefix = f"\033[1;31m{prefix}\033[0m"
    print(prefix + message, file=sys.stderr)
    sys.exit(code)
