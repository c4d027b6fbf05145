"""Files that hold data: found, opened, unpacked and parsed; a kind is known by its suffix.

.json, .jsonl, .ndjson    one list of records, or a record a line; which of the two, the text says, not the name
.csv, .tsv                a row of names, then records, whose values are text
.parquet                  read by pyarrow
.gz, .zst                 behind any of these, as in data.jsonl.gz
-                         standard input: JSON of either form, packed or not
"""

import csv
import difflib
import glob
import io
import os.path
import re
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_adapter.data.strict_json import Unreadable, decode, decode_list
from llama_adapter.errors import DataError, MissingExtraError
from llama_adapter.files import is_lfs_pointer

Records = list[tuple[int, object]]
"""Each record with its 1-based number: its line in a file of lines or rows, else its place in the list."""
STDIN = "-"
LINE_SUFFIXES = (".jsonl", ".ndjson")
PACKED_SUFFIXES = (".gz", ".zst")
SUFFIXES = (".json", *LINE_SUFFIXES, ".csv", ".tsv", ".parquet")
SMALL, LARGEST_RATIO = 2**26, 100
"""A packed file may unpack to this many bytes, or to this many times its own size; text is packed to a tenth."""

_CSV_LIMIT = threading.Lock()
"""Whoever holds it may change the csv module's one limit, which all threads share."""
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
_LIST_HINT = "fix it, or name the file .jsonl if it has one record a line"
_ROW_HINT = 'put "..." around values that hold the delimiter'
_LINE_HINT = "write one complete JSON object on each line"


def is_data_file(name: str) -> bool:
    """Whether `name` ends as data files do."""
    return suffix_of(name) in SUFFIXES


