"""What an adapter's folder holds, as far as vLLM's processes need to know it; nothing of vLLM is imported here."""

import hashlib
import json
from pathlib import Path

from llama_adapter.core.config import AdapterConfig
from llama_adapter.errors import AdapterError
from llama_adapter.formats.native import CONFIG_FILE, LARGEST_CONFIG, WEIGHTS_FILE, check_base, read_config


def is_ours(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of this project, rather than LoRA's; nothing is checked beyond that."""
    path = Path(folder) / CONFIG_FILE
    try:
        with path.open("rb") as file:
            return "format_version" in json.loads(file.read(LARGEST_CONFIG + 1))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def folder_digest(folder: str | Path) -> str:
    """SHA-256 of an adapter's two files, in hex.

    Raises:
        AdapterError: one of them cannot be read.
    """
    found = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            content = (Path(folder) / name).read_bytes()
        except OSError as error:
            raise AdapterError(f"{Path(folder) / name} cannot be read ({error.strerror}): copy it again.") from None
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def read_servable(folder: str | Path, shape: dict[str, int | str]) -> AdapterConfig:
    """The configuration of an adapter that vLLM can serve on a base of this shape.

    Raises:
        AdapterError: it is damaged, made for another base, or has what vLLM has no place for.
    """
    config = read_config(folder)
    check_base(config, shape, folder)
    if config.condition is not None:
        raise AdapterError(
            f"{folder} has a condition, such as pictures, which makes prompts a request's own: vLLM serves adapters "
            "without one; use llama-adapter serve."
        )
    wanted = [name for name in ("norms", "linear_scale", "linear_bias") if getattr(config, name)]
    if wanted:
        raise AdapterError(
            f"{folder} has {', '.join(wanted)}, and vLLM keeps one of each for all requests: it serves prompts, "
            "gate_scale and LoRA; use llama-adapter serve."
        )
    return config


def rank_of(config: AdapterConfig) -> int:
    """The rank that an adapter needs of vLLM's slots: its prompts a layer, or LoRA's r where that is more."""
    return max(config.adapter_len if config.adapter_layers else 0, config.lora_rank)
