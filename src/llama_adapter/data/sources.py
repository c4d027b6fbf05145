"""From the names of data sources to examples: record files and hub datasets, ScienceQA folders, COCO captions.

mine.jsonl              records of any format in `formats`, see `read_records`
scienceqa:FOLDER:train  the questions of one split ("train" where none is named), see `read_scienceqa`
coco:captions.json      pictures with captions; they lie beside the file or in its folder "images"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama_adapter.data.formats import Example, Media, Message, parse_record
from llama_adapter.data.records import read_records
from llama_adapter.errors import DataError
from llama_adapter.evaluation.scienceqa.questions import PAPER, Question, load_json, read_scienceqa, render_question

SCIENCEQA, COCO = "scienceqa:", "coco:"
CAPTION = "Generate a caption of this image."
"""What COCO's captions are the answer to."""


@dataclass(frozen=True)
class Loaded:
    """What `load_examples` found: the examples, and one sentence for each record it skipped."""

    examples: list[Example]
    skipped: list[str]


def load_examples(
    sources: Sequence[str], skip_bad_records: bool = False, style: str = PAPER, pictures: bool = True
) -> Loaded:
    """Read all `sources`, in their order, and parse every record.

    Args:
        sources: see the head of this module.
        skip_bad_records: leave unusable records out instead of stopping at the first.
        style: how ScienceQA's questions are written, see `data/scienceqa.py`.
        pictures: whether ScienceQA's must be there; training on text alone does without.

    Raises:
        DataError: a source cannot be read; a record is bad and `skip_bad_records` is false; nothing is left.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    for source in sources:
        for origin, record in _entries(source, pictures):
            try:
                examples.append(replace(_example(record, source, style), origin=origin))
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
            return str(path)
    raise DataError(f"'{media}' is neither there nor in {folder}")


def question_example(question: Question, style: str = PAPER) -> Example:
    """A ScienceQA question with its answer, written in a style.

    Raises:
        DataError: its answer is not known.
    """
    prompt, target = render_question(question, style)
    return Example((Message("user", prompt), Message("assistant", target)), media=question.media)


@dataclass(frozen=True)
class _Caption:
    """One annotation of a COCO file: its text, the name of its picture, and the file."""

    text: object
    picture: object
    file: Path


def _entries(source: str, pictures: bool) -> Iterator[tuple[str, object]]:
    """What a source holds, each with a name for error messages."""
    if source.startswith(SCIENCEQA):
        folder, split = _folder_and_split(source.removeprefix(SCIENCEQA))
        for question in read_scienceqa(folder, split, images=pictures):
            yield f"{folder}, {split}, question {question.pid}", question
    elif source.startswith(COCO):
        yield from _captions(Path(source.removeprefix(COCO)).expanduser())
    else:
        for number, record in read_records(source):
            yield f"{source}, record {number}", record


def _example(record: object, source: str, style: str) -> Example:
    if isinstance(record, Question):
        return question_example(record, style)
    if isinstance(record, _Caption):
        return _caption_example(record)
    return with_found_media(parse_record(record), source)


def _caption_example(caption: _Caption) -> Example:
    if not isinstance(caption.text, str) or not caption.text.strip() or not isinstance(caption.picture, str):
        raise DataError("it has no caption, or its image_id is not among 'images'")
    folder = caption.file.parent
    for path in (folder / caption.picture, folder / "images" / caption.picture):
        if path.exists():
            messages = (Message("user", CAPTION), Message("assistant", caption.text.strip()))
            return Example(messages, media=(str(path),))
    raise DataError(f"'{caption.picture}' lies neither beside the file nor in {folder / 'images'}")


def _folder_and_split(text: str) -> tuple[str, str]:
    """'FOLDER:SPLIT', or 'FOLDER' for its "train"; a folder that exists is never taken apart."""
    folder, colon, split = text.rpartition(":")
    return (folder, split) if colon and split and not Path(text).expanduser().exists() else (text, "train")


def _captions(file: Path) -> Iterator[tuple[str, _Caption]]:
    """The annotations of a COCO file."""
    data = load_json(file)
    lists = [data.get(key) for key in ("images", "annotations")] if isinstance(data, dict) else [None]
    if not all(isinstance(found, list) for found in lists):
        raise DataError(f"{file} holds no COCO captions: it must have lists 'images' and 'annotations'.")
    images, annotations = ([entry if isinstance(entry, dict) else {} for entry in found or ()] for found in lists)
    names = {image.get("id"): image.get("file_name") for image in images}
    for number, entry in enumerate(annotations, start=1):
        yield f"{file}, annotation {number}", _Caption(entry.get("caption"), names.get(entry.get("image_id")), file)
