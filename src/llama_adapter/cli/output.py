"""What commands print: JSON and tables that fit the output's encoding, commands that can be copied."""

import json
import os
import shlex
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SHADES, PLAIN_SHADES = " ░▒▓█", " .:*#"


def prepare_streams() -> None:
    """Standard streams that exist, and that write what their encoding lacks as \\u escapes instead of failing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us, as in >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def is_narrow(stream: Any) -> bool:
    """Whether its encoding lacks letters that others have."""
    return not (getattr(stream, "encoding", None) or "ascii").lower().startswith("utf")


def print_json(value: Any) -> None:
    """One line of JSON on stdout, in ASCII where its encoding is narrow."""
    print(json.dumps(value, ensure_ascii=is_narrow(sys.stdout)), flush=True)


def console() -> "Console":
    """rich's, for stdout: as wide as the terminal, and wide enough for any table where there is none."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return Console(file=sys.stdout, highlight=False, markup=False, width=width)


def colours(stream: Any) -> bool:
    """Whether it is a terminal that takes colours, and nobody asked for none."""
    return bool(stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def on_one_line(text: str) -> str:
    """The text with escapes for what moves a terminal's cursor or cannot be seen: names from files may hold it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def copyable(*words: object) -> str:
    """A command line of these words, quoted as a shell needs them."""
    return shlex.join([str(word) for word in words])
