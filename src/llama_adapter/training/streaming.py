"""From a recipe with `streaming` to its data: the first records are read, for validation and to see what they are."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from llama_adapter.data.encode import Encoded
from llama_adapter.data.examples import Example
from llama_adapter.data.sources import check_some_left, reject
from llama_adapter.data.stream import BEGINNING, Mark, Raw, Stream, first_records, parts_of
from llama_adapter.errors import ConfigError
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.feed import RecordEncoder, StreamFeed

FIRST_HELD_OUT, LOOKED_AT = 256, 256
"""Records that validation takes where a recipe does not say, and those of the rest that are looked at before a run."""


@dataclass
class First:
    """The first records of a stream: the texts held out for validation, and those that are only looked at."""

    val: list[Encoded] = field(default_factory=list)
    seen: list[Encoded] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    held: tuple[int, Mark] = (0, BEGINNING)


def open_stream(config: TrainConfig, encoder: RecordEncoder) -> tuple[StreamFeed, First]:
    """The batches of a recipe's data, and their first records.

    Raises:
        DataError: they cannot be streamed, or one of the first is bad and none may be skipped.
        ConfigError: validation takes all records.
        MissingExtraError: a package is not installed.
    """
    parts = parts_of(config.data)
    given = FIRST_HELD_OUT if config.val_size is None else int(config.val_size)
    count = 0 if config.val_data else given
    first = First()
    records = first_records(parts)
    held = _take_sound(records, encoder, count, first, first.val, config.skip_bad_records)
    seen = _take_sound(islice(records, LOOKED_AT), encoder, LOOKED_AT, first, first.seen, config.skip_bad_records)
    if not seen:
        check_some_left(first.examples, first.skipped)
        raise ConfigError(
            f"Validation takes the first {count} records and leaves none of {held} to train on: pass --val-size with a "
            "smaller number, or --val-data FILE."
        )
    encoder.raw = all(example.raw for example in first.examples)
    stream = Stream(parts, config.value("shuffle_buffer"), config.seed, first.held)
    return StreamFeed(stream, encoder, config.batch_size, config.skip_bad_records), first


def digest_of(streamed: StreamFeed, val: str) -> str:
    """SHA-256 of what tells these files from others, and of the validation texts."""
    digest = hashlib.sha256(val.encode())
    for part in streamed.stream.parts:
        digest.update(part.digest)
    return digest.hexdigest()


def _take_sound(
    records: Iterator[tuple[Raw, tuple[int, Mark]]],
    encoder: RecordEncoder,
    count: int,
    first: First,
    texts: list[Encoded],
    skip: bool,
) -> int:
    """Put the texts of the next `count` good records into `texts`; how many there were."""
    taken = 0
    while taken < count and (record := next(records, None)):
        raw, mark = record
        (example,), (found,) = encoder.examples([raw]), encoder.encode([raw])
        if isinstance(found, str) or isinstance(example, str):
            reject(str(found), first.skipped if skip else None)
            continue
        first.examples.append(example)
        texts += found
        taken += 1
        if texts is first.val:
            first.held = mark
    return taken
