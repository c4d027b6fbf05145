"""Keep what was computed from some tensors for as long as none of them changes.

Decoding reads the same prompt keys and values at every step, so they are computed once. Under gradients nothing
is kept: a kept value would hide the prompt from its own gradient.
"""

import operator
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class _Stamp:
    """The tensors that a value was computed from, and the state they were in."""

    tensors: tuple[Tensor, ...]
    state: tuple[object, ...]

    def matches(self, other: "_Stamp") -> bool:
        same_length = len(self.tensors) == len(other.tensors)
        return same_length and self.state == other.state and all(map(operator.is_, self.tensors, other.tensors))


class PromptCache(Generic[T]):
    """Holds one value; `get` recomputes it when a source tensor was replaced, moved or written to."""

    def __init__(self) -> None:
        # One attribute, read once and replaced whole: threads may share a model.
        self._kept: tuple[_Stamp, T] | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_kept": None}  # copies and pickles start empty

    def get(self, key: Hashable, sources: Iterable[Tensor], like: Tensor, compute: Callable[[], T]) -> T:
        """The kept value, or `compute()`.

        Args:
            key: what is asked for; another key is another value.
            sources: every tensor that the value is computed from.
            like: has the device and dtype that the value is wanted in.
            compute: called when the value is not there or stale.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return compute()
        tensors = tuple(sources)
        if any(tensor.is_inference() for tensor in tensors):
            return compute()  # inference tensors do not count their changes
        state = (key, like.device, like.dtype, *((tensor._version, tensor.data_ptr()) for tensor in tensors))
        stamp = _Stamp(tensors, state)
        kept = self._kept
        if kept is None or not kept[0].matches(stamp):
            self._kept = kept = (stamp, compute())
        return kept[1]
