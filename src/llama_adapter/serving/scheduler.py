"""Who is answered when: requests wait in line, join the running batch between two steps, and leave it when they end."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from llama_adapter.errors import LlamaAdapterError
from llama_adapter.inference.batch import Batch, Member, stretches_beyond
from llama_adapter.inference.choice import Choice, Row
from llama_adapter.inference.engine import Engine

log = logging.getLogger(__name__)
T = TypeVar("T")

PREFILL = 4096
"""Prompt tokens, padding included, that join at once; one long prompt may have more."""

PIECE = 512
"""Of those, how many are read between two steps, so that others' answers go on."""

CLOSING = "The server is shutting down: ask another one."

LATE = "The request took longer than the server allows: ask for less, or later."


class BusyError(LlamaAdapterError):
    """The line is full."""


class ClosingError(LlamaAdapterError):
    """The server is shutting down."""


@dataclass(eq=False)
class Ticket:
    """A request in line or in the batch.

    Attributes:
        rows: its answers, written side by side.
        on_token: called in the decoding thread with a row's number and its next token; returns whether that row has
            enough, such as after a stop string.
        on_end: called there once, with None where every row has ended and else with what went wrong.
        deadline: when it ends, done or not, by `time.monotonic`.
    """

    rows: Sequence[Row]
    on_token: Callable[[int, Choice], bool]
    on_end: Callable[[Exception | None], None]
    deadline: float
    cancelled: bool = False
    members: list[Member] = field(default_factory=list)
    open: set[int] = field(default_factory=set)

    def over(self, closing: float) -> Exception | None:
        """What ends it where its time is over, or that of the whole server, which closes at `closing`."""
        now = time.monotonic()
        return ClosingError(CLOSING) if now > closing else TimeoutError(LATE) if now > self.deadline else None


