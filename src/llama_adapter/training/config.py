"""`TrainConfig`, a training recipe: each field is a key of the YAML file and a flag of `llama-adapter train`.

A default that may have to give way, to the data, the base, the adapter that a run goes on from or another setting, is
None and stands for the value that the help shows: only so can it be told from the same value when somebody typed it.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from llama_adapter.conditions.config import Absent, Activation, Kind, is_python, unnamed
from llama_adapter.core.config import V2_FIELDS, AdapterConfig, GateActivation, Template
from llama_adapter.errors import ConfigError
from llama_adapter.settings import (
    BUNDLED,
    Count,
    CountOrZero,
    NotNegative,
    Place,
    Positive,
    Precision,
    Quantization,
    Seed,
    Sound,
    check,
    one_quantization,
    parse,
)
from llama_adapter.training.recipe_file import read_settings

log = logging.getLogger(__name__)

BasePrecision = Literal["auto", "fp8", "int8"]
Method = Literal["sft", "dpo"]
Tracker = Literal["tensorboard", "wandb", "trackio", "none"]


def setting(default: Any, text: str, group: str, stands_for: Any = None) -> Any:
    """A `TrainConfig` field: its default, the help text and heading of its flag, and what a default None stands for."""
    return field(default=default, metadata={"help": text, "group": group, "stands_for": stands_for})


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; the defaults are the paper's (its section 4.1) where it gives any.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    model: Place | None = setting(
        None, "Base model: a folder, a GGUF file, a hub name, or 'bundled'.", "Model and data", stands_for=BUNDLED
    )
    data: tuple[Place, ...] = setting(
        ("bundled",),
        "Training data: files, folders, hub names, scienceqa:FOLDER, coco:FILE, '-' or 'bundled'; one or more.",
        "Model and data",
    )
    val_data: tuple[Place, ...] = setting((), "Validation data; else a part of --data is held out.", "Model and data")
    val_size: NotNegative | None = setting(
        None, "Validation part of --data: a fraction below 1, or a number of records.", "Model and data",
        stands_for=0.02,
    )  # fmt: skip
    output_dir: Place = setting("runs/adapter", "Folder for adapter, checkpoints, metrics, plots.", "Model and data")
    template: Template | None = setting(
        None, "Prompt format; 'chat' is the tokenizer's own.", "Model and data", stands_for="alpaca"
    )
    scienceqa_style: str = setting(
        "paper", "How ScienceQA is written: paper, words, or QCM-A and its kin.", "Model and data"
    )
    max_length: Annotated[int, Ge(8)] | None = setting(
        None, "Longest example in tokens, at most the base's context; longer ones are truncated.", "Model and data",
        stands_for=512,
    )  # fmt: skip
    skip_bad_records: bool = setting(False, "Count unusable records instead of stopping.", "Model and data")
    streaming: bool = setting(
        False, "Read --data as it is needed, where they are larger than memory: .jsonl, .gz, .zst, .parquet, patterns, "
        "hub names. Needs --max-steps; --val-size is then the first N records.",
        "Model and data",
    )  # fmt: skip
    shuffle_buffer: Count | None = setting(
        None, "Records that --streaming shuffles at a time.", "Model and data", stands_for=10_000
    )

    method: Method = setting(
        "sft", "Learn answers (sft), or from chosen and rejected ones which is better (dpo).", "Method"
    )
    beta: Positive | None = setting(
        None, "Of dpo: how near to the reference, which the run starts from, the adapter stays.", "Method",
        stands_for=0.1,
    )  # fmt: skip

    init_from: Place | None = setting(
        None,
        "Go on from an adapter's weights and its own settings (not rate, steps, data): a folder, run or hub name.",
        "Adapter",
    )
    adapter_len: Count | None = setting(None, "K, prompt vectors per adapted layer.", "Adapter", stands_for=10)
    adapter_layers: CountOrZero | None = setting(
        None, "L, top layers with prompts (default: all but the lowest two); 0 for none.", "Adapter"
    )
    gate_activation: GateActivation | None = setting(None, "Applied to the gates.", "Adapter", stands_for="tanh")
    prompt_init_text: str | None = setting(
        None, "Start prompts from what each layer reads at this text's tokens; 'data' is the first training example "
        "(default: N(0, 1)).",
        "Adapter",
    )  # fmt: skip
    gate_scale: bool = setting(False, "One more factor per layer on its gates (V2's new_gate).", "Adapter")
    norms: bool = setting(False, "Train own copies of the base's norms (V2).", "Adapter")
    linear_scale: tuple[str, ...] = setting((), "Linears that get a scale of their inputs (V2). Repeatable.", "Adapter")
    linear_bias: tuple[str, ...] = setting((), "Linears that get a bias (V2). Repeatable.", "Adapter")
    lora_rank: CountOrZero = setting(0, "Rank of LoRA beside the prompts; 0 for none.", "Adapter")
    lora_alpha: Positive | None = setting(None, "LoRA's factor is this / rank (default: 1).", "Adapter")
    lora_targets: tuple[str, ...] = setting((), "Linears with LoRA. Repeatable.", "Adapter")

    condition: Kind | None = setting(None, "What else the prompts depend on (default: text alone).", "Condition")
    tower: Place | None = setting(
        None, "Frozen encoder: a folder, a hub name, 'bundled', or your code: python:FILE.py:FUNCTION.", "Condition",
        stands_for=BUNDLED,
    )  # fmt: skip
    tower_depths: tuple[int, ...] = setting(
        (), "Hidden states of the tower that are read (default: six, evenly spread). Repeatable.", "Condition"
    )
    condition_lr: Positive | None = setting(
        None, "Peak learning rate of the condition (default: as prompts).", "Condition"
    )
    condition_width: Count | None = setting(None, "Width of the bottleneck.", "Condition", stands_for=64)
    condition_activation: Activation | None = setting(None, "Of the bottleneck.", "Condition", stands_for="gelu")
    absent: Absent | None = setting(None, "Condition of an example without a picture.", "Condition", stands_for="zero")
    visual_blocks: Count | None = setting(None, "Self-attention blocks of a visual prompt.", "Condition", stands_for=8)
    visual_width: Count | None = setting(None, "Their width.", "Condition", stands_for=768)
    visual_heads: Count | None = setting(None, "Their heads.", "Condition", stands_for=16)
    condition_layers: Count | None = setting(
        None, "Early fusion: first layers that read the condition alone (default: it is added to all prompts).",
        "Condition",
    )  # fmt: skip
    visual_len: Count | None = setting(
        None, "Prompts of patches or a visual prompt in early fusion (default: K).", "Condition"
    )
    disjoint: bool = setting(
        False, "In early fusion: records with a file train the condition and its gates, others all the rest.",
        "Condition",
    )  # fmt: skip
    feature_cache: Place | None = setting(None, "Folder that keeps the tower's features between runs.", "Condition")

    epochs: Positive = setting(5.0, "Passes over the training data.", "Optimisation")
    max_steps: Count | None = setting(None, "Stop after this many optimiser steps instead.", "Optimisation")
    warmup_epochs: NotNegative | None = setting(
        None, "Linear warm-up, in epochs, two fifths of a run below 5; under --max-steps the same share of the run.",
        "Optimisation", stands_for=2.0,
    )  # fmt: skip
    batch_size: Count = setting(64, "Examples per optimiser step, over all processes.", "Optimisation")
    micro_batch_size: Count = setting(8, "Examples per forward on one process.", "Optimisation")
    base_lr: Positive = setting(9e-3, "Learning rate is this x batch_size / 256.", "Optimisation")
    lr: Positive | None = setting(None, "Learning rate as it is, instead of --base-lr.", "Optimisation")
    parts_lr: Positive | None = setting(
        None, "Peak learning rate of norms, scales, biases and LoRA (default: as prompts).", "Optimisation"
    )
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
    tensor_parallel: bool = setting(
        False, "Cut the base head by head over all processes that torchrun started (docs/sharding.md).", "Running"
    )
    compile: bool = setting(False, "Compile the layers: slow start, quicker steps.", "Running")
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, slower.", "Running")
    eval_every: Count | None = setting(
        None, "Steps between validations (default: once an epoch; with --streaming a tenth of the run).", "Running"
    )
    save_every: Count = setting(
        100, "Steps between checkpoints. A journal keeps every step between, if that takes a tenth of the time.",
        "Running",
    )  # fmt: skip
    trackers: tuple[Tracker, ...] = setting(
        (), "Also log to: tensorboard (the default), wandb, trackio. Repeatable; 'none' for none.", "Running"
    )
    resume: bool = setting(
        False, "Continue the run in --output-dir; with more --epochs or --max-steps also a finished one.", "Running"
    )
    push_to_hub: str | None = setting(
        None, "Push the adapter to this repository, OWNER/NAME, at the end; a new one is private.", "Running"
    )
    overwrite: bool = setting(False, "Delete the run in --output-dir first.", "Running")

    def __post_init__(self) -> None:
        check(self, self._between)

    def _between(self, sound: Sound) -> Iterator[str]:
        if sound("data") and not self.data:
            yield "data names no file: pass --data FILE"
        if sound("output_dir") and not self.output_dir:
            yield "output_dir is empty: pass --output-dir FOLDER"
        if sound("val_size") and self.val_size is not None and self.val_size > 1 and self.val_size % 1:
            yield f"val_size is {self.val_size}; it must be a fraction below 1 or a whole number of records"
        if sound("warmup_epochs", "epochs") and self.value("warmup_epochs") > self.epochs:
            yield (
                f"warmup_epochs is {self.warmup_epochs}, more than the {self.epochs} epochs of the run: "
                "lower it, or leave it out"
            )
        if sound("min_lr", "lr", "base_lr", "batch_size") and self.min_lr > self.peak_lr:
            yield f"min_lr is {self.min_lr}, above the peak learning rate {self.peak_lr:g}: lower it, or pass --lr"
        if sound("trackers") and "none" in self.trackers and len(set(self.trackers)) > 1:
            yield f"trackers are {', '.join(self.trackers)}: pass 'none' or the others"
        if sound("streaming", "max_steps", "val_size", "condition"):
            yield from self._between_streaming()
        if sound("condition", "data"):
            yield from idle_settings(vars(self)).values()
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
                if self.parts_lr is not None and not (parts or self.init_from):
                    yield "parts_lr has no effect without norms, linear_scale, linear_bias and lora_rank: leave it out"
                if parts and self.compile is True:
                    yield "compile knows no norms, linear_scale, linear_bias and lora_rank: leave it out"
        if self.prompt_init_text is not None and self.init_from is not None and self.resume is not True:
            yield "prompt_init_text has no effect on the prompts of init_from: leave one of them out"
        if self.prompt_init_text is not None and self.adapter_layers == 0:
            yield "prompt_init_text has no effect without prompts, and adapter_layers is 0: leave one of them out"
        if self.condition is not None and self.method == "dpo":
            yield "method dpo compares answers to text, without a condition: leave condition out"
        if self.condition is not None and self.adapter_layers == 0:
            yield "adapter_layers is 0, and a condition is added to prompts: give at least 1"
        if self.resume is True and self.overwrite is True:
            yield "resume and overwrite exclude each other: pass one of them"

    def _between_streaming(self) -> Iterator[str]:
        if not self.streaming:
            return
        if self.max_steps is None:
            yield "streaming needs max_steps, as nobody knows how many records there are: pass --max-steps N"
        if self.val_size is not None and self.val_size % 1 and not self.val_data:
            yield (
                f"val_size is {self.val_size}, a share of what nobody knows with streaming: pass --val-size N for the "
                "first N records, or --val-data FILE"
            )
        if self.condition is not None:
            yield f"streaming knows no condition, and {self.condition} reads files before a run: leave one of them out"

    def value(self, name: str) -> Any:
        """The setting of this name, or what it stands for where it is a default None."""
        given = getattr(self, name)
        if given is None and name == "warmup_epochs":
            return min(STANDS_FOR[name], 0.4 * self.epochs)  # the paper's share, 2 of 5 epochs
        return STANDS_FOR[name] if given is None else given

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
            adapter_len=self.value("adapter_len"),
            adapter_layers=self.adapter_layers,
            gate_activation=self.value("gate_activation"),
            template=self.value("template"),
            base_model_name_or_path=self.value("model"),
            **{name: getattr(self, name) for name in V2_FIELDS},
        )


DEFAULTS = {setting.name: setting.default for setting in fields(TrainConfig)}
STANDS_FOR = {setting.name: setting.metadata["stands_for"] for setting in fields(TrainConfig)}
BOTTLENECK = {"condition_width", "condition_activation"}
VISUAL = {"visual_blocks", "visual_width", "visual_heads", "visual_len"}
IDLE = {"visual_prompt": BOTTLENECK, "patches": VISUAL - {"visual_len"}}
"""Settings without effect on a condition of this kind; `VISUAL` on all others."""


def idle_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings that somebody gave and that have no effect beside the others, each with the sentence that says so."""
    kind, data = values.get("condition"), values.get("data")
    given = [name for name, default in DEFAULTS.items() if values.get(name, default) not in (None, default, [])]
    of_condition = {s.name for s in fields(TrainConfig) if s.metadata["group"] == "Condition"} - {"condition"}
    sentences = {}
    for name in given:
        if kind is None and name in of_condition and not values.get("init_from"):
            sentences[name] = f"{name} has no effect without a condition: pass --condition image, or leave it out"
        elif kind is not None and name in IDLE.get(str(kind), VISUAL):
            sentences[name] = f"{name} has no effect with condition {kind}: leave it out"
        elif name == "shuffle_buffer" and not values.get("streaming"):
            sentences[name] = "shuffle_buffer has no effect without streaming: pass --streaming, or leave it out"
        elif name == "beta" and values.get("method", "sft") == "sft":
            sentences[name] = "beta has no effect without method dpo: pass --method dpo, or leave it out"
        elif name == "scienceqa_style" and isinstance(data, str | list | tuple) and "scienceqa:" not in str(data):
            sentences[name] = f"{name} has no effect without --data scienceqa:FOLDER: leave it out"
    return sentences


