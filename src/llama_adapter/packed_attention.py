"""Attention over examples laid end to end in one row, behind a prefix that all of them share. torch only.

    row        prefix | example 1 | example 2 | ...        positions restart behind the prefix
    sees       each example its own tokens and the prefix, causally; the prefix itself

What each token gets is exactly what it would get in a row of its own, so loss and gradients are those of the examples
one by one; the prefix is computed once, and nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEGMENTS = "packed_segments"
"""Name of the keyword argument that carries `Segments` from a model's forward to its attention."""


@dataclass(frozen=True)
class Segments:
    """Where the examples of a packed row lie.

    Attributes:
        prefix: tokens at the front that belong to all of them; may be 0.
        bounds: first and last-but-one position of each example's own tokens, in order and without gaps.
        masks: what each example sees, [1, 1, own, prefix + own] bool; empty without a prefix, where causal says it all.
    """

    prefix: int
    bounds: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...] = ()

    @staticmethod
    def of(prefix: int, lengths: Sequence[int]) -> "Segments":
        """Segments for examples with so many tokens of their own."""
        bounds, start = [], prefix
        for length in lengths:
            bounds.append((start, start + length))
            start += length
        masks = [torch.ones(1, 1, length, prefix + length, dtype=torch.bool).tril(prefix) for length in lengths]
        return Segments(prefix, tuple(bounds), tuple(masks) if prefix else ())

    def to(self, device: torch.device) -> "Segments":
        """The same on `device`."""
        return Segments(self.prefix, self.bounds, tuple(mask.to(device, non_blocking=True) for mask in self.masks))


def attend(
    segments: Segments,
    text_attention: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **kwargs: Any,
) -> Tensor:
    """What `text_attention` (of transformers' interface) gives each example of a packed row.

    Args:
        segments: where they lie.
        text_attention: called once for the prefix and once for every example.
        module: the attention module.
        query: [1, H, T, D], rotated by positions that restart behind the prefix.
        key: [1, kv heads, T, D].
        value: as `key`.
        kwargs: handed on.

    Returns:
        [1, T, H, D].
    """
    shared = segments.prefix
    sizes = [shared, *(end - start for start, end in segments.bounds)]
    # Split, not sliced: the backward of a slice fills a tensor of the whole row with zeros, for every example anew.
    (first_query, *queries), (first_key, *keys), (first_value, *values) = (
        states.split(sizes, 2) for states in (query, key, value)
    )
    outputs = []
    if shared:
        outputs.append(text_attention(module, first_query, first_key, first_value, None, **kwargs)[0])
        keys = [torch.cat([first_key, own], 2) for own in keys]
        values = [torch.cat([first_value, own], 2) for own in values]
    masks = segments.masks or [None] * len(queries)
    for own in zip(queries, keys, values, masks, strict=True):
        outputs.append(text_attention(module, *own, **kwargs)[0])
    return torch.cat(outputs, 1)
