"""`AdapterConfig`, which describes an adapter and is stored beside its weights, and the condition that it may take."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.errors import ConfigError
from llama_adapter.settings import Problems, parse

FORMAT_VERSION = 1
GateActivation = Literal["tanh", "identity"]
Template = Literal["alpaca", "chat"]
WrittenAs = Literal["alpaca", "chat", "raw"]
"""A template, or "raw": prompt-completion text that was trained without any."""


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
        ConfigError: a value breaks its rule.
    """

    adapter_len: int = 10
    adapter_layers: int | None = None
    gate_activation: GateActivation = "tanh"
    template: WrittenAs | None = None
    base_model_name_or_path: str | None = None
    base_shape: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    condition: ConditionConfig | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least("adapter_len", self.adapter_len, 1)
        problems.at_least("adapter_layers", self.adapter_layers, 1)
        problems.one_of("gate_activation", self.gate_activation, GateActivation)
        problems.one_of("template", self.template, WrittenAs)
        problems.raise_if_any()

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = dataclasses.asdict(self)
        return values if self.condition is None else {**values, "condition": self.condition.to_dict()}

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
        if isinstance(values.get("condition"), Mapping):
            condition = ConditionConfig.from_dict(values["condition"], "adapter_config.json, condition")
            values = {**values, "condition": condition}
        return parse(cls, values, "adapter_config.json")
