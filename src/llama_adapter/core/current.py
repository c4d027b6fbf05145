"""Which routing the layer that runs right now was called with, for modules that get no arguments beside their input.

A forward's routing is an argument of the decoder and of each of its layers. What lies deeper, such as a linear of the
feed-forward, finds it here for as long as that call runs, in the thread that runs it: nothing is left afterwards.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Calls(threading.local):
    """The calls that this thread is in, outermost first: who was called, and with which routing."""

    def __init__(self) -> None:
        self.stack: list[tuple[Any, Any]] = []


_calls = _Calls()


def current_routing() -> Any:
    """The `Routing` of the innermost call around the caller; None is the bare base."""
    return _calls.stack[-1][1] if _calls.stack else None


def enter(who: Any, routing: Any) -> None:
    """Begin a call; one of the same `who`, which Ctrl-C ended without `leave`, is forgotten with all inside it."""
    stack = _calls.stack
    for place, (other, _) in enumerate(stack):
        if other is who:
            del stack[place:]
            break
    stack.append((who, routing))


def leave(who: Any) -> None:
    """End a call, if it was begun."""
    if _calls.stack and _calls.stack[-1][0] is who:
        _calls.stack.pop()


@contextmanager
def under(routing: Any) -> Iterator[None]:
    """Within the block this is the current routing."""
    who = object()
    enter(who, routing)
    try:
        yield
    finally:
        leave(who)
