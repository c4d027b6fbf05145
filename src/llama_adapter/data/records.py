"""From a file, the bundled data or a hub dataset to raw records; `formats` knows what they mean."""

import difflib
import os.path
import re
from pathlib import Path
from typing import Any

from llama_adapter.data.strict_json import Unreadable, decode, decode_list
from llama_adapter.errors import DataError, MissingExtraError

BUNDLED_INSTRUCTIONS = Path(__file__).parent.parent / "bundled" / "instructions.json"
LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINE_SUFFIXES)

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>.+))?")


def read_records(source: str, keep_unreadable: bool = False) -> list[tuple[int, object]]:
    """Return every record of `source` with its 1-based number: its line in a .jsonl, else its place in the list.

    With `keep_unreadable` a record that is no JSON is an `Unreadable`, and the others can be used.

    `source` is the path of a .json (one list), .jsonl or .ndjson file in UTF-8, the name "bundled" for the
    data that come with this package, or "owner/name" or "owner/name:split" of a dataset on the Hugging Face
    hub (split "train" where none is given). A path that exists is always read as a file.

    Raises:
        DataError: the source cannot be found or read, is no JSON, or holds no record.
        MissingExtraError: a hub dataset is asked for and `datasets` is not installed.
    """
    path = BUNDLED_INSTRUCTIONS if source == "bundled" else Path(os.path.expanduser(source))
    hub_name = _HUB_NAME.fullmatch(source)
    if hub_name and not os.path.exists(path) and path.suffix.lower() not in SUFFIXES:
        records = _read_hub(hub_name["name"], hub_name["split"] or "train")
    else:
        records = _read_file(path, keep_unreadable)
    if not records:
        raise DataError(f"{source} holds no records: give a source with at least one.")
    return records


def load_json(path: Path) -> Any:
    """Read a file that is one JSON value, such as ScienceQA's and COCO's.

    Raises:
        DataError: the file cannot be read or is no JSON.
    """
    return _sound(path, decode(_read_text(path)), "it may be cut off; take a whole copy")


def _read_file(path: Path, keep_unreadable: bool = False) -> list[tuple[int, object]]:
    # os.path's tests say no where Path's raise, as in a folder that may not be searched.
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder: give the path of a .json or .jsonl file.")
    if not os.path.exists(path):
        raise DataError(_missing(path))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        found = f"ends in '{suffix}'" if suffix else "has no suffix"
        raise DataError(f"{path} {found}: data files end in {', '.join(SUFFIXES)}.")
    text = _read_text(path, keep_unreadable)
    records = _parse_lines(text) if suffix in LINE_SUFFIXES else _parse_list(path, text)
    if not keep_unreadable:
        hint = "write one complete JSON object on each line" if suffix in LINE_SUFFIXES else "fix this record"
        for _, record in records:
            _sound(path, record, f"{hint}, or pass --skip-bad-records")
    return records


def _missing(path: Path) -> str:
    """Say that `path` does not exist, with the names in its folder that look like it."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"{path} does not exist or cannot be reached: check the path and its permissions."
    close = difflib.get_close_matches(path.name, names)
    hint = f"did you mean {' or '.join(close)}?" if close else "check the path."
    return f"{path} does not exist: {hint}"


def _read_text(path: Path, keep_unreadable: bool = False) -> str:
    """The text of a file; with `keep_unreadable` bytes that are not UTF-8 become characters that `decode` knows."""
    try:
        return (
            path.read_bytes().decode("utf-8", "surrogateescape" if keep_unreadable else "strict").removeprefix("\ufeff")
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte offset {error.start}): save it as UTF-8.") from error


def _parse_list(path: Path, text: str) -> list[tuple[int, object]]:
    if not text.strip():
        return []
    if text.lstrip()[0] != "[":
        records = _sound(path, decode(text), "fix it, or name the file .jsonl if it has one record a line")
        found = "an object" if isinstance(records, dict) else "a single value"
        raise DataError(f"{path} holds {found}, not a list of records: put the records into one JSON list.")
    records = _sound(path, decode_list(text), "fix it, or name the file .jsonl if it has one record a line")
    return list(enumerate(records, start=1))


def _parse_lines(text: str) -> list[tuple[int, object]]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, decode(line, number)) for number, line in lines if line.strip()]


def _sound(path: Path, value: Any, hint: str) -> Any:
    if isinstance(value, Unreadable):
        raise DataError(f"{path} is not JSON ({value.reason}): {hint}.")
    return value


def _read_hub(name: str, split: str) -> list[tuple[int, object]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"loading '{name}' from the hub") from error
    try:
        dataset = datasets.load_dataset(name, split=split)
        for column, feature in (dataset.features or {}).items():
            if (encoded := _encoded(feature)) is not feature:  # one damaged file would otherwise stop the reading
                dataset = dataset.cast_column(column, encoded)
        return list(enumerate(dataset, start=1))
    except Exception as error:  # datasets, hub and network libraries raise dozens of unrelated types here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name} is no local file, and its split '{split}' could not be loaded from the Hugging Face hub "
            f"({reason}): check the name and the connection, or give a .json or .jsonl file."
        ) from error


def _encoded(feature: Any) -> Any:
    """The feature of a column whose pictures and recordings stay as they are stored; others come back themselves."""
    import datasets

    if isinstance(feature, datasets.Image | datasets.Audio):
        return type(feature)(decode=False)
    inner = getattr(feature, "feature", None)
    return feature if inner is None or _encoded(inner) is inner else type(feature)(_encoded(inner))
