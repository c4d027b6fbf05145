"""The card of an adapter: README.md with what the hub shows and finds it by, written anew until somebody edits it."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llama_adapter.files import write_atomically, writing
from llama_adapter.formats.hub import hub_name
from llama_adapter.settings import BUNDLED

CARD_FILE = "README.md"
PLACE = "path/to/adapter"
"""What a card calls its adapter until it is pushed."""
_MARK = "<!-- llama-adapter writes this card anew until it is edited: {} -->\n"
_TASKS = {None: "text-generation", "audio": "audio-text-to-text", "video": "video-text-to-text"}


def write_card(folder: str | os.PathLike[str], text: str) -> bool:
    """Write an adapter's card, unless the folder has one that is not ours or was edited; whether it was written.

    Raises:
        AdapterError: the folder cannot be written.
    """
    path = Path(folder) / CARD_FILE
    with writing(Path(folder)):
        if os.path.lexists(path) and not is_unedited(path.read_text(encoding="utf-8", errors="replace")):
            return False
        write_atomically(path, marked(text).encode())
    return True


def marked(text: str) -> str:
    """A card's text with the line by which `is_unedited` knows it."""
    return text + _MARK.format(_digest(text))


def is_unedited(card: str) -> bool:
    """Whether a card is as `marked` left it."""
    text, newline, last = card.rpartition("\n<!-- llama-adapter")
    return bool(newline) and f"<!-- llama-adapter{last}" == _MARK.format(_digest(text + "\n"))


def moved_card(card: bytes, place: str) -> bytes:
    """An unedited card that calls its adapter `place`; another as it is."""
    text = card.decode(errors="replace")
    if not is_unedited(text):
        return card
    return marked(text[: text.rindex("<!-- llama-adapter")].replace(PLACE, place)).encode()


def card_text(found: Mapping[str, Any], training: Mapping[str, object], datasets: tuple[str, ...] = ()) -> str:
    """The card of an adapter.

    Args:
        found: what `describe_adapter` says of it.
        training: rows of the table on its training, in order; may be empty.
        datasets: names of data on the hub.
    """
    config = found["config"]
    named = config["base_model_name_or_path"] or ""
    base, licence = public_name(named), base_licence(named)
    kind = (config["condition"] or {}).get("kind")
    front: dict[str, Any] = {"library_name": "llama-adapter", "pipeline_tag": _TASKS.get(kind, "image-text-to-text")}
    if hub_name(base):
        front |= {"base_model": base, "base_model_relation": "adapter"}
    if licence:
        front["license"] = licence
    front["tags"] = ["llama-adapter", "zero-init-attention", "adapter"]
    if datasets:
        front["datasets"] = list(datasets)
    parts = ", ".join(f"{size:,} {part}" for part, size in found["parts"].items())
    rows = {
        "base": f"{base or 'nobody said'} ({config['base_shape']['model_type']})",
        "parameters": f"{found['parameters']:,} ({parts})",
        "adapter": f"K={config['adapter_len']} prompts in the top L={config['adapter_layers']} layers, "
        f"{config['gate_activation']} gates",
        "prompt format": config["template"] or "nobody said",
        **training,
    }
    table = "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items())
    if licence:
        terms = f"The base is under `{licence}`, whose terms go for what is made with it."
    else:
        terms = "The licence of the base is not recorded here: its own page or folder has it."
    shown = "the base that comes with llama-adapter" if named == BUNDLED else base
    code = ""
    if hub_name(base) and not named.lower().endswith(".gguf"):
        code = (
            "or\n\n"
            "    from llama_adapter import load_adapter\n    from transformers import AutoModelForCausalLM\n\n"
            f'    model = AutoModelForCausalLM.from_pretrained("{base}")\n    load_adapter(model, "{PLACE}")\n\n'
        )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# Adapter for {shown or 'a language model'}\n\n"
        "A [LLaMA-Adapter](https://arxiv.org/abs/2303.16199): learnable prompts that a frozen base reads through gates "
        f"which started at zero.\n\n| | |\n|---|---|\n{table}\n"
        "## How to use\n\n"
        f'    pip install llama-adapter\n    llama-adapter generate --adapter {PLACE} "..."\n\n'
        f"{code}"
        f"## Licence\n\n{terms}\n"
    )


def public_name(name: str) -> str:
    """A base or a file as a card may name it: hub names as they are, of a path its last part alone."""
    path = Path(os.path.expanduser(name))
    local = os.path.lexists(path) or path.is_absolute() or name.startswith((".", "~"))
    if local:
        return path.name
    found = re.fullmatch(r"([^/]+/[^/]+)/.+\.gguf", name)
    return found[1] if found else name


def base_licence(name: str) -> str | None:
    """The licence that a base's own files name, or None; of a base on the hub, what its card says."""
    if name == BUNDLED:
        return "apache-2.0"
    path = Path(os.path.expanduser(name))
    if path.is_file() and name.lower().endswith(".gguf"):
        return _of_gguf(path)
    if path.is_dir():
        return _of_card(path / CARD_FILE)
    found = hub_name(public_name(name))
    if found is None or os.path.lexists(path):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return _of_card(Path(hf_hub_download(found[0], CARD_FILE)))
    except Exception:  # a card, too, may be missing, private or out of reach: then nobody knows
        return None


def _of_card(path: Path) -> str | None:
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except Exception:  # whatever somebody wrote there
        return None
    return licence if isinstance(licence, str) else None


def _of_gguf(path: Path) -> str | None:
    try:
        from gguf import GGUFReader

        field = GGUFReader(path).get_field("general.license")
        return None if field is None else str(field.contents()).lower()
    except Exception:  # the file was read by other code, so this is no place to fail
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
