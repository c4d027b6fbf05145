"""Which adapter serves which row, under which condition: an argument of the forward, from there to attention.

Shape letters as in `zero_init.py`, and A distinct adapters in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llama_adapter.core.current import under
from llama_adapter.core.tensor_parallel import own_heads
from llama_adapter.core.zero_init import Projection, Prompts, ZeroInitAdapter, project_prompts
from llama_adapter.errors import AdapterError

Names = str | None | Sequence[str | None]
"""An adapter's name, None for the bare base, or a list with one of these per row of the batch."""


@dataclass(eq=False)
class Adapter:
    """Handle of one adapter on one model. Whoever holds it still holds the parameters after a removal.

    Attributes:
        name: what `use_adapter` calls it.
        config: its `AdapterConfig`, with `adapter_layers` and `base_shape` filled in.
        layers: the base's layer index -> the parameters there, lowest layer first.
        condition: what turns features of a picture into a condition, where the configuration asks for one.
        modules: `norms.{path}`, `linears.{path}`, `lora.{path}` -> the parameters there, for modules in the decoder.
        homes: the same names -> those modules of the base.
        removed: whether it has been taken off its model.
    """

    name: str
    config: Any
    layers: Mapping[int, ZeroInitAdapter]
    condition: nn.Module | None = None
    modules: Mapping[str, Any] = field(default_factory=dict, repr=False)
    homes: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    removed: bool = False

    @property
    def early_fusion(self) -> bool:
        """Whether a condition is all that the first layers read, and not added to the prompts of the top ones."""
        return self.config.condition is not None and self.config.condition.layers is not None

    @property
    def parts(self) -> dict[str, Any]:
        """Prefix -> module with `adapter_params()`: what saving, counting, training and loading are written over."""
        condition = {} if self.condition is None else {"condition": self.condition}
        return {**{f"layers.{i}": layer for i, layer in self.layers.items()}, **self.modules, **condition}

    def named_parameters(self) -> "list[tuple[str, nn.Parameter]]":
        """`layers.{i}.prompt` [K, hidden] and `layers.{i}.gate` [heads] of each adapted layer i, then all others."""
        return [(f"{prefix}.{key}", p) for prefix, part in self.parts.items() for key, p in part.adapter_params()]

    def parameters(self) -> list[nn.Parameter]:
        """Its trainable parameters."""
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Its parameters by the names of `named_parameters`, fp32; views of the memory that they are in."""
        return {key: parameter.detach() for key, parameter in self.named_parameters()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave. Keys and shapes must be right already (`formats` checks files)."""
        with torch.no_grad():
            for key, mine in self.state_dict().items():
                mine.copy_(tensors[key])

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained: L x (K x hidden + heads) for prompts and gates, and those of other parts."""
        return sum(parameter.numel() for parameter in self.parameters())


@dataclass(eq=False)
class Routing:
    """What one forward is told.

    Attributes:
        adapters: the distinct adapters of the batch; None is the bare base.
        rows: [B] int64, which of them serves each row; None where one serves them all.
        condition: [B, 1, hidden] or [B, K, hidden], added to each row's prompts; None adds nothing.
        prompts: what layers read, by their index: None where every forward projects anew; a dictionary that belongs
            to one generation, filled on its first step; or all of them, from an engine that has them ready.
        ready: whether `prompts` is complete; a layer that is not in it then reads none.
        spans: in a batch of one packed row, how many tokens each of `adapters` serves, in their order; without `rows`
            and `condition`.
    """

    adapters: tuple[Adapter | None, ...]
    rows: Tensor | None = None
    condition: Tensor | None = None
    prompts: dict[int, Prompts | None] | None = None
    ready: bool = False
    spans: tuple[int, ...] | None = None

    def refuse_removed(self) -> None:
        """Stop a forward whose adapters are no longer all on the model.

        Raises:
            AdapterError: one was taken off while it ran.
        """
        for adapter in self.adapters:
            if adapter is not None and adapter.removed:
                raise AdapterError(f"Adapter '{adapter.name}' was removed while a forward used it: ask again.")


class PartsSlot(nn.Module):
    """What adapters have for one module of the base, as submodules, so that it moves and is saved with the model."""

    def get(self, adapter: Adapter | None) -> Any:
        """What `adapter` has here, or None."""
        return None if adapter is None else self._modules.get(module_key(adapter.name))

    def put(self, name: str, module: nn.Module | None) -> None:
        """Let the adapter of this name have `module` here, in place of what it had."""
        if module is not None:
            self.add_module(module_key(name), module)
        else:
            self._modules.pop(module_key(name), None)


class AdapterSlot(PartsSlot):
    """The prompts and gates of one attention module."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self._projection = projection

    def prompts(self, attention: nn.Module, routing: Routing, query: Tensor) -> Prompts | None:
        """What the rows of `query` [B, H, T, D], or its spans, read; None where no adapter of theirs has this layer."""
        if routing.ready:
            return (routing.prompts or {}).get(attention.layer_idx)  # type: ignore[call-overload]
        if routing.prompts is None or torch.is_grad_enabled():
            return self._of_rows(attention, routing, query)
        layer: Any = attention.layer_idx
        kept = routing.prompts.get(layer)
        if kept is None or kept.key.dtype != query.dtype or len(kept.key) != len(query):
            kept = routing.prompts[layer] = self._of_rows(attention, routing, query)
        return kept

    def _of_rows(self, attention: nn.Module, routing: Routing, query: Tensor) -> Prompts | None:
        with under(None):  # scales, biases and LoRA are on text: prompts take the base's own projections
            return self._projected(attention, routing, query)

    def _projected(self, attention: nn.Module, routing: Routing, query: Tensor) -> Prompts | None:
        layers: list[ZeroInitAdapter | None] = [self.get(adapter) for adapter in routing.adapters]
        routing.refuse_removed()  # after the look-up, and said before a removal: no gap between the two
        # What has a gate only reads the condition alone, and nothing without one.
        alone = [layer is not None and not len(layer.prompt) for layer in layers]
        if routing.condition is None:
            layers = [None if only else layer for layer, only in zip(layers, alone, strict=True)]
        if not any(layers):
            return None
        prompt, strength, bias = stacked(layers, query)
        strength = own_heads(strength, attention, query.shape[1])
        added = [a is not None and not a.early_fusion for a in routing.adapters]
        if routing.condition is None or not any(alone + added):
            key, value, _ = project_prompts(attention, self._projection, prompt, strength, query.dtype)
            prompts = Prompts(key, value, bias)
            return prompts if routing.spans is not None else _per_row(routing.rows, len(query), prompts)
        condition = routing.condition.to(prompt)  # [B, 1 or K, hidden]
        rows = query.new_zeros(len(query), dtype=torch.int64) if routing.rows is None else routing.rows.to(query.device)
        prompt, strength, bias = prompt[rows], strength[rows], None if bias is None else bias[rows]
        if any(layer is not None and yes for layer, yes in zip(layers, added, strict=True)):
            # Beside longer prompts, which are then all in early fusion, one of K vectors ends early.
            missing = 0 if condition.shape[1] == 1 else prompt.shape[1] - condition.shape[1]
            prompt = prompt + pad(condition, (0, 0, 0, missing)) * prompt.new_tensor(added)[rows, None, None]
        if any(alone):
            only = torch.tensor(alone, device=query.device)[rows]
            prompt, strength, bias = beside(prompt, strength, bias, condition, only, query)
        key, value, _ = project_prompts(attention, self._projection, prompt, strength, query.dtype)
        return Prompts(key, value, bias)


