"""Every setting with its default, its meaning and its rule. Nothing here imports torch.

`AdapterConfig` describes an adapter and is stored beside its weights. `TrainConfig` is a training recipe: each field
is a key of the YAML file and a flag of `llama-adapter train`, and its help text stands here.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_adapter.errors import ConfigError

BUNDLED = "bundled"
"""Name of the base, the data and the recipe that ship with this package, in place of a path."""
FORMAT_VERSION = 1
GateActivation = Literal["tanh", "identity"]
Template = Literal["alpaca", "chat"]
WrittenAs = Literal["alpaca", "chat", "raw"]
"""A template, or "raw": prompt-completion text that was trained without any."""
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is; written to `adapter_config.json`.

    Attributes:
        adapter_len: K, prompt vectors per adapted layer (>= 1). The paper uses 10.
        adapter_layers: L, how many of the top layers are adapted (>= 1). None stands for all but the lowest two,
            which is the paper's 30 of 32; `add_adapter` puts the number in its place.
        gate_activation: "tanh" (the authors' training code) or "identity" (their first release, PEFT, LitGPT).
        template: how prompts were written in training, so that generation writes them alike: "alpaca", "chat"
            (the tokenizer's own chat template), "raw" (as they are), or None where nobody said.
        base_model_name_or_path: the base the adapter was made for, as it was named.
        base_shape: that base's dimensions; an adapter is refused on a base of another shape.
        format_version: version of the files on disk.

    Raises:
        ConfigError: a value breaks its rule.
    """

    adapter_len: int = 10
    adapter_layers: int | None = None
    gate_activation: GateActivation = "tanh"
    template: WrittenAs | None = None
    base_model_name_or_path: str | None = None
    base_shape: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.at_least("adapter_len", self.adapter_len, 1)
        problems.at_least("adapter_layers", self.adapter_layers, 1)
        problems.one_of("gate_activation", self.gate_activation, GateActivation)
        problems.one_of("template", self.template, WrittenAs)
        problems.raise_if_any()

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdapterConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key, a wrong type, or files of a newer format version.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {version!r}, and this llama-adapter reads versions up to {FORMAT_VERSION}: "
                "upgrade with pip install -U llama-adapter."
            )
        return parse(cls, values, "adapter_config.json")


def setting(default: Any, text: str, group: str) -> Any:
    """A `TrainConfig` field: its default, and the help text and heading under which the command line shows it."""
    return field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; the defaults are the paper's (its section 4.1) where it gives any."""

    model: str = setting("bundled", "Base model: a folder, a hub name, or 'bundled'.", "Model and data")
    data: tuple[str, ...] = setting(
        ("bundled",),
        "Training data: .json or .jsonl files, hub names, or 'bundled'. Repeatable.",
        "Model and data",
    )
    val_data: tuple[str, ...] = setting((), "Validation data; else a part of --data is held out.", "Model and data")
    val_size: float = setting(
        0.02, "Validation part of --data: a fraction below 1, or a number of records.", "Model and data"
    )
    output_dir: str = setting("runs/adapter", "Folder for adapter, checkpoints, metrics, plots.", "Model and data")
    template: Template = setting("alpaca", "Prompt format; 'chat' is the tokenizer's own.", "Model and data")
    max_length: int = setting(512, "Longest example in tokens; longer ones are truncated.", "Model and data")
    skip_bad_records: bool = setting(False, "Count unusable records instead of stopping.", "Model and data")

    adapter_len: int = setting(10, "K, prompt vectors per adapted layer.", "Adapter")
    adapter_layers: int | None = setting(None, "L, top layers adapted (default: all but the lowest two).", "Adapter")
    gate_activation: GateActivation = setting("tanh", "Applied to the gates.", "Adapter")

    epochs: float = setting(5.0, "Passes over the training data.", "Optimisation")
    max_steps: int | None = setting(None, "Stop after this many optimiser steps instead.", "Optimisation")
    warmup_epochs: float = setting(
        2.0, "Linear warm-up, in epochs; under --max-steps the same share of the run.", "Optimisation"
    )
    batch_size: int = setting(64, "Examples per optimiser step, over all processes.", "Optimisation")
    micro_batch_size: int = setting(8, "Examples per forward on one process.", "Optimisation")
    base_lr: float = setting(9e-3, "Learning rate is this x batch_size / 256.", "Optimisation")
    lr: float | None = setting(None, "Learning rate as it is, instead of --base-lr.", "Optimisation")
    min_lr: float = setting(0.0, "Where the cosine decay ends.", "Optimisation")
    weight_decay: float = setting(0.02, "AdamW's, on prompts and gates alike.", "Optimisation")
    max_grad_norm: float | None = setting(None, "Clip the gradient's norm (default: never).", "Optimisation")
    seed: int = setting(0, "Of initialisation, split and order.", "Optimisation")

    precision: Precision = setting(
        "auto", "Of the frozen base; 'auto' is bf16 on hardware that has it. Adapters stay fp32.", "Running"
    )
    load_in_4bit: bool = setting(False, "Quantise the base with bitsandbytes (CUDA).", "Running")
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, slower.", "Running")
    eval_every: int | None = setting(None, "Steps between validations (default: once an epoch).", "Running")
    save_every: int = setting(100, "Steps between checkpoints.", "Running")
    trackers: tuple[str, ...] = setting(
        ("tensorboard",), "Also log to: tensorboard, wandb, trackio. Repeatable; 'none' for none.", "Running"
    )
    resume: bool = setting(False, "Continue the run in --output-dir.", "Running")
    overwrite: bool = setting(False, "Delete the run in --output-dir first.", "Running")

    def __post_init__(self) -> None:
        problems = _Problems()
        for name in ("adapter_len", "adapter_layers", "batch_size", "micro_batch_size", "max_steps"):
            problems.at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every"):
            problems.at_least(name, getattr(self, name), 1)
        problems.at_least("max_length", self.max_length, 8)
        for name in ("epochs", "base_lr", "lr", "max_grad_norm"):
            problems.above_zero(name, getattr(self, name))
        for name in ("warmup_epochs", "min_lr", "weight_decay", "val_size"):
            problems.at_least(name, getattr(self, name), 0)
        problems.seed(self.seed)
        problems.one_of("gate_activation", self.gate_activation, GateActivation)
        problems.one_of("template", self.template, Template)
        problems.one_of("precision", self.precision, Precision)
        for tracker in self.trackers:
            problems.one_of("trackers", tracker, Literal["tensorboard", "wandb", "trackio", "none"])
        problems.require("data", bool(self.data), "names no file: pass --data FILE")
        problems.require("output_dir", bool(self.output_dir), "is empty: pass --output-dir FOLDER")
        problems.require(
            "warmup_epochs",
            self.warmup_epochs <= self.epochs,
            f"is {self.warmup_epochs}, more than the {self.epochs} epochs of the run",
        )
        problems.require(
            "resume",
            not (self.resume and self.overwrite),
            "and overwrite exclude each other: pass one of them",
        )
        problems.raise_if_any()

    @property
    def peak_lr(self) -> float:
        """`lr` where it is given, else the paper's rule base_lr x batch_size / 256."""
        return self.base_lr * self.batch_size / 256 if self.lr is None else self.lr

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return self.max_steps or max(1, math.ceil(self.epochs * steps_per_epoch))

    def adapter_config(self) -> AdapterConfig:
        """The adapter that this recipe trains."""
        return AdapterConfig(
            adapter_len=self.adapter_len,
            adapter_layers=self.adapter_layers,
            gate_activation=self.gate_activation,
            template=self.template,
            base_model_name_or_path=self.model,
        )


