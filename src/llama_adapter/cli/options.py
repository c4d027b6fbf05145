"""Options that `generate` and `chat` share."""

import argparse
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from llama_adapter.core.config import WrittenAs
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.settings import Precision, one_quantization, shown

if TYPE_CHECKING:
    from llama_adapter.conditions.config import Kind
    from llama_adapter.inference.session import Session, SessionPlan


def add_base_options(base: Any) -> None:
    """Which base, in how many bits, and its adapters."""
    base.add_argument(
        "-a", "--adapter", action="append", default=[], metavar="[NAME=]FOLDER",
        help="adapter, or OWNER/NAME[@REVISION] on the hub; repeatable",
    )  # fmt: skip
    base.add_argument(
        "-m", "--model", metavar="TEXT",
        help="folder, GGUF file, hub name or 'bundled' (default: the adapter's own base)",
    )  # fmt: skip
    base.add_argument(
        "--tower", action="append", default=[], metavar="python:FILE.py:FUNCTION",
        help="code that makes the tower of an adapter trained with it, which runs only if it is named here; repeatable",
    )  # fmt: skip
    base.add_argument("--template", choices=get_args(WrittenAs), help="prompt format (default: the adapter's own)")
    base.add_argument("--precision", choices=get_args(Precision), default="auto", help="of the base (default: auto)")
    base.add_argument("--load-in-4bit", action="store_true", help="quantise the base to NF4 with bitsandbytes")
    base.add_argument("--load-in-8bit", action="store_true", help="quantise the base to LLM.int8() with bitsandbytes")
    base.add_argument(
        "--base-precision", choices=("auto", "int8"), default="auto", help="int8: of the base's linears, with torchao"
    )


def add_session_options(
    parser: argparse.ArgumentParser, max_new_tokens: int = GenerateConfig.max_new_tokens, sampling: bool = True
) -> None:
    """Base, adapters, and how to decode; without `sampling` decoding is greedy."""
    add_base_options(parser.add_argument_group("base and adapters"))
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N",
        help="longest answer in tokens (default: %(default)s)",
    )  # fmt: skip
    if not sampling:
        return
    decoding.add_argument("--compile", action="store_true", help="compile the step: for long answers on a GPU")
    decoding.add_argument(
        "--temperature", type=float, default=GenerateConfig.temperature, metavar="X",
        help="0 always takes the likeliest token (default: %(default)s)",
    )  # fmt: skip
    decoding.add_argument(
        "--top-p", type=float, default=GenerateConfig.top_p, metavar="X",
        help="sample from the likeliest tokens of this total probability (default: %(default)s)",
    )  # fmt: skip
    decoding.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")


def add_skip_bad_records(parser: Any) -> None:
    """The flag of the commands that read records, as `train` has it."""
    parser.add_argument("--skip-bad-records", action="store_true", help="count unusable records instead of stopping")


def kinds_of(planned: "SessionPlan") -> "set[Kind]":
    """As what the conditions of a session's adapters look at files."""
    from llama_adapter.conditions.config import ConditionConfig

    conditions = [found.config.condition for found in planned.readings.values()]
    kinds = [condition.kind for condition in conditions if isinstance(condition, ConditionConfig)]
    return {kind for kind in kinds if kind != "image_bind"}  # of which no tower here computes features


def path_of(text: str) -> Path:
    """A path on the command line, in which ~ is the home folder, also behind --flag= where no shell sees it."""
    return Path(os.path.expanduser(text))


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Check these options before anything is loaded; one that was not given passes.

    Raises:
        ConfigError: one is below 1.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {shown(value)}; it must be at least 1.")


def decoding_from(args: argparse.Namespace) -> GenerateConfig:
    """The checked decoding settings."""
    return GenerateConfig(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.compile)


def plan(args: argparse.Namespace) -> "SessionPlan":
    """Check what the options name, but for the base's weights.

    Raises:
        LlamaAdapterError: see `plan_session`.
        ConfigError: a --tower that no adapter reads, or that is no code.
    """
    from llama_adapter.conditions.config import is_python
    from llama_adapter.inference.session import plan_session

    for tower in args.tower:
        if not is_python(tower):
            raise ConfigError(f"--tower {tower} is no python:FILE.py:FUNCTION: adapters find other towers themselves.")
    planned = plan_session(args.model, name_adapters(args.adapter), args.template, args.tower)
    towers = [getattr(found.config.condition, "tower", None) for found in planned.readings.values()]
    if args.tower and not any(map(is_python, towers)) and getattr(args, "adapter_dir", None) is None:
        raise ConfigError("--tower has no effect: no --adapter was trained with a tower that Python code makes.")
    return planned


def load(planned: "SessionPlan", args: argparse.Namespace) -> "Session":
    """Read the weights."""
    from llama_adapter.inference.session import default_device

    rounded = one_quantization(args.load_in_4bit, args.load_in_8bit, args.base_precision)
    return planned.load(default_device(), args.precision, rounded)


def read_stdin(invitation: str) -> str:
    """All of stdin; bytes that are not UTF-8 stay in it as Python hands them on, for `check_encodable` to name."""
    if sys.stdin.isatty():
        print(invitation, file=sys.stderr)
    keep_bytes(sys.stdin)
    return sys.stdin.read().removeprefix("\ufeff")


def keep_bytes(stream: Any) -> None:
    """Let a text stream hand on bytes that it cannot read, instead of raising in the middle of them."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="surrogateescape")


def report_skipped(sentences: Sequence[str]) -> None:
    """Say on stderr what was left out: how many, and the first five."""
    for sentence in sentences[:5]:
        print(f"skipped: {sentence}", file=sys.stderr)
    if sentences:
        print(f"{len(sentences)} skipped_records", file=sys.stderr)


def existing(files: Sequence[str], lookers: Collection[str], option: str = "--image") -> tuple[str, ...]:
    """The files of `option`, checked to be there, and somebody to look at them, before a model is loaded.

    Raises:
        ConfigError: no adapter looks at files.
        DataError: a file does not exist.
    """
    files = [os.path.expanduser(file) for file in files]
    if files and not lookers:  # whether the file is there does not matter then
        raise ConfigError(f"{option} needs an adapter that was trained with --condition: pass --adapter FOLDER.")
    for file in files:
        if not os.path.exists(file):
            raise DataError(f"{option} {file} does not exist: check the path.")
    return tuple(files)


def name_adapters(given: Sequence[str]) -> dict[str, str]:
    """`NAME=FOLDER`, or `FOLDER`, whose last part is then the name, with '-' for what a name may not have.

    Raises:
        ConfigError: two adapters of one name.
    """
    named: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or os.path.isdir(text):
            name, folder = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rstrip("/").rpartition("/")[2]), text
        if name in named:
            raise ConfigError(f"Two adapters are called '{name}': tell them apart with --adapter NAME=FOLDER.")
        named[name] = os.path.expanduser(folder)
    return named
