"""JSON as its standard has it, where what is wrong with one record is said of that record alone."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama_adapter.errors import DataError
from llama_adapter.settings import shown


@dataclass(frozen=True)
class Unreadable:
    """Stands where a value should.

    Attributes:
        reason: why there is none, such as "line 3: the key 'output' stands twice in one object".
        torn: whether the text is no JSON at this place, so that what follows cannot be trusted either.
    """

    reason: str
    torn: bool = False


def decode(text: str, first_line: int = 1) -> Any:
    """The value of a text, or `Unreadable`; `first_line` is the number of its first line in the file."""
    return _attempt(lambda: _DECODER.decode(text), text, (0, len(text)), first_line)


def decode_list(text: str) -> list[Any] | Unreadable:
    """The entries of a JSON list, each a value or `Unreadable`; or `Unreadable` where the list itself is none."""
    position = _after_blanks(text, 0)
    if not text.startswith("[", position):
        return Unreadable("line 1: it does not begin with '['", torn=True)
    if text.startswith("]", _after_blanks(text, position + 1)):
        return []
    entries = []
    while text[position : position + 1] in ("[", ","):
        start = _after_blanks(text, position + 1)
        end = _end_of_entry(text, start)
        entry = _attempt(partial(_entry, text, start, end), text, (start, end), 1)
        if isinstance(entry, Unreadable) and entry.torn:
            return entry
        entries.append(entry)
        position = end
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        return Unreadable(f"line {_line(text, position, 1)}: the list does not end here as it should", torn=True)
    return entries


def _attempt(value: Callable[[], Any], text: str, place: tuple[int, int], first_line: int) -> Any:
    try:
        if _NOT_UTF8.search(text, *place):
            raise DataError("bytes that are not UTF-8")
        return value()
    except json.JSONDecodeError as error:
        return Unreadable(f"line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}", torn=True)
    except DataError as error:
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:  # Python's own limit, which guards against numbers that take minutes to read
        reason = "a number of more than 4,300 digits"
        long = _LONG_NUMBER.search(text, *place)
        place = (long.start(), long.end()) if long else place
    return Unreadable(f"line {_line(text, place[0], first_line)}: {reason}")


def _entry(text: str, start: int, end: int) -> Any:
    value, stop = _DECODER.raw_decode(text, start)
    if text[stop:end].strip(" \t\r\n"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, stop)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {shown(twice)} stands twice in one object")
    return result


def _constant(name: str) -> None:
    raise DataError(f"{name}, which JSON does not have: write null where a value is missing")


def _end_of_entry(text: str, start: int) -> int:
    """Where the entry of a list ends: at the comma or bracket that is inside no string and no bracket of its own."""
    depth = 0
    for token in _TOKENS.finditer(text, start):
        if token[0] in ("[", "{"):
            depth += 1
        elif depth == 0 and token[0] in (",", "]", "}"):
            return token.start()
        elif token[0] in ("]", "}"):
            depth -= 1
    return len(text)


def _after_blanks(text: str, start: int) -> int:
    found = _BLANKS.match(text, start)
    return found.end() if found else start


def _line(text: str, position: int, first_line: int) -> int:
    return first_line + text.count("\n", 0, position)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_BLANKS = re.compile(r"[ \t\r\n]*")
_TOKENS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_LONG_NUMBER = re.compile(r"[0-9]{4301,}")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What bytes outside UTF-8 become under the error handler "surrogateescape"; sound text has no such characters."""
