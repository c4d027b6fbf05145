"""From the names of data sources to examples: record files and hub datasets, and whatever `SOURCES` names.

mine.jsonl              records of any format in `formats`, in a file of any kind in `kinds`; or a folder of such files
scienceqa:FOLDER:train  the questions of one split ("train" where none is named)
coco:captions.json      pictures with captions; they lie beside the file or in its folder "images"
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from llama_adapter.data.formats import Example, Media, Message, parse_record
from llama_adapter.data.kinds import data_files, load_json
from llama_adapter.data.records import read_records
from llama_adapter.errors import DataError
from llama_adapter.files import is_lfs_pointer

Entry = tuple[str, Callable[[], Example]]
"""A record's name for error messages, and what makes the example of it or raises DataError."""
SOURCES = {
    "scienceqa": "llama_adapter.evaluation.scienceqa.questions:read_source",
    "coco": "llama_adapter.data.sources:read_coco",
}
"""Which function reads sources of a prefix: called with what stands behind the colon, with whether pictures must be
there and with options of its own, it yields entries. Named here and imported when such a source is asked for, so that
a benchmark can keep its reader beside its scores, in a room that itself builds on this one."""
CAPTION = "Generate a caption of this image."
"""What COCO's captions are the answer to."""


@dataclass(frozen=True)
class Loaded:
    """What `load_examples` found: the examples, and one sentence for each record it skipped."""

    examples: list[Example]
    skipped: list[str]


def load_examples(
    sources: Sequence[str],
    skip_bad_records: bool = False,
    pictures: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Loaded:
    """Read all `sources`, in their order, and parse every record.

    Args:
        sources: see the head of this module.
        skip_bad_records: leave unusable records out instead of stopping at the first.
        pictures: whether ScienceQA's must be there; training on text alone does without.
        options: more arguments for the reader of a prefix, such as {"scienceqa": {"style": "QCM-A"}}.

    Raises:
        DataError: a source cannot be read; a record is bad and `skip_bad_records` is false; nothing is left.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    for source in sources:
        for origin, make in _entries(source, pictures, options or {}, skipped if skip_bad_records else None):
            try:
                examples.append(replace(make(), origin=origin))
            except DataError as error:
                if not skip_bad_records:
                    raise DataError(f"{origin}: {error}; fix it or pass --skip-bad-records.") from error
                skipped.append(f"{origin}: {error}.")
    if not examples:
        first = f" The first: {skipped[0]}" if skipped else " Give at least one data source."
        raise DataError(f"No record is left to use ({len(skipped)} skipped).{first}")
    return Loaded(examples, skipped)


def with_found_media(example: Example, source: str) -> Example:
    """The example with the paths of its files: as a record of `source` names them, else beside `source`.

    Raises:
        DataError: a file is in neither place.
    """
    return replace(example, media=tuple(_found(media, Path(source).expanduser().parent) for media in example.media))


def _found(media: Media, folder: Path) -> Media:
    if isinstance(media, bytes):
        return media
    for path in (Path(media).expanduser(), folder / media):
        if path.exists():
            if is_lfs_pointer(path):
                raise DataError(f"{path} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder")
            return str(path)
    raise DataError(f"'{media}' is neither there nor in {folder}")


def _entries(
    source: str, pictures: bool, options: Mapping[str, Mapping[str, Any]], bad: list[str] | None
) -> Iterator[Entry]:
    prefix, colon, rest = source.partition(":")
    if colon and prefix in SOURCES:
        module, _, name = SOURCES[prefix].partition(":")
        yield from getattr(import_module(module), name)(rest, pictures, **options.get(prefix, {}))
    else:
        for file in data_files(source):
            for number, record in read_records(file, bad):
                yield f"{file}, record {number}", partial(_parsed, record, file)


def _parsed(record: object, source: str) -> Example:
    return with_found_media(parse_record(record), source)


def read_coco(name: str, pictures: bool) -> Iterator[Entry]:
    """The annotations of a COCO file, whose pictures must be there even where training does not look at them.

    Raises:
        DataError: it cannot be read or holds no captions.
    """
    file = Path(name).expanduser()
    data = load_json(file)
    lists = [data.get(key) for key in ("images", "annotations")] if isinstance(data, dict) else [None]
    if not all(isinstance(found, list) for found in lists):
        raise DataError(f"{file} holds no COCO captions: it must have lists 'images' and 'annotations'.")
    images, annotations = ([entry if isinstance(entry, dict) else {} for entry in found or ()] for found in lists)
    names = {image.get("id"): image.get("file_name") for image in images}
    for number, entry in enumerate(annotations, start=1):
        make = partial(_captioned, entry.get("caption"), names.get(entry.get("image_id")), file.parent)
        yield f"{file}, annotation {number}", make


def _captioned(text: object, picture: object, folder: Path) -> Example:
    if not isinstance(text, str) or not text.strip() or not isinstance(picture, str):
        raise DataError("it has no caption, or its image_id is not among 'images'")
    for path in (folder / picture, folder / "images" / picture):
        if path.exists():
            return Example((Message("user", CAPTION), Message("assistant", text.strip())), media=(str(path),))
    raise DataError(f"'{picture}' lies neither beside the file nor in {folder / 'images'}")
