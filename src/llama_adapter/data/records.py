"""From a file, the bundled data or a hub dataset to raw records; `formats` knows what they mean."""

import os.path
import re
from collections.abc import Callable
from typing import Any, TypeVar

from llama_adapter.data.kinds import STDIN, Records, is_data_file, read_file, without_nulls
from llama_adapter.errors import DataError, MissingExtraError
from llama_adapter.settings import BUNDLED_FOLDER

Result = TypeVar("Result")
BUNDLED_INSTRUCTIONS = BUNDLED_FOLDER / "instructions.json"

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>.+))?")


def read_records(source: str, bad: list[str] | None = None) -> Records:
    """Return every record of `source` with its 1-based number: its line in files of lines or rows, else its place.

    `source` is the path of a data file (see `kinds`), "-" for standard input, the name "bundled" for the data that
    come with this package, or "owner/name" or "owner/name:split" of a dataset on the Hugging Face hub (split "train"
    where none is given). A path that exists is always read as a file.

    Args:
        source: one of these; `data_files` makes files of a folder or a pattern.
        bad: where given, lines that cannot be read are left out, and a sentence for each put there.

    Raises:
        DataError: the source cannot be found or read, is damaged, or holds no record.
        MissingExtraError: a package that it needs is not installed.
    """
    before = len(bad or ())
    hub = hub_parts(source)
    if source == "bundled":
        records = read_file(str(BUNDLED_INSTRUCTIONS))
    elif hub is None:
        records = read_file(source, bad)
    else:
        records = _read_hub(*hub)
    if not records and len(bad or ()) == before:
        raise DataError(f"{source} holds no records: give a source with at least one.")
    return records


def hub_parts(source: str) -> tuple[str, str] | None:
    """Name and split of a dataset on the hub; None for a file, also for one that is not there."""
    found = _HUB_NAME.fullmatch(source)
    if source == STDIN or not found or os.path.exists(os.path.expanduser(source)) or is_data_file(source):
        return None
    return found["name"], found["split"] or "train"


def _read_hub(name: str, split: str) -> Records:
    return open_hub(name, split, lambda dataset: list(enumerate(map(without_nulls, dataset), start=1)))


def open_hub(name: str, split: str, read: Callable[[Any], Result], **options: Any) -> Result:
    """What `read` makes of a dataset on the hub, whose pictures and recordings stay as they are stored.

    Raises:
        DataError: it cannot be loaded, or `read` fails.
        MissingExtraError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"loading '{name}' from the hub") from error
    try:
        dataset = datasets.load_dataset(name, split=split, **options)
        for column, feature in (dataset.features or {}).items():
            if (encoded := _encoded(feature)) is not feature:  # one damaged file would otherwise stop the reading
                dataset = dataset.cast_column(column, encoded)
        return read(dataset)
    except Exception as error:  # datasets, hub and network libraries raise dozens of unrelated types here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name} is no local file, and its split '{split}' could not be loaded from the Hugging Face hub "
            f"({reason}): check the name and the connection, or give a data file."
        ) from error


def _encoded(feature: Any) -> Any:
    """The feature of a column whose pictures and recordings stay as they are stored; others come back themselves."""
    import datasets

    if isinstance(feature, datasets.Image | datasets.Audio):
        return type(feature)(decode=False)
    inner = getattr(feature, "feature", None)
    return feature if inner is None or _encoded(inner) is inner else type(feature)(_encoded(inner))
