"""What of vLLM is replaced, and the check that it is still there. None of it is imported before `register` runs."""

import importlib
import logging
import os
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from llama_adapter.errors import LlamaAdapterError, MissingExtraError

log = logging.getLogger(f"vllm.{__name__}")  # under vLLM's own, which has handlers in all of its processes
RAN_ON = "0.32"
INTERNALS = (
    (
        "vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager",
        "_load_adapter _apply_adapters remove_adapter",
    ),
    (
        "vllm.lora.model_manager", "LRUCacheLoRAModelManager",
        "_match_target_modules _create_lora_modules _create_merged_loras_inplace _get_punica_wrapper create_dummy_lora "
        "register_module lora_slots",
    ),
    ("vllm.lora.layers", "BaseLayerWithLoRA", "set_lora reset_lora set_mapping"),
    ("vllm.lora.lora_model", "LoRAModel", ""),
    ("vllm.lora.lora_weights", "LoRALayerWeights", ""),
    ("vllm.lora.request", "LoRARequest", "lora_name lora_int_id lora_path load_inplace"),
    ("vllm.lora.resolver", "LoRAResolverRegistry", "register_resolver"),
    ("vllm.lora.utils", "get_adapter_absolute_path", ""),
    ("vllm.lora.utils", "replace_submodule", ""),
    ("vllm.model_executor.layers.attention", "Attention", ""),
    ("vllm.config.lora", "LoRAConfig", "compute_hash"),
    ("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", ""),
    ("vllm.v1.engine.core", "EngineCore", "add_lora remove_lora"),
)  # fmt: skip
"""Module, name in it, attributes of that: everything of vLLM that this plugin stands on."""


class MovedError(LlamaAdapterError):
    """vLLM no longer has what the plugin stands on."""


def register() -> None:
    """Have vLLM's model runners build our manager of adapters, which is LoRA's and a little more.

    Raises:
        MissingExtraError: vLLM is not installed.
        MovedError: vLLM has moved something that the plugin stands on; vLLM then does not start, rather than answer
            without adapters.
    """
    check_names()
    from vllm.v1.worker import lora_model_runner_mixin

    from llama_adapter.serving.vllm_plugin.managers import AdapterWorkerManager

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = AdapterWorkerManager
    _tell_compiled_graphs_apart()
    _salt_the_prefix_cache()
    _let_lora_modules_do()
    _begin_responses_once()
    if folder := os.environ.get("LLAMA_ADAPTER_DIR"):
        _resolve_from(Path(folder))


def check_names() -> None:
    """Look for everything of vLLM that the plugin stands on.

    Raises:
        MissingExtraError: vLLM is not installed.
        MovedError: something is gone; the message names it.
    """
    try:
        import vllm
    except ImportError:
        raise MissingExtraError("vllm", "vllm", "The vLLM plugin") from None
    for module, name, attributes in INTERNALS:
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise _moved(vllm, f"{module}.{name}") from None
        for attribute in attributes.split():
            if not hasattr(found, attribute):
                raise _moved(vllm, f"{module}.{name}.{attribute}")
    if not vllm.__version__.startswith(RAN_ON):
        log.warning("llama-adapter's plugin was run on vLLM %s, and this is %s.", RAN_ON, vllm.__version__)


def _moved(vllm: Any, name: str) -> MovedError:
    return MovedError(
        f"vLLM {vllm.__version__} has no {name}, on which llama-adapter's plugin stands: install vLLM {RAN_ON}, on "
        "which it was run, or leave the plugin out with VLLM_PLUGINS=''."
    )


def _tell_compiled_graphs_apart() -> None:
    """vLLM keeps compiled graphs on disk under a hash of its configuration, which does not know of plugins."""
    from vllm.config.lora import LoRAConfig

    from llama_adapter import __version__

    without = LoRAConfig.compute_hash
    if hasattr(without, "llama_adapter"):
        return

    def compute_hash(self: Any) -> str:
        return f"{without(self)}-llama-adapter-{__version__}"

    compute_hash.llama_adapter = True  # type: ignore[attr-defined]
    LoRAConfig.compute_hash = compute_hash


