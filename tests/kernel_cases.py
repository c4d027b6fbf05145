"""What `test_gated_kernel.py` runs in processes of its own: Triton either interprets or compiles."""

import os
from itertools import product

import pytest
import torch

from llama_adapter.serving.vllm_plugin.gated import gated_prompts
from llama_adapter.serving.vllm_plugin.gated_triton import _kernel, on_cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles in this process")
compiled = pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process")
SLOTS = [0, 0, 1, -1, 2, 1]
"""The first slot is full, the second half full, the third empty; a token of -1 has no adapter."""
TARGETS = [("cuda", 80, 32), ("cuda", 89, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


def inside(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in memory with nan before and behind: what is read from beyond them shows."""
    numbers, room = torch.Size(shape).numel(), 512
    memory = torch.full((numbers + 2 * room,), float("nan"), dtype=dtype)
    memory[room : room + numbers] = torch.randn(numbers)
    return memory[room : room + numbers].view(shape)


def inputs(size: int, prompts: int, key_heads: int, heads: int, dtype: torch.dtype, tokens: int = len(SLOTS)):
    """Queries, keys, gated values, lengths and slots; what lies past the end of shorter prompts is nan."""
    torch.manual_seed(0)
    query = inside((tokens, heads, size), dtype)
    key, value = inside((3, key_heads, prompts, size), dtype), inside((3, heads, prompts, size), dtype)
    lengths = torch.tensor([prompts, max(prompts // 2, 1), 0], dtype=torch.int32)
    for slot, length in enumerate(lengths.tolist()):
        key[slot, :, length:], value[slot, :, length:] = float("nan"), float("nan")
    slots = torch.tensor((SLOTS * (tokens // len(SLOTS) + 1))[: tokens + 3])  # the buffer is longer than the tokens
    return query, key, value, lengths, slots


def reference(query, key, value, lengths, slots, scale, softcap):
    """The term by its definition, in float64, token by token."""
    found, group = torch.zeros(query.shape, dtype=torch.float64), query.shape[1] // key.shape[1]
    for token, slot in enumerate(slots[: len(query)].tolist()):
        length = int(lengths[slot]) if slot >= 0 else 0
        for head in range(query.shape[1] if length else 0):
            scores = key[slot, head // group, :length].double() @ query[token, head].double() * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            found[token, head] = scores.softmax(0) @ value[slot, head, :length].double()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether nothing but rounding to the dtype (the interpreter cuts bf16 off), and what fp32 loses, lies between."""
    step = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 2e-6
    return bool(((found.double() - expected).abs() <= step * expected.abs() + 2e-6).all())


CASES = [
    *product([16, 20, 64, 80, 256], [10], [2], [0.0], [torch.float32]),
    *product([20, 128], [10], [2], [2.0], [torch.float32, torch.bfloat16]),
    (64, 1, 1, 0.0, torch.bfloat16),
    (64, 3, 4, 0.0, torch.bfloat16),
    (64, 33, 2, 0.0, torch.bfloat16),
    (64, 10, 2, 0.0, torch.float16),
]


@interpreted
@pytest.mark.parametrize(("size", "prompts", "key_heads", "softcap", "dtype"), CASES)
def test_the_kernel_is_the_definition(size, prompts, key_heads, softcap, dtype):
    given = inputs(size, prompts, key_heads, 4, dtype)
    query, key, value, lengths, slots = given
    found = on_cuda(query, key, value, lengths, slots[: len(query)], size**-0.5, softcap)
    expected = reference(*given, size**-0.5, softcap)
    assert found.dtype == dtype
    assert close(found, expected)
    assert (found[[3, 4]] == 0).all()
    assert (found[[0, 1, 2, 5]] != 0).any(-1).all()
    by_torch = gated_prompts(
        query.flatten(1), key.nan_to_num(), value.nan_to_num(), lengths, slots, size**-0.5, softcap
    )
    near = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]  # it rounds scores and weights too
    torch.testing.assert_close(by_torch.view_as(found), found, atol=near, rtol=near)


@interpreted
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_any_number_of_tokens(tokens):
    given = inputs(16, 5, 1, 1, torch.float32, tokens)
    found = on_cuda(*given[:4], given[4][:tokens], 0.25, 0.0)
    assert found.shape == (tokens, 1, 16)
    assert close(found, reference(*given, 0.25, 0.0))


@interpreted
@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of an exp whose infinity is meant
def test_queries_need_not_be_contiguous_and_large_scores_are_no_trouble():
    query, key, value, lengths, slots = inputs(16, 5, 2, 4, torch.float32)
    apart = torch.cat([query, query], -1)[..., :16]
    for scale, softcap in ((300.0, 0.0), (300.0, 30.0), (1e4, 1e-2)):
        found = on_cuda(apart, key, value, lengths, slots[: len(query)], scale, softcap)
        torch.testing.assert_close(
            found.double(), reference(query, key, value, lengths, slots, scale, softcap), atol=1e-3, rtol=1e-3
        )


@compiled
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    ("kind", "heads", "key_heads", "prompts", "size"), [("bf16", 32, 8, 10, 128), ("fp32", 4, 4, 1, 80)]
)
def test_the_kernel_compiles_to_machine_code(target, kind, heads, key_heads, prompts, size):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(_kernel.arg_names, "constexpr") | dict.fromkeys(("out", "query", "key", "value"), f"*{kind}")
    types |= {"lengths": "*i32", "slots": "*i64", "scale": "fp32", "softcap": "fp32"}
    sizes = {"HEADS": heads, "KEY_HEADS": key_heads, "PROMPTS": prompts, "SIZE": size}
    blocks = {"BLOCK_K": triton.next_power_of_2(prompts), "BLOCK_D": triton.next_power_of_2(size)}
    made = triton.compile(ASTSource(_kernel, types, constexprs=sizes | blocks), target=GPUTarget(*target))
    assert len(made.asm["cubin" if target[0] == "cuda" else "hsaco"]) > 1000
    assert made.metadata.shared <= 48 * 1024