class Scheduler:
    """Drives an engine from a thread of its own.

    Args:
        engine: decodes; nobody else may for as long as a batch runs.
        max_rows: answers side by side.
        max_waiting: answers in line.
    """

    def __init__(self, engine: Engine, max_rows: int, max_waiting: int) -> None:
        self.engine, self.max_rows, self.max_waiting = engine, max_rows, max_waiting
        self._beyond = stretches_beyond(engine.model.config)
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._joining: list[Ticket] = []
        self._suspects: deque[Ticket] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._news = threading.Condition()
        self._closing, self._until = False, float("inf")
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers in the batch."""
        return sum(len(ticket.open) for ticket in tuple(self._running))

    @property
    def waiting(self) -> int:
        """Answers in line."""
        return sum(len(ticket.rows) for ticket in tuple(self._waiting))

    @property
    def alive(self) -> bool:
        """Whether requests are answered: until those are done that were there when it was told to close."""
        return self._thread.is_alive()

    @property
    def open(self) -> bool:
        """Whether new requests are taken, too."""
        return self.alive and not self._closing

    def submit(self, ticket: Ticket) -> None:
        """Put a request in line.

        Raises:
            BusyError: the line is full, or the request has more rows than the batch.
            ClosingError: the server is shutting down.
        """
        with self._news:
            if not self.open:
                raise ClosingError(CLOSING)
            if self._waiting and self.waiting + len(ticket.rows) > self.max_waiting:
                raise BusyError(f"{self.waiting} answers are waiting, and no more than {self.max_waiting} may.")
            self._waiting.append(ticket)
            self._news.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Let a request go that nobody waits for any more; its `on_end` is not called."""
        with self._news:
            ticket.cancelled = True
            self._news.notify()

    def drain(self, seconds: float) -> None:
        """Take no more requests, and give those there are some time to end; told twice, the shorter one."""
        with self._news:
            self._closing, self._until = True, min(self._until, time.monotonic() + seconds)
            self._news.notify()

    def close(self, seconds: float) -> None:
        """Drain, wait for the end, and stop."""
        self.drain(seconds)
        self._thread.join(seconds + 10)

    def between_steps(self, work: Callable[[], T]) -> "Future[T]":
        """Do something to the model while no step runs, such as loading an adapter; in the decoding thread."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._news:
            if self._closing:
                raise ClosingError(CLOSING)
            self._jobs.append(job)
            self._news.notify()
        return future

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._waiting and not self._jobs:
                    if self._closing:
                        return
                    self._news.wait()
            self._do_jobs()
            try:
                with self.engine.batch() as batch:
                    self._answer(batch)
            except Exception as error:  # a fault of the batch is one of all its requests, and the server goes on
                log.exception("the running batch failed")
                failed = [*self._running, *self._suspects]
                self._running, self._joining = [], []
                self._suspects.clear()
                for ticket in failed:
                    ticket.open.clear()
                    tell(ticket, error)

    def _do_jobs(self, batch: Batch | None = None) -> None:
        """Do what is asked by now, once those have left whom nobody waits for: it may remove what was theirs."""
        jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
        if batch is not None:
            self._let_go(batch, [])
        for job in jobs:
            job()

    def _answer(self, batch: Batch) -> None:
        while True:
            self._do_jobs(batch)
            self._let_in(batch)
            self._read_on(batch)
            if not batch.members:
                if batch.joining or self._suspects:
                    continue
                return
            places = {id(member): (t, i) for t in self._running for i, member in enumerate(t.members)}
            ended: list[Member] = []
            for member, choice in batch.choose():
                ticket, number = places[id(member)]
                if enough(ticket, number, member, choice):
                    ticket.open.discard(number)
                    ended.append(member)
            self._let_go(batch, ended)
            batch.advance()

    def _let_go(self, batch: Batch, ended: list[Member]) -> None:
        """Let the rows that have ended leave, and requests that are done, late or given up, be they still joining."""
        over = {ticket: ticket.over(self._until) for ticket in self._running}
        done = [ticket for ticket, why in over.items() if not ticket.open or ticket.cancelled or why]
        for ticket in done:
            self._running.remove(ticket)
            ended += [ticket.members[number] for number in ticket.open]
        if ended:
            batch.drop(ended)  # before anybody is told: then nothing of theirs is in use any more
        for ticket in done:
            tell(ticket, over[ticket] if ticket.open else None)
            ticket.open.clear()

    def _let_in(self, batch: Batch) -> None:
        """Let waiting requests begin to join while there is room, in their order."""
        new: list[Ticket] = []
        with self._news:
            late = {ticket: ticket.over(self._until) for ticket in self._waiting}
            gone = [ticket for ticket, why in late.items() if ticket.cancelled or why]
            for ticket in gone:  # wherever they stand: behind one that finds no room they would fill the line
                self._waiting.remove(ticket)
            rows, longest = len(batch.members), 0
            while self._waiting and not batch.joining and not self._suspects:
                ticket = self._waiting[0]
                longest = max(longest, *(len(row.tokens) for row in ticket.rows))
                joining = sum(len(other.rows) for other in new) + len(ticket.rows)
                full = rows + joining > self.max_rows and (rows or new)
                if full or (new and joining * longest > PREFILL) or not self._may_stand_beside(ticket, new):
                    break
                new.append(self._waiting.popleft())
        for ticket in gone:
            tell(ticket, late[ticket])
        if self._suspects and not batch.joining:
            new = [self._suspects.popleft()]
        if new:
            self._begin(batch, new)

    def _may_stand_beside(self, ticket: Ticket, new: Sequence[Ticket]) -> bool:
        """Whether nobody's rotations would be scaled by the length of another's rows."""

        def stretches(one: Ticket) -> bool:
            return any(len(row.tokens) + row.max_new_tokens > (self._beyond or 0) for row in one.rows)

        others = [*self._running, *new]
        return self._beyond is None or not others or not any(map(stretches, (ticket, *others)))

    def _begin(self, batch: Batch, new: list[Ticket]) -> None:
        """Admit requests, whose prompts are read from now on."""
        self._running += new
        self._joining = new
        try:
            members = batch.admit([row for ticket in new for row in ticket.rows])
            for ticket in new:
                ticket.members, members = members[: len(ticket.rows)], members[len(ticket.rows) :]
                ticket.open = set(range(len(ticket.rows)))
            batch.begin([member for ticket in new for member in ticket.members])
        except Exception as error:
            self._could_not_join(batch, error)

    def _read_on(self, batch: Batch) -> None:
        """Read a piece of the prompts of those who are joining."""
        try:
            batch.read(PIECE)
        except Exception as error:
            self._could_not_join(batch, error)

    def _could_not_join(self, batch: Batch, error: Exception) -> None:
        """Say so to the one whose fault it is; of several, each joins alone, to find out who."""
        failed = [ticket for ticket in self._joining if ticket in self._running]
        batch.drop([member for ticket in failed for member in ticket.members])
        for ticket in failed:
            self._running.remove(ticket)
            ticket.members, ticket.open = [], set()
        if len(failed) > 1:
            self._suspects += failed
            return
        log.debug("a request could not join the batch", exc_info=error)
        for ticket in failed:
            tell(ticket, error)


def enough(ticket: Ticket, number: int, member: Member, choice: Choice) -> bool:
    """Hand a token over; whether the row has ended. A fault of the one who takes it ends that request alone."""
    if ticket.cancelled:
        return False  # it leaves with all of its rows
    try:
        return ticket.on_token(number, choice) or member.ended
    except Exception as error:
        log.exception("a request failed")
        tell(ticket, error)
        ticket.cancelled = True
        return False


def tell(ticket: Ticket, error: Exception | None) -> None:
    """Say that a request has ended, unless nobody waits for it."""
    if ticket.cancelled:
        return
    try:
        ticket.on_end(error)
    except Exception:  # whoever asked is gone
        log.debug("nobody heard that a request ended", exc_info=True)
