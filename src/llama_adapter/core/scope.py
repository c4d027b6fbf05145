"""`use_adapter` blocks: which of them the code that runs right now stands in.

A block belongs to the function whose `with` statement opened it, so it is found by looking up the call stack for that
function. That holds for a generator too, whoever resumes it, in whatever thread, and for several that take turns.
Context variables, which `asyncio.to_thread` carries along, come second. Work that was handed to another thread in any
other way stands in no block that could be seen from there: it is refused as long as a block is open, since it may
have been meant for that one.
"""

import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor

from llama_adapter.core.routing import Adapter
from llama_adapter.core.zero_init import Prompts
from llama_adapter.errors import AdapterError

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_SUSPENDED = _GENERATORS | inspect.CO_COROUTINE
_visible: ContextVar[tuple["Block", ...]] = ContextVar("llama_adapter_blocks", default=())


@dataclass(eq=False)
class Request:
    """What somebody wants to be served by.

    Attributes:
        adapters: one adapter (None: the bare base) for all rows, or a tuple with one per row.
        condition: [B, 1, hidden] or [B, K, hidden], a row each; None adds nothing.
        generation: whether it is that of one `generate`, whose rows come as often as there are beams and returned
            sequences, and which serves nobody but that.
        inputs: how many prompts a generation was given; None where that cannot be told.
        batch: rows of a generation's forwards, once the first has told.
        prompts: what a generation keeps of what it projected.
    """

    adapters: Adapter | tuple[Adapter | None, ...] | None
    condition: Tensor | None = None
    generation: bool = False
    inputs: int | None = None
    batch: int | None = None
    prompts: dict[int, Prompts | None] | None = None

    def uses(self, adapter: Adapter) -> bool:
        """Whether a row of it is served by `adapter`."""
        return adapter in self.adapters if isinstance(self.adapters, tuple) else adapter is self.adapters


@dataclass(eq=False)
class Block:
    """A request that holds for the body of a `with` statement."""

    scope: "Scope"
    request: Request
    frames: tuple[FrameType, ...] = field(default=(), repr=False)

    def __enter__(self) -> None:
        if self.frames:
            raise AdapterError("This use_adapter block is open already: call use_adapter again for another.")
        self.frames = tuple(_owners(sys._getframe(1)))
        with self.scope.lock:
            self.scope.blocks = (*self.scope.blocks, self)
        if not self.request.generation:
            _visible.set((*_visible.get(), self))

    def __exit__(self, *exception: Any) -> None:
        with self.scope.lock:
            self.scope.blocks = tuple(block for block in self.scope.blocks if block is not self)
        _visible.set(tuple(block for block in _visible.get() if block is not self))
        self.frames = ()

    def owner(self, running: Mapping[int, int]) -> FrameType | None:
        """The function that the block stands in, seen from a thread with these functions on its stack.

        A helper that opened it and has returned hands it to its caller; a generator keeps it while it is suspended.
        """
        return next((f for f in self.frames if id(f) in running or f.f_code.co_flags & _SUSPENDED), None)


class Scope:
    """The open blocks of one model, and the adapters that an engine is answering with."""

    def __init__(self) -> None:
        # Replaced whole under the lock, never changed: threads read them without it.
        self.lock = threading.Lock()
        self.blocks: tuple[Block, ...] = ()
        self.held: tuple[tuple[Adapter | None, ...], ...] = ()

    def __reduce__(self) -> tuple[type["Scope"], tuple[()]]:
        return Scope, ()  # a copy of the model stands in no block

    def uses(self, adapter: Adapter) -> bool:
        """Whether a block, a generation or an engine needs `adapter` right now."""
        return any(block.request.uses(adapter) for block in self.blocks) or any(adapter in held for held in self.held)

    @contextlib.contextmanager
    def holding(self, adapters: tuple[Adapter | None, ...]) -> Iterator[None]:
        """Within the block these adapters cannot be removed; it chooses nobody for a forward."""
        with self.lock:
            self.held = (*self.held, adapters)
        try:
            yield
        finally:
            with self.lock:
                self.held = tuple(held for held in self.held if held is not adapters)

    def current(self) -> Request | None:
        """The request of the innermost block around the caller; None where no block is open at all.

        Raises:
            AdapterError: blocks are open, and none can be seen from here.
        """
        blocks = self.blocks
        if not blocks:
            return None
        running: dict[int, int] = {}  # function -> how many others stand between
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            running[id(frame)] = len(running)
            frame = frame.f_back
        owners = [(block, block.owner(running)) for block in reversed(blocks)]
        around = [(running[id(owner)], block) for block, owner in owners if id(owner) in running]
        if around:
            return min(around, key=lambda found: found[0])[1].request  # of several in one function the latest
        hidden = [block for block, owner in owners if owner is not None and owner.f_code.co_flags & _GENERATORS]
        seen = [block for block in _visible.get() if block in blocks and block not in hidden]
        if seen:
            return seen[-1].request
        if all(block.request.generation for block in blocks):
            return None  # of other threads, which is no business of this call
        raise AdapterError(
            "A use_adapter block is open, but not around this call, which runs in another thread or context: "
            "say here what is wanted, with model(..., adapter_names=...), model.generate(..., adapter_names=...) "
            "or a use_adapter block of its own."
        )


def _owners(frame: FrameType | None) -> Iterator[FrameType]:
    """The functions that may own a block, innermost first: contextlib, and what it runs, only stand between."""
    while frame is not None:
        above = frame.f_back
        managed = above is not None and above.f_code.co_filename == contextlib.__file__
        helper = frame.f_code.co_filename == contextlib.__file__
        if not helper and not (managed and frame.f_code.co_flags & _GENERATORS):
            yield frame
        frame = above
