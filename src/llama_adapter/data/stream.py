"""Records read as they are needed: no more of a source is in memory than one window, in which they are shuffled.

.jsonl, .ndjson, .json with a record a line, and these packed by gzip or zstd     read line by line
.parquet                                                                          read batch by batch
owner/name, owner/name:split                                                      a dataset on the hub, by `datasets`

Files and patterns are read here and not by `datasets`, which takes the kinds of all columns from the first megabytes:
a key or a kind that comes later, or one bad line, ends the reading there.
The order is a function of the seed, the pass over the data and the records: files change places from pass to pass, and
each window of records is shuffled in itself, so that a resumed run refills one window and no more.
"""

import gzip
import hashlib
import io
import os.path
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llama_adapter.data.examples import Example
from llama_adapter.data.formats import parse_record
from llama_adapter.data.kinds import (
    LINE_SUFFIXES,
    STDIN,
    check_file,
    data_files,
    packing_of,
    suffix_of,
    without_nulls,
    zstd_reader,
)
from llama_adapter.data.records import hub_parts, open_hub
from llama_adapter.data.sources import SOURCES, parsed
from llama_adapter.data.strict_json import Unreadable, decode
from llama_adapter.data.unchanged import FINGERPRINTED, Known
from llama_adapter.errors import DataError, MissingExtraError

LONGEST_LINE = 2**26
"""Bytes; a packed file could unpack to one line without end."""
_ROWS = 256


class Raw(NamedTuple):
    """One record as it was read: its source, its number there, the source's folder, and a line's bytes or a row."""

    source: str
    number: int
    folder: Path
    content: Any

    @property
    def origin(self) -> str:
        """Where it stands, for people."""
        return f"{self.source}, record {self.number}"

    def example(self, parse: Callable[[object], Example] = parse_record) -> Example:
        """What it says, read by `parse`.

        Raises:
            DataError: it is unreadable or breaks a rule; the message begins with its origin.
        """
        try:
            value = self.content
            if isinstance(value, bytes):
                value = decode(value.rstrip(b"\r\n").decode("utf-8", "surrogateescape"), self.number)
                if isinstance(value, Unreadable):
                    raise DataError(value.reason)
            example = parsed(value, self.folder, parse)
        except DataError as error:
            raise DataError(f"{self.origin}: {error}") from None
        return replace(example, origin=self.origin)


class Mark(NamedTuple):
    """Where a part is read on: how many records (lines, also blank ones) lie before, and what finds the place."""

    number: int = 0
    place: Any = None


BEGINNING = Mark()


class Reader(Protocol):
    """Reads a part from a mark on."""

    def __iter__(self) -> Iterator[Raw]:
        """The records that are left."""

    def mark(self) -> Mark:
        """Where the next one begins."""


class Lines:
    """A file with a record a line; its place is the offset of the next line, in unpacked bytes."""

    def __init__(self, path: Path, mark: Mark) -> None:
        self.path, self.name, self.folder, self.number = path, str(path), path.parent, mark.number
        self.file = _unpacked(path)
        if mark.place:
            with _readable(path):
                _go_to(self.file, mark.place)

    def __iter__(self) -> Iterator[Raw]:
        """The records that are left; blank lines are none."""
        with self.file, _readable(self.path):
            while line := self.file.readline(LONGEST_LINE + 1):
                if self.number == 0:
                    line = self._first(line)
                self.number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{self.path}, line {self.number} is longer than {LONGEST_LINE:,} bytes.")
                if line.strip():
                    yield Raw(self.name, self.number, self.folder, line)

    def mark(self) -> Mark:
        """Where the next line begins."""
        return Mark(self.number, self.file.tell())

    def _first(self, line: bytes) -> bytes:
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path} is UTF-16, not UTF-8: save it as UTF-8.")
        line = line.removeprefix(b"\xef\xbb\xbf")
        if line.lstrip().startswith(b"["):
            raise DataError(
                f"{self.path} is one JSON list, which is read as a whole: for --streaming write one record a line "
                "(.jsonl), or leave --streaming out."
            )
        return line


