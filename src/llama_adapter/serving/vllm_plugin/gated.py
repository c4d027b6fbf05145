"""The second softmax for tokens that each belong to an adapter of their own, or to none, as one opaque operator.

`torch.ops.llama_adapter.gated_prompts`. On CUDA nothing here waits for the device or looks at a value, so that CUDA
graphs may record it; torch.compile sees one node. Needs torch alone.

Shape letters: T tokens, S slots, H query heads, N key heads, K prompts, D head_dim.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GATHERED = 1 << 22
"""How many numbers a CPU gathers at once, token by token; where it were more, tokens are taken slot by slot."""


def gated_prompts(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, slots: Tensor, scale: float, softcap: float
) -> Tensor:
    """softmax(s q K') V of each token's own slot; exactly 0 where the slot is -1 or empty.

    Args:
        query: [T, H x D], rotated, as the model's attention reads it.
        key: [S, N, K, D].
        value: [S, H, K, D], times the gate's strength.
        lengths: [S] int32, how many of a slot's K prompts there are; 0 where the layer has no adapter.
        slots: [at least T] int64, each token's slot.
        scale: s.
        softcap: bound of the scores, c tanh(score / c); 0 for none.

    Returns:
        [T, H x D] in the query's dtype.
    """
    heads, size = value.shape[1], value.shape[3]
    rows = query.reshape(-1, heads, size)
    slots = slots[: len(rows)]
    if query.is_cuda:
        from llama_adapter.serving.vllm_plugin.gated_triton import on_cuda

        return on_cuda(rows, key, value, lengths, slots, scale, softcap).view_as(query)
    out = torch.zeros_like(rows)
    if value[0].numel() * len(rows) <= GATHERED:
        mine = (slots >= 0).nonzero().squeeze(-1)
        mine = mine[lengths[slots[mine]] > 0]
        if len(mine):
            out[mine] = _one_by_one(rows[mine], key, value, lengths, slots[mine], scale, softcap)
        return out.view_as(query)
    runs, counts = torch.unique_consecutive(slots, return_counts=True)
    start = 0
    for slot, count in zip(runs.tolist(), counts.tolist(), strict=True):
        if slot >= 0 and (length := int(lengths[slot])):
            part = slice(start, start + count)
            out[part] = _together(rows[part], key[slot, :, :length], value[slot, :, :length], scale, softcap)
        start += count
    return out.view_as(query)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, slots: Tensor, scale: float, softcap: float
) -> Tensor:
    """Tokens [T, H, D] with keys and values gathered for each."""
    groups = query.unflatten(1, (key.shape[1], -1))  # [T, N, H / N, D]
    scores = _capped(groups @ key[slots].transpose(-1, -2) * scale, softcap).flatten(1, 2)  # [T, H, K]
    past = torch.arange(key.shape[2], device=key.device) >= lengths[slots, None]
    weights = scores.masked_fill(past[:, None], float("-inf")).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights.unsqueeze(2) @ value[slots]).squeeze(2)


def _together(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
    """Tokens [T, H, D] of one slot."""
    query = query.transpose(0, 1)
    key = key.repeat_interleave(len(query) // len(key), 0)
    if not softcap:
        return scaled_dot_product_attention(query[None], key[None], value[None], scale=scale)[0].transpose(0, 1)
    scores = _capped(query @ key.transpose(-1, -2) * scale, softcap)
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(0, 1)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _shape(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, slots: Tensor, scale: float, softcap: float
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_library = torch.library.Library("llama_adapter", "FRAGMENT")
_library.define("gated_prompts" + torch.library.infer_schema(gated_prompts, mutates_args=()))
for _device in ("CPU", "CUDA"):
    _library.impl("gated_prompts", gated_prompts, _device)
torch.library.register_fake("llama_adapter::gated_prompts", _shape, lib=_library)
