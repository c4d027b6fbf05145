"""How settings are checked: every broken rule is collected, and outside values are read with a sentence for each."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from llama_adapter.errors import ConfigError

ConfigType = typing.TypeVar("ConfigType")

BUNDLED = "bundled"
"""Name of the base, the data and the recipe that ship with this package, in place of a path."""
Precision = typing.Literal["auto", "bf16", "fp32"]


class Problems:
    """Collects every broken rule, so that one run of a command reports them all."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def require(self, name: str, holds: bool, sentence: str) -> None:
        """`name` `sentence` is a problem unless it `holds`."""
        if not holds:
            self.found.append(f"{name} {sentence}")

    def at_least(self, name: str, value: float | None, least: float) -> None:
        """A finite number from `least` on; None passes."""
        self.require(name, value is None or value >= least, f"is {value}; it must be at least {least}")
        self._finite(name, value)

    def above_zero(self, name: str, value: float | None) -> None:
        """A finite number above 0; None passes."""
        self.require(name, value is None or value > 0, f"is {value}; it must be above 0")
        self._finite(name, value)

    def seed(self, value: int | None) -> None:
        """A seed that every library takes."""
        self.require("seed", value is None or 0 <= value < 2**32, f"is {value}; it must be at least 0 and below 2^32")

    def _finite(self, name: str, value: float | None) -> None:
        self.require(name, value is None or value != math.inf, f"is {value}; it must be a finite number")

    def one_of(self, name: str, value: Any, choices: Any) -> None:
        """One of a Literal's values; None passes."""
        allowed = typing.get_args(choices)
        self.require(name, value is None or value in allowed, f"is {value!r}; it must be one of {', '.join(allowed)}")

    def raise_if_any(self) -> None:
        """Raise all of them in one ConfigError."""
        if self.found:
            raise ConfigError("; ".join(self.found))


def parse(cls: type[ConfigType], values: Mapping[str, Any], source: str) -> ConfigType:
    """Build a config from outside values: numbers given as text are read, unknown keys refused.

    Raises:
        ConfigError: naming `source`, every offending key, its value and the rule.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, so not before a command needs it

    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError("; ".join(f"{source}: {unknown_name('key', key, known)}" for key in unknown))
    cleaned = {key: _as_tuple(cls, key, value) for key, value in values.items()}
    try:
        return TypeAdapter(cls).validate_python(cleaned)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(map(_sentence, error.errors()))) from None


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence for a name that is not among the known ones, with the likeliest correction."""
    choices = list(known)
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(choices)}."
    return f"unknown {kind} '{name}'; {hint}"


def _as_tuple(cls: type, key: str, value: Any) -> Any:
    is_list = typing.get_origin(typing.get_type_hints(cls)[key]) is tuple
    return (value,) if is_list and isinstance(value, str) else value


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{'.'.join(map(str, error['loc']))} is {error['input']!r}: {error['msg'].lower()}"
