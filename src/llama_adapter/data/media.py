"""The pictures, recordings and videos that a record names or holds, and the tags that say where they stand."""

import base64
import binascii
import os.path
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_adapter.data.examples import Media, type_name
from llama_adapter.errors import DataError
from llama_adapter.files import is_lfs_pointer
from llama_adapter.settings import shown

MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
PICTURE_TAG = "<image>"
_TAG = re.compile(r"\s*<(?:image|audio|video)>\s*")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}\s*")
_LONGEST_NAME = 1024
"""Base64 of a picture is longer than this; a path without a dot, a blank or a backslash is not."""


def media_of(value: object, name: str) -> list[Media]:
    """The files under one key: none (null, "", []), one, or a list.

    A file is a path, a `data:` address, its content as base64, or an object as `datasets` writes them, with `bytes` or
    `path`.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, list | tuple):
        return [_one(item, f"an entry of {name}") for item in value]
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return [_one(value, name)]


def _one(value: object, name: str) -> Media:
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, Mapping):
        for key in ("bytes", "base64", "data"):
            if content := value.get(key):
                return content if isinstance(content, bytes) else _decoded(content, f"'{key}' of {name}")
        path = value.get("path") or value.get("url")
        if not path:
            raise DataError(f"{name} is an object with neither 'bytes' nor 'path'")
        return _one(path, f"'path' of {name}")
    if not isinstance(value, str) or not value.strip():
        found = "empty" if value in ("", b"") or isinstance(value, str) else type_name(value)
        raise DataError(f"{name} must be a file name or a list of them, not {found}")
    if value.startswith("data:"):
        return _decoded(value.partition(",")[2], name)
    if value.startswith(("http://", "https://")):
        raise DataError(f"{name} is the address {shown(value)}: download the file and name its path")
    if len(value) > _LONGEST_NAME and _BASE64.fullmatch(value):
        return _decoded(value, name)
    return value.removeprefix("file://")


def _decoded(text: object, name: str) -> bytes:
    try:
        content = base64.b64decode(str(text).strip().translate({ord("-"): "+", ord("_"): "/"}), validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content:
        raise DataError(f"{name} holds a file's content that is no base64")
    return content


def found(media: Media, folder: Path) -> Media:
    """A path as the record names it, else beside the data file; content as it is.

    Raises:
        DataError: the file is in neither place.
    """
    if isinstance(media, bytes):
        return media
    # os.path's test says no to names that are too long or hold a zero, where Path's raises.
    for path in (os.path.expanduser(media), os.path.join(folder, media)):
        if os.path.exists(path):
            if is_lfs_pointer(Path(path)):
                raise DataError(f"{path} is a Git LFS pointer, not the file: run 'git lfs pull' in its folder")
            return path
    raise DataError(f"{shown(media)} is neither there nor in {os.path.abspath(folder)}")


def count_tags(text: str) -> int:
    """How many tags stand in a text."""
    return len(_TAG.findall(text))


def without_tags(text: str) -> str:
    """The text without the tags that say where a picture stands: it enters beside the text, through the prompts."""
    return _TAG.sub(lambda tag: "\n" if "\n" in tag[0] else " ", text).strip() if _TAG.search(text) else text


PART_SOURCES = {
    "image": ("image", "url", "path", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "audio": ("audio", "url", "path", "base64"),
    "audio_url": ("audio_url",),
    "input_audio": ("input_audio",),
    "video": ("video", "url", "path", "base64"),
    "video_url": ("video_url",),
}
"""Where a part of a message's content, by its type, has its file."""


def media_of_part(part: Mapping[str, Any], where: str) -> list[Media]:
    """The files of one part; none where it only says that a picture stands there, which the record then names.

    Raises:
        DataError: the part's type is unknown, or its file cannot be understood.
    """
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PART_SOURCES:
        known = ", ".join(("text", *PART_SOURCES))
        raise DataError(f"{where} has a part of the unknown type {shown(kind)}; the types are {known}")
    sources = [(key, part[key]) for key in PART_SOURCES[kind] if part.get(key)]
    return [file for key, value in sources[:1] for file in media_of(value, f"'{key}' of a part of {where}")]
