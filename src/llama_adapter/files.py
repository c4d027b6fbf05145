"""Files written so that no reader, and no crash, ever meets half of one; and pointers that stand for files."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_adapter.errors import AdapterError


def write_atomically(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, so that `path` is never half written.

    A new file has the permissions that the user's umask gives, one that is replaced keeps its own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # tempfile's are the user's alone, and the umask cannot be read without changing it for every thread
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into one sentence."""
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"{folder} cannot be written ({error.strerror or error}): what was there before is kept; "
            "free space or choose another folder."
        ) from None


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS has left a pointer where a file should be; what cannot be read is none."""
    try:
        if path.stat().st_size > 1024 or not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(23) == b"version https://git-lfs"
    except OSError:
        return False
