"""A key-value cache with room for more tokens, where transformers' own is copied whole at every step."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens that there is room for at least, when a layer takes new memory."""


class GrowingLayer(DynamicLayer):
    """Keys and values [B, kv heads, tokens, D] of one layer, at the front of tensors with room for more."""

    keys: Tensor
    values: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._store: tuple[Tensor, Tensor] | None = None
        self._shown: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, kv heads, new, D]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        now = seen + key_states.shape[-2]
        if self._store is None or self.keys is not self._shown or now > self._store[0].shape[-2]:
            self._store = self._with_room(key_states, self.keys, now), self._with_room(value_states, self.values, now)
        keys, values = self._store
        keys[:, :, seen:now] = key_states
        values[:, :, seen:now] = value_states
        self.keys, self.values = keys[:, :, :now], values[:, :, :now]
        self._shown = self.keys  # other keys, put here by beam search or a crop, are not in the store
        return self.keys, self.values

    def take_in(self, other: "GrowingLayer") -> None:
        """Lay the rows of another layer below these; whichever is shorter gets zeros on the left."""
        tokens = max(self.get_seq_length(), other.get_seq_length())
        self._hold(*(
            torch.cat([pad(part, (0, 0, tokens - part.shape[-2], 0)) for part in parts])
            for parts in ((self.keys, other.keys), (self.values, other.values))
        ))  # fmt: skip

    def keep(self, rows: Tensor, tokens: int) -> None:
        """Keep these rows alone, int64 [B], and of theirs the last `tokens`."""
        self._hold(self.keys[:, :, -tokens:][rows], self.values[:, :, -tokens:][rows])

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self._store = keys, values, None

    @staticmethod
    def _with_room(new: Tensor, old: Tensor, needed: int) -> Tensor:
        store = new.new_empty(*new.shape[:2], needed + max(ROOM, needed // 4), new.shape[3])
        if old.numel():
            store[:, :, : old.shape[-2]] = old
        return store


class GrowingCache(DynamicCache):
    """An empty cache for a model, whose rows stand flush right.

    Layers whose attention sees only a window of tokens keep all of them, so that rows of unlike length can be laid
    together; the mask hides what lies before the window.
    """

    layers: list[Any]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        grows = (DynamicLayer, DynamicSlidingWindowLayer)
        self.layers = [GrowingLayer() if type(layer) in grows else layer for layer in self.layers]

    def take_in(self, other: "GrowingCache") -> None:
        """Lay another cache's rows below these."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.take_in(its)

    def keep(self, rows: Tensor, tokens: int) -> None:
        """Keep these rows alone, int64 [B], and of theirs the last `tokens`."""
        for layer in self.layers:
            layer.keep(rows, tokens)
