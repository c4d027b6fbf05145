"""Linear layers that read the same input, computed as one product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llama_adapter.core.parts import PartsHook


class Joined:
    """Several linear layers as one.

    The weights of plain layers become slices of one tensor, which takes no memory of its own: the modules keep their
    parameters, and whoever reads or saves those finds what was there. Layers of other kinds are called one by one. Made
    for as long as the layers' weights are not moved or replaced.

    Attributes:
        weight: the layers' weights one below the other, [all of their out, in]; None where they are not plain.
        bias: their biases likewise, or None.
    """

    def __init__(self, *layers: Any) -> None:
        self.layers = layers
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if all(map(is_plain, layers)) and len({layer.bias is None for layer in layers}) == 1:
            self.sizes = [len(layer.weight) for layer in layers]
            self.weight = as_slices([layer.weight for layer in layers])
            self.bias = None if layers[0].bias is None else as_slices([layer.bias for layer in layers])

    def __call__(self, inputs: Tensor) -> Tensor:
        """[..., in] -> what the layers give, side by side: [..., all of their out]."""
        if self.weight is None:
            return torch.cat([layer(inputs) for layer in self.layers], -1)
        return linear(inputs, self.weight, self.bias)

    def each(self, inputs: Tensor) -> Sequence[Tensor]:
        """[..., in] -> what each layer gives, [..., out]."""
        if self.weight is None:
            return [layer(inputs) for layer in self.layers]
        return self(inputs).split_with_sizes(self.sizes, -1)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias and nothing else, but for what adapters of other batches have there."""
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    hooked = not all(isinstance(hook, PartsHook) for hook in hooks) or "forward" in vars(layer)
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooked


@torch.inference_mode(False)  # a parameter that was made in it could not learn afterwards
@torch.no_grad()
def as_slices(parts: Sequence[Tensor]) -> Tensor:
    """One tensor that `parts` are slices of from now on, along its first dimension; they may be that already."""
    first = parts[0]
    begins, ends = [part.data_ptr() for part in parts], [part.data_ptr() + part.nbytes for part in parts]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) == 1 and begins[1:] == ends[:-1] and all(part.is_contiguous() for part in parts):
        return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = piece
    return whole
