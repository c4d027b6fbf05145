"""Packed attention in one call: FlashAttention over rows of unlike lengths, on GPUs in half precision.

`attend` of `packed_attention.py` runs once per example; here all of them, and the prefix, are one kernel. Queries stay
where they are. Keys and values are gathered so that each example's own stand behind a copy of the prefix's: causal,
aligned to the end, each query then sees the prefix and what is before it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ranges:
    """Where the parts of a packed row lie: the prefix, of P tokens, and the N examples behind it, of each section.

    Attributes:
        queries: [parts + 1] int32, where the queries of each part begin, and the end.
        keys: likewise for the gathered keys.
        longest: most queries, and most keys, of one part.
        source: [M] int64, the token that each gathered key and value is of.
        homes: of each section where its tokens went: of its examples, [own tokens] int64, and of the copies of its
            prefix, [N + 1, P] int64.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    source: Tensor
    homes: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(sections: Iterable[tuple[int, Sequence[int]]], device: torch.device | None = None) -> "Ranges":
        """Ranges for sections of a prefix of so many tokens, and examples with so many of their own."""

        def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        parts: list[int] = []
        spans: list[int] = []
        source: list[int] = []
        homes = []
        first = 0  # token of a section
        for prefix, lengths in sections:
            own: list[int] = []
            copies: list[range] = []
            begin = first
            for length in [0, *lengths] if prefix else lengths:
                copies.append(range(len(source), len(source) + prefix))
                source += range(first, first + prefix)
                begin = max(begin, first + prefix)
                own += range(len(source), len(source) + length)
                source += range(begin, begin + length)
                begin += length
                parts.append(length or prefix)
                spans.append(prefix + length)
            homes.append((tensor(own), tensor([list(copy) for copy in copies]).reshape(len(copies), prefix)))
            first += prefix + sum(lengths)
        return Ranges(
            queries=tensor([0, *accumulate(parts)], torch.int32),
            keys=tensor([0, *accumulate(spans)], torch.int32),
            longest=(max(parts), max(spans)),
            source=tensor(source),
            homes=tuple(homes),
        )


class _Gathered(torch.autograd.Function):
    """states[source], whose backward adds the copies of a prefix in fp32 instead of one after another in half."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, ranges: Ranges) -> Tensor:
        ctx.ranges = ranges
        return states[ranges.source]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient, ranges = gradients[0], ctx.ranges
        pieces = []
        for own, prefix in ranges.homes:
            pieces += [gradient[prefix].sum(0, dtype=torch.float32).to(gradient.dtype), gradient[own]]
        return torch.cat(pieces), None


def fits(query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether the kernel computes what is asked: half precision on CUDA, no soft cap, sinks or dropout."""
    plain = options.get("softcap") is None and options.get("s_aux") is None and not options.get("dropout")
    size = query.shape[-1]  # called directly, the kernel does not pad heads of other sizes as sdpa does: it fails
    known = size <= 256 and size % 8 == 0
    return query.device.type == "cuda" and query.dtype in HALF and known and plain and _sees_the_end()


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
