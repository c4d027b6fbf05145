"""From any adapter to ours, and from ours to the others, with an account of every tensor."""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama_adapter.base import empty_base, load_base, load_config
from llama_adapter.core.families import shape_of
from llama_adapter.core.model import add_adapter, get_adapter, remove_adapter, use_adapter
from llama_adapter.errors import AdapterError
from llama_adapter.formats.litgpt import CUT_WRONGLY, write_litgpt
from llama_adapter.formats.load import find_adapter, read_adapter
from llama_adapter.formats.native import native_files, write_files
from llama_adapter.formats.official import write_official
from llama_adapter.formats.peft import write_peft
from llama_adapter.formats.stored import NOTHING_SAID, Hints, Reading

Target = Literal["peft", "official", "litgpt"]
PROBE = 12
"""Tokens of the sequence whose logits are compared."""


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: Target | None = None,
    base: str | None = None,
    hints: Hints = NOTHING_SAID,
    verify: bool = False,
) -> dict[str, Any]:
    """Write the adapter in `source` to the folder `output`.

    Args:
        source: an adapter of any format, see `read_adapter`.
        output: a new or empty folder.
        to: the format; None is ours.
        base: the base it is for: checked, and named in what is written.
        hints: what the source does not say.
        verify: read back what was written and compare it, with a base its logits too.

    Returns:
        The account: source, kind, output, files, read, mapped (numbers of tensors), left_over (names), parameters,
        digest (of our tensors), notes, config, and where it was verified `verified` (largest differences).

    Raises:
        LlamaAdapterError: the source, the base or the target cannot take part; nothing is written then.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"{folder} exists and is not empty: give --output a new folder.")
    if base is not None:
        hints = replace(hints, base_shape=shape_of(load_config(base)), base=base)
    found = read_adapter(find_adapter(source), hints, None if base is None else empty_base(load_config(base)))
    if base is not None:
        config = replace(found.config, base_model_name_or_path=base, base_shape=hints.base_shape)
        found = replace(found, config=config)
    files, notes = _files(found, to)
    account = {
        "source": str(source), "kind": found.kind, "output": str(folder), "files": sorted(files), "read": found.read,
        "mapped": len(found.tensors), "left_over": found.left_over, "parameters": _count(found.tensors),
        "digest": digest(found.tensors), "notes": [*found.notes, *notes], "config": found.config.to_dict(),
    }  # fmt: skip
    write_files(folder, files)
    if verify:
        account["verified"] = _verify(found, folder, base)
    return account


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of an adapter's tensors by our names: the same for the same adapter, whatever file it was in."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(f"{key} {list(tensors[key].shape)}\n".encode())
        total.update(tensors[key].contiguous().numpy().tobytes())
    return total.hexdigest()


def _files(found: Reading, to: Target | None) -> tuple[dict[str, bytes], list[str]]:
    """What is written, and what there is to know of it."""
    if to is None:
        return native_files(found.config, found.tensors, found.facts), []
    activation = found.config.gate_activation
    if to == "official":
        name, content = write_official(found)
        note = (
            f"The authors' layout does not say the gates' activation: it is {activation}; "
            f"read it back with convert --gate-activation {activation}."
        )
        return {name: _pickled(content)}, [note]
    notes = [] if activation == "identity" else ["The gates are written as tanh(g), which the target uses as they are."]
    if to == "peft":
        return write_peft(found), notes
    name, content = write_litgpt(found)
    if (found.config.base_shape or {}).get("num_key_value_heads") != 1:
        notes.append(CUT_WRONGLY)
    return {name: _pickled(content)}, notes


def _pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _verify(found: Reading, folder: Path, base: str | None) -> dict[str, Any]:
    """Read the written adapter and compare it with what was converted.

    Raises:
        AdapterError: they differ.
    """
    config = found.config
    hints = Hints(config.base_shape, config.base_model_name_or_path, None, config.adapter_len,
                  getattr(config.condition, "block_heads", None))  # fmt: skip
    again = read_adapter(folder, hints)
    if again.kind.startswith("the authors' V1") or again.kind.startswith("the authors' V2"):
        again = replace(again, config=replace(again.config, gate_activation=config.gate_activation))
    ours, theirs = _effective(found), _effective(again)
    if ours.keys() != theirs.keys():
        raise AdapterError(f"{folder} was written, but reads back with other tensors: report this, and do not use it.")
    result = {"tensors": max((_apart(ours[key], theirs[key]) for key in ours), default=0.0)}
    if base is not None:
        first, second = _logits(base, [found, again])
        result["logits"] = _apart(first, second)
    if result["tensors"] > 0 or result.get("logits", 0.0) > 1e-5:
        raise AdapterError(f"{folder} was written, but reads back differently by {result}: do not use it.")
    return result


def _effective(reading: Reading) -> dict[str, Tensor]:
    """The tensors with what is done to the gates done: two ways of writing one strength compare equal."""
    from llama_adapter.core.zero_init import GATE_ACTIVATIONS

    activate = GATE_ACTIVATIONS[reading.config.gate_activation]
    found = {key: activate(t) if key.endswith(".gate") else t for key, t in reading.tensors.items()}
    scales = [key for key in found if key.endswith(".gate_scale")]
    for key in scales:
        found[key.removesuffix("_scale")] = found[key.removesuffix("_scale")] * found.pop(key)
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item() if one.shape == other.shape else float("inf")


@torch.no_grad()
def _logits(base: str, readings: list[Reading]) -> list[Tensor]:
    """Logits of one sequence through each adapter on the base, in fp32 on the CPU."""
    model = load_base(base, torch.device("cpu"), "fp32")
    tokens = torch.arange(PROBE)[None] % model.get_input_embeddings().num_embeddings
    found = []
    for reading in readings:
        add_adapter(model, reading.config, "verified", state_dict=reading.tensors)
        condition = None
        if get_adapter(model, "verified").condition is not None:
            condition = torch.linspace(-1, 1, model.get_input_embeddings().weight.shape[1])[None]
        with use_adapter(model, "verified", condition):
            found.append(model(tokens).logits)
        remove_adapter(model, "verified")
    return found
