"""Options that `generate` and `chat` share."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from llama_adapter.core.config import WrittenAs
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.settings import Precision, one_quantization

if TYPE_CHECKING:
    from llama_adapter.inference.session import Session


def add_session_options(
    parser: argparse.ArgumentParser, max_new_tokens: int = GenerateConfig.max_new_tokens, sampling: bool = True
) -> None:
    """Base, adapters, and how to decode; without `sampling` decoding is greedy."""
    base = parser.add_argument_group("base and adapters")
    base.add_argument(
        "-a", "--adapter", action="append", default=[], metavar="[NAME=]FOLDER",
        help="adapter, or OWNER/NAME[@REVISION] on the hub; repeatable",
    )  # fmt: skip
    base.add_argument(
        "-m", "--model", metavar="TEXT",
        help="folder, GGUF file, hub name or 'bundled' (default: the adapter's own base)",
    )  # fmt: skip
    base.add_argument("--template", choices=get_args(WrittenAs), help="prompt format (default: the adapter's own)")
    base.add_argument("--precision", choices=get_args(Precision), default="auto", help="of the base (default: auto)")
    base.add_argument("--load-in-4bit", action="store_true", help="quantise the base to NF4 with bitsandbytes")
    base.add_argument("--load-in-8bit", action="store_true", help="quantise the base to LLM.int8() with bitsandbytes")
    base.add_argument(
        "--base-precision", choices=("auto", "int8"), default="auto", help="int8: of the base's linears, with torchao"
    )
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


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Check these options before anything is loaded; one that was not given passes.

    Raises:
        ConfigError: one is below 1.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


def decoding_from(args: argparse.Namespace) -> GenerateConfig:
    """The checked decoding settings."""
    return GenerateConfig(args.max_new_tokens, args.temperature, args.top_p, args.seed, args.compile)


def open_session(args: argparse.Namespace) -> "Session":
    """Load what the options name."""
    from llama_adapter.inference.session import default_device, load_session

    rounded = one_quantization(args.load_in_4bit, args.load_in_8bit, args.base_precision)
    return load_session(
        args.model, name_adapters(args.adapter), default_device(), args.precision, rounded, args.template
    )


def existing(files: Sequence[str], adapters: Sequence[str]) -> tuple[str, ...]:
    """The files of --image, checked to be there, and somebody to look at them, before a model is loaded.

    Raises:
        ConfigError: no adapter is given.
        DataError: a file does not exist.
    """
    if files and not adapters:
        raise ConfigError("--image needs an adapter that was trained with --condition: pass --adapter FOLDER.")
    for file in files:
        if not os.path.exists(file):
            raise DataError(f"--image {file} does not exist: check the path.")
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
        named[name] = folder
    return named
