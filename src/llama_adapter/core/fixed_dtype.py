"""Modules that a change of the model's precision moves but does not cast."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class FixedDtype(nn.Module):
    """A module whose tensors keep their dtypes through `model.to(bfloat16)` and its kin."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self
