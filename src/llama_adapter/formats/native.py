"""An adapter on disk: a folder with `adapter_model.safetensors` and `adapter_config.json`.

The tensors are fp32: `layers.{i}.prompt` [K, hidden] and `layers.{i}.gate` [heads], i the layer's index in the base,
`norms.*`, `linears.*` and `lora.*` (see `core/parts.py`) where it has any, and `condition.*` where it has a condition,
whose tower is only named in the configuration.
Everything is checked before the model is touched, and what the files claim before any tensor is read; files are
replaced atomically: a reader or a crash sees the old file or the new one.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.base import first_sentence, resolve_model
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.core.config import FORMAT_VERSION, AdapterConfig
from llama_adapter.core.model import get_adapter
from llama_adapter.core.parts import part_shapes
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.files import is_lfs_pointer, write_atomically, writing
from llama_adapter.settings import BUNDLED, parse, shown

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FACTS = "source"
"""Key of the weights' metadata under which a converted adapter keeps what its source had beside."""
LARGEST_CONFIG, LARGEST_HEADER = 2**16, 2**20
"""Bytes of a configuration and of the header of the weights; ours have some hundreds and some thousands."""
FLOATS = ("F64", "F32", "F16", "BF16")
BLOCK_TENSORS = 12
"""Tensors of one block of a visual prompt."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write one adapter of `model`, by default the active one, to `folder`, which is created where needed.

    Raises:
        AdapterError: there is no such adapter, or the folder cannot be written to (the old files are kept then).
    """
    adapter = get_adapter(model, name)
    folder = Path(os.path.expanduser(folder))
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter.state_dict().items()}
    write_files(folder, native_files(adapter.config, tensors))
    return folder


def native_files(
    config: AdapterConfig, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The two files of an adapter; `facts` are what a converted one had beside it, for the way back."""
    metadata = {"format": "pt", **({FACTS: json.dumps(facts)} if facts else {})}
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    return {WEIGHTS_FILE: save(dict(tensors), metadata=metadata), CONFIG_FILE: text.encode()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, which is created where needed.

    Raises:
        AdapterError: the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)


def read_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """The configuration in an adapter's folder; no tensor is read.

    Raises:
        AdapterError: the folder holds none, or it is not ours.
    """
    folder = Path(os.path.expanduser(folder))
    path = folder / CONFIG_FILE
    hint = "it is no folder" if os.path.exists(folder) else "there is nothing of that name"
    if os.path.isdir(folder):
        hint = f"it has no {CONFIG_FILE}"
    if os.path.isfile(folder / "config.json"):
        hint += ", but a whole model's config.json: save_pretrained says nothing of adapters, save_adapter keeps them"
    size = _size(path, f"{folder} is not an adapter: {hint}. Give the folder that training wrote.")
    if size > LARGEST_CONFIG:
        raise AdapterError(f"{path} has {size:,} bytes and no adapter's configuration has 2^16: restore the file.")
    try:
        values = json.loads(path.read_bytes().decode(), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise AdapterError(f"{path} is nested too deep for a configuration: restore the file.") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}): restore the file or train again.") from None
    if not isinstance(values, dict) or "format_version" not in values:
        peft = values.get("peft_type") if isinstance(values, dict) else None
        kind = f"PEFT's ({shown(peft)})" if peft else "not llama-adapter's"
        raise AdapterError(f"{path} is {kind}: it has no 'format_version'. Give a folder that llama-adapter wrote.")
    try:
        config = config_from(values, str(path))
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    shape = config.base_shape or {}
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        number = shape.get(key)
        if config.adapter_layers is None or not isinstance(number, int) or number < 1:
            raise AdapterError(f"{path} does not say adapter_layers and the base's shape ({key}): it was edited.")
        early = (None if config.condition is None else config.condition.layers) or 0
        if key == "num_hidden_layers" and config.adapter_layers + early > number:
            layers = shown(config.adapter_layers) + (f" and the condition's {shown(early)}" if early else "")
            raise AdapterError(f"{path}: adapter_layers is {layers}, more than the base's {shown(number)} layers.")
    return config


def config_from(values: Mapping[str, Any], source: str = CONFIG_FILE) -> AdapterConfig:
    """The inverse of `AdapterConfig.to_dict`.

    Raises:
        ConfigError: an unknown key, a wrong type, a broken rule, or files of a newer format version.
    """
    version = values.get("format_version", FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(
            f"{source}: format_version is {shown(version)}, and this llama-adapter reads versions up to "
            f"{FORMAT_VERSION}: upgrade with pip install -U llama-adapter."
        )
    condition = values.get("condition")
    if isinstance(condition, Mapping):
        values = {**values, "condition": ConditionConfig.from_dict(condition, f"{source}, condition")}
    return parse(AdapterConfig, values, source)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _size(path: Path, missing: str) -> int:
    """Bytes of a file; `missing` is said where there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(missing) from None
    except (OSError, ValueError) as error:  # a circle of links, no permission, an impossible name
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path} cannot be read ({reason}): copy the adapter again.") from None
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError(f"{path} is no file: copy the adapter again.")
    return status.st_size


