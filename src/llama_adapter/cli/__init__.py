"""The command line: thin. It parses, calls, prints; results go to stdout, everything else to stderr.

Importing this package reads neither torch nor transformers; commands import what they need when they run.
"""

import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType

from llama_adapter import __version__
from llama_adapter.cli.output import colours, on_one_line, prepare_streams
from llama_adapter.cli.parser import Parser
from llama_adapter.errors import ConfigError, LlamaAdapterError

COMMANDS = (
    "demo",
    "quickstart",
    "train",
    "train-many",
    "validate",
    "generate",
    "chat",
    "serve",
    "evaluate",
    "inspect",
    "convert",
    "push",
)
"""Each is a module of this package, with `_` for `-`."""
PLACES_THAT_REFUSE = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
}  # fmt: skip
EPILOG = """\
start with:
  llama-adapter demo
  llama-adapter quickstart mine.jsonl
  llama-adapter train bundled --output-dir runs/first
  llama-adapter generate --adapter runs/first "What is the capital of France?"
"""


def build_parser(words: Sequence[str] = ()) -> Parser:
    """The parser of `llama-adapter`; `args.run` is the chosen command.

    Where `words` begin with a command, it knows that one alone: the modules of the others are not even read.
    """
    parser = Parser(
        prog="llama-adapter",
        description="Fine-tune a frozen language model with zero-init attention (LLaMA-Adapter), and talk to it.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"llama-adapter {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name in words[:1] if words and words[0] in COMMANDS else COMMANDS:
        import_module(f"llama_adapter.cli.{name.replace('-', '_')}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: a `LlamaAdapterError` becomes one sentence and its exit code, never a traceback."""
    prepare_streams()
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama_adapter").setLevel(logging.INFO)
    for library in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, wanted or not, and it complains
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries; what failed is said once, by us
    try:
        try:
            words = sys.argv[1:] if argv is None else argv
            _check_words(words)
            args = build_parser(words).parse_args(words)
            with _interruptible():
                args.run(args)
        finally:
            sys.stdout.flush()  # here, where what the reader or the disk says can still be caught
    except LlamaAdapterError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("Stopped.", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        _drop_output()
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", text):
            raise
        _fail(f"There is not enough memory ({text[:200].rstrip('.')}): take smaller settings or files.", 2)
    except OSError as error:
        if error.errno not in PLACES_THAT_REFUSE:
            raise
        if error.filename is None:
            _drop_output()
        from llama_adapter.files import way_out  # reads what help does without

        _fail(f"{error.filename or 'The output'}: {error.strerror}: {way_out(error)}.", 2)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt also where packages that are being read make an error of it, or we do."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except (ImportError, LlamaAdapterError) as error:
        if seen and _comes_of_reading(error):
            raise KeyboardInterrupt from None
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _comes_of_reading(error: BaseException | None) -> bool:
    """Whether an interruption, or an import that failed, lies behind an error."""
    while error is not None and not isinstance(error, ImportError | KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _check_words(words: Sequence[str]) -> None:
    """Python's own callers can pass half a surrogate pair, which is neither text nor a path."""
    for word in words:
        try:
            os.fsencode(word)
        except UnicodeEncodeError:
            raise ConfigError(f"The argument {ascii(word)[:80]} has half a character: write the other half.") from None


def _drop_output() -> None:
    """What is left in stdout's buffer goes nowhere, so that the interpreter does not stumble over it at its end."""
    with suppress(OSError, ValueError):  # a stream without a file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    prefix = "Error: " if code == 2 else ""
    if prefix and colours(sys.stderr):
        prefix = f"\033[1;31m{prefix}\033[0m"
    print(prefix + on_one_line(message), file=sys.stderr)
    sys.exit(code)
