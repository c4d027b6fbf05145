"""Which format a source has: told by what is in it, never by its name."""

import os
from pathlib import Path

from llama_adapter.base import META_BASE, is_meta_base
from llama_adapter.errors import AdapterError, ModelError
from llama_adapter.formats.litgpt import read_litgpt
from llama_adapter.formats.official import PREFIX, QUERY, read_official
from llama_adapter.formats.peft import PEFT_TYPE, read_peft
from llama_adapter.formats.stored import Hints, Reading, Stored, open_stored, read_json
from llama_adapter.settings import shown


def read_foreign(source: str | os.PathLike[str], hints: Hints) -> Reading | None:
    """An adapter that another program wrote, or None where the source is a folder that is not another's.

    Raises:
        AdapterError: the source is damaged, or holds no adapter.
        ModelError: it is a base in Meta's layout.
    """
    path = Path(source)
    if os.path.isdir(path):  # os.path's answers are False for impossible names, which our own reader explains
        if os.path.lexists(path / "adapter_config.json"):
            config = read_json(path / "adapter_config.json")
            return read_peft(path, hints) if config.get("peft_type") == PEFT_TYPE else None
        if is_meta_base(path):
            raise ModelError(META_BASE.format(path, path))
        files = sorted([*path.glob("lit_model.pth.adapter*"), *path.glob("*.pth")])
        if not files:
            return None
        if len(files) > 1:
            raise AdapterError(f"{path} has several files, {shown([file.name for file in files])}: give one of them.")
        path = files[0]
    elif not os.path.isfile(path):
        return None
    stored = open_stored(path)
    if any(key.endswith((".adapter_wte.weight", ".gating_factor")) for key in stored.tensors):
        return read_litgpt(stored, hints)
    if QUERY in stored or PREFIX in stored or any(key.endswith(".attention.wq_scale") for key in stored.tensors):
        return read_official(stored, hints)
    if "tok_embeddings.weight" in stored:
        raise ModelError(META_BASE.format(path, path.parent))
    raise AdapterError(_unknown(stored))


def _unknown(stored: Stored) -> str:
    names = sorted(stored.tensors)
    if path := next((name for name in names if name.endswith((".prompt", "adaption_prompt"))), None):
        return f"{stored.path} has an adapter's tensors ({path}) without its configuration: give its folder."
    return (
        f"{stored.path} is no adapter of the authors, PEFT or LitGPT: it has {len(names)} tensors, such as "
        f"{shown(names[:3])}. Give the file that holds adapter_query.weight."
    )
