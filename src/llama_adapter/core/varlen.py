"""Packed attention in one call: FlashAttention over rows of unlike lengths, on GPUs in half precision.

`attend` of `packed_attention.py` runs once per example; here all of them, and the prefix, are one kernel. Queries stay
where they are. Keys and values are gathered so that each example's own stand behind a copy of the prefix's: causal,
aligned to the end, each query then sees the prefix and what is before it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ranges:
    """Where the parts of a packed row lie, for N examples behind a prefix of P tokens.

    Attributes:
        queries: [N + 2] int32, where the queries of the prefix and of each example begin, and the end; without the
            first where P is 0.
        keys: likewise for the gathered keys.
        longest: most queries, and most keys, of one part.
        source: [M] int64, the token that each gathered key and value is of.
        own: [T - P] int64, where the examples' own tokens went.
        prefix: [N + 1, P] int64, where the copies of the prefix went.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    source: Tensor
    own: Tensor
    prefix: Tensor

    @staticmethod
    def of(prefix: int, lengths: Sequence[int], device: torch.device | None = None) -> "Ranges":
        """Ranges for examples with so many tokens of their own."""
        parts = [prefix, *lengths] if prefix else list(lengths)
        spans = [prefix, *(prefix + length for length in lengths)] if prefix else list(lengths)
        starts = [0, *accumulate(spans)]
        source: list[int] = []
        own: list[int] = []
        begin = prefix
        for number, length in enumerate(lengths, start=1 if prefix else 0):
            source += [*range(prefix), *range(begin, begin + length)]
            own += range(starts[number] + prefix, starts[number + 1])
            begin += length
        copies = [list(range(start, start + prefix)) for start in starts[:-1]] if prefix else []

        def int32(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def int64(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return Ranges(
            queries=int32([0, *accumulate(parts)]),
            keys=int32(starts),
            longest=(max(parts), max(spans)),
            source=int64([*range(prefix), *source]),
            own=int64(own),
            prefix=int64(copies).reshape(len(copies), prefix),
        )


class _Gathered(torch.autograd.Function):
    """states[source], whose backward adds the copies of the prefix in fp32 instead of one after another in half."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, ranges: Ranges) -> Tensor:
        ctx.ranges = ranges
        return states[ranges.source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient, ranges = gradients[0], ctx.ranges
        shared = gradient[ranges.prefix].sum(0, dtype=torch.float32).to(gradient.dtype)
        return torch.cat([shared, gradient[ranges.own]]), None


def fits(query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether the kernel computes what is asked: half precision on CUDA, no soft cap, sinks or dropout."""
    plain = options.get("softcap") is None and options.get("s_aux") is None and not options.get("dropout")
    return query.device.type == "cuda" and query.dtype in HALF and query.shape[-1] <= 256 and plain and _sees_the_end()


def attend_at_once(
    ranges: Ranges,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Each example's attention over the prefix and itself.

    Args:
        ranges: where they lie.
        query: [1, H, T, D].
        key: [1, kv heads, T, D].
        value: as `key`.
        scaling: of the scores; None is D ** -0.5, which is the kernel's own.
        kernel: in place of torch's, with the arguments of `_varlen`.

    Returns:
        [1, T, H, D].
    """
    group = query.shape[1] // key.shape[1]
    rows = query[0].transpose(0, 1)
    if scaling is not None:
        rows = rows * (scaling * query.shape[-1] ** 0.5)
    keys, values = (_Gathered.apply(states[0].transpose(0, 1), ranges) for states in (key, value))
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return (kernel or _varlen)(rows, keys, values, ranges.queries, ranges.keys, *ranges.longest)[None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int
) -> Tensor:
    """torch's kernel, causal; how that is said has changed between its versions."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(query, key, value, queries, keys, most_queries, most_keys, **_causal())  # type: ignore[return-value]


@cache
def _causal() -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}


@cache
def _sees_the_end() -> bool:
    """Whether this build has the kernel, and aligns fewer queries than keys to the end, as the gathered keys need."""
    try:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
        query, key, value = (torch.randn(length, 1, 64, **shape) for length in (2, 5, 5))  # type: ignore[call-overload]
        queries, keys = (torch.tensor([0, length], dtype=torch.int32, device="cuda") for length in (2, 5))
        found = _varlen(query, key, value, queries, keys, 2, 5)[:, 0].float()
    except (ImportError, RuntimeError, TypeError, ValueError):
        return False
    scores = query[:, 0].float() @ key[:, 0].float().T / 8
    scores[0, 4] = float("-inf")
    return bool((found - scores.softmax(-1) @ value[:, 0].float()).abs().max() < 0.05)
