"""Whether a file is still the one that reading began with: some are read for days, again and again."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from llama_adapter.errors import DataError

FINGERPRINTED = 256
"""Blocks of 64 KiB, over all files, by which a run knows them: 16 MiB are read in a moment."""
_BLOCK = 2**16


def fingerprint(path: Path, blocks: int) -> bytes:
    """SHA-256 of what tells other content from this: of a file its size and so many blocks, evenly spaced.

    Blocks have 64 KiB, and the first and the last are always among them; a file of no more is read whole. Not its
    time: that of a copy is another.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        digest = hashlib.sha256(b"%d " % size)
        count = min(-(-size // _BLOCK), max(2, blocks))
        for number in range(count):
            file.seek(number * max(0, size - _BLOCK) // max(1, count - 1))
            digest.update(file.read(_BLOCK))
    return digest.digest()


@dataclass
class Known:
    """A file as it was once."""

    path: Path
    blocks: int
    looks: tuple[int, ...]
    digest: bytes

    @classmethod
    def of(cls, path: Path, blocks: int) -> "Known":
        """As it is now; `blocks` see `fingerprint`."""
        return cls(path, blocks, _looks(path), fingerprint(path, blocks))

    def check(self) -> None:
        """Check that it is still so: by a look, and by its content where it looks otherwise, as after a copy.

        Raises:
            DataError: it is another now, shorter or longer, or gone.
        """
        try:
            looks = _looks(self.path)
            if looks == self.looks or fingerprint(self.path, self.blocks) == self.digest:
                self.looks = looks
                return
        except OSError as error:
            reason = f"cannot be read any more ({error.strerror})"
        else:
            reason = "has changed while it was in use"
        raise DataError(
            f"{self.path} {reason}: put the old file back and go on with --resume, or start anew with --overwrite."
        )


def _looks(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino
