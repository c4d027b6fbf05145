"""`AdapterConfig`, which describes an adapter and is stored beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from llama_adapter.settings import Count, check

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 1
GateActivation = Literal["tanh", "identity"]
Template = Literal["alpaca", "chat"]
WrittenAs = Literal["alpaca", "chat", "raw"]
"""A template, or "raw": prompt-completion text that was trained without any."""


@runtime_checkable
class ConditionSettings(Protocol):
    """What an adapter asks of its condition's settings; `conditions.config.ConditionConfig` is one."""

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
        adapter_layers: L, how many of the top layers are adapted (>= 1). None stands for all but the lowest two,
            which is the paper's 30 of 32; `add_adapter` puts the number in its place.
        gate_activation: "tanh" (the authors' training code) or "identity" (their first release, PEFT, LitGPT).
        template: how prompts were written in training, so that generation writes them alike: "alpaca", "chat"
            (the tokenizer's own chat template), "raw" (as they are), or None where nobody said.
        base_model_name_or_path: the base the adapter was made for, as it was named.
        base_shape: that base's dimensions; an adapter is refused on a base of another shape.
        format_version: version of the files on disk.
        condition: what else the prompts depend on, such as a picture; None for text alone.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    adapter_len: Count = 10
    adapter_layers: Count | None = None
    gate_activation: GateActivation = "tanh"
    template: WrittenAs | None = None
    base_model_name_or_path: str | None = None
    base_shape: Mapping[str, int | str] | None = None
    format_version: int = FORMAT_VERSION
    condition: ConditionSettings | None = None

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        shape, condition = self.base_shape, self.condition
        return {
            **vars(self),
            "base_shape": None if shape is None else dict(shape),
            "condition": None if condition is None else condition.to_dict(),
        }
