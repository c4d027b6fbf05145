"""An adapter on disk: a folder with `adapter_model.safetensors` and `adapter_config.json`.

The tensors are fp32: `layers.{i}.prompt` [K, hidden] and `layers.{i}.gate` [heads], i the layer's index in the base,
and `condition.*` where it has a condition, whose tower is only named in the configuration.
Everything is checked before the model is touched, and files are replaced atomically: a reader or a crash sees the
old file or the new one.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.conditions.modules import build_condition
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import shape_of
from llama_adapter.core.model import add_adapter, get_adapter
from llama_adapter.core.routing import Adapter
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.files import write_atomically, writing

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Path:
    """Write one adapter of `model` to `folder`, which is created where needed.

    Raises:
        AdapterError: there is no such adapter, or the folder cannot be written to (the old files are kept then).
    """
    adapter = get_adapter(model, name)
    folder = Path(folder)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter.state_dict().items()}
    config = json.dumps(adapter.config.to_dict(), indent=2) + "\n"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, config.encode())
    return folder


def load_adapter(
    model: PreTrainedModel, folder: str | os.PathLike[str], name: str = "default", trainable: bool = False
) -> Adapter:
    """Read an adapter from `folder` onto `model`, where it becomes the active one.

    Args:
        model: a base of the shape the adapter was made for.
        folder: what `save_adapter` wrote.
        name: what the adapter is called on this model.
        trainable: whether its parameters take gradients.

    Raises:
        AdapterError: no adapter there, damaged or foreign files, or one made for a base of another shape.
        UnsupportedModelError: the family cannot be adapted.
    """
    config = read_config(folder)
    check_base(config, shape_of(model.config), folder)
    tensors = read_tensors(folder, config)
    with torch.random.fork_rng(devices=[]):  # the prompts drawn here are overwritten: leave the caller's state alone
        adapter = add_adapter(model, replace(config, base_shape=None), name)
    adapter.load_state_dict(tensors)
    for parameter in adapter.parameters():
        parameter.requires_grad_(trainable)
    return adapter


def read_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """The configuration in an adapter's folder; no tensor is read.

    Raises:
        AdapterError: the folder holds none, or it is not ours.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        hint = "it is no folder" if not Path(folder).is_dir() else f"it has no {CONFIG_FILE}"
        raise AdapterError(f"{folder} is not an adapter: {hint}. Give the folder that training wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}): restore the file or train again.") from None
    if not isinstance(values, dict) or "format_version" not in values:
        is_peft = isinstance(values, dict) and "peft_type" in values
        kind = f"PEFT's ({values['peft_type']})" if is_peft else "not llama-adapter's"
        raise AdapterError(f"{path} is {kind}: it has no 'format_version'. Give a folder that llama-adapter wrote.")
    try:
        config = AdapterConfig.from_dict(values)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from None
    shape = config.base_shape or {}
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if config.adapter_layers is None or not isinstance(shape.get(key), int):
            raise AdapterError(f"{path} does not say adapter_layers and the base's shape ({key}): it was edited.")
    return config


def check_base(config: AdapterConfig, shape: dict[str, int | str], source: object) -> None:
    """Refuse an adapter that was made for a base of another shape.

    Raises:
        AdapterError: naming every dimension that differs, and the base the adapter was made for.
    """
    made_for = config.base_shape or {}
    differences = [
        f"{key} {made_for[key]} against {shape.get(key)}" for key in made_for if made_for[key] != shape.get(key)
    ]
    if differences:
        raise AdapterError(
            f"The adapter in {source} was made for {config.base_model_name_or_path or 'another base'}, "
            f"not for this one: {', '.join(differences)}. Load it on the base it was trained on."
        )


def read_tensors(folder: str | os.PathLike[str], config: AdapterConfig) -> dict[str, Tensor]:
    """The tensors of an adapter, checked against its configuration.

    Raises:
        AdapterError: a file is missing, truncated or foreign, or a tensor has another shape than it should.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        tensors = load(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}: the copy is incomplete.") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is truncated or no safetensors file ({error}): copy it again.") from None
    wanted = tensor_shapes(config)
    if wanted.keys() != tensors.keys():
        missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise AdapterError(
            f"{path} does not fit its {CONFIG_FILE}: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}."
        )
    for key, size in wanted.items():
        if tuple(tensors[key].shape) != size or not tensors[key].is_floating_point():
            raise AdapterError(
                f"{path}: {key} is {tensors[key].dtype} {list(tensors[key].shape)}, not float {list(size)}."
            )
        if not tensors[key].isfinite().all():
            raise AdapterError(f"{path}: {key} holds NaN or infinity; take an earlier checkpoint.")
    return tensors


def tensor_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter whose `adapter_layers` and `base_shape` are known."""
    shape = config.base_shape or {}
    top, count, hidden = shape["num_hidden_layers"], config.adapter_layers or 0, shape["hidden_size"]
    sizes = {"prompt": (config.adapter_len, hidden), "gate": (shape["num_attention_heads"],)}
    wanted = {f"layers.{i}.{kind}": size for i in range(top - count, top) for kind, size in sizes.items()}
    if config.condition is not None:
        with torch.device("meta"):
            condition = build_condition(config.condition, hidden, config.adapter_len)
        wanted |= {f"condition.{key}": tuple(p.shape) for key, p in condition.named_parameters()}
    return wanted
