"""`AdapterConfig`, which describes an adapter and is stored beside its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from llama_adapter.settings import Count, CountOrZero, Positive, Sound, check

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 1
GateActivation = Literal["tanh", "identity"]
Template = Literal["alpaca", "chat"]
WrittenAs = Literal["alpaca", "chat", "raw"]
"""A template, or "raw": prompt-completion text that was trained without any."""
V2_FIELDS = ("gate_scale", "norms", "linear_scale", "linear_bias", "lora_rank", "lora_alpha", "lora_targets")
"""What the method's second version adds; a recipe has them too."""
LATER_FIELDS = (*V2_FIELDS, "modules_to_save")
"""What came after the first files; written only where it is used."""


@runtime_checkable
class ConditionSettings(Protocol):
    """What an adapter asks of its condition's settings; `conditions.config.ConditionConfig` is one."""

    @property
    def layers(self) -> int | None:
        """In early fusion, how many first layers read the condition alone; None adds it to the top layers' prompts."""

    def build(self, hidden_size: int, adapter_len: int) -> "nn.Module":
        """The learnable module, which gives [B, hidden] or [B, K, hidden] to add to the prompts."""

    def shapes(self, hidden_size: int, adapter_len: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that `build` would make."""

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is; written to `adapter_config.json`.

    Attributes:
        adapter_len: K, prompt vectors per adapted layer (>= 1). The paper uses 10.
        adapter_layers: L, how many of the top layers have prompts. None stands for all but the lowest two, which is the
            paper's 30 of 32; `add_adapter` puts the number in its place. 0 is an adapter without prompts.
        gate_activation: "tanh" (the authors' training code) or "identity" (their first release, PEFT, LitGPT).
        template: how prompts were written in training, so that generation writes them alike: "alpaca", "chat"
            (the tokenizer's own chat template), "raw" (as they are), or None where nobody said.
        base_model_name_or_path: the base the adapter was made for, as it was named.
        base_shape: that base's dimensions; an adapter is refused on a base of another shape.
        format_version: version of the files on disk.
        condition: what else the prompts depend on, such as a picture; None for text alone.
        gate_scale: one more number per layer with prompts, 1 at the start, that multiplies act(g): `new_gate` of
            LLaMA-Adapter V2.
        norms: own weights (and biases) for all norms of the decoder but those of queries and keys.
        linear_scale: names of linears in the decoder's layers, such as "q_proj", that get a scale s of their inputs.
        linear_bias: names of those that get a bias b: y = W(s * x) + b.
        lora_rank: r of LoRA; 0 is none.
        lora_alpha: its factor is alpha / r; None is a factor of 1.
        lora_targets: names of the linears that it is on.
        modules_to_save: names of modules of the model that the adapter has copies of its own of, such as the
            "classifier" of an encoder; trained and saved with it, and rows of other adapters have theirs.

    Norms, scales, biases and LoRA are on every layer, and prompts do not go through them; see `core/scale_bias.py`.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    adapter_len: Count = 10
    adapter_layers: CountOrZero | None = None
    gate_activation: GateActivation = "tanh"
    template: WrittenAs | None = None
    base_model_name_or_path: str | None = None
    base_shape: Mapping[str, int | str] | None = None
    format_version: int = FORMAT_VERSION
    condition: ConditionSettings | None = None
    gate_scale: bool = False
    norms: bool = False
    linear_scale: tuple[str, ...] = ()
    linear_bias: tuple[str, ...] = ()
    lora_rank: CountOrZero = 0
    lora_alpha: Positive | None = None
    lora_targets: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, self._between)

    def _between(self, sound: Sound) -> Iterator[str]:
        if not sound("adapter_layers", *LATER_FIELDS):
            return
        if bool(self.lora_rank) != bool(self.lora_targets):
            yield "lora_rank and lora_targets belong together: give both or neither"
        if self.lora_alpha is not None and not self.lora_rank:
            yield "lora_alpha is given without lora_rank: give both or neither"
        if self.adapter_layers == 0:
            if not self.has_parts:
                yield "adapter_layers is 0; it must be at least 1 without norms, linear_bias and lora_rank"
            if self.condition is not None or self.gate_scale:
                yield "adapter_layers is 0, and a condition and gate_scale need prompts: give at least 1"

    @property
    def has_parts(self) -> bool:
        """Whether it has norms, scales, biases, LoRA or modules of its own."""
        linears = self.linear_scale or self.linear_bias or self.lora_rank
        return bool(self.norms or linears or self.modules_to_save)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; without those of the second version where it has none of that."""
        shape, condition = self.base_shape, self.condition
        unused = {name for name in LATER_FIELDS if getattr(self, name) == getattr(type(self), name)}
        values = {key: value for key, value in vars(self).items() if key not in unused}
        return {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()},
            "base_shape": None if shape is None else dict(shape),
            "condition": None if condition is None else condition.to_dict(),
        }