@dataclass(frozen=True)
class GenerateConfig:
    """How an answer is decoded; the defaults are the paper's (temperature 0.1, top-p 0.75).

    `temperature` 0 decodes greedily. `seed` None draws differently at every call.
    """

    max_new_tokens: int = 256
    temperature: float = 0.1
    top_p: float = 0.75
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.at_least("max_new_tokens", self.max_new_tokens, 1)
        problems.at_least("temperature", self.temperature, 0)
        problems.seed(self.seed)
        problems.require("top_p", 0 < self.top_p <= 1, f"is {self.top_p}; it must be above 0 and at most 1")
        problems.raise_if_any()


ConfigType = typing.TypeVar("ConfigType", AdapterConfig, TrainConfig)


def parse(cls: type[ConfigType], values: Mapping[str, Any], source: str) -> ConfigType:
    """Build a config from outside values: numbers given as text are read, unknown keys refused.

    Raises:
        ConfigError: naming `source`, every offending key, its value and the rule.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, so not before a command needs it

    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError("; ".join(f"{source}: {unknown_name('key', key, known)}" for key in unknown))
    cleaned = {key: _as_tuple(cls, key, value) for key, value in values.items()}
    try:
        return TypeAdapter(cls).validate_python(cleaned)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(map(_sentence, error.errors()))) from None


def load_recipe(path: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """A YAML recipe with flags on top of it.

    Args:
        path: the recipe's file, 'bundled' for the one that fits the bundled base, or None for the defaults alone.
        overrides: values that replace the recipe's.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or a value breaks its rule.
    """
    values: dict[str, Any] = {}
    if path is not None:
        import yaml

        file = Path(__file__).parent / "bundled" / "recipe.yaml" if path == BUNDLED else Path(path)
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"Recipe {path} cannot be read ({reason}): give the path of a YAML file.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"Recipe {path} is not YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(loaded, dict | None):
            raise ConfigError(f"Recipe {path} holds a {type(loaded).__name__}, not 'key: value' lines.")
        values = loaded or {}
    return parse(TrainConfig, {**values, **overrides}, "flags" if path is None else str(path))


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


class _Problems:
    """Collects every broken rule, so that one run of a command reports them all."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def require(self, name: str, holds: bool, sentence: str) -> None:
        if not holds:
            self.found.append(f"{name} {sentence}")

    def at_least(self, name: str, value: float | None, least: float) -> None:
        self.require(name, value is None or value >= least, f"is {value}; it must be at least {least}")
        self._finite(name, value)

    def above_zero(self, name: str, value: float | None) -> None:
        self.require(name, value is None or value > 0, f"is {value}; it must be above 0")
        self._finite(name, value)

    def seed(self, value: int | None) -> None:
        self.require("seed", value is None or 0 <= value < 2**32, f"is {value}; it must be at least 0 and below 2^32")

    def _finite(self, name: str, value: float | None) -> None:
        self.require(name, value is None or value != math.inf, f"is {value}; it must be a finite number")

    def one_of(self, name: str, value: Any, choices: Any) -> None:
        allowed = typing.get_args(choices)
        self.require(name, value is None or value in allowed, f"is {value!r}; it must be one of {', '.join(allowed)}")

    def raise_if_any(self) -> None:
        if self.found:
            raise ConfigError("; ".join(self.found))