class Rows:
    """A parquet file; groups of rows that lie before the mark are not read."""

    def __init__(self, path: Path, mark: Mark) -> None:
        self.path, self.name, self.folder, self.number = path, str(path), path.parent, mark.number
        try:
            from pyarrow import parquet
        except ImportError:
            raise MissingExtraError("pyarrow", "datasets", f"reading {path}") from None
        with _readable(path):
            self.file = parquet.ParquetFile(path, pre_buffer=False)

    def __iter__(self) -> Iterator[Raw]:
        """The rows that are left."""
        with self.file, _readable(self.path):
            skip, metadata = self.number, self.file.metadata
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                if skip >= count:
                    skip -= count
                    continue
                batches = self.file.iter_batches(batch_size=_ROWS, row_groups=[group])
                for row in islice((row for batch in batches for row in batch.to_pylist()), skip, None):
                    self.number += 1
                    yield Raw(self.name, self.number, self.folder, without_nulls(row))
                skip = 0

    def mark(self) -> Mark:
        """Where the next row is."""
        return Mark(self.number)


class HubRows:
    """A dataset on the hub; its place is what `datasets` says of it."""

    def __init__(self, name: str, split: str, mark: Mark) -> None:
        self.name, self.number = f"{name}:{split}", mark.number
        self.rows = open_hub(name, split, lambda rows: rows, streaming=True)
        if mark.place is not None:
            self.rows.load_state_dict(mark.place)

    def __iter__(self) -> Iterator[Raw]:
        """The rows that are left."""
        try:
            for row in self.rows:
                self.number += 1
                yield Raw(self.name, self.number, Path(), without_nulls(row))
        except Exception as error:  # datasets, hub and network libraries raise dozens of unrelated types here
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise DataError(f"{self.name} cannot be read on after record {self.number} ({reason}).") from error

    def mark(self) -> Mark:
        """Where the next row is."""
        return Mark(self.number, self.rows.state_dict())


@dataclass(frozen=True)
class StreamPart:
    """A file or a dataset on the hub, which is read from its beginning to its end.

    Attributes:
        name: the file's path, or the dataset's "owner/name".
        split: of a dataset on the hub; None for a file.
        known: the file as it was before its first record was read.
    """

    name: str
    split: str | None = None
    known: Known | None = None

    def read(self, mark: Mark = BEGINNING) -> Reader:
        """Open it where the mark is.

        Raises:
            DataError: it cannot be read, or only as a whole.
            MissingExtraError: a package is not installed.
        """
        self.check()
        if self.split is not None:
            return HubRows(self.name, self.split, mark)
        path = Path(os.path.expanduser(self.name))
        return Rows(path, mark) if suffix_of(self.name) == ".parquet" else Lines(path, mark)

    @property
    def digest(self) -> bytes:
        """SHA-256 of what tells it from others, where it is known; a dataset on the hub, of its name."""
        return (
            hashlib.sha256(f"{self.name}:{self.split}".encode()).digest() if self.known is None else self.known.digest
        )

    def check(self) -> None:
        """Check that the file is still the one that is known.

        Raises:
            DataError: it is not.
        """
        if self.known is not None:
            self.known.check()


