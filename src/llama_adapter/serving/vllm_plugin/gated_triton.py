"""`gated_prompts` on a GPU: one program per token and head; an adapter's prompts of one head are a few KB."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    out, query, key, value, lengths, slots, scale, softcap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, PROMPTS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, prompts = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    here = (token * HEADS + head) * SIZE + dims
    slot = tl.load(slots + token)
    length = tl.load(lengths + slot, mask=slot >= 0, other=0)
    if length > 0:
        there = (prompts[:, None] < length) & (dims[None, :] < SIZE)
        at = prompts[:, None] * SIZE + dims[None, :]
        key_head = head // (HEADS // KEY_HEADS)
        q = tl.load(query + here, mask=dims < SIZE, other=0.0).to(tl.float32)
        k = tl.load(key + (slot * KEY_HEADS + key_head) * PROMPTS * SIZE + at, mask=there, other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
        if softcap > 0:
            scores = softcap * (2 / (1 + tl.exp(-2 * scores / softcap)) - 1)
        scores = tl.where(prompts < length, scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 0))
        v = tl.load(value + (slot * HEADS + head) * PROMPTS * SIZE + at, mask=there, other=0.0)
        mixed = tl.sum(v.to(tl.float32) * (weights / tl.sum(weights, 0))[:, None], 0)
        tl.store(out + here, mixed.to(out.dtype.element_ty), mask=dims < SIZE)
    else:
        tl.store(out + here, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=dims < SIZE)


def on_cuda(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, slots: Tensor, scale: float, softcap: float
) -> Tensor:
    """`gated.gated_prompts` for queries [T, H, D]; the other arguments as there, contiguous."""
    query = query.contiguous()
    out = torch.empty_like(query)
    prompts, size = value.shape[2:]
    if len(query):
        _kernel[(len(query), value.shape[1])](
            out, query, key, value, lengths, slots, scale, softcap,
            value.shape[1], key.shape[1], prompts, size,
            triton.next_power_of_2(prompts), triton.next_power_of_2(size),
        )  # fmt: skip
    return out
