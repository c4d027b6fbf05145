"""The authors' names for an adapter's parts, and ours: one table, over which their files are read and written.

Their rotation turns pairs of neighbours, transformers' turns halves, so what comes out of wq and wk has its rows in
another order (`to_halves`).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from llama_adapter.core.config import AdapterConfig

LINEARS = {
    "q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3",
}  # fmt: skip
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


class Pair(NamedTuple):
    """One tensor: its names, its shape in their file and in ours, and the heads whose rows change their order."""

    theirs: str
    ours: str
    their_shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    heads: int = 0


class Sizes(NamedTuple):
    """Dimensions of the base that the pairs need; `wide` is that of the MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    wide: int = 0

    def of(self, linear: str) -> tuple[int, int]:
        """(in, out) of a linear layer."""
        attention = self.heads * self.head_dim
        return {
            "q_proj": (self.hidden, attention), "o_proj": (attention, self.hidden),
            "gate_proj": (self.hidden, self.wide), "up_proj": (self.hidden, self.wide),
            "down_proj": (self.wide, self.hidden),
        }.get(linear, (self.hidden, self.kv_heads * self.head_dim))  # fmt: skip


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads x D, ...] from Meta's order, pairs side by side, to transformers', halves one after the other."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def pairs(config: AdapterConfig, sizes: Sizes, prefix: str) -> Iterator[Pair]:
    """All tensors of an adapter but the prompts, which the authors keep in one matrix.

    Args:
        config: what the adapter has.
        sizes: of its base.
        prefix: "" or "llama.", before their names of the decoder's parts.
    """
    for i in range(sizes.layers - (config.adapter_layers or 0), sizes.layers):
        theirs = f"{prefix}layers.{i}.attention."
        yield Pair(f"{theirs}gate", f"layers.{i}.gate", (1, sizes.heads, 1, 1), (sizes.heads,))
        if config.gate_scale:
            yield Pair(f"{theirs}new_gate", f"layers.{i}.gate_scale", (1, 1, 1, 1), (1,))
    if config.norms:
        yield Pair(f"{prefix}norm.weight", "norms.norm.weight", (sizes.hidden,), (sizes.hidden,))
    for i in range(sizes.layers if config.has_parts else 0):
        layer = f"{prefix}layers.{i}."
        for ours, theirs in NORMS.items() if config.norms else ():
            shape = (sizes.hidden,)
            yield Pair(f"{layer}{theirs}.weight", f"norms.layers.{i}.{ours}.weight", shape, shape)
        for name, theirs in LINEARS.items():
            yield from _of_linear(config, sizes, name, layer + theirs, f"layers.{i}.{_path(name)}")


def _of_linear(config: AdapterConfig, sizes: Sizes, name: str, theirs: str, path: str) -> Iterator[Pair]:
    into, out = sizes.of(name)
    turned = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}.get(name, 0)
    if name in config.linear_scale:
        yield Pair(f"{theirs}_scale", f"linears.{path}.scale", (into,), (into,))
    if name in config.linear_bias:
        bias = f"{theirs}_bias" if config.linear_scale else f"{theirs}.bias"
        yield Pair(bias, f"linears.{path}.bias", (out,), (out,), turned)
    if name in config.lora_targets:
        lora = re.sub(r"\.(w.)$", r".lora_\1", theirs)
        rank = config.lora_rank
        yield Pair(f"{lora}_l1.weight", f"lora.{path}.A", (rank, into), (rank, into))
        yield Pair(f"{lora}_l2.weight", f"lora.{path}.B", (out, rank), (out, rank), turned)


def _path(linear: str) -> str:
    return ("self_attn." if LINEARS[linear].startswith("attention") else "mlp.") + linear