def parts_of(sources: Sequence[str]) -> list[StreamPart]:
    """The files and datasets of these sources, which can be read as a stream.

    Raises:
        DataError: one cannot be, or is not there.
        MissingExtraError: a package is not installed.
    """
    names: list[str] = []
    for source in sources:
        prefix = source.partition(":")[0]
        if source in (STDIN, "bundled") or (prefix in SOURCES and prefix != source):
            raise DataError(f"{source} is read as a whole: leave --streaming out, or give files of lines or parquet.")
        names += data_files(source)
    parts = [_part(name, FINGERPRINTED // len(names)) for name in names]
    for part in parts:
        if next(iter(part.read()), None) is None:
            raise DataError(f"{part.name} holds no records: give a source with at least one.")
    return parts


def _part(name: str, blocks: int) -> StreamPart:
    hub = hub_parts(name)
    if hub is not None:
        return StreamPart(*hub)
    _check_streamed(name)
    path = Path(os.path.expanduser(name))
    with _readable(path):
        return StreamPart(name, known=Known.of(path, blocks))


def _check_streamed(name: str) -> None:
    path, suffix = Path(os.path.expanduser(name)), suffix_of(name)
    check_file(path, piped=False)
    if suffix not in (".json", *LINE_SUFFIXES, ".parquet") or (suffix == ".parquet" and packing_of(path)):
        raise DataError(
            f"{path} is read as a whole: for --streaming write it as .jsonl (also .gz, .zst) or as .parquet, or leave "
            "--streaming out."
        )


class Stream:
    """All parts again and again, in an order of its own each time, shuffled in windows.

    Args:
        parts: what is read.
        window: so many records are shuffled at a time.
        seed: of the order.
        held: the part, by its place among `parts`, and where in it the records begin that are read; those before are
            held out.
    """

    def __init__(
        self, parts: Sequence[StreamPart], window: int, seed: int, held: tuple[int, Mark] = (0, BEGINNING)
    ) -> None:
        self.parts, self.window, self.seed, self.held = parts, window, seed, held
        self.seek(None)

    def seek(self, position: dict[str, Any] | None) -> None:
        """Go to where `position` was taken; None is the beginning."""
        found = position or {"pass": 0, "window": 0, "part": 0, "number": 0, "place": None, "taken": 0}
        self._begin(found["pass"], found["window"], found["part"], Mark(found["number"], found["place"]))
        if found["taken"]:
            self._fill()
            self._taken = found["taken"]

    @property
    def position(self) -> dict[str, Any]:
        """Where the next record is, as JSON has it."""
        part, mark = self._start
        return {
            "pass": self.passes, "window": self._windows, "part": part, "number": mark.number, "place": mark.place,
            "taken": self._taken,
        }  # fmt: skip

    def take(self, count: int) -> list[Raw]:
        """The next records of this pass, at most `count`; none at its end, after which the next pass begins.

        Raises:
            DataError: a part cannot be read.
        """
        if self._taken == len(self._buffer):
            if self._buffer:
                self._windows += 1
                self._start = (self._part, self._mark())
            self._fill()
            if not self._buffer:
                self._begin(self.passes + 1, 0, 0, BEGINNING)
                return []
        taken = self._buffer[self._taken : self._taken + count]
        self._taken += len(taken)
        return taken

    def _begin(self, passes: int, windows: int, part: int, mark: Mark) -> None:
        self.passes, self._windows, self._part = passes, windows, part
        self._order = list(range(self.held[0], len(self.parts)))
        random.Random(f"{self.seed} {passes}").shuffle(self._order)
        self._buffer: list[Raw] = []
        self._taken = 0
        self._records = self._from(mark)
        self._start = (part, mark)

    def _from(self, mark: Mark) -> Iterator[Raw]:
        """The records from there to the end of the pass."""
        while self._part < len(self._order):
            index = self._order[self._part]
            if mark == BEGINNING and index == self.held[0]:
                mark = self.held[1]
            self._reader = self.parts[index].read(mark)
            yield from self._reader
            self.parts[index].check()  # one that was cut while it was read ends early
            self._part += 1
            mark = BEGINNING

    def _mark(self) -> Mark:
        return self._reader.mark() if self._part < len(self._order) else BEGINNING

    def _fill(self) -> None:
        self._buffer, self._taken = [], 0  # the old window is let go before the new one is read
        self._buffer = list(islice(self._records, self.window))
        if self._part < len(self._order):
            self.parts[self._order[self._part]].check()  # no window of a file that was changed is learnt from
        random.Random(f"{self.seed} {self.passes} {self._windows}").shuffle(self._buffer)


def first_records(parts: Sequence[StreamPart]) -> Iterator[tuple[Raw, tuple[int, Mark]]]:
    """Records in the order of the parts, each with where the one behind it is."""
    for index, part in enumerate(parts):
        reader = part.read()
        for raw in reader:
            yield raw, (index, reader.mark())
        part.check()


def _unpacked(path: Path) -> Any:
    """A file of lines, opened and unpacked as it is read."""
    packing = packing_of(path)
    if packing == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"), 2**20)
    if packing == ".zst":
        return io.BufferedReader(zstd_reader(path), 2**20)
    return path.open("rb", 2**20)


def _go_to(file: Any, place: int) -> None:
    if file.seekable():
        file.seek(place)
        return
    while place and (passed := file.read(min(place, 2**20))):
        place -= len(passed)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the block into one sentence about the file."""
    try:
        yield
    except EOFError:
        raise DataError(f"{path} is cut off: take a whole copy.") from None
    except (OSError, ValueError, OverflowError, zlib.error) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}): take another copy.") from None
