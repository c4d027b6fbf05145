"""`TrainConfig`, a training recipe: each field is a key of the YAML file and a flag of `llama-adapter train`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from llama_adapter.conditions.config import Absent, Activation, Kind
from llama_adapter.core.config import V2_FIELDS, AdapterConfig, GateActivation, Template
from llama_adapter.errors import ConfigError
from llama_adapter.settings import (
    BUNDLED,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Precision,
    Quantization,
    Seed,
    Sound,
    check,
    one_quantization,
    parse,
)

BasePrecision = Literal["auto", "fp8", "int8"]
Tracker = Literal["tensorboard", "wandb", "trackio", "none"]


def setting(default: Any, text: str, group: str) -> Any:
    """A `TrainConfig` field: its default, and the help text and heading under which the command line shows it."""
    return field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; the defaults are the paper's (its section 4.1) where it gives any.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    model: str = setting("bundled", "Base model: a folder, a GGUF file, a hub name, or 'bundled'.", "Model and data")
    data: tuple[str, ...] = setting(
        ("bundled",),
        "Training data: .json or .jsonl files, hub names, scienceqa:FOLDER, coco:FILE, or 'bundled'. Repeatable.",
        "Model and data",
    )
    val_data: tuple[str, ...] = setting((), "Validation data; else a part of --data is held out.", "Model and data")
    val_size: NotNegative = setting(
        0.02, "Validation part of --data: a fraction below 1, or a number of records.", "Model and data"
    )
    output_dir: str = setting("runs/adapter", "Folder for adapter, checkpoints, metrics, plots.", "Model and data")
    template: Template = setting("alpaca", "Prompt format; 'chat' is the tokenizer's own.", "Model and data")
    scienceqa_style: str = setting(
        "paper", "How ScienceQA is written: paper, words, or QCM-A and its kin.", "Model and data"
    )
    max_length: Annotated[int, Ge(8)] = setting(
        512, "Longest example in tokens; longer ones are truncated.", "Model and data"
    )
    skip_bad_records: bool = setting(False, "Count unusable records instead of stopping.", "Model and data")

    adapter_len: Count = setting(10, "K, prompt vectors per adapted layer.", "Adapter")
    adapter_layers: CountOrZero | None = setting(
        None, "L, top layers with prompts (default: all but the lowest two); 0 for none.", "Adapter"
    )
    gate_activation: GateActivation = setting("tanh", "Applied to the gates.", "Adapter")
    gate_scale: bool = setting(False, "One more factor per layer on its gates (V2's new_gate).", "Adapter")
    norms: bool = setting(False, "Train own copies of the base's norms (V2).", "Adapter")
    linear_scale: tuple[str, ...] = setting((), "Linears that get a scale of their inputs (V2). Repeatable.", "Adapter")
    linear_bias: tuple[str, ...] = setting((), "Linears that get a bias (V2). Repeatable.", "Adapter")
    lora_rank: CountOrZero = setting(0, "Rank of LoRA beside the prompts; 0 for none.", "Adapter")
    lora_alpha: Positive | None = setting(None, "LoRA's factor is this / rank (default: 1).", "Adapter")
    lora_targets: tuple[str, ...] = setting((), "Linears with LoRA. Repeatable.", "Adapter")

    condition: Kind | None = setting(None, "What else the prompts depend on (default: text alone).", "Condition")
    tower: str = setting("bundled", "Frozen encoder: a folder, a hub name, or 'bundled'.", "Condition")
    tower_depths: tuple[int, ...] = setting(
        (), "Hidden states of the tower that are read (default: six, evenly spread). Repeatable.", "Condition"
    )
    condition_lr: Positive | None = setting(
        None, "Peak learning rate of the condition (default: as prompts).", "Condition"
    )
    condition_width: Count = setting(64, "Width of the bottleneck.", "Condition")
    condition_activation: Activation = setting("gelu", "Of the bottleneck.", "Condition")
    absent: Absent = setting("zero", "Condition of an example without a picture.", "Condition")
    visual_blocks: Count = setting(8, "Self-attention blocks of a visual prompt.", "Condition")
    visual_width: Count = setting(768, "Their width.", "Condition")
    visual_heads: Count = setting(16, "Their heads.", "Condition")
    feature_cache: str | None = setting(None, "Folder that keeps the tower's features between runs.", "Condition")

    epochs: Positive = setting(5.0, "Passes over the training data.", "Optimisation")
    max_steps: Count | None = setting(None, "Stop after this many optimiser steps instead.", "Optimisation")
    warmup_epochs: NotNegative = setting(
        2.0, "Linear warm-up, in epochs; under --max-steps the same share of the run.", "Optimisation"
    )
    batch_size: Count = setting(64, "Examples per optimiser step, over all processes.", "Optimisation")
    micro_batch_size: Count = setting(8, "Examples per forward on one process.", "Optimisation")
    base_lr: Positive = setting(9e-3, "Learning rate is this x batch_size / 256.", "Optimisation")
    lr: Positive | None = setting(None, "Learning rate as it is, instead of --base-lr.", "Optimisation")
    min_lr: NotNegative = setting(0.0, "Where the cosine decay ends, one step after the last.", "Optimisation")
    weight_decay: NotNegative = setting(0.02, "AdamW's, on prompts and gates alike.", "Optimisation")
    max_grad_norm: Positive | None = setting(None, "Clip the gradient's norm (default: never).", "Optimisation")
    seed: Seed = setting(0, "Of initialisation, split and order.", "Optimisation")

    precision: Precision = setting(
        "auto", "Of the frozen base; 'auto' is bf16 on hardware that has it. Adapters stay fp32.", "Running"
    )
    base_precision: BasePrecision = setting(
        "auto", "Of the base's linear layers: as they are loaded, 'fp8' for speed (NVIDIA Ada, Hopper or newer), "
        "'int8' for memory (torchao).",
        "Running",
    )  # fmt: skip
    load_in_4bit: bool = setting(False, "Quantise the base to NF4 with bitsandbytes.", "Running")
    load_in_8bit: bool = setting(False, "Quantise the base to LLM.int8() with bitsandbytes.", "Running")
    packing: bool = setting(
        True, "Lay examples end to end and compute what they begin with alike once, where the base allows.", "Running"
    )
    compile: bool = setting(False, "Compile the layers: slow start, quicker steps.", "Running")
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, slower.", "Running")
    eval_every: Count | None = setting(None, "Steps between validations (default: once an epoch).", "Running")
    save_every: Count = setting(100, "Steps between checkpoints.", "Running")
    trackers: tuple[Tracker, ...] = setting(
        ("tensorboard",), "Also log to: tensorboard, wandb, trackio. Repeatable; 'none' for none.", "Running"
    )
    push_to_hub: str | None = setting(
        None, "Push the adapter to this repository, OWNER/NAME, at the end; a new one is private.", "Running"
    )
    resume: bool = setting(False, "Continue the run in --output-dir.", "Running")
    overwrite: bool = setting(False, "Delete the run in --output-dir first.", "Running")

    def __post_init__(self) -> None:
        check(self, self._between)

    def _between(self, sound: Sound) -> Iterator[str]:
        if sound("data") and not self.data:
            yield "data names no file: pass --data FILE"
        if sound("output_dir") and not self.output_dir:
            yield "output_dir is empty: pass --output-dir FOLDER"
        if sound("warmup_epochs", "epochs") and self.warmup_epochs > self.epochs:
            yield f"warmup_epochs is {self.warmup_epochs}, more than the {self.epochs} epochs of the run"
        if sound("base_precision", "load_in_4bit", "load_in_8bit"):
            try:
                self.quantization  # noqa: B018
            except ConfigError as error:
                yield str(error)
        if sound("adapter_len", "adapter_layers", "gate_activation", "template", "model", *V2_FIELDS):
            try:
                parts = self.adapter_config().has_parts
            except ConfigError as error:
                yield str(error)
            else:
                if parts and self.compile is True:
                    yield "compile knows no norms, linear_scale, linear_bias and lora_rank: leave it out"
        if self.condition is not None and self.adapter_layers == 0:
            yield "adapter_layers is 0, and a condition is added to prompts: give at least 1"
        if self.resume is True and self.overwrite is True:
            yield "resume and overwrite exclude each other: pass one of them"

    @property
    def quantization(self) -> Quantization | None:
        """How the base's linears are rounded while they are loaded."""
        return one_quantization(self.load_in_4bit, self.load_in_8bit, self.base_precision)

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
            **{name: getattr(self, name) for name in V2_FIELDS},
        )


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

        file = Path(__file__).parents[1] / "bundled" / "recipe.yaml" if path == BUNDLED else Path(path)
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
    return parse(TrainConfig, {**values, **overrides}, "flags" if path is None else str(path), text=True)