def data_files(source: str) -> list[str]:
    """The files of a folder, without those of its subfolders, or those that a pattern with *, ? or [] matches, sorted.

    Anything else, such as a file, a hub name or "-", is returned as it is.

    Raises:
        DataError: the folder holds no data file, or nothing matches the pattern.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        try:
            names = sorted(name for name in os.listdir(path) if is_data_file(name) and not name.startswith("."))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
        if not names:
            raise DataError(f"{path} is a folder without data files: they end in {', '.join(SUFFIXES)}.")
        return [os.path.join(path, name) for name in names]
    if not re.search(r"[*?[]", source) or re.search(r":.*\[", source) or os.path.exists(path):  # owner/name:split[:9]
        return [source]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"{source} matches no file: check the pattern.")
    return found


def sources_of(sources: Iterable[str]) -> list[str]:
    """All files of these sources, each by one name however it is reached; what is no file as it is.

    Raises:
        DataError: as `data_files`.
    """
    files = [name for source in sources for name in data_files(source)]
    return [os.path.realpath(path) if os.path.exists(path := os.path.expanduser(name)) else name for name in files]


def read_file(source: str, bad: list[str] | None = None) -> Records:
    """Every record of one file, or of standard input; blank lines are none.

    Args:
        source: a path, or "-".
        bad: where given, a line or row that cannot be read is left out, and the sentence that says why put there.

    Raises:
        DataError: the file cannot be read or is damaged; without `bad`, one of its lines is.
        MissingExtraError: its kind needs a package that is not installed.
    """
    path, suffix = Path(os.path.expanduser(source)), suffix_of(source)
    if source != STDIN and suffix not in SUFFIXES and not _is_piped(path):
        if os.path.isdir(path) or not os.path.exists(path):
            _content(path)  # says so
        found = f"ends in '{suffix}'" if suffix else "has no suffix"
        raise DataError(f"{path} {found}: data files end in {', '.join(SUFFIXES)}, or in these and .gz or .zst.")
    content = _unpacked(path, _content(path))
    if suffix == ".parquet":
        return _parquet(path, content)
    text = _decoded(path, content, keep_bytes=bad is not None)
    if suffix in (".csv", ".tsv"):
        return _rows(path, text, suffix, bad)
    return _json(path, text, suffix != ".json", bad)


def load_json(path: Path) -> Any:
    """Read a file that is one JSON value, such as ScienceQA's and COCO's.

    Raises:
        DataError: the file cannot be read or is no JSON.
    """
    text = _decoded(path, _unpacked(path, _content(path)))
    value = decode(text)
    if isinstance(value, Unreadable):
        raise DataError(f"{path} is not JSON ({value.reason}): it may be cut off; take a whole copy.")
    return value


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys that hold null, in objects at any depth.

    A column's objects all have the keys of all its rows: a tool would have the parameters of every other tool, as null.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def suffix_of(name: str) -> str:
    """The suffix that says the kind, in lower case: ".jsonl" of "a.jsonl.gz"."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _is_piped(path: Path) -> bool:
    """Whether it is what a shell makes of <(command), or /dev/stdin."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")) and os.path.exists(path)


def _content(path: Path) -> bytes:
    """Raises DataError for whatever is no file that can be read to its end."""
    try:
        if str(path) == STDIN:
            return sys.stdin.buffer.read()
        check_file(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error


def check_file(path: Path, piped: bool = True) -> None:
    """Check that it is a file that can be read to its end, also a pipe where `piped` allows it.

    Raises:
        DataError: it is not.
    """
    try:
        # os.path's tests say no where Path's raise, as in a folder that may not be searched.
        if os.path.isdir(path):
            raise DataError(f"{path} is a folder: give the path of a file.")
        if not os.path.exists(path):
            raise DataError(_missing(path))
        if not stat.S_ISREG(os.stat(path).st_mode) and not (piped and _is_piped(path)):
            raise DataError(f"{path} is a device or a pipe, not a file: give a file, or '-' for standard input.")
        if is_lfs_pointer(path):
            raise DataError(f"{path} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder.")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error


def _missing(path: Path) -> str:
    """Say that `path` does not exist, with the names in its folder that look like it."""
    parts = str(path).split(",")
    if len(parts) > 1 and all(os.path.exists(os.path.expanduser(part.strip())) for part in parts):
        return f"{path} is no file, but its parts are: write a blank, not a comma, between files, or repeat --data"
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"{path} does not exist or cannot be reached: check the path and its permissions."
    close = difflib.get_close_matches(path.name, names)
    hint = f"did you mean {' or '.join(close)}?" if close else "check the path."
    return f"{path} does not exist: {hint}"


def packing_of(path: Path, content: bytes | None = None) -> str:
    """ ".gz", ".zst" or "", by the beginning of a file.

    Raises:
        DataError: its name says another, or it cannot be read.
    """
    if content is None:
        try:
            with path.open("rb") as file:
                content = file.read(max(map(len, _MAGIC.values())))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error
    packing = next((kind for kind, magic in _MAGIC.items() if content.startswith(magic)), "")
    if (named := path.suffix.lower()) in _MAGIC and named != packing:
        raise DataError(f"{path} is no {named} file: give it the suffix of what it is, or take another copy.")
    return packing


def zstd_reader(path: Path) -> Any:
    """A .zst file, opened to be unpacked as it is read.

    Raises:
        MissingExtraError: the package for it is not installed.
    """
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdFile

        return ZstdFile(path)
    try:
        from zstandard import ZstdDecompressor
    except ImportError:
        raise MissingExtraError("zstandard", "zstd", f"reading {path}") from None
    return ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)


def _unpacked(path: Path, content: bytes) -> bytes:
    packing = packing_of(path, content)
    if not packing:
        return content
    new: Callable[[], Any] = _zstd(path) if packing == ".zst" else lambda: zlib.decompressobj(wbits=31)
    most, unpacked, unpacker = max(SMALL, LARGEST_RATIO * len(content)), bytearray(), new()
    try:
        for start in range(0, len(content), 1024):  # of which zlib makes 1 MiB at the most, and zstd 32
            piece = content[start : start + 1024]
            while piece and (not unpacker.eof or piece.strip(b"\0")):  # gzip may end in zeros
                if unpacker.eof:
                    unpacker = new()
                unpacked += unpacker.decompress(piece)
                piece = unpacker.unused_data if unpacker.eof else b""
            if len(unpacked) > most:
                break
    except Exception as error:  # zlib's and zstd's own
        raise DataError(f"{path} is damaged ({error}): take another copy.") from None
    if len(unpacked) > most:
        raise DataError(
            f"{path} unpacks to more than {most:,} bytes, {LARGEST_RATIO} times its size: unpack it yourself if it may."
        )
    if not unpacker.eof:
        raise DataError(f"{path} is cut off: take a whole copy.")
    return bytes(unpacked)


def _zstd(path: Path) -> Callable[[], Any]:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor

        return ZstdDecompressor
    try:
        from zstandard import ZstdDecompressor
    except ImportError:
        raise MissingExtraError("zstandard", "zstd", f"reading {path}") from None
    return ZstdDecompressor().decompressobj


def _decoded(path: Path, content: bytes, keep_bytes: bool = False) -> str:
    """The text of a file; with `keep_bytes` what is not UTF-8 becomes characters that are refused in their record."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, not UTF-8: save it as UTF-8.")
    try:
        return content.decode("utf-8", "surrogateescape" if keep_bytes else "strict").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte offset {error.start}): save it as UTF-8.") from error


