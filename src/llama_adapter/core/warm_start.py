"""Prompts that start from a real text: what each adapted layer's attention reads at some of its tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.core.families import attention_modules
from llama_adapter.core.routing import Adapter
from llama_adapter.errors import ConfigError


@torch.no_grad()
def prompts_from_text(model: PreTrainedModel, adapter: Adapter, input_ids: Sequence[int]) -> None:
    """Set each prompt [K, hidden] to the bare layer's normalised attention input at K tokens spread over a text.

    The gates stay 0, so the model still computes what the base does; but the first gradients of the gates come from
    keys and values that the layer knows, where those of N(0, 1) are several times larger than any it has met.

    Args:
        model: the base that `adapter` is on.
        adapter: whose prompts are overwritten.
        input_ids: the text's tokens, at least K.

    Raises:
        ConfigError: the text has fewer tokens than the adapter has prompts.
    """
    count = adapter.config.adapter_len
    if len(input_ids) < count:
        raise ConfigError(
            f"The text that prompts start from has {len(input_ids)} tokens, fewer than adapter_len {count}: "
            "give a longer one, or lower adapter_len."
        )
    places = torch.linspace(0, len(input_ids) - 1, count).round().long()
    modules = {int(module.layer_idx): module for module in attention_modules(model)}
    handles = [
        modules[index].register_forward_pre_hook(_taking(layer, places), with_kwargs=True)
        for index, layer in adapter.layers.items()
        if len(layer.prompt)  # in early fusion the first layers have none
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled layer would keep the hooks that it was traced with
            model(input_ids=torch.tensor([list(input_ids)], device=model.device), use_cache=False, adapter_names=None)
    finally:
        for handle in handles:
            handle.remove()


def _taking(layer: Any, places: Tensor) -> Any:
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        layer.prompt.copy_(states[0, places.to(states.device)])

    return take