def beside(
    prompt: Tensor, strength: Tensor, bias: Tensor | None, condition: Tensor, alone: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Early fusion: rows that read their condition alone, among rows that read prompts.

    Args:
        prompt, strength, bias: [B, K, hidden], [B, H] and None or [B, 1, 1, K], what `stacked` gave each row.
        condition: [B, C, hidden]; one of zeros, of a row without a picture, is not read.
        alone: [B], which rows read it.
        like: in whose dtype the bias is.

    Returns:
        prompts [B, K + C, hidden], strengths, and a bias that shows each row the one or the other.
    """
    present = condition.flatten(1).any(1)
    strength = strength * (present | ~alone)[:, None]
    before, added = prompt.shape[1], condition.shape[1]
    if not before:  # all other rows are on the bare base, whose strength is 0
        return condition, strength, None
    bias = like.new_zeros(len(prompt), 1, 1, before) if bias is None else bias
    here, there = (
        alone[:, None, None, None].expand(-1, 1, 1, before),
        ~alone[:, None, None, None].expand(-1, 1, 1, added),
    )
    bias = torch.cat([bias, like.new_zeros(len(prompt), 1, 1, added)], -1)
    return torch.cat([prompt, condition], 1), strength, bias.masked_fill(torch.cat([here, there], -1), float("-inf"))


def stacked(layers: Sequence[ZeroInitAdapter | None], like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Several adapters of unlike length side by side, on the device of `like`.

    Returns:
        prompts [A, longest K, hidden], zeros past the end of shorter ones; act(g) [A, H], 0 for the bare base; and a
        bias [A, 1, 1, K] in the dtype of `like`, -inf past the end, or None where all are as long.
    """
    first = next(layer for layer in layers if layer is not None)
    lengths = [0 if layer is None else len(layer.prompt) for layer in layers]
    longest = max(lengths)
    no_prompt, no_strength = first.prompt.new_zeros(0, first.prompt.shape[1]), torch.zeros_like(first.gate)
    prompts = [no_prompt if layer is None else layer.prompt for layer in layers]
    prompt = torch.stack([pad(p, (0, 0, 0, longest - len(p))) if len(p) < longest else p for p in prompts])
    strength = torch.stack([no_strength if layer is None else layer.strength() for layer in layers])
    if all(length in (0, longest) for length in lengths):
        return prompt.to(like.device), strength.to(like.device), None
    bias = like.new_zeros(len(lengths), 1, 1, longest)
    for row, length in zip(bias, lengths, strict=True):
        row[..., length or longest :] = float("-inf")
    return prompt.to(like.device), strength.to(like.device), bias


def _per_row(rows: Tensor | None, batch: int, prompts: Prompts) -> Prompts:
    """The prompts of every row of a batch; where one adapter serves them all, no memory is taken."""
    key, value, bias = prompts
    if rows is not None:
        rows = rows.to(key.device)
        return Prompts(key[rows], value[rows], None if bias is None else bias[rows])
    of_all = (batch, -1, -1, -1)
    return Prompts(key.expand(of_all), value.expand(of_all), None if bias is None else bias.expand(of_all))


def module_key(name: str) -> str:
    """Submodule name of adapter `name`: PyTorch allows no dot in it, adapter names allow no colon."""
    return "adapter_" + name.replace(".", ":")
