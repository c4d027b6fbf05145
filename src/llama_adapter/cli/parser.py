"""argparse with the manners of this project: examples kept as written, no abbreviations, suggestions."""

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from llama_adapter.cli.output import on_one_line


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal; commands to copy, which are indented by two, stay on their line."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=34, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        commands = text.startswith(("examples:", "start with:"))
        return "".join(line if commands else _wrapped(line, width) for line in text.splitlines(keepends=True))


def _wrapped(line: str, width: int) -> str:
    hang = re.match(r"(  \S+ +)?", line)
    after = " " * len(hang[0]) if hang else ""
    return "\n".join(textwrap.wrap(line, max(width, 20), subsequent_indent=after)) + "\n" * line.endswith("\n")


def _places(parser: argparse.ArgumentParser) -> list[str]:
    """What the arguments are called that are told by their place."""
    return [str(action.metavar or action.dest) for action in parser._actions if not action.option_strings]


class Parser(argparse.ArgumentParser):
    """Refuses unknown flags with the nearest known one; exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown flag is reported by the command that got it."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser: Parser = getattr(parsed, "parser", self)
            places = _places(parser)
            if places and not unknown[0].startswith("-"):
                parser.error(f"'{unknown[0]}' is one too many: {parser.prog} takes {' and '.join(places)} and no more")
            known = [flag for action in parser._actions for flag in action.option_strings]
            if "--adapter" in known and not unknown[0].startswith("-"):
                parser.error(f"unknown argument '{unknown[0]}'; for an adapter write --adapter {unknown[0]}")
            hint = _likely(unknown[0].split("=")[0], known) or f"see {parser.prog} --help"
            parser.error(f"unknown argument '{unknown[0]}'; {hint}")
        return parsed

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)  # argparse's own says nothing of a full disk

    def error(self, message: str) -> NoReturn:
        """One sentence on stderr, exit code 2."""
        if wrong := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL):
            from llama_adapter.settings import unknown_name  # reads much that help does without

            what = wrong[1] if wrong[1].startswith("-") else wrong[1].lower()
            message = unknown_name(what, wrong[2], re.findall(r"[\w.-]+", wrong[3]))
        message = message if len(message) < 500 else f"{message[:250]} ... {message[-100:]}"
        print(f"Error: {on_one_line(message)} (usage: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _likely(flag: str, known: Sequence[str]) -> str:
    """Which of the known flags may be meant; nothing where none is like it."""
    from llama_adapter.settings import likeliest  # reads much that help does without

    keys = {one.lstrip("-").replace("-", "_"): one for one in known if one.startswith("--")}
    found = likeliest(flag.lstrip("-").replace("-", "_"), keys)
    return f"did you mean {keys[found]}?" if found else ""


def add_command(
    commands: Any, name: str, run: Any, description: str, examples: str, usage: str | None = None
) -> Parser:
    """A subcommand whose help ends with examples; `run` takes the parsed arguments."""
    text = "examples:\n" + "".join(f"  {line}\n" for line in examples.strip().splitlines())
    parser: Parser = commands.add_parser(
        name, help=description.split(". ")[0].rstrip("."), description=description, epilog=text, usage=usage
    )
    parser.set_defaults(run=run, parser=parser)
    return parser
