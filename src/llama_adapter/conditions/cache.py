"""Features kept between epochs and runs: a frozen tower gives the same ones every time."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llama_adapter.errors import DataError
from llama_adapter.files import way_out, write_atomically
from llama_adapter.progress import progress_bar

Compute = Callable[[list[Any]], Sequence[Tensor] | Tensor]
LONG_WORK = 64
"""From this many missing inputs on, a progress bar is shown."""
CHUNK = 48
"""How many inputs `fill` holds the features of at a time."""


class FeatureCache:
    """Features by the content of their input and the tower that made them.

    Args:
        folder: where files are kept, in a folder for each tower; None keeps them in memory.
        tower_key: `Tower.key(depths)`, and how files are read; whatever changes the features must change it.
        batch_size: inputs handed to `compute` at once; what a batch gave is kept before the next one starts.
        most: how many features are kept in memory, the last ones; None keeps all.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        tower_key: str,
        batch_size: int = 16,
        most: int | None = None,
    ) -> None:
        self.most = most
        self.tower_key = tower_key
        self.batch_size = batch_size
        self._folder = None if folder is None else Path(folder) / hashlib.sha256(tower_key.encode()).hexdigest()[:16]
        self._memory: dict[str, Tensor] = {}
        self._digests: dict[tuple[str, int, int], str] = {}

    def fill(self, inputs: Sequence[Any], compute: Compute) -> None:
        """Compute what is missing, without holding the features of all inputs at once.

        Raises:
            DataError: as `get_many`.
        """
        with progress_bar(len(inputs), "input", "features", disable=len(inputs) < CHUNK) as bar:
            for start in range(0, len(inputs), CHUNK):
                bar.update(len(self.get_many(inputs[start : start + CHUNK], compute)))

    def get_many(self, inputs: Sequence[Any], compute: Compute) -> list[Tensor]:
        """The features of every input, in order, on the CPU.

        Args:
            inputs: paths of files or of folders of frames, their content as bytes, pictures, arrays of samples,
                or lists of these; equal content is computed once.
            compute: called with some of `inputs`, at most `batch_size`; gives one tensor each.

        Raises:
            DataError: an input cannot be read, or the folder cannot be written to.
        """
        digests = [self._digest(given) for given in inputs]
        found = {digest: kept for digest in dict.fromkeys(digests) if (kept := self._read(digest)) is not None}
        missing = {digest: given for digest, given in zip(digests, inputs, strict=True) if digest not in found}
        for batch in self._batches(list(missing.items())):
            features = compute([given for _, given in batch])
            for (digest, _), tensor in zip(batch, features, strict=True):
                # A row of a batch would keep the whole batch alive, and safetensors writes no views.
                found[digest] = tensor.detach().cpu().clone().contiguous()
                self._write(digest, found[digest])
        return [found[digest] for digest in digests]

    def _digest(self, given: Any) -> str:
        """Of the content; a file that has not been touched is not read again."""
        if not isinstance(given, str) or not os.path.isfile(given):
            return content_digest(given)
        stat = os.stat(given)
        state = (given, stat.st_mtime_ns, stat.st_size)
        if state not in self._digests:
            self._digests[state] = content_digest(given)
        return self._digests[state]

    def _batches(self, items: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
        short = len(items) < LONG_WORK
        with progress_bar(len(items), "input", "features", disable=short) as bar:
            for start in range(0, len(items), self.batch_size):
                batch = items[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _path(self, digest: str) -> Path:
        assert self._folder is not None
        return self._folder / digest[:2] / f"{digest}.safetensors"  # a flat folder of 100,000 files is slow to list

    def _read(self, digest: str) -> Tensor | None:
        if self._folder is None:
            return self._memory.get(digest)
        try:
            return load(self._path(digest).read_bytes())["features"]
        except (OSError, SafetensorError, KeyError):  # not there, or damaged: computed again and replaced
            return None

    def _write(self, digest: str, features: Tensor) -> None:
        if self._folder is None:
            self._memory[digest] = features
            if self.most is not None and len(self._memory) > self.most:
                del self._memory[next(iter(self._memory))]
            return
        path = self._path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"features": features}, metadata={"tower": self.tower_key}))
        except OSError as error:
            raise DataError(
                f"The feature cache {self._folder} cannot be written ({error.strerror or error}): {way_out(error)}."
            ) from None


def content_digest(given: Any) -> str:
    """SHA-256 of what an input holds, whatever it is called.

    Raises:
        DataError: a file that cannot be read, or something that is no input.
    """
    digest = hashlib.sha256()
    for part in _content(given):
        digest.update(f"{len(part)}:".encode())  # so that no two sequences of parts run together
        digest.update(part)
    return digest.hexdigest()


def _content(given: Any) -> Iterator[bytes]:
    if isinstance(given, bytes):
        yield given
    elif isinstance(given, str | os.PathLike):
        yield from _file_content(Path(given))
    elif isinstance(given, Image.Image):
        yield from (given.mode.encode(), str(given.size).encode(), given.tobytes())
    elif isinstance(given, np.ndarray):
        yield from (f"{given.dtype} {given.shape}".encode(), np.ascontiguousarray(given).tobytes())
    elif isinstance(given, list | tuple):
        yield f"{len(given)} parts".encode()
        for part in given:
            yield from _content(part)
    else:
        raise DataError(f"A {type(given).__name__} is no input of a tower: give a path, a picture or samples.")


def _file_content(path: Path) -> Iterator[bytes]:
    try:
        if path.is_dir():
            for file in sorted(file for file in path.iterdir() if file.is_file()):
                yield from (file.name.encode(), file.read_bytes())
        else:
            yield path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check the path.") from None