def check_base(config: AdapterConfig, shape: Mapping[str, int | str], source: object) -> None:
    """Refuse an adapter that was made for a base of another shape.

    Raises:
        AdapterError: naming every dimension that differs, and the base the adapter was made for.
    """
    made_for = config.base_shape or {}
    differences = [
        f"{key:.40} {shown(made_for[key])} against {shape.get(key)!r}"
        for key in made_for
        if made_for[key] != shape.get(key)
    ]
    if differences:
        base = config.base_model_name_or_path
        raise AdapterError(
            f"The adapter in {source} was made for {shown(base) if base else 'another base'}, "
            f"not for this one: {', '.join(differences[:6])}. Load it on the base it was trained on."
        )


def names_another_base(config: AdapterConfig, base: str | None) -> str | None:
    """A sentence where an adapter was made for a base of another name than this one's, of the same shape though it be.

    Names are told apart by their last part, as bases move between folders and the hub.
    """
    made_for = config.base_model_name_or_path
    if not made_for or not base or _last_part(made_for) == _last_part(base):
        return None
    return (
        f"it was made for the base {shown(made_for)} and is used on {shown(base)}, which has the same shape: answers "
        "mean something where the weights are the same too"
    )


def _last_part(base: str) -> str:
    """The name of a base without its folder or owner; of a folder in the hub's cache the repository's."""
    if base in (BUNDLED, resolve_model(BUNDLED)):
        return BUNDLED
    parts = Path(os.path.realpath(base) if os.path.exists(base) else base).parts
    cached = [part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")]
    return (cached or parts)[-1].casefold()


def read_tensors(
    folder: str | os.PathLike[str], config: AdapterConfig, model: PreTrainedModel | None = None
) -> dict[str, Tensor]:
    """The tensors of an adapter in fp32, checked against its configuration before any of them is read.

    Args:
        folder: the adapter's.
        config: what `read_config` gave.
        model: its base, with weights or without: which norms and linears there are, and how large. Without it what the
            adapter has for those is held against its configuration alone.

    Raises:
        AdapterError: a file is missing, truncated or foreign, or a tensor has another shape than it should.
    """
    path = Path(os.path.expanduser(folder)) / WEIGHTS_FILE
    _size(path, f"{folder} has no {WEIGHTS_FILE}: the copy is incomplete.")
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if is_lfs_pointer(path):
            raise AdapterError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' in its folder.")
        if (header := int.from_bytes(start[:8], "little")) > LARGEST_HEADER:
            raise SafetensorError(f"a header of {header:,} bytes")
        with safe_open(path, "pt") as file:
            _check_header({key: file.get_slice(key) for key in file.keys()}, config, path, model)  # noqa: SIM118
            tensors = {key: file.get_tensor(key).to(torch.float32, copy=True) for key in file.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: larger than the address space allows
        raise AdapterError(f"{path} is truncated or no safetensors file ({error}): copy it again.") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {key} holds NaN, infinity or more than fp32 can; take an earlier checkpoint.")
    return tensors


def read_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a converted adapter's source had beside it; the weights have been read before."""
    try:
        with safe_open(Path(folder) / WEIGHTS_FILE, "pt") as file:
            values = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (ValueError, RecursionError):
        return {}
    facts = values if isinstance(values, dict) else {}
    return {key: value for key, value in facts.items() if isinstance(value, dict)}


def _check_header(found: Mapping[str, Any], config: AdapterConfig, path: Path, model: PreTrainedModel | None) -> None:
    """Names, shapes and dtypes that the header claims, against those that follow from the configuration."""
    condition = config.condition
    blocks = getattr(condition, "blocks", 0) if getattr(condition, "kind", None) == "visual_prompt" else 0
    # Names are made only where there can be as many: an edited configuration may ask for 10^9.
    if (
        max(2 * (config.adapter_layers or 0), getattr(condition, "layers", 0) or 0, BLOCK_TENSORS * blocks)
        > len(found) + 1000
    ):
        raise AdapterError(f"{path} does not fit its {CONFIG_FILE}, which asks for more than its {len(found)} tensors.")
    try:
        wanted = tensor_shapes(config)
        try:
            wanted |= _claimed_parts(found, config) if model is None else part_shapes(config, model)
        except ConfigError as error:
            raise AdapterError(f"{path}: {error}") from None
    except (RuntimeError, TypeError) as error:  # numbers that PyTorch does not count up to
        raise AdapterError(f"{path}: no weights fit its {CONFIG_FILE} ({first_sentence(error)[:80]})") from None
    if wanted.keys() != found.keys():
        missing, extra = sorted(wanted.keys() - found)[:3], sorted(found.keys() - wanted)[:3]
        raise AdapterError(
            f"{path} does not fit its {CONFIG_FILE}: missing {missing or 'none'}, "
            f"unexpected {shown(extra) if extra else 'none'}."
        )
    for key, size in wanted.items():
        kind, shape = found[key].get_dtype(), found[key].get_shape()
        if tuple(shape) != size or kind not in FLOATS:
            raise AdapterError(f"{path}: {key} is {kind} {shape}, not float {shown([*size])}.")


def _claimed_parts(found: Mapping[str, Any], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Tensors beside prompts that a configuration allows, in the sizes that the header claims for its base.

    Raises:
        ConfigError: none at all for something that the configuration asks for.
    """
    names = {"scale": config.linear_scale, "bias": config.linear_bias}
    names |= dict.fromkeys("AB", config.lora_targets)
    missing = {f"{kind} of {name}" for kind, some in names.items() for name in some}
    missing |= {"norms"} if config.norms else set()
    wanted: dict[str, tuple[int, ...]] = {}
    for key, tensor in found.items():
        if key.startswith(tuple(f"modules_to_save.{name}." for name in config.modules_to_save)):
            wanted[key] = tuple(tensor.get_shape())
            continue
        kind, parameter, shape = key.partition(".")[0], key.rpartition(".")[2], tuple(tensor.get_shape())
        name = key.split(".")[-2] if key.count(".") > 1 else ""
        if kind == "norms" and config.norms and parameter in ("weight", "bias") and len(shape) == 1:
            missing.discard("norms")
            wanted[key] = shape
        elif kind == "linears" and parameter in ("scale", "bias") and name in names[parameter] and len(shape) == 1:
            missing.discard(f"{parameter} of {name}")
            wanted[key] = shape
        elif kind == "lora" and parameter in ("A", "B") and name in config.lora_targets and len(shape) == 2:
            missing.discard(f"{parameter} of {name}")
            wanted[key] = (config.lora_rank, shape[1]) if parameter == "A" else (shape[0], config.lora_rank)
            wanted.setdefault(key[:-1] + "AB".replace(parameter, ""), ())  # both, or a key that is not there
    if missing:
        raise ConfigError(f"there is no tensor for {', '.join(sorted(missing)[:3])}")
    return wanted


def tensor_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the prompts, gates and condition of an adapter with known `adapter_layers` and `base_shape`.

    Those of its other parts depend on the base's modules: `core.parts.part_shapes` has them.
    """
    shape: Mapping[str, Any] = config.base_shape or {}
    top, count, hidden = shape["num_hidden_layers"], config.adapter_layers or 0, shape["hidden_size"]
    sizes = {"prompt": (config.adapter_len, hidden), "gate": (shape["num_attention_heads"],)}
    if config.gate_scale:
        sizes["gate_scale"] = (1,)
    wanted = {f"layers.{i}.{kind}": size for i in range(top - count, top) for kind, size in sizes.items()}
    if config.condition is not None:
        del sizes["prompt"]
        early = range(config.condition.layers or 0)
        wanted |= {f"layers.{i}.{kind}": size for i in early for kind, size in sizes.items()}
        of_condition = config.condition.shapes(hidden, config.adapter_len)
        wanted |= {f"condition.{key}": size for key, size in of_condition.items()}
    return wanted
