"""Keep what was computed from some parameters and tensors for as long as none of them changes.

Decoding reads the same prompt keys and values at every step, so they are computed once. Under gradients nothing
is kept: a kept value would hide the prompt from its own gradient. A look at the cache happens in every layer at every
step, so it is a few comparisons and walks through no module.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Place = tuple[nn.Module, str]
"""A module, and the name under which it holds another."""


@dataclass(frozen=True, slots=True)
class _Kept(Generic[T]):
    """A value with what it was computed from.

    Attributes:
        key: what was asked for.
        held: each module or parameter that was read, with the dictionary and the name that it was found by.
        states: each tensor's number of changes and its memory, which `tensor.data = ...` replaces.
        value: what came of it.
    """

    key: Hashable
    held: Sequence[tuple[Mapping[str, Any], str, Any]]
    states: Sequence[tuple[Tensor, int, int]]
    value: T


class PromptCache(Generic[T]):
    """Holds one value for as long as no tensor that it came from is replaced, moved or written to."""

    def __init__(self) -> None:
        # One attribute, read once and replaced whole: threads may share a model.
        self._kept: _Kept[T] | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_kept": None}  # copies and pickles start empty

    def find(self, key: Hashable) -> T | None:
        """The value that was kept under `key`, or None where it must be computed."""
        kept = self._kept
        if kept is None or kept.key != key or not _keeps():
            return None
        for names, name, value in kept.held:
            if names.get(name) is not value:
                return None
        for tensor, version, memory in kept.states:
            if tensor._version != version or tensor.data_ptr() != memory:
                return None
        return kept.value

    def keep(self, key: Hashable, value: T, places: Sequence[Place], tensors: Sequence[Tensor] = ()) -> T:
        """Keep `value` under `key` in place of what was kept, and return it.

        Args:
            key: what was asked for; another key is another value.
            value: what was computed.
            places: where the modules are held whose parameters it was computed from.
            tensors: what else it was computed from.
        """
        self._kept = None
        if _keeps():
            held = _held(places)
            read = [*tensors, *(tensor for _, _, tensor in held if isinstance(tensor, Tensor))]
            if not any(tensor.is_inference() for tensor in read):  # those do not count their changes
                self._kept = _Kept(key, held, [(t, t._version, t.data_ptr()) for t in read], value)
        return value


def _keeps() -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _held(places: Sequence[Place]) -> list[tuple[Mapping[str, Any], str, Any]]:
    """The modules in these places, all that is below them, and their parameters."""
    found: list[tuple[Mapping[str, Any], str, Any]] = []
    for holder, name in places:
        module = holder._modules.get(name)
        found.append((holder._modules, name, module))
        if module is not None:
            found += [(module._parameters, key, value) for key, value in module._parameters.items()]
            found += _held([(module, key) for key in module._modules])
    return found
