"""How settings are checked: one place reads the rules of their annotations, and says each broken one in a sentence."""

import dataclasses
import difflib
import functools
import itertools
import os
import reprlib
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

from llama_adapter.errors import ConfigError

ConfigType = typing.TypeVar("ConfigType")


class _Expanded:
    """Tells pydantic, which is not read before a setting is made, what a path is."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(expanded, handler(source))


def expanded(path: str) -> str:
    """The path with the home folder for ~.

    Raises:
        ValueError: it holds a zero, which no path may.
    """
    if "\0" in path:
        raise ValueError("a path without the character 0")
    return os.path.expanduser(path)


BUNDLED = "bundled"
"""Name of the base, the data and the recipe that ship with this package, in place of a path."""
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
"""Where those are."""
BUNDLED_LR = 0.12
"""The learning rate of the bundled recipe, for a base of 3M parameters; the paper's is for 7B."""
ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "micro_batch_size",
    "model_name_or_path": "model", "model_name": "model", "base_model": "model", "base": "model",
    "train_data": "data", "train_file": "data", "dataset_name": "data",
    "eval_data": "val_data", "eval_file": "val_data", "val_file": "val_data", "validation_file": "val_data",
    "out": "output_dir", "cutoff_len": "max_length", "eval_steps": "eval_every", "save_steps": "save_every",
    "report_to": "trackers", "torch_dtype": "precision", "dtype": "precision", "num_layers": "adapter_layers",
    "K": "adapter_len", "L": "adapter_layers", "num_virtual_tokens": "adapter_len", "prompt_len": "adapter_len",
    "r": "lora_rank", "target_modules": "lora_targets", "gradient_accumulation_steps": "batch_size",
    "dataset_path": "data", "bf16": "precision", "fp16": "precision",
}  # fmt: skip
"""What other trainers, and papers, call a setting that has no like name here, or where the likest is another."""
Precision = typing.Literal["auto", "bf16", "fp32"]
Quantization = typing.Literal["4bit", "8bit", "int8"]
"""How a base's linears are rounded while they are loaded: bitsandbytes' NF4 or LLM.int8(), torchao's int8 weights."""
Count = Annotated[int, Ge(1), Lt(2**31)]
CountOrZero = Annotated[int, Ge(0), Lt(2**31)]
Positive = Annotated[float, Gt(0), Lt(10**12)]
NotNegative = Annotated[float, Ge(0), Lt(10**12)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What every library takes as a seed."""
Place = Annotated[str, _Expanded()]
"""A path, in which ~ is the home folder."""
Sound = Callable[..., bool]
"""Whether the fields of these names follow the rules of their annotations."""

MOST = 20
"""Broken rules of annotations that one message names: a list may break one in every item."""

_WORDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt}",
    "literal_error": "one of {expected}",
    "value_error": "{error}",
    "tuple_type": "a list",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def check(config: Any, between: Callable[[Sound], Iterator[str]] | None = None) -> None:
    """Hold a new frozen dataclass against its annotations, strictly: neither "10" nor True is a number.

    Args:
        config: the instance; where annotations say so, lists and a single text become tuples, whole numbers floats.
        between: yields a sentence for each broken rule that an annotation cannot say.

    Raises:
        ConfigError: naming every broken rule.
    """
    from pydantic import ValidationError  # slow to import, so not before a setting is made

    cls: Any = type(config)
    values = {name: getattr(config, name) for name in _hints(cls)}
    for name, hint in _hints(cls).items():
        if typing.get_origin(hint) is tuple and isinstance(values[name], list | str):
            values[name] = (values[name],) if isinstance(values[name], str) else tuple(values[name])
    broken: set[Any] = set()
    sentences: list[str] = []
    try:
        values = dict(vars(_rules(cls)(**values)))
    except ValidationError as error:
        for found in error.errors(include_url=False):
            broken.add(found["loc"][0])
            if len(sentences) < MOST and found["loc"][-1:] != ("str",):  # of an "int | str" the first one says enough
                sentences.append(_sentence(found))
    for name, value in values.items():
        object.__setattr__(config, name, value)
    if between:
        sentences += between(lambda *names: broken.isdisjoint(names))
    if sentences:
        raise ConfigError("; ".join(sentences))


def parse(cls: type[ConfigType], values: Mapping[Any, Any], source: str, *, text: bool = False) -> ConfigType:
    """Build a config from outside values.

    Args:
        cls: what to build.
        values: its fields by name.
        source: where they come from.
        text: read numbers and switches that are given as text, as flags are, and 3e-4 is in YAML.

    Raises:
        ConfigError: naming `source`, every offending key, its value and the rule.
    """
    hints, fields = _hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    wrong = unknown_keys(values, hints)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    wrong += [f"{name} is missing: give one" for name in needed if name not in values]
    if wrong:
        raise ConfigError("; ".join(f"{source}: {sentence}" for sentence in wrong))
    try:
        return cls(**({key: _read(hints[key], value) for key, value in values.items()} if text else values))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def unknown_keys(values: Iterable[object], known: Collection[str]) -> list[str]:
    """A sentence for each key that is not among the known ones; of the first three."""
    unknown = itertools.islice((key for key in values if key not in known), 3)
    return unknown_names("key", [shown(key).strip("'") for key in unknown], known)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence for a name that is not among the known ones, with the likeliest correction."""
    return "; ".join(unknown_names(kind, [name], known))


def unknown_names(kind: str, names: Iterable[object], known: Iterable[str]) -> list[str]:
    """The same for each of several, where the known ones are listed once."""
    choices = list(known)
    close = {str(name): likeliest(str(name), choices) for name in names}
    likely = [f"unknown {kind} '{name}'; did you mean '{found}'?" for name, found in close.items() if found]
    if strange := [f"unknown {kind} '{name}'" for name, found in close.items() if not found]:
        likely.append(f"{', '.join(strange)}; known: {', '.join(choices)}.")
    return likely


def likeliest(name: str, known: Collection[str]) -> str | None:
    """The known name that is meant by another: what `ELSEWHERE` says, or the one that is spelt most alike."""
    if (meant := ELSEWHERE.get(name)) in known:
        return meant
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def one_quantization(load_in_4bit: bool, load_in_8bit: bool, base_precision: str) -> Quantization | None:
    """What these settings ask for when the base is loaded; FP8 comes after.

    Raises:
        ConfigError: several at once.
    """
    asked = {
        f"base_precision {base_precision}": base_precision != "auto",
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
    }
    given = [name for name, wanted in asked.items() if wanted]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: pass one of them")
    if load_in_4bit or load_in_8bit:
        return "4bit" if load_in_4bit else "8bit"
    return "int8" if base_precision == "int8" else None


def shown(value: object) -> str:
    """A value from outside as an error message may show it: on one line, and never a megabyte of it."""
    try:
        return _short.repr(value)
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "a number of thousands of digits"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _rules(cls: type) -> Any:
    from pydantic import ConfigDict, create_model

    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in hints.items()}
    return create_model(cls.__name__, __config__=config, **fields)


def _read(hint: Any, value: Any) -> Any:
    """What `value` says where it is text; what cannot be read stays, for `check` to name."""
    from pydantic import TypeAdapter, ValidationError

    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        return [_read(typing.get_args(hint)[0], item) for item in items] if isinstance(items, list | tuple) else value
    if not isinstance(value, str):
        return value
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError:
        return value


def _sentence(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "int")  # which names a member of a union
    rule = _WORDS.get(error["type"], error["msg"].removeprefix("Input should be ").lower())
    limits = {
        key: str(value).replace("'", "").replace(" or ", ", ") if key == "expected" else value
        for key, value in error.get("ctx", {}).items()
    }
    return f"{where} is {shown(error['input'])}; it must be {rule.format(**limits)}"
