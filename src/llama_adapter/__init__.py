"""LLaMA-Adapter (zero-init attention, arXiv:2303.16199) for any transformers language model.

    from llama_adapter import AdapterConfig, add_adapter, use_adapter, save_adapter, load_adapter, remove_adapter

    adapter = add_adapter(model, AdapterConfig(adapter_len=10, adapter_layers=30))   # freezes the base
    ...train model with anything that trains transformers models...
    save_adapter(model, "my-adapter")

The method itself is in `llama_adapter.core.zero_init`; read that first.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_adapter.core.config import AdapterConfig
    from llama_adapter.core.merge import merge_adapter
    from llama_adapter.core.model import (
        active_adapter,
        add_adapter,
        disable_adapter,
        get_adapter,
        list_adapters,
        reference_model,
        remove_adapter,
        set_adapter,
        use_adapter,
    )
    from llama_adapter.core.routing import Adapter
    from llama_adapter.errors import LlamaAdapterError
    from llama_adapter.formats.load import load_adapter
    from llama_adapter.formats.native import save_adapter
    from llama_adapter.formats.push import push_adapter
    from llama_adapter.inference.session import load_session
    from llama_adapter.training.callback import AdapterCallback
    from llama_adapter.training.config import TrainConfig
    from llama_adapter.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterCallback",
    "AdapterConfig",
    "LlamaAdapterError",
    "TrainConfig",
    "active_adapter",
    "add_adapter",
    "disable_adapter",
    "get_adapter",
    "list_adapters",
    "load_adapter",
    "load_session",
    "merge_adapter",
    "push_adapter",
    "reference_model",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "train",
    "use_adapter",
]

_HOME = {
    "Adapter": "core.routing",
    "AdapterCallback": "training.callback",
    "AdapterConfig": "core.config",
    "LlamaAdapterError": "errors",
    "TrainConfig": "training.config",
    "load_adapter": "formats.load",
    "load_session": "inference.session",
    "merge_adapter": "core.merge",
    "push_adapter": "formats.push",
    "save_adapter": "formats.native",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only what touches a model pays for them.
    if name not in __all__:
        raise AttributeError(f"module 'llama_adapter' has no attribute '{name}'")
    return getattr(importlib.import_module(f"llama_adapter.{_HOME.get(name, 'core.model')}"), name)
