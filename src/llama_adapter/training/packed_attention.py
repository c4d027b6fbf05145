"""Attention over examples laid end to end in one row, behind a prefix that all of them share.

    row        prefix | example 1 | example 2 | ...        positions restart behind the prefix
    sees       each example its own tokens and the prefix, causally; the prefix itself

A row may have several such sections, one behind the other, each with a prefix of its own: those of an expert each.

What each token gets is exactly what it would get in a row of its own, so loss and gradients are those of the examples
one by one; the prefix is computed once, and nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.core.attention import SEGMENTS
from llama_adapter.core.parts import decoder_and_layers
from llama_adapter.errors import TrainingError
from llama_adapter.training.varlen import Ranges, attend_at_once, fits

FIXED_SHAPE = {"gpt2"}
"""Families whose decoder gives its output the shape of its input."""
BY_TOKEN = ("position_ids", "position_embeddings")
"""Arguments of a decoder layer that are [1, T, ...], beside the hidden states."""


@dataclass(frozen=True)
class Segments:
    """Where the examples of a packed row lie.

    Attributes:
        prefix: tokens at the front that belong to all of them; may be 0.
        lengths: tokens that each example has of its own, in order.
        device: where the row is; None is the CPU.
    """

    prefix: int
    lengths: tuple[int, ...]
    device: torch.device | None = None

    def to(self, device: torch.device) -> "Segments":
        """The same for a row on `device`."""
        return Segments(self.prefix, self.lengths, device)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """What each example sees, [1, 1, own, prefix + own] bool; without a prefix None, as causal says it all."""
        if not self.prefix:
            return [None] * len(self.lengths)
        shapes = ((1, 1, length, self.prefix + length) for length in self.lengths)
        return [torch.ones(shape, dtype=torch.bool, device=self.device).tril(self.prefix) for shape in shapes]

    @cached_property
    def ranges(self) -> Ranges:
        """The same for one call over all of them."""
        return Ranges.of([(self.prefix, self.lengths)], self.device)

    @property
    def tokens(self) -> int:
        """Of the prefix and all examples."""
        return self.prefix + sum(self.lengths)

    @torch.compiler.disable  # it would be compiled anew for every batch
    def attend(
        self,
        text_attention: Callable[..., tuple[Tensor, Any]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """What `text_attention` (of transformers' interface) gives each example of a packed row.

        Args:
            text_attention: called once for the prefix and for every example, where `varlen.py` has nothing quicker.
            module: the attention module.
            query: [1, H, T, D], rotated by positions that restart behind the prefix.
            key: [1, kv heads, T, D].
            value: as `key`.
            kwargs: handed on.

        Returns:
            [1, T, H, D].
        """
        if fits(query, kwargs):
            return attend_at_once(self.ranges, query, key, value, kwargs.get("scaling"))
        # Split, not sliced: the backward of a slice fills a tensor of the whole row with zeros, for every example anew.
        sizes = [self.prefix, *self.lengths]
        (first_query, *queries), (first_key, *keys), (first_value, *values) = (
            states.split(sizes, 2) for states in (query, key, value)
        )
        outputs = []
        if self.prefix:
            outputs.append(text_attention(module, first_query, first_key, first_value, None, **kwargs)[0])
            keys = [torch.cat([first_key, own], 2) for own in keys]
            values = [torch.cat([first_value, own], 2) for own in values]
        for own in zip(queries, keys, values, self.masks, strict=True):
            outputs.append(text_attention(module, *own, **kwargs)[0])
        return torch.cat(outputs, 1)


@dataclass(frozen=True)
class Sections:
    """Where the examples of a packed row of several sections lie.

    Attributes:
        parts: the sections, in order.
        device: where the row is; None is the CPU.
    """

    parts: tuple[Segments, ...]
    device: torch.device | None = None

    def to(self, device: torch.device) -> "Sections":
        """The same for a row on `device`."""
        return Sections(tuple(part.to(device) for part in self.parts), device)

    @cached_property
    def ranges(self) -> Ranges:
        """See `Segments.ranges`."""
        return Ranges.of([(part.prefix, part.lengths) for part in self.parts], self.device)

    @torch.compiler.disable
    def attend(
        self,
        text_attention: Callable[..., tuple[Tensor, Any]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """See `Segments.attend`."""
        if fits(query, kwargs):
            rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
            return torch.cat([attend_at_once(self.ranges, *row, kwargs.get("scaling")) for row in rows])
        sizes = [part.tokens for part in self.parts]
        pieces = zip(self.parts, *(states.split(sizes, 2) for states in (query, key, value)), strict=True)
        return torch.cat([part.attend(text_attention, module, *states, **kwargs) for part, *states in pieces], 1)


def joined(parts: Sequence[Segments]) -> Segments | Sections:
    """A row of these sections."""
    return parts[0] if len(parts) == 1 else Sections(tuple(parts))


@dataclass(frozen=True)
class SharedBelow:
    """A packed row that is shorter in the lowest layers, where sections of several experts are alike.

    There all of them share one prefix; from the lowest adapted layer on each has a copy that its own adapter changes.
    No adapter has anything in those layers, so what they compute is the same for all, and nothing learns there.

    Attributes:
        below: the row in the lowest layers.
        above: the row in the others.
        source: [T] int64, the token below that each one above comes from.
        layers: how many are the lowest.
    """

    below: Segments | Sections
    above: Segments | Sections
    source: Tensor
    layers: int

    def to(self, device: torch.device) -> "SharedBelow":
        """The same for a row on `device`."""
        return SharedBelow(self.below.to(device), self.above.to(device), self.source.to(device), self.layers)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never called: each layer is told which of the two rows it sees, by a `LayerHook`.

        Raises:
            TrainingError: it was not.
        """
        raise TrainingError("This base's layers were not told which tokens they share: pass --no-packing.")


def tell_layers(model: PreTrainedModel) -> bool:
    """Let the decoder's layers take rows that are shorter in the lowest of them; whether this base can."""
    decoder, layers = decoder_and_layers(model)
    if decoder.config.model_type in FIXED_SHAPE:
        return False
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(LayerHook(number), with_kwargs=True)
    return True


class LayerHook:
    """Forward pre-hook of the layer of this number: under `SharedBelow` it gets the row that it is to see."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        row = kwargs.get(SEGMENTS)
        if not isinstance(row, SharedBelow):
            return None
        if self.number < row.layers:
            return args, {**kwargs, SEGMENTS: row.below}
        taken = {key: _taken(kwargs[key], row.source) for key in BY_TOKEN if kwargs.get(key) is not None}
        if self.number == row.layers:
            args = (args[0][:, row.source], *args[1:])
        return args, {**kwargs, **taken, SEGMENTS: row.above}


def _taken(value: Any, source: Tensor) -> Any:
    """What belongs to tokens, of those at `source`: a tensor [1, T, ...] or a tuple of such."""
    return tuple(_taken(part, source) for part in value) if isinstance(value, tuple) else value[:, source]
