"""RECIPE and one flag per field of `TrainConfig`, for the commands that take a recipe."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from llama_adapter.errors import ConfigError
from llama_adapter.settings import BUNDLED
from llama_adapter.training.config import TrainConfig, load_recipe

USAGE = "llama-adapter {} [RECIPE] [--setting value ...]"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags default to nothing, so that the dataclass alone owns the defaults."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="YAML file with any of the settings below, or 'bundled'"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the result as JSON")
    hints = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        title = field.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title.lower())
        groups[title] = group
        _add_flag(group, field, hints[field.name])


def recipe_from(args: argparse.Namespace) -> TrainConfig:
    """The recipe with the given flags on top of it."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {key: value for key, value in vars(args).items() if key in names and value is not None}
    recipe = args.recipe
    for key in ("data", "val_data"):
        if words := given.get(key):
            given[key] = [name for group in words for name in group]
            last = words[-1][-1] if len(words[-1]) > 1 else ""
            if last.lower().endswith((".yaml", ".yml")):
                recipe = _only(recipe, given[key].pop())
            elif last == BUNDLED and recipe is None:
                raise ConfigError(
                    f"--{key.replace('_', '-')} ends in 'bundled', which may be data or the RECIPE: "
                    "put the RECIPE in front of all flags, or the data 'bundled' first."
                )
    return load_recipe(recipe, given)


def _only(recipe: str | None, other: str) -> str:
    """The RECIPE that stands behind the files of --data, where none stands elsewhere."""
    if recipe is not None:
        raise ConfigError(f"{other} is no data file, and the RECIPE is {recipe} already: leave one of them out.")
    return other


def _add_flag(group: Any, field: "dataclasses.Field[Any]", hint: Any) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].rstrip(".")
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kind = next(t for t in typing.get_args(hint) if t is not type(None)) if optional else hint
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    default: Any = field.metadata["stands_for"] if field.default is None else field.default
    if typing.get_origin(hint) is tuple:
        shown = " ".join(default)
        options: dict[str, Any] = {"action": "append", "metavar": field.name.upper()}
        if field.name in ("data", "val_data"):
            options["nargs"] = "+"  # what a shell makes of *.jsonl
    elif typing.get_origin(kind) is typing.Literal:
        shown, options = default, {"choices": typing.get_args(kind)}
    else:
        shown, options = default, {"metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    suffix = "" if shown in (None, "") else f" (default: {shown})"
    group.add_argument(flag, help=(text + suffix).replace("%", "%%"), **options)
