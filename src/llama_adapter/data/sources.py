"""From the names of data sources to examples: record files and hub datasets, ScienceQA folders, COCO captions.

mine.jsonl              records of any format in `formats`, see `read_records`
scienceqa:FOLDER:train  the questions of one split ("train" where none is named), see `read_scienceqa`
coco:captions.json      pictures with captions; they lie beside the file or in its folder "images"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama_adapter.data.formats import Example, Message, parse_record
from llama_adapter.data.records import read_records
from llama_adapter.data.scienceqa import PAPER, Question, load_json, read_scienceqa, render_question
from llama_adapter.errors import DataError

SCIENCEQA, COCO = "scienceqa:", "coco:"
CAPTION = "Generate a caption of this image."
"""What COCO's captions are the answer to."""


@dataclass(frozen=True)
class Loaded:
    """What `load_examples` found: the examples, and one sentence for each record it skipped."""

    examples: list[Example]
    skipped: list[str]


def load_examples(sources: Sequence[str], skip_bad_records: bool = False, style: str = PAPER) -> Loaded:
    """Read all `sources`, in their order, and parse every record.

    Args:
        sources: see the head of this module.
        skip_bad_records: leave unusable records out instead of stopping at the first.
        style: how ScienceQA's questions are written, see `data/scienceqa.py`.

    Raises:
        DataError: a source cannot be read; a record is bad and `skip_bad_records` is false; nothing is left.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    for source in sources:
        for origin, record in _entries(source):
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


def find_media(name: str, source: str) -> str:
    """The path of a file that a record of `source` names: as it is, else beside the data file.

    Raises:
        DataError: it is in neither place.
    """
    beside = Path(source).expanduser().parent / name
    for path in (Path(name).expanduser(), beside):
        if path.exists():
            return str(path)
    raise DataError(f"'{name}' is neither there nor beside {source}")


def question_example(question: Question, style: str = PAPER) -> Example:
    """A ScienceQA question with its answer, written in a style.

    Raises:
        DataError: its answer is not known.
    """
    prompt, target = render_question(question, style)
    media = (
        ()
        if question.image is None
        else (question.image if isinstance(question.image, bytes) else str(question.image),)
    )
    return Example((Message("user", prompt), Message("assistant", target)), media=media)


def _entries(source: str) -> Iterator[tuple[str, object]]:
    """What a source holds, each with a name for error messages."""
    if source.startswith(SCIENCEQA):
        folder, split = _folder_and_split(source.removeprefix(SCIENCEQA))
        for question in read_scienceqa(folder, split):
            yield f"{folder}, {split}, question {question.pid}", question
    elif source.startswith(COCO):
        yield from _captions(Path(source.removeprefix(COCO)).expanduser())
    else:
        for number, record in read_records(source):
            yield f"{source}, record {number}", record


def _example(record: object, source: str, style: str) -> Example:
    if isinstance(record, Question):
        return question_example(record, style)
    if isinstance(record, Example):
        return record
    example = parse_record(record)
    media = tuple(name if isinstance(name, bytes) else find_media(name, source) for name in example.media)
    return replace(example, media=media)


def _folder_and_split(text: str) -> tuple[str, str]:
    """'FOLDER:SPLIT', or 'FOLDER' for its "train"; a folder that exists is never taken apart."""
    folder, colon, split = text.rpartition(":")
    return (folder, split) if colon and split and not Path(text).expanduser().exists() else (text, "train")


def _captions(file: Path) -> Iterator[tuple[str, Example]]:
    """The captions of a COCO annotation file, each with its picture."""
    data = load_json(file)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list) or "annotations" not in data:
        raise DataError(f"{file} holds no COCO captions: it must have 'images' and 'annotations'.")
    names = {image.get("id"): image.get("file_name") for image in data["images"] if isinstance(image, dict)}
    for number, annotation in enumerate(data["annotations"], start=1):
        origin = f"{file}, annotation {number}"
        caption, name = annotation.get("caption"), names.get(annotation.get("image_id"))
        if not isinstance(caption, str) or not caption.strip() or not isinstance(name, str):
            raise DataError(f"{origin} has no caption, or no entry of 'images' for its image_id: repair the file.")
        picture = next((p for p in (file.parent / name, file.parent / "images" / name) if p.exists()), None)
        if picture is None:
            raise DataError(f"{origin}: '{name}' lies neither beside {file} nor in {file.parent / 'images'}.")
        messages = (Message("user", CAPTION), Message("assistant", caption.strip()))
        yield origin, Example(messages, media=(str(picture),))