def _salt_the_prefix_cache() -> None:
    """Let the content of an adapter be part of what its cached blocks are found by; see `salts`."""
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    from llama_adapter.serving.vllm_plugin.salts import Salts

    without, add, remove = kv_cache_utils._gen_lora_extra_hash_keys, EngineCore.add_lora, EngineCore.remove_lora
    if hasattr(without, "llama_adapter"):
        return
    salts = Salts(get_adapter_absolute_path)

    def extra_keys(request: Any) -> list[tuple[str, ...]]:
        keys = without(request)
        salt = salts.of(request.lora_request) if request.lora_request else None
        return keys if salt is None else [*keys, ("llama_adapter", salt, "")]

    @wraps(add)  # messages to the engine are decoded by these signatures
    def add_lora(self: Any, lora_request: Any) -> Any:
        return salts.loading(
            lora_request, lambda: add(self, lora_request), lambda: remove(self, lora_request.lora_int_id)
        )

    @wraps(remove)
    def remove_lora(self: Any, lora_id: int) -> Any:
        salts.forget(lora_id)
        return remove(self, lora_id)

    extra_keys.llama_adapter = True  # type: ignore[attr-defined]
    kv_cache_utils._gen_lora_extra_hash_keys = extra_keys
    EngineCore.add_lora, EngineCore.remove_lora = add_lora, remove_lora


def _let_lora_modules_do() -> None:
    """`--lora-modules` with an adapter of ours switches on what it needs, where the command line says nothing of it."""
    arguments = sys.modules.get("vllm.entrypoints.launchers.cli_args")
    action = getattr(arguments, "LoRAParserAction", None)
    if action is None or hasattr(action.__call__, "llama_adapter"):
        return  # only a server's process has read that module
    from llama_adapter.serving.vllm_plugin.launch import slots_for

    without = action.__call__

    def call(self: Any, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        without(self, parser, namespace, values, option_string)
        try:
            needed = slots_for([one.path for one in getattr(namespace, self.dest)])
        except LlamaAdapterError as error:
            parser.error(str(error))
        for name, value in needed.items():
            if getattr(namespace, name, None) == parser.get_default(name):
                setattr(namespace, name, value)

    call.llama_adapter = True  # type: ignore[attr-defined]
    action.__call__ = call


def _begin_responses_once() -> None:
    """vLLM puts the tokenizer's first token before a response's prompt, which its template has begun with already."""
    if "vllm.entrypoints.launchers.cli_args" not in sys.modules:
        return  # only a server's process answers requests
    import vllm
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    without = getattr(ResponsesRequest, "build_tok_params", None)
    if without is None:
        raise _moved(vllm, "ResponsesRequest.build_tok_params")
    if hasattr(without, "llama_adapter"):
        return

    def build_tok_params(self: Any, model_config: Any) -> Any:
        return replace(without(self, model_config), add_special_tokens=False)  # as for chats

    build_tok_params.llama_adapter = True  # type: ignore[attr-defined]
    ResponsesRequest.build_tok_params = build_tok_params


def _resolve_from(folder: Path) -> None:
    """Adapters by name from `folder`, if it is one.

    Raises:
        LlamaAdapterError: it is none.
    """
    if not os.path.isdir(os.path.expanduser(folder)):
        raise LlamaAdapterError(
            f"LLAMA_ADAPTER_DIR is {folder}, which is no folder: name the one that holds the adapters."
        )
    from vllm.lora.resolver import LoRAResolverRegistry

    from llama_adapter.serving.vllm_plugin.resolver import FolderResolver

    LoRAResolverRegistry.register_resolver("llama_adapter", FolderResolver(folder))
