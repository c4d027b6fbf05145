"""`use_adapter` blocks: which of them the code that runs right now stands in.

A block belongs to the `with` statement that opened it, so it is found by looking up the call stack for the function
that has that statement. That holds for a generator too, whoever resumes it, in whatever thread, and for several that
take turns. Context variables, which `asyncio.to_thread` carries along, come second. Work that was handed to another
thread in any other way stands in no block that could be seen from there: it is refused as long as a block is open,
since it may have been meant for that one.
"""

import contextlib
import inspect
import sys
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor

from llama_adapter.core.routing import Adapter
from llama_adapter.core.zero_init import Prompts
from llama_adapter.errors import AdapterError

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_visible: ContextVar[tuple["Block", ...]] = ContextVar("llama_adapter_blocks", default=())


@dataclass(eq=False)
class Request:
    """What somebody wants to be served by.

    Attributes:
        adapters: one adapter (None: the bare base) for all rows, or a tuple with one per row.
        condition: [B, 1, hidden] or [B, K, hidden], a row each; None adds nothing.
        repeats: whether rows may come several times over, as they do for beams and returned sequences.
        prompts: what one generation keeps of what it projected; None keeps nothing.
    """

    adapters: Adapter | tuple[Adapter | None, ...] | None
    condition: Tensor | None = None
    repeats: bool = False
    prompts: dict[int, Prompts | None] | None = None

    def uses(self, adapter: Adapter) -> bool:
        """Whether a row of it is served by `adapter`."""
        return adapter in self.adapters if isinstance(self.adapters, tuple) else adapter is self.adapters


@dataclass(eq=False)
class Block:
    """A request that holds for the body of a `with` statement."""

    scope: "Scope"
    request: Request
    frame: FrameType | None = field(default=None, repr=False)

    def __enter__(self) -> None:
        if self.frame is not None:
            raise AdapterError("This use_adapter block is open already: call use_adapter again for another.")
        self.frame = _owner(sys._getframe(1))
        self.scope.blocks = (*self.scope.blocks, self)
        _visible.set((*_visible.get(), self))

    def __exit__(self, *exception: Any) -> None:
        self.scope.blocks = tuple(block for block in self.scope.blocks if block is not self)
        _visible.set(tuple(block for block in _visible.get() if block is not self))
        self.frame = None


class Scope:
    """The open blocks of one model."""

    def __init__(self) -> None:
        # Replaced whole, never changed: threads read it without a lock.
        self.blocks: tuple[Block, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": ()}  # a copy of the model stands in no block

    def current(self) -> Request | None:
        """The request of the innermost block around the caller; None where no block is open at all.

        Raises:
            AdapterError: blocks are open, and none can be seen from here.
        """
        blocks = self.blocks
        if not blocks:
            return None
        of_frame = {id(block.frame): block for block in blocks}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if (found := of_frame.get(id(frame))) is not None:
                return found.request
            frame = frame.f_back
        seen = [block for block in _visible.get() if block in blocks]
        if not seen:
            raise AdapterError(
                "A use_adapter block is open, but not around this call, which runs in another thread or context: "
                "say here what is wanted, with model(..., adapter_names=...), model.generate(..., adapter_names=...) "
                "or a use_adapter block of its own."
            )
        return seen[-1].request


def _owner(frame: FrameType | None) -> FrameType | None:
    """The function whose `with` statement opens a block: contextlib, and what it runs, may stand between."""
    while frame is not None:
        above = frame.f_back
        managed = above is not None and above.f_code.co_filename == contextlib.__file__
        helper = frame.f_code.co_filename == contextlib.__file__
        if not helper and not (managed and frame.f_code.co_flags & _GENERATORS):
            return frame
        frame = above
    return None
