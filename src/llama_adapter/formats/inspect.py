"""What an adapter of any format holds, as plain values."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama_adapter.core.zero_init import GATE_ACTIVATIONS
from llama_adapter.formats.load import find_adapter, read_adapter
from llama_adapter.formats.native import WEIGHTS_FILE


def describe_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Configuration, size, and the gates and prompts of every layer; the base is not needed.

    A folder, or "owner/name" on the hub.
    A PEFT folder is the exception: how many heads share a gate only its base's configuration says.

    Returns:
        folder, format, notes (what the files leave open), config, parameters, bytes (of the weights file), and
        `layers`: for each adapted layer its index, act(g) per head (times the gate's scale), their mean and largest
        magnitude, and the root mean square of its prompts; and `parts`: how many numbers its prompts, gates, norms,
        scales, biases, LoRA and condition have.

    Raises:
        AdapterError: the folder holds no sound adapter.
    """
    place = find_adapter(folder)
    found = read_adapter(place)
    config, tensors = found.config, found.tensors
    activate = GATE_ACTIVATIONS[config.gate_activation]
    layers = []
    of_gates = [key for key in tensors if key.startswith("layers.") and key.endswith(".gate")]
    for key in sorted(of_gates, key=lambda key: int(key.split(".")[1])):
        gates = activate(tensors[key]) * tensors.get(f"{key}_scale", 1.0)
        prompt = tensors.get(key.replace(".gate", ".prompt"))  # none where the condition alone is read
        layers.append(
            {
                "layer": int(key.split(".")[1]),
                "mean": gates.abs().mean().item(),
                "max": gates.abs().max().item(),
                "prompt_rms": None if prompt is None else prompt.square().mean().sqrt().item(),
                "gates": gates.tolist(),
            }
        )
    return {
        "folder": str(folder),
        "format": found.kind,
        "notes": found.notes,
        "config": config.to_dict(),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "parts": _sizes(tensors),
        "bytes": _bytes(place),
        "layers": layers,
    }


def _bytes(path: Path) -> int:
    """Of the weights: of the one file, or of those in the folder."""
    files = [path] if path.is_file() else [path / WEIGHTS_FILE]
    files = files if files[0].is_file() else [*path.glob("adapter_model.bin"), *path.glob("*.pth*")]
    return sum(file.stat().st_size for file in files)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers by kind of part."""
    found: dict[str, int] = {}
    for key, tensor in tensors.items():
        kind, last = key.partition(".")[0], key.rpartition(".")[2]
        kind = {"layers": f"{last}s", "linears": {"scale": "scales"}.get(last, "biases")}.get(kind, kind)
        found[kind] = found.get(kind, 0) + tensor.numel()
    return found
