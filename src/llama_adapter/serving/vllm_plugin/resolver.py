"""Adapters by name from one folder: `LLAMA_ADAPTER_DIR=experts/ VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve ...`.

vLLM asks when a request names a model that it does not know, loads what it is told, and keeps it.
"""

import os
import re
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from llama_adapter.serving.vllm_plugin.folders import is_ours


class FolderResolver(LoRAResolver):
    """Finds the adapter `name` in the subfolder of that name.

    Args:
        folder: holds a subfolder per adapter; none is opened before it is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.expanduser(folder)).resolve()

    def find(self, name: str) -> Path | None:
        """The folder of an adapter of ours; a name that leads out of the folder is nobody's."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name):
            return None
        found = Path(os.path.realpath(self.folder / name))  # unlike resolve, it takes links that go in a circle
        return found if found.is_relative_to(self.folder) and found != self.folder and is_ours(found) else None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """See `vllm.lora.resolver.LoRAResolver`."""
        found = self.find(lora_name)
        if found is None:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(found))  # vLLM gives it its number
