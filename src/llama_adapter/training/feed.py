"""What the steps of a run learn from: batches of the examples in memory, or of a stream that is encoded as it goes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

from accelerate import PartialState
from accelerate.utils import gather_object

from llama_adapter.data.batches import global_batch, steps_per_epoch
from llama_adapter.data.encode import Encoded, encode_records, texts_of
from llama_adapter.data.examples import Example
from llama_adapter.data.formats import parse_record
from llama_adapter.data.limits import Limits
from llama_adapter.data.sources import MOST_SKIPPED, reject
from llama_adapter.data.stream import Raw, Stream
from llama_adapter.errors import DataError, LlamaAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Feed(Protocol):
    """Gives the global batch of each step, the same in every process."""

    @property
    def position(self) -> dict[str, Any] | None:
        """Where the next batch begins, for `seek`; None where the step alone says it."""

    def seek(self, position: dict[str, Any] | None) -> None:
        """Go on where `position` was taken."""

    def batch(self, step: int) -> list[Encoded]:
        """The examples of optimiser step `step` (from 0); steps are asked for in their order."""

    def epoch(self, step: int) -> float:
        """How often the data were gone through when `step` steps are done."""

    def summary(self) -> str:
        """What was learnt from, in a few words."""


@dataclass(frozen=True)
class MemoryFeed:
    """Every epoch is a permutation of all examples."""

    examples: Sequence[Encoded]
    batch_size: int
    seed: int
    position: None = None

    def seek(self, position: dict[str, Any] | None) -> None:
        """Nothing: the step says where a run is."""

    def batch(self, step: int) -> list[Encoded]:
        """See `global_batch`."""
        return [self.examples[i] for i in global_batch(len(self.examples), self.batch_size, step, self.seed)]

    def epoch(self, step: int) -> float:
        """Steps by those of an epoch."""
        return round(step / steps_per_epoch(len(self.examples), self.batch_size), 4)

    def summary(self) -> str:
        """How many examples there are."""
        count = len(self.examples)
        return f"{count:,} example{'s' * (count != 1)} to train on"


@dataclass
class RecordEncoder:
    """Makes texts of raw records; `raw` says whether all must be prompt-completion text."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str
    max_length: int
    now: datetime
    limits: Limits | None
    parse: Callable[[object], Example] = parse_record
    raw: bool = False

    def examples(self, records: Sequence[Raw]) -> list[Example | str]:
        """What each record says, or the sentence that says why nothing."""
        found: list[Example | str] = []
        for record in records:
            try:
                example = record.example(self.parse)
            except DataError as error:
                found.append(str(error))
                continue
            if self.raw and not example.raw:
                found.append(f"{example.origin}: it takes a template, and the first records are text without one")
            else:
                found.append(example)
        return found

    def encode(self, records: Sequence[Raw]) -> list[list[Encoded] | str]:
        """The texts of each record, or the sentence that says why there are none."""
        found = self.examples(records)
        sound = [example for example in found if not isinstance(example, str)]
        try:
            texts = iter(self._texts(sound))
        except DataError:  # of one of them
            return [example if isinstance(example, str) else self._alone(example) for example in found]
        return [example if isinstance(example, str) else next(texts) for example in found]

    def _alone(self, example: Example) -> list[Encoded] | str:
        try:
            return self._texts([example])[0]
        except DataError as error:
            text = str(error)
            return text if text.startswith(example.origin) else f"{example.origin}: {text}"

    def _texts(self, examples: Sequence[Example]) -> list[list[Encoded]]:
        encoded = encode_records(examples, self.template, self.tokenizer, self.max_length, self.now)
        if self.limits is not None:
            for texts in encoded:
                self.limits.check_ids((text.input_ids for text in texts_of(texts)), self.tokenizer)
        return encoded


@dataclass
class _Part:
    """What one process has of a batch's next records, or why it has none."""

    numbers: list[int] = field(default_factory=list)
    """Of all records, not only its own; processes may have the files elsewhere, under other names."""
    first: str = ""
    places: list[int] = field(default_factory=list)
    found: list[list[Encoded] | str] = field(default_factory=list)
    error: str | None = None


class StreamFeed:
    """Batches of a stream; each process parses and encodes its own part of a batch, and tells the others.

    A batch is `batch_size` texts, or a few more where its last record is several; at the end of a pass over the data it
    is what is left.
    """

    def __init__(self, stream: Stream, encoder: RecordEncoder, batch_size: int, skip_bad_records: bool) -> None:
        self.stream, self.encoder = stream, encoder
        self.batch_size, self.skip_bad_records = batch_size, skip_bad_records
        self.records = self.skipped = 0

    @property
    def position(self) -> dict[str, Any] | None:
        """Where the stream is, with the counts so far."""
        return {**self.stream.position, "records": self.records, "skipped": self.skipped}

    def seek(self, position: dict[str, Any] | None) -> None:
        """Go on there."""
        self.stream.seek(position)
        self.records, self.skipped = (position[key] if position else 0 for key in ("records", "skipped"))

    def batch(self, step: int) -> list[Encoded]:
        """The next texts.

        Raises:
            DataError: a record is bad and none may be skipped, no record is good, or a file cannot be read.
        """
        texts: list[Encoded] = []
        ended = False
        while len(texts) < self.batch_size:
            if records := self._next(self.batch_size - len(texts)):
                for found in records:
                    texts += self._kept(found)
            elif self.skipped == self.records or (ended and not texts):  # a whole pass: the files were changed
                raise DataError(f"No record is left to use ({self.skipped} skipped).")
            elif texts:
                break
            else:
                ended = True
        return texts

    def epoch(self, step: int) -> float:
        """Whole passes over the data, of which the number of steps is not known."""
        return self.stream.passes

    def summary(self) -> str:
        """How many records were read, again and again where there were several passes."""
        return f"a stream, of which {self.records:,} records were read ({self.skipped:,} skipped)"

    def _next(self, count: int) -> list[list[Encoded] | str]:
        """The next records, encoded; none at the end of a pass.

        Processes tell each other also what went wrong, so that none waits for one that has stopped.
        """
        state = PartialState()
        own = _Part()
        try:
            records = self.stream.take(count)
        except LlamaAdapterError as error:
            own.error = str(error)
        else:
            own.places = list(range(state.process_index, len(records), state.num_processes))
            own.numbers = [raw.number for raw in records]
            own.first = records[0].origin if records else "the end"
            own.found = self.encoder.encode([records[i] for i in own.places])
        parts = gather_object([own]) if state.num_processes > 1 else [own]
        for process, part in enumerate(parts):
            if part.error is not None:
                raise DataError(part.error)
            if part.numbers != parts[0].numbers:
                raise DataError(
                    f"Process {process} reads other records than process 0 (from {part.first} on, not from "
                    f"{parts[0].first}): give all machines the same files."
                )
        found = [pair for part in parts for pair in zip(part.places, part.found, strict=True)]
        return [texts for _, texts in sorted(found, key=itemgetter(0))]

    def _kept(self, found: list[Encoded] | str) -> list[Encoded]:
        self.records += 1
        if not isinstance(found, str):
            return found
        reject(found, [] if self.skip_bad_records else None)
        self.skipped += 1
        if PartialState().is_main_process and self.skipped <= MOST_SKIPPED:
            last = "; more are counted, and not shown" if self.skipped == MOST_SKIPPED else ""
            log.warning("skipped: %s%s", found, last)
        return []
