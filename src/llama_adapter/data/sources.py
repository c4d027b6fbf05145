"""From the names of data sources to examples: record files and hub datasets, and whatever `SOURCES` names.

mine.jsonl              records of any format in `formats`, in a file of any kind in `kinds`; or a folder of such files
scienceqa:FOLDER:train  the questions of one split ("train" where none is named)
coco:captions.json      pictures with captions; they lie beside the file or in its folder "images"
"""

import logging
import os.path
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from llama_adapter.conditions.config import Kind
from llama_adapter.data.examples import Example, Media, Message
from llama_adapter.data.formats import parse_record
from llama_adapter.data.kinds import data_files, load_json
from llama_adapter.data.media import found
from llama_adapter.data.records import read_records
from llama_adapter.errors import DataError
from llama_adapter.settings import shown

log = logging.getLogger(__name__)

Entry = tuple[str, Callable[[], Example]]
"""A record's name for error messages, and what makes the example of it or raises DataError."""
SOURCES = {
    "scienceqa": "llama_adapter.evaluation.scienceqa.questions:read_source",
    "coco": "llama_adapter.data.sources:read_coco",
}
"""Which function reads sources of a prefix: called with what stands behind the colon, with whether pictures must be
there and with options of its own, it yields entries. Named here and imported when such a source is asked for, so that
a benchmark can keep its reader beside its scores, in a room that itself builds on this one."""
MOST_NOTES = 20
"""Records with keys of their own each would otherwise fill the screen."""
MOST_SKIPPED = 5
"""Skipped records that are shown one by one."""
CAPTION = "Generate a caption of this image."
"""What COCO's captions are the answer to."""


@dataclass(frozen=True)
class Loaded:
    """What `load_examples` found.

    Attributes:
        examples: of every record that can be used.
        skipped: one sentence for each record that was left out.
        notes: what the used ones hold and nobody reads, with the number of records.
    """

    examples: list[Example]
    skipped: list[str]

    @property
    def notes(self) -> list[str]:
        """One sentence for each kind of thing, the most frequent first."""
        return notes_of(self.examples)


def notes_of(examples: Sequence[Example]) -> list[str]:
    """What examples hold and nobody reads: one sentence for each kind of thing, the most frequent first."""
    counts = Counter(note for example in examples for note in example.notes)
    shown = [f"{note} ({count:,} of {len(examples):,} records)" for note, count in counts.most_common(MOST_NOTES)]
    rest = len(counts) - len(shown)
    return [*shown, f"and {rest:,} more such keys"] if rest else shown


