"""Slots: what many adapters' prompts are projected to, one tensor a layer, so that a row finds its own by a number."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.core.attention import SLOT
from llama_adapter.core.families import attention_modules
from llama_adapter.core.registry import device_of
from llama_adapter.core.routing import Adapter, Routing
from llama_adapter.core.zero_init import Prompts

BASE = 0
"""The slot of the bare base: values of 0, which add exactly 0."""


class Slots:
    """Keys and gated values [S, H, K, D] of each layer, zeros past the end of shorter prompts.

    A slot is filled when an adapter is admitted. Parameters that were trained, loaded or written since are found by
    comparing them with a copy, as no counter tells of every write; a changed base by projecting one adapter again.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Forget every adapter."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths: list[dict[int, int]] = [{}]  # K of every slot, by layer; BASE has none
        self.free: list[int] = []
        self.of: dict[Adapter, tuple[int, Tensor]] = {}

    def admit(self, adapter: Adapter) -> int:
        """The slot of an adapter, filled where its prompts are not what they were; `BASE` where it has none."""
        if not adapter.layers:
            return BASE
        parameters = [parameter for layer in adapter.layers.values() for parameter in layer.parameters()]
        now = torch.cat([parameter.detach().flatten() for parameter in parameters])
        slot, before = self.of.get(adapter, (None, None))
        if slot is None or before is None or not torch.equal(now, before):
            slot = self.fill(Routing((adapter,)), slot)
            self.of[adapter] = slot, now
        return slot

    @torch.no_grad()
    def check(self, adapter: Adapter | None) -> None:
        """Forget everything where the base, or a LoRA on it, is not what it was: one adapter's projection tells."""
        if adapter is None or adapter not in self.of:
            return
        slot = self.of[adapter][0]
        found = self._projected(Routing((adapter,)))
        for layer, prompts in found.items():
            stores = self.layers[layer]
            length = prompts.key.shape[2]
            for store, part in zip(stores, prompts[:2], strict=True):
                if store.dtype != part.dtype or not torch.equal(store[slot, :, :length], part[0]):
                    self.clear()
                    return

    def release(self, slot: int) -> None:
        """Let others have a slot."""
        self.free.append(slot)

    def drop_removed(self) -> None:
        """Release the slots of adapters that were taken off the model."""
        for adapter in [adapter for adapter in self.of if adapter.removed]:
            self.release(self.of.pop(adapter)[0])

    @torch.no_grad()
    def fill(self, routing: Routing, slot: int | None = None) -> int:
        """Project the prompts of one row, under its condition where it has one, into a slot; None takes a new one."""
        found = self._projected(routing)
        if slot is None and not self.free:
            self.free += range(2 * len(self.lengths) - 1, len(self.lengths) - 1, -1)
            self.lengths += [{} for _ in self.lengths]
        slot = self.free.pop() if slot is None else slot
        self.lengths[slot] = {layer: prompts.key.shape[2] for layer, prompts in found.items()}
        for layer in self.layers.keys() | found.keys():
            for i, store in enumerate(self._with_room(layer, found.get(layer))):
                store[slot] = 0
                if layer in found:
                    store[slot, :, : self.lengths[slot][layer]] = found[layer][i][0]  # type: ignore[index]
        return slot

    def rows(self, slots: Sequence[int]) -> dict[int, Prompts | None]:
        """What a batch reads: layer -> prompts [B, H, K, D]; empty where every row is on the bare base."""
        found: dict[int, Prompts | None] = {}
        for layer, stores in self.layers.items():
            lengths = [self.lengths[slot].get(layer, 0) for slot in slots]
            longest = max(lengths)
            if not longest:
                continue
            uneven = any(length not in (0, longest) for length in lengths)
            key, value = (store[:, :, :longest] for store in stores)
            if len(set(slots)) == 1:
                key, value = (part[slots[0]].expand(len(slots), -1, -1, -1) for part in (key, value))
            else:
                index = torch.tensor(slots, device=key.device)
                key, value = key.index_select(0, index), value.index_select(0, index)
            found[layer] = Prompts(key, value, past_the_end(lengths, key) if uneven else None)
        return found

    def _projected(self, routing: Routing) -> dict[int, Prompts]:
        """The prompts of one row, by layer."""
        like = torch.empty(1, 1, 1, 1, dtype=self.model.dtype)
        found: dict[int, Prompts] = {}
        for module in attention_modules(self.model):
            prompts = getattr(module, SLOT).prompts(module, routing, like.to(device_of(module)))
            if prompts is not None:
                found[int(module.layer_idx)] = prompts
        return found

    def _with_room(self, layer: int, new: Prompts | None) -> tuple[Tensor, Tensor]:
        """The tensors of a layer, large enough for every slot and the longest prompt."""
        old = self.layers.get(layer)
        size, longest = len(self.lengths), max(lengths.get(layer, 0) for lengths in self.lengths)
        if old is not None:  # the longest may have left since
            longest = max(longest, old[0].shape[2])
        if old is None or len(old[0]) < size or old[0].shape[2] < longest:
            like = new.key if old is None and new is not None else old[0]  # type: ignore[index]
            stores = tuple(like.new_zeros(size, like.shape[1], longest, like.shape[3]) for _ in range(2))
            for store, before in zip(stores, old or (), strict=False):
                store[: len(before), :, : before.shape[2]] = before
            self.layers[layer] = stores[0], stores[1]
        return self.layers[layer]


def past_the_end(lengths: Sequence[int], like: Tensor) -> Tensor:
    """-inf [B, 1, 1, longest K] past the end of shorter prompts; rows on the bare base, of length 0, read zeros."""
    longest = max(lengths)
    ends = torch.tensor([length or longest for length in lengths], device=like.device)
    hidden = torch.arange(longest, device=like.device) >= ends[:, None]
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))[:, None, None]
