"""Files written so that no reader, and no crash, ever meets half of one; locks; and pointers that stand for files."""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llama_adapter.errors import NotWrittenError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
"""What file systems say that have no locks."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, so that `path` is never half written.

    A new file has the permissions that the user's umask gives, one that is replaced keeps its own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # tempfile's are the user's alone, and the umask cannot be read without changing it for every thread
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        with suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_all(handle: int, content: bytes) -> None:
    """Write all of `content` to an open file, which takes as much at a time as it likes."""
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]


def append(path: Path, content: bytes) -> None:
    """Write at the end of a file; where that fails, the file is cut to what it was."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        before = os.fstat(handle).st_size
        try:
            write_all(handle, content)
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether it is a temporary file of `write_atomically`, which a kill leaves behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


class Lock:
    """A lock on a file that one process at a time can hold, and that dies with it, however that ends.

    Attributes:
        path: the file; it stays when the lock is gone, and holds what its last owner wrote with `note`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def take(self) -> bool:
        """Take it, or say that another holds it; where the file system has no locks, everybody gets it.

        Raises:
            OSError: the file cannot be opened.
        """
        if self._handle is not None:
            return True
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                return False
        self._handle = handle
        return True

    def note(self, text: str) -> None:
        """Write into the file, for whoever finds it taken."""
        if self._handle is not None:
            with suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(self._handle, 0)
                os.lseek(self._handle, 0, os.SEEK_SET)
                write_all(self._handle, text.encode())

    def read(self) -> str:
        """What its last owner wrote; empty where nobody did."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def release(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # behind the note, which others may read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        return
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one sentence."""
    try:
        yield
    except OSError as error:
        raise NotWrittenError(
            f"{folder} cannot be written ({error.strerror or error}): what was there before is kept; {way_out(error)}."
        ) from None


def way_out(error: OSError) -> str:
    """What to do where something cannot be written: only a full disk asks for space."""
    if is_full(error):
        return "free space or choose another place"
    return "choose another place, or change who may write there"


def is_full(error: OSError) -> bool:
    """Whether a disk, or what one may use of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS has left a pointer where a file should be; what cannot be read is none."""
    try:
        if path.stat().st_size > 1024 or not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(23) == b"version https://git-lfs"
    except OSError:
        return False


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, none where it is not there; a line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add an object to a file of JSON lines; a line that a kill cut off is ended first."""
    cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    append(path, ("\n" * cut_off + json.dumps(values) + "\n").encode())