def _json(path: Path, text: str, lines: bool, bad: list[str] | None) -> Records:
    start = text.lstrip()[:1]
    if lines and start != "[":
        return _lines(path, text, bad)
    if not start:
        return []
    value = decode_list(text) if start == "[" else decode(text)
    if isinstance(value, Unreadable):
        first = decode(text.lstrip().split("\n", 1)[0])
        if (lines or start == "{") and not (isinstance(first, Unreadable) and first.torn):
            return _lines(path, text, bad)
        raise DataError(f"{path} is not JSON ({value.reason}): {_LIST_HINT}.")
    if not isinstance(value, list):
        found = "an object" if isinstance(value, dict) else "a single value"
        raise DataError(f"{path} holds {found}, not a list of records: put the records into one JSON list.")
    return _sound(path, enumerate(value, start=1), "JSON", "fix this record", bad)


def _lines(path: Path, text: str, bad: list[str] | None) -> Records:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return _sound(path, ((number, decode(line, number)) for number, line in lines), "JSON", _LINE_HINT, bad)


def _sound(path: Path, values: Iterable[tuple[int, Any]], kind: str, hint: str, bad: list[str] | None) -> Records:
    """The values that can be read; the others are an error, or a sentence in `bad` each."""
    sound = []
    for number, value in values:
        if not isinstance(value, Unreadable):
            sound.append((number, value))
        elif bad is None:
            raise DataError(f"{path} is not {kind} ({value.reason}): {hint}, or pass --skip-bad-records.")
        else:
            bad.append(f"{path}, record {number}: {value.reason}.")
    return sound


def _rows(path: Path, text: str, suffix: str, bad: list[str] | None) -> Records:
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "\t" if suffix == ".tsv" else next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    with _CSV_LIMIT:
        before = csv.field_size_limit(len(text) + 1)  # the standard 128 KiB is less than some answers have
        try:
            return _sound(path, _row_values(path, reader), suffix[1:].upper(), _ROW_HINT, bad)
        except csv.Error as error:
            raise DataError(
                f"{path} is not {suffix[1:].upper()} (line {reader.line_num}: {error}): "
                'put "..." around values that hold quotes, line breaks or the delimiter, and write " in them twice.'
            ) from None
        finally:
            csv.field_size_limit(before)


def _row_values(path: Path, reader: Any) -> Iterator[tuple[int, dict[str, str] | Unreadable]]:
    names: list[str] = []
    end = 0
    for row in reader:
        start, end = end + 1, reader.line_num
        if not any(row):
            continue
        if names and len(row) != len(names):
            yield start, Unreadable(f"line {start}: {len(row)} values and {len(names)} columns")
        elif names:
            yield start, dict(zip(names, row, strict=True))
        else:
            names = [name.strip() for name in row]
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path} has two columns '{twice[0]}': the first row names the columns, each once.")


def _parquet(path: Path, content: bytes) -> Records:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "datasets", f"reading {path}") from None
    most, unpacked = max(SMALL, LARGEST_RATIO * len(content)), 0
    records: list[object] = []
    try:
        with parquet.ParquetFile(BufferReader(content)) as table:
            groups = range(table.metadata.num_row_groups)
            claimed = sum(table.metadata.row_group(i).total_byte_size for i in groups)
            for batch in table.iter_batches(batch_size=256) if claimed <= most else ():
                unpacked += batch.nbytes
                if unpacked > most:
                    break
                records += map(without_nulls, batch.to_pylist())
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"{path} is damaged or no parquet file ({reason[:200]}): take another copy.") from None
    if max(claimed, unpacked) > most:
        raise DataError(f"{path} unpacks to more than {most:,} bytes, {LARGEST_RATIO} times its size: write it anew.")
    return list(enumerate(records, start=1))
