"""What a condition is: the settings of its learnable part, and the tower that its features come from. No torch here."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llama_adapter.errors import AdapterError
from llama_adapter.settings import Count, Sound, check, parse, shown

if TYPE_CHECKING:
    from llama_adapter.conditions.modules import Condition

Kind = Literal["image", "patches", "visual_prompt", "audio", "video"]
"""What a tower of transformers can give the features of."""
AnyKind = Literal["image", "patches", "visual_prompt", "audio", "video", "image_bind"]
TOKEN_KINDS = ("patches", "visual_prompt")
"""Kinds that read all tokens of a picture, and give every prompt a vector of its own."""
Activation = Literal["silu", "gelu", "relu", "identity"]
Absent = Literal["zero", "learnt"]
LAST = (-1,)
PYTHON = "python:"
"""How the name of a tower begins that Python code makes, which runs only where a user names it."""


def is_python(tower: str | None) -> bool:
    """Whether a tower's name is that of Python code."""
    return tower is not None and tower.startswith(PYTHON)


def unnamed(tower: str) -> str:
    """The sentence about a tower that an adapter or a recipe names, and nobody on the command line."""
    return f"The tower '{tower}' is Python code, which runs only if you name it yourself: pass --tower {tower}."


@dataclass(frozen=True)
class ConditionConfig:
    """A condition's settings; stored with the adapter that it belongs to.

    Attributes:
        kind: "image", "audio" and "video" pool hidden states of the tower into one vector a scale and send them
            through a bottleneck (section 3.4 of the paper); "patches" sends each part of a picture through it, a part
            for every prompt; "visual_prompt" lets learnable queries read all tokens of a picture (LLaMA-Adapter V2);
            "image_bind" is ImageBind-LLM's bridge, whose embeddings no tower here
            gives: hand them to the condition yourself.
        tower: the frozen encoder: a folder, a hub name, "bundled" or "python:FILE.py:FUNCTION", see `python_towers`.
        tower_width: D, the width of one scale's features, or of one token's.
        depths: which hidden states of the tower are pooled, one scale each; 0 is its embedding, -1 its last layer.
            "patches" and "visual_prompt" read the last one, so they take (-1,) and nothing else.
        width: r, the bottleneck's width. With six scales of 768 the default has the paper's parameter count.
        activation: the bottleneck's.
        bias: whether the bottleneck's two linear layers have biases.
        absent: the condition of an example without a picture: nothing at all, or a learnt parameter.
        blocks: self-attention blocks of "visual_prompt".
        block_width: their width.
        block_heads: their attention heads; a divisor of `block_width`.
        layers: early fusion, as LLaMA-Adapter V2's paper has it: how many of the base's first layers read the condition
            as prompts of their own, through gates of their own. None adds it to the prompts of every adapted layer.
        visual_len: prompts that "patches" and "visual_prompt" make for them; None stands for `adapter_len`.
        tower_digest: of the weights of a tower that Python code makes; None for all others.
        legacy_bridge: whether "image_bind" has LayerNorm and biases, as its first checkpoints, or RMSNorm and none.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    kind: AnyKind
    tower: str
    tower_width: Count
    depths: tuple[int, ...] = LAST
    width: Count = 64
    activation: Activation = "gelu"
    bias: bool = True
    absent: Absent = "zero"
    blocks: Count = 8
    block_width: Count = 768
    block_heads: Count = 16
    layers: Count | None = None
    visual_len: Count | None = None
    legacy_bridge: bool = False
    tower_digest: str | None = None

    def __post_init__(self) -> None:
        check(self, self._between)

    def _between(self, sound: Sound) -> Iterator[str]:
        if sound("tower") and not self.tower:
            yield "tower is empty: give a folder, a hub name or 'bundled'"
        if sound("depths"):
            depths = f"depths are {shown([*self.depths])}"
            if not self.depths:
                yield "depths names no hidden state: give at least one, such as -1"
            if len(set(self.depths)) < len(self.depths):
                yield f"{depths}: each hidden state may be named once"
            if self.kind in TOKEN_KINDS and self.depths != LAST:
                yield f"{depths}; kind {self.kind} reads the tower's last hidden state: leave them at [-1]"
        if sound("layers", "visual_len") and self.visual_len and (self.kind not in TOKEN_KINDS or not self.layers):
            yield "visual_len is for kinds patches and visual_prompt with layers, in early fusion: leave it out"
        if sound("layers", "absent") and self.layers and self.absent == "learnt":
            yield "absent is 'learnt', and in early fusion an example without a picture reads nothing: take 'zero'"
        if sound("block_heads", "block_width") and self.block_width % self.block_heads:
            heads, width = shown(self.block_heads), shown(self.block_width)
            yield f"block_heads is {heads}; it must divide block_width, which is {width}"

    def build(self, hidden_size: int, adapter_len: int) -> "Condition":
        """The module that these settings describe, with new parameters.

        Args:
            hidden_size: of the base whose prompts it is added to.
            adapter_len: K, prompts of a layer; only `TOKEN_KINDS` give each of them a condition of its own.
        """
        from llama_adapter.conditions.modules import (
            ImageBindCondition,
            ImageCondition,
            PatchCondition,
            VisualPromptCondition,
        )

        width, absent, bottleneck = self.tower_width, self.absent, (self.width, self.activation, self.bias)
        if self.kind == "patches":
            return PatchCondition(hidden_size, self.visual_len or adapter_len, width, *bottleneck, absent)
        if self.kind == "visual_prompt":
            shape = (self.blocks, self.block_width, self.block_heads)
            return VisualPromptCondition(hidden_size, self.visual_len or adapter_len, width, *shape, absent)
        if self.kind == "image_bind":
            return ImageBindCondition(hidden_size, width, self.legacy_bridge, absent)
        return ImageCondition(hidden_size, len(self.depths), width, *bottleneck, absent)

    def shapes(self, hidden_size: int, adapter_len: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters of what `build` makes, without making it."""
        import torch

        # One block stands for all: building each of them takes milliseconds, and a file may claim thousands.
        with torch.device("meta"):
            module = dataclasses.replace(self, blocks=1).build(hidden_size, adapter_len)
        wanted = {}
        for key, parameter in module.named_parameters():
            for i in range(self.blocks if key.startswith("visual_blocks.0.") else 1):
                wanted[key.replace(".0.", f".{i}.", 1)] = tuple(parameter.shape)
        return wanted

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {**dataclasses.asdict(self), "depths": list(self.depths)}
        if self.tower_digest is None:  # older releases do not know the key, and read such files
            del values["tower_digest"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "condition") -> "ConditionConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key, a missing one or a wrong type; the message begins with `source`.
        """
        return parse(cls, values, source)


def check_digest(condition: ConditionConfig, tower: str, digest: str | None) -> None:
    """Refuse Python code's tower of other weights than those that a condition was trained with.

    Raises:
        AdapterError: naming both.
    """
    if condition.tower_digest != digest:
        raise AdapterError(
            f"The adapter was trained with the tower '{condition.tower}', and '{tower}' has other weights: "
            "pass --tower with the one that it was trained with."
        )
