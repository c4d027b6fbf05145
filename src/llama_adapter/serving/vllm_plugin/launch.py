"""The command that starts vLLM's server on a base and its adapters, and what can be said before it runs."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from llama_adapter.base import load_config, resolve_model
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import shape_of
from llama_adapter.core.model import check_name
from llama_adapter.errors import AdapterError, ConfigError, LlamaAdapterError, MissingExtraError
from llama_adapter.formats.load import find_adapter
from llama_adapter.formats.native import read_config
from llama_adapter.serving.vllm_plugin.chat import chat_template
from llama_adapter.serving.vllm_plugin.folders import is_ours, rank_of, read_servable

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
UNASKED = ("general", "platform", "io_processor", "stat_logger")
"""Kinds of plugins that vLLM loads where nobody names any."""
MOST_SLOTS = 64
"""Adapters that one batch may hold where nobody said; vLLM's scheduler keeps others waiting."""


def command(
    model: str,
    adapters: Mapping[str, str],
    *,
    adapter_dir: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """The command line of vLLM's server; it wants `environment(adapter_dir)` beside the caller's own.

    Args:
        model: the base: a folder, a hub name or 'bundled'.
        adapters: what requests call them -> their folders, or hub names.
        adapter_dir: a folder whose subfolders are adapters by name, each loaded when it is first asked for.
        host, port: the address.
        served_model_name: what requests call the bare base; None: as `model`.
        options: more of vLLM's own.

    Raises:
        MissingExtraError: vLLM is not installed.
        ModelError, UnsupportedModelError: the base cannot be read, or not be adapted.
        AdapterError: an adapter is damaged, made for another base, or has what vLLM has no place for.
        ConfigError: there is no such `adapter_dir`, an adapter has more prompts than vLLM has room for, or adapters
            were trained with unlike templates.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm", "--backend vllm")
    shape = shape_of(load_config(model))
    served = served_model_name or model
    folders = {}
    for name, source in adapters.items():
        check_name(name)
        if name == served:
            raise AdapterError(f"'{name}' is what the bare base is called: choose another name.")
        folders[name] = str(find_adapter(source))
    configs = {name: read_servable(folder, shape) for name, folder in folders.items()} | _servable_in(
        adapter_dir, shape
    )
    template = chat_template(model, configs)
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(model)]
    line += ["--served-model-name", served, "--host", host, "--port", str(port)]
    line += ["--enable-lora"]
    for name, number in _slots([rank_of(config) for config in configs.values()]).items():
        line += ["--" + name.replace("_", "-"), str(number)]
    if not any(config.lora_rank for config in configs.values()):
        line += ["--lora-target-modules", "attn"]
    if template is not None:
        line += ["--chat-template", template]
    if folders:
        line += ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    return [*line, *options]


def environment(adapter_dir: str | None) -> dict[str, str]:
    """What `command` wants in the environment: where adapters are found by name, vLLM's leave to load them, our page.

    vLLM takes routes from plugins that `VLLM_PLUGINS` names alone, which shuts others out: those of the groups that it
    loads unasked are named, too.
    """
    named = os.environ.get("VLLM_PLUGINS")
    unasked = {point.name for group in UNASKED for point in entry_points(group=f"vllm.{group}_plugins")}
    plugins = unasked if named is None else {name for name in named.split(",") if name}
    found = {"VLLM_PLUGINS": ",".join(sorted(plugins | {"llama_adapter"}))}
    if adapter_dir is None:
        return found
    return found | {
        "LLAMA_ADAPTER_DIR": str(Path(os.path.expanduser(adapter_dir)).resolve()),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }


def slots_for(folders: Sequence[str]) -> dict[str, bool | int]:
    """vLLM's settings for serving these adapters, by the names of its arguments; none where none of them is ours.

    All of them stay in the host's memory: what is put out of it is read again, and may have changed.

    Raises:
        ConfigError: one has more prompts than vLLM has room for.
    """
    ranks = [rank_of(read_config(folder)) for folder in folders if is_ours(folder)]
    return {"enable_lora": True, **_slots(ranks)} if ranks else {}


def _slots(ranks: Sequence[int]) -> dict[str, int]:
    needed, slots = max(ranks, default=16), min(max(len(ranks), 1), MOST_SLOTS)
    rank = next((rank for rank in RANKS if rank >= needed), None)
    if rank is None:
        raise ConfigError(f"An adapter has {needed} prompts a layer (or LoRA's r), and vLLM has room for {RANKS[-1]}.")
    return {"max_lora_rank": rank, "max_loras": slots, "max_cpu_loras": max(len(ranks), slots)}


def _servable_in(directory: str | None, shape: dict[str, int | str]) -> dict[str, AdapterConfig]:
    """The adapters in a directory that fit the base; whoever asks for another is told why then."""
    if directory is None:
        return {}
    path = Path(os.path.expanduser(directory))
    if not path.is_dir():
        raise ConfigError(f"--adapter-dir {directory} is no folder: give one whose subfolders are adapters.")
    found = {}
    for folder in sorted(path.iterdir()):
        try:
            found[folder.name] = read_servable(folder, shape)
        except LlamaAdapterError:
            continue
    return found
