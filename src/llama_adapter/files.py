"""Files written so that no reader, and no crash, ever meets half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_adapter.errors import AdapterError


def write_atomically(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder, so that `path` is never half written."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
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
