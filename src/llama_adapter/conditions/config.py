"""What a condition is: the settings of its learnable part, and the tower that its features come from. No torch here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama_adapter.settings import Problems, parse

Kind = Literal["image", "visual_prompt", "audio", "video"]
Activation = Literal["silu", "gelu", "relu", "identity"]
Absent = Literal["zero", "learnt"]
LAST = (-1,)


@dataclass(frozen=True)
class ConditionConfig:
    """A condition's settings; stored with the adapter that it belongs to.

    Attributes:
        kind: "image", "audio" and "video" pool hidden states of the tower into one vector a scale and send them
            through a bottleneck (section 3.4 of the paper); "visual_prompt" lets learnable queries read all tokens
            of a picture (LLaMA-Adapter V2).
        tower: the frozen encoder: a folder, a hub name or "bundled".
        tower_width: D, the width of one scale's features, or of one token's for "visual_prompt".
        depths: which hidden states of the tower are pooled, one scale each; 0 is its embedding, -1 its last layer.
            "visual_prompt" reads the last one, so it takes (-1,) and nothing else.
        width: r, the bottleneck's width. With six scales of 768 the default has the paper's parameter count.
        activation: the bottleneck's.
        bias: whether the bottleneck's two linear layers have biases.
        absent: the condition of an example without a picture: nothing at all, or a learnt parameter.
        blocks: self-attention blocks of "visual_prompt".
        block_width: their width.
        block_heads: their attention heads; a divisor of `block_width`.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    kind: Kind
    tower: str
    tower_width: int
    depths: tuple[int, ...] = LAST
    width: int = 64
    activation: Activation = "gelu"
    bias: bool = True
    absent: Absent = "zero"
    blocks: int = 8
    block_width: int = 768
    block_heads: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON and callers hand over lists
        problems = Problems()
        for name, choices in (("kind", Kind), ("activation", Activation), ("absent", Absent)):
            value = getattr(self, name)
            problems.require(name, value is not None, "is missing: give one")
            problems.one_of(name, value, choices)
        problems.require("tower", bool(self.tower), "is empty: give a folder, a hub name or 'bundled'")
        for name in ("tower_width", "width", "blocks", "block_width", "block_heads"):
            problems.at_least(name, getattr(self, name), 1)
        problems.require("depths", bool(self.depths), "names no hidden state: give at least one, such as -1")
        problems.require(
            "depths",
            len(set(self.depths)) == len(self.depths),
            f"are {list(self.depths)}: each hidden state may be named once",
        )
        problems.require(
            "depths",
            self.kind != "visual_prompt" or self.depths == LAST,
            f"are {list(self.depths)}; kind visual_prompt reads the tower's last hidden state: leave them at [-1]",
        )
        problems.require(
            "block_heads",
            self.block_heads < 1 or self.block_width % self.block_heads == 0,
            f"is {self.block_heads}; it must divide block_width, which is {self.block_width}",
        )
        problems.raise_if_any()

    def build(self, hidden_size: int, adapter_len: int) -> Any:
        """The module that this describes, with new parameters; see `conditions/modules.py`."""
        from llama_adapter.conditions.modules import build_condition

        return build_condition(self, hidden_size, adapter_len)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**dataclasses.asdict(self), "depths": list(self.depths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "condition") -> "ConditionConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key, a missing one or a wrong type; the message begins with `source`.
        """
        return parse(cls, values, source)
