"""What an adapter folder holds, as plain values."""

import os
from pathlib import Path
from typing import Any

from llama_adapter.core.zero_init import GATE_ACTIVATIONS
from llama_adapter.formats.native import WEIGHTS_FILE, read_config, read_tensors


def describe_adapter(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Configuration, size, and the gates and prompts of every layer; the base is not needed.

    Returns:
        folder, config, parameters, bytes (of the weights file), and `layers`: for each adapted layer its index,
        act(g) per head, their mean and largest magnitude, and the root mean square of its prompts.

    Raises:
        AdapterError: the folder holds no sound adapter.
    """
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    activate = GATE_ACTIVATIONS[config.gate_activation]
    layers = []
    for key in sorted((key for key in tensors if key.endswith(".gate")), key=lambda key: int(key.split(".")[1])):
        gates = activate(tensors[key])
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
        "config": config.to_dict(),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": (Path(folder) / WEIGHTS_FILE).stat().st_size,
        "layers": layers,
    }
