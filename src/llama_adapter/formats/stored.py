"""Files that somebody else wrote: opened without running anything in them, and looked at before a tensor is copied.

`Stored` hands out tensors of one file by name. Whoever takes one says its shape first; what nobody took is left over,
and is reported.
"""

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llama_adapter.base import first_sentence
from llama_adapter.core.config import AdapterConfig, GateActivation
from llama_adapter.errors import AdapterError
from llama_adapter.settings import shown

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name of a model's tensors."""
OLD_PICKLE = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""How a file of torch.save begins that PyTorch before 1.6 wrote: a pickle of its magic number."""
LARGEST_PICKLE, LARGEST_JSON = 2**26, 2**20
"""Bytes of what describes the tensors of a checkpoint, which for a whole LLaMA are some 100,000, and of a config."""


@dataclass(frozen=True)
class Hints:
    """What is known beside the source, for what it does not say itself.

    Attributes:
        base_shape: dimensions of the base, see `core.families.shape_of`.
        base: its name.
        gate_activation: how the gates are meant.
        adapter_len: K.
        block_heads: attention heads of a visual prompt's blocks.
    """

    base_shape: Mapping[str, Any] | None = None
    base: str | None = None
    gate_activation: GateActivation | None = None
    adapter_len: int | None = None
    block_heads: int | None = None


NOTHING_SAID = Hints()


@dataclass
class Reading:
    """An adapter as it was found in a file or folder of any format.

    Attributes:
        kind: what the source was recognised as.
        config: the adapter's configuration; `base_shape` has what the source, or the base, says of it.
        tensors: its parameters by the names of `Adapter.state_dict`, fp32.
        read: how many tensors of the source they were made from.
        left_over: names in the source that the adapter has no use for.
        notes: what the source does not say and was taken as usual, in sentences.
        facts: what the authors' layout has beside: dtypes, and gates of layers without prompts.
    """

    kind: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    read: int
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Stored:
    """Tensors of one file by name, none of them copied yet."""

    def __init__(self, path: Path, found: Mapping[Any, Any], beside: Mapping[Any, Any] | None = None) -> None:
        self.path = path
        while found and (wrapper := next((w for w in WRAPPERS if all(str(key).startswith(w) for key in found)), None)):
            found = {str(key).removeprefix(wrapper): value for key, value in found.items()}
        self.tensors = {
            key: value.detach()
            for key, value in found.items()
            if isinstance(key, str) and type(value) in (Tensor, nn.Parameter)
            if value.layout == torch.strided and not value.is_meta
        }
        self.beside = {str(key): value for key, value in (beside or {}).items()}
        others = [shown(key) for key in found if key not in self.tensors]
        if others:
            raise AdapterError(
                f"{path}: {others[0]} is no plain tensor, and nothing else belongs there: copy the file again."
            )
        self.taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            AdapterError: it is missing, or has not that many dimensions.
        """
        if name not in self.tensors:
            close = [key for key in sorted(self.tensors) if key.rpartition(".")[2] == name.rpartition(".")[2]][:2]
            raise AdapterError(f"{self.path} has no tensor {name}{f' (but {shown(close)})' if close else ''}: "
                               "it is incomplete, copy it again.")  # fmt: skip
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims or 0 in shape:
            raise AdapterError(f"{self.path}: {name} has shape {shown([*shape])}, and should have {dims} dimensions.")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor as a copy in fp32.

        Raises:
            AdapterError: it is missing, of another shape than this, no float, or not finite.
        """
        found = self.shape(name, len(shape))
        tensor = self.tensors[name]
        whole = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        if found != shape or not tensor.is_floating_point() or not whole:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(f"{self.path}: {name} is {kind} {shown([*found])}, not float {shown([*shape])}.")
        self.taken.add(name)
        copy = tensor.to(torch.float32, copy=True).contiguous()
        if not copy.isfinite().all():
            raise AdapterError(f"{self.path}: {name} holds NaN or infinity; take an earlier checkpoint.")
        return copy

    def untaken(self) -> list[str]:
        """Names of the tensors that nobody took."""
        return sorted(self.tensors.keys() - self.taken)


def open_stored(path: Path) -> Stored:
    """The tensors of a file of torch.save or safetensors; of a dictionary with a `model` inside, that one's.

    Raises:
        AdapterError: it is truncated, holds more than tensors and plain values, or no tensors by name.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise AdapterError(f"{path} is no file: copy the adapter again.")
    with _reading(path):
        with path.open("rb") as file:
            start = file.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise AdapterError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' in its folder.")
        if start[8:9] == b"{" and not start.startswith(b"PK"):  # a header's length, then its JSON
            with safe_open(path, "pt") as file:
                return Stored(path, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    whole = _unpickled(path)
    if isinstance(whole, Mapping) and isinstance(whole.get("model"), Mapping):
        return Stored(path, whole["model"], {key: value for key, value in whole.items() if key != "model"})
    if not isinstance(whole, Mapping) or not whole:
        raise AdapterError(f"{path} holds {type(whole).__name__:.40}, not tensors by name: it is no adapter.")
    return Stored(path, whole)


def _unpickled(path: Path) -> Any:
    """What torch.save wrote, its tensors still on disk. Nothing but tensors and plain values is made."""
    with _reading(path):
        with path.open("rb") as file:
            old = file.read(len(OLD_PICKLE)) == OLD_PICKLE
        if not old and not zipfile.is_zipfile(path):
            raise AdapterError(
                f"{path} is not an adapter: it is no folder, and no whole file of torch.save or safetensors. "
                "Copy it again."
            )
        if not old:
            _check_archive(path)
        # The training code keeps its arguments as a Namespace: a class of attributes, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=not old, weights_only=True)


def _check_archive(path: Path) -> None:
    """Nothing in it may be larger than it looks."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            limit = LARGEST_PICKLE if entry.filename.endswith(".pkl") else path.stat().st_size
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
                raise AdapterError(f"{path} is no file of torch.save: its part {entry.filename[:80]} is packed.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into one sentence."""
    try:
        yield
    except AdapterError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"code ({code[1][:80]})" if code else "more than tensors and plain values"
        raise AdapterError(f"{path} holds {what}, which is never run: get the adapter from another place.") from None
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist: check the path.") from None
    except Exception as error:  # wrong bytes raise anything
        reason = first_sentence(error)[:-1][:120]
        raise AdapterError(
            f"{path} is truncated or no file of torch.save or safetensors ({reason}): copy it again."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A configuration; `{}` where there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:  # a pipe would never end
            return {}
        values = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return {}  # whose format this is, its own reader says better
    return values if isinstance(values, dict) else {}
