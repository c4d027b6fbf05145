"""The state of a run after every step, in two files that take turns: a kill costs the step that was being computed.

They are written over in place and left to the operating system to bring to the disk, which is so much cheaper than a
checkpoint that it can be done after every step. What a kill tore, or a loss of power, does not fit its checksum: the
other file, or the checkpoint before, counts then.
"""

import json
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from llama_adapter.files import write_all

JOURNAL_FILES = ("journal.0", "journal.1")
SHARE, QUICK = 0.1, 0.05
"""The journal may take this share of a run's time; a write that is quicker than so many seconds is always made."""
_MAGIC = b"adapter\1"
_HEADER = struct.Struct("<8sQI")
"""The mark, the length of what follows and its CRC-32."""


@dataclass(frozen=True)
class State:
    """What a run goes on from: facts as text, and tensors by name; `source` says which file they are from."""

    facts: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    source: Path

    @property
    def step(self) -> int:
        """How many steps were finished.

        Raises:
            KeyError, TypeError, ValueError: it does not say.
        """
        return int(json.loads(self.facts["progress"])["step"])


class Journal:
    """Writes and reads the two files in a folder, one of so many that share the time of a run."""

    def __init__(self, folder: Path, together: int = 1) -> None:
        self.folder, self.together = folder, together
        self._turn = 0
        self._costs: deque[float] = deque(maxlen=10)
        self._last = -float("inf")

    @property
    def cost(self) -> float:
        """Seconds that a write takes; the least of the last ten, as others may have had the processor."""
        return min(self._costs, default=0.0)

    @property
    def period(self) -> float:
        """Seconds between writes that keep to their share of the time."""
        cost = self.cost * self.together
        return 0.0 if cost <= QUICK else cost / SHARE

    def is_due(self) -> bool:
        """Whether a write now keeps to its share of the time."""
        return time.monotonic() - self._last >= self.period

    def write(self, content: Callable[[], bytes]) -> None:
        """Write a state, over the older of the two.

        Args:
            content: makes it, in safetensors' format with the facts as metadata.

        Raises:
            OSError: the disk is full or forbidden; the other file is whole.
        """
        began = time.monotonic()
        body = content()
        path = self.folder / JOURNAL_FILES[self._turn % 2]
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                write_all(handle, _HEADER.pack(_MAGIC, len(body), zlib.crc32(body)))
                write_all(handle, body)
            finally:
                os.close(handle)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._turn += 1
        self._last = time.monotonic()
        self._costs.append(self._last - began)

    def newest(self) -> State | None:
        """The newest whole state; the next write goes over the other file."""
        state = max(self.whole(), key=lambda state: state.step, default=None)
        if state is not None:
            self._turn = JOURNAL_FILES.index(state.source.name) + 1
        return state

    def whole(self) -> list[State]:
        """The states in the files that are not torn."""
        found = []
        for name in JOURNAL_FILES:
            path = self.folder / name
            try:
                content = path.read_bytes()
                magic, length, checksum = _HEADER.unpack_from(content)
                body = content[_HEADER.size : _HEADER.size + length]
                if magic != _MAGIC or len(body) != length or zlib.crc32(body) != checksum:
                    continue
                facts = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
                state = State(facts, load(body), path)
                state.step  # noqa: B018
            except (OSError, struct.error, SafetensorError, KeyError, TypeError, ValueError):
                continue
            found.append(state)
        return found