def load_examples(
    sources: Sequence[str],
    skip_bad_records: bool = False,
    pictures: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    parse: Callable[[object], Example] = parse_record,
    kinds: Collection[Kind] = (),
    limit: int | None = None,
) -> Loaded:
    """Read all `sources`, in their order, and parse every record.

    Args:
        sources: see the head of this module.
        skip_bad_records: leave unusable records out instead of stopping at the first.
        pictures: whether ScienceQA's must be there; training on text alone does without.
        options: more arguments for the reader of a prefix, such as {"scienceqa": {"style": "QCM-A"}}.
        parse: makes the example of a record.
        kinds: as what conditions will look at the files ("image", "audio", ...); each is then really decoded.
        limit: only so many records of each source, the first.

    Raises:
        DataError: a source cannot be read; a record is bad and `skip_bad_records` is false; nothing is left.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    for source in sources:
        entries = _entries(source, skipped if skip_bad_records else None, pictures, options or {}, parse)
        for origin, make in islice(entries, limit):
            try:
                examples.append(replace(make(), origin=origin))
            except DataError as error:
                reject(f"{origin}: {error}", skipped if skip_bad_records else None)
    if not sources:
        raise DataError("No record is left to use (0 skipped). Give at least one data source.")
    for kind in kinds:
        examples = _without_damaged(examples, kind, skipped if skip_bad_records else None)
    check_some_left(examples, skipped)
    return Loaded(examples, skipped)


def _without_damaged(examples: list[Example], kind: Kind, skipped: list[str] | None) -> list[Example]:
    """The examples whose files can be read; they are decoded in threads and dropped again.

    Raises:
        DataError: a file cannot, and there is no list of skipped records.
    """
    from llama_adapter.conditions.perception import READERS

    def problem_of(file: Media) -> str | None:
        try:
            READERS[kind](file)
        except DataError as error:
            return str(error)
        return None

    files = list(dict.fromkeys(media for example in examples for media in example.media))
    pool = ThreadPoolExecutor()
    try:
        with warnings.catch_warnings():  # the readers' own are not safe in threads and would leave filters behind
            problems = dict(zip(files, pool.map(problem_of, files), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    sound = []
    for example in examples:
        problem = next((problems[file] for file in example.media if problems[file]), None)
        if problem is None:
            sound.append(example)
        else:
            reject(f"{example.origin}: {problem}", skipped)
    return sound


def log_findings(skipped: Sequence[str], notes: Sequence[str]) -> None:
    """Say what was left out and what was not used."""
    for sentence in skipped[:MOST_SKIPPED]:
        log.warning("skipped: %s", sentence)
    if len(skipped) > MOST_SKIPPED:
        log.warning("skipped: %s more", f"{len(skipped) - MOST_SKIPPED:,}")
    for note in notes:
        log.warning("note: %s", note)


def reject(reason: str, skipped: list[str] | None) -> None:
    """Count a bad record among the skipped; without such a list it stops everything.

    Raises:
        DataError: there is no list.
    """
    reason = reason.rstrip(".")
    if skipped is None:
        raise DataError(f"{reason}; fix it or pass --skip-bad-records.")
    skipped.append(f"{reason}.")


def check_some_left(examples: Sequence[object], skipped: Sequence[str]) -> None:
    """Check that skipping has left something.

    Raises:
        DataError: nothing is left.
    """
    if not examples:
        first = f" The first: {skipped[0]}" if skipped else ""
        raise DataError(f"No record is left to use ({len(skipped)} skipped).{first}")


def _entries(
    source: str,
    bad: list[str] | None,
    pictures: bool,
    options: Mapping[str, Mapping[str, Any]],
    parse: Callable[[object], Example],
) -> Iterator[Entry]:
    prefix, colon, rest = source.partition(":")
    if colon and prefix in SOURCES:
        module, _, name = SOURCES[prefix].partition(":")
        yield from getattr(import_module(module), name)(rest, pictures, **options.get(prefix, {}))
    else:
        for file in data_files(source):
            folder = Path(os.path.expanduser(file)).parent
            for number, record in read_records(file, bad):
                yield f"{file}, record {number}", partial(parsed, record, folder, parse)


def parsed(record: object, folder: Path, parse: Callable[[object], Example]) -> Example:
    """The example of a record, whose files are looked for beside it, in `folder`."""
    example = parse(record)
    return replace(example, media=tuple(found(media, folder) for media in example.media))


def read_coco(name: str, pictures: bool) -> Iterator[Entry]:
    """The annotations of a COCO file, whose pictures must be there even where training does not look at them.

    Raises:
        DataError: it cannot be read or holds no captions.
    """
    file = Path(os.path.expanduser(name))
    data = load_json(file)
    lists = [data.get(key) for key in ("images", "annotations")] if isinstance(data, dict) else [None]
    if not all(isinstance(found, list) for found in lists):
        raise DataError(f"{file} holds no COCO captions: it must have lists 'images' and 'annotations'.")
    images, annotations = ([entry if isinstance(entry, dict) else {} for entry in found or ()] for found in lists)
    names = {image["id"]: image.get("file_name") for image in images if isinstance(image.get("id"), int | str)}
    for number, entry in enumerate(annotations, start=1):
        make = partial(_captioned, entry.get("caption"), entry.get("image_id"), names, file.parent)
        yield f"{file}, annotation {number}", make


def _captioned(text: object, image: object, names: Mapping[int | str, object], folder: Path) -> Example:
    picture = names.get(image) if isinstance(image, int | str) else None
    if not isinstance(text, str) or not text.strip() or not isinstance(picture, str):
        raise DataError("it has no caption, or its image_id is not among 'images'")
    for path in (os.path.join(folder, picture), os.path.join(folder, "images", picture)):
        if os.path.isfile(path):
            return Example((Message("user", CAPTION), Message("assistant", text.strip())), media=(path,))
    raise DataError(f"{shown(picture)} lies neither beside the file nor in {folder / 'images'}")