EITHER_OR = (("lr", "base_lr"), ("val_data", "val_size"))
"""Settings of which one takes the place of the other."""
REPLACED_BY = {"lr": "base_lr", "max_steps": "epochs", "val_data": "val_size", "val_size": "val_data"}
"""A recipe's setting that would silence the flag behind it, and so gives way to that."""


def load_recipe(path: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """A YAML recipe with flags on top of it.

    Args:
        path: the recipe's file, 'bundled' for the one that fits the bundled base, or None for the defaults alone; with
            `resume` among the flags None is the recipe of the run in `output_dir`, where there is one.
        overrides: values that replace the recipe's.

    Raises:
        ConfigError: as `read_recipe`; or the file, and no flag, names a tower that Python code makes.
    """
    config = read_recipe(path, overrides)
    if is_python(config.tower) and overrides.get("tower") is None:
        raise ConfigError(f"{path or 'recipe.yaml'}: {unnamed(config.tower or '')}")
    return config


def read_recipe(path: str | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """`load_recipe` for whoever looks at a recipe and does not run it.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, two flags exclude each other, or a value breaks its
            rule.
    """
    for one, other in EITHER_OR:
        if one in overrides and other in overrides:
            raise ConfigError(f"flags: {one} and {other} exclude each other: pass one of them")
    if "epochs" in overrides and "max_steps" in overrides:
        log.warning("max_steps ends the run; epochs only scales its warm-up")
    file, started = path, {}
    if path is None and overrides.get("resume") in (True, "true"):
        folder = str(overrides.get("output_dir") or TrainConfig.output_dir)
        if (Path(os.path.expanduser(folder)) / "recipe.yaml").is_file():
            file, started = str(Path(os.path.expanduser(folder)) / "recipe.yaml"), {"output_dir": folder}
    values = {} if file is None else {**read_settings(file), **started}
    return overlaid(values, overrides, "flags" if file is None else file)


def overlaid(values: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> TrainConfig:
    """A recipe of settings and of others that go before them; what those leave without effect gives way.

    Raises:
        ConfigError: naming `source`; a value breaks its rule.
    """
    values = dict(values)
    for name, flag in REPLACED_BY.items():
        if flag in overrides and name not in overrides:
            values.pop(name, None)
    _shorten_warmup(values, overrides)
    for name, sentence in idle_settings({**values, **overrides}).items():
        # a finished run's recipe may name every setting, also at its default
        if name not in overrides and values.pop(name) != STANDS_FOR[name]:
            log.warning("%s: %s", source, sentence)
    return parse(TrainConfig, {**values, **overrides}, source, text=True)


def _shorten_warmup(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """A recipe's warm-up that is longer than the epochs of a flag gives way to the default."""
    if "epochs" not in overrides or "warmup_epochs" in overrides or values.get("warmup_epochs") is None:
        return
    try:
        too_long = float(values["warmup_epochs"]) > float(overrides["epochs"])
    except (TypeError, ValueError, OverflowError):  # `parse` says what is wrong
        return
    if too_long:
        log.warning("the recipe's warm-up of %s epochs gives way to two fifths of the run", values.pop("warmup_epochs"))
