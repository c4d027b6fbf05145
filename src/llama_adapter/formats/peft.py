"""PEFT's `adaption_prompt` folders: the same method with one gate for all heads of a layer, used as it is."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from llama_adapter.base import load_config
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import shape_of
from llama_adapter.core.zero_init import GATE_ACTIVATIONS
from llama_adapter.errors import AdapterError, ModelError
from llama_adapter.formats.stored import Hints, Reading, open_stored, read_json
from llama_adapter.settings import shown

PEFT_TYPE = "ADAPTION_PROMPT"
FAMILIES_OF_PEFT = ("llama", "mistral")
"""Model types for which PEFT computes the method; for GPT-2 it leaves out the output projection."""
PEFT_KEY = r"base_model\.model\.(?:.+\.)?layers\.(\d{1,4})\.self_attn\.adaption_(prompt|gate)"


def read_peft(folder: Path, hints: Hints) -> Reading:
    """The adapter in a folder that PEFT's `save_pretrained` wrote.

    Raises:
        AdapterError: a file is missing or damaged, or the base that says how many heads there are cannot be found.
    """
    values = read_json(folder / "adapter_config.json")
    adapter_len, layers = values.get("adapter_len"), values.get("adapter_layers")
    base = hints.base or values.get("base_model_name_or_path") or None  # PEFT writes "" for a model without a name
    if type(adapter_len) is not int or type(layers) is not int or not (base is None or isinstance(base, str)):
        raise AdapterError(
            f"{folder}: its adapter_config.json is PEFT's ('{PEFT_TYPE}'), and does not say adapter_len and "
            "adapter_layers: restore the file."
        )
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    stored = open_stored(next((file for file in files if file.exists()), files[0]))
    keys = {name: match for name in stored.tensors if (match := re.fullmatch(PEFT_KEY, name))}
    indices = sorted({int(match[1]) for match in keys.values()})
    strange = sorted(stored.tensors.keys() - keys)
    if strange or not indices or not len(indices) == layers == indices[-1] + 1 - indices[0]:
        what = f"such as {shown(strange[0])}" if strange else f"on layers {shown(indices)}"
        raise AdapterError(f"{stored.path} does not hold prompts and gates of the top {shown(layers)} layers: {what}.")
    shape = hints.base_shape or _shape_of_base(base, folder)
    names = {(int(match[1]), match[2]): name for name, match in keys.items()}
    hidden = stored.shape(names.get((indices[0], "prompt"), f"layers.{indices[0]}.self_attn.adaption_prompt"), 3)[2]
    tensors = {}
    for i in indices:
        prompt, gate = (names.get((i, part), f"layers.{i}.self_attn.adaption_{part}") for part in ("prompt", "gate"))
        tensors[f"layers.{i}.prompt"] = stored.take(prompt, 1, adapter_len, hidden)[0]
        tensors[f"layers.{i}.gate"] = stored.take(gate, 1).repeat(shape["num_attention_heads"])
    config = AdapterConfig(
        adapter_len=adapter_len,
        adapter_layers=layers,
        gate_activation="identity",
        base_model_name_or_path=base,
        base_shape={**shape, "hidden_size": hidden, "num_hidden_layers": indices[-1] + 1},
    )
    return Reading("PEFT adaption prompt", config, tensors, len(stored.taken))


def _shape_of_base(base: str | None, folder: Path) -> dict[str, Any]:
    if base is None:
        raise AdapterError(f"{folder} does not name its base, which says how many heads share a gate: pass --base.")
    try:
        return shape_of(load_config(base))
    except ModelError as error:
        raise AdapterError(
            f"{folder} was made for '{base:.200}', which says how many heads share a gate: {error}"
        ) from None


def write_peft(reading: Reading) -> dict[str, bytes]:
    """An adapter as the two files of a PEFT folder.

    Raises:
        AdapterError: PEFT cannot say it exactly.
    """
    config = reading.config
    shape: Any = config.base_shape or {}
    family, width = shape.get("model_type"), shape["num_attention_heads"] * (shape.get("head_dim") or 0)
    strength = {
        key: GATE_ACTIVATIONS[config.gate_activation](tensor)
        for key, tensor in reading.tensors.items()
        if key.endswith(".gate")
    }
    uneven = next((key for key, gate in strength.items() if not torch.equal(gate, gate[:1].expand_as(gate))), None)
    reasons = {
        f"its code adapts {' and '.join(FAMILIES_OF_PEFT)} models, not {family}": family not in FAMILIES_OF_PEFT,
        "a condition has no place in it": config.condition is not None,
        "norms, scales, biases and LoRA have no place beside its prompts": config.has_parts or config.gate_scale,
        "it has no adapters without prompts": not config.adapter_layers,
        f"it has one gate for all heads of a layer, and those of {uneven} differ": uneven is not None,
        "its code takes heads x head_dim to be the hidden size": width != shape["hidden_size"],
    }
    for reason, broken in reasons.items():
        if broken:
            raise AdapterError(
                f"This adapter cannot be PEFT's: {reason}. Keep it as it is, or see --to official and --to litgpt."
            )
    tensors = {}
    for key, gate in strength.items():
        prefix = f"base_model.model.model.{key.removesuffix('.gate')}.self_attn.adaption_"
        tensors[f"{prefix}gate"] = gate[:1].clone()
        tensors[f"{prefix}prompt"] = reading.tensors[key.replace(".gate", ".prompt")][None].contiguous()
    values = {
        "peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "inference_mode": True, "target_modules": "self_attn",
        "adapter_len": config.adapter_len, "adapter_layers": config.adapter_layers,
        "base_model_name_or_path": config.base_model_name_or_path,
    }  # fmt: skip
    return {
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "adapter_config.json": (json.dumps(values, indent=2) + "\n").encode(),
    }
