"""The seam: transformers' attention interface, the only code of anybody's that is wrapped.

transformers looks every attention function up by name and hands it the rotated query, key, value and the attention
module. The stock function is wrapped under its own name; a module without adapters gets exactly what it returned.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_adapter.core.routing import AdapterSlot, Routing
from llama_adapter.core.zero_init import Prompts, second_softmax
from llama_adapter.errors import AdapterError, UnsupportedModelError

SLOT = "zero_init"
"""Name under which an attention module holds its `AdapterSlot`."""
ROUTING = "adapter_routing"
"""Keyword argument that carries a `Routing` from the model's forward to its attention."""
SEGMENTS = "packed_segments"
"""Keyword argument that says where the examples of a packed row lie; its `attend` runs the text's attention."""
NAMES = "adapter_names"
"""Keyword argument of an adapted model's forward and `generate`: `routing.Names`."""
EAGER = "llama_adapter_eager"
"""Attention name of adapted models whose own is "eager", which transformers keeps out of its registry."""


def with_zero_init(text_attention: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a transformers attention function so that adapted modules add their gated term.

    The result has the signature of transformers' attention interface: (module, query [B, H, T, D], key, value,
    attention_mask, scaling=, softcap=, ...) -> (output [B, T, H, D], weights).
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        routing: Routing | None = kwargs.pop(ROUTING, None)
        segments: Any = kwargs.pop(SEGMENTS, None)
        if segments is None:
            text, weights = text_attention(module, query, key, value, attention_mask, **kwargs)
        else:
            text, weights = segments.attend(text_attention, module, query, key, value, **kwargs), None
        if NAMES in kwargs:
            raise AdapterError(f"{NAMES} was given to a model without adapters: add or load them first.")
        slot: AdapterSlot | None = getattr(module, SLOT, None)
        if slot is None or routing is None:
            if routing is not None:  # a tower's module, or one whose last adapter was just taken off
                routing.refuse_removed()
            return text, weights
        prompts = slot.prompts(module, routing, query)
        if prompts is None:
            return text, weights
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if routing.spans is not None:
            return text + by_span(query, prompts, routing.spans, scaling, kwargs.get("softcap")), weights
        return text + second_softmax(query, prompts, scaling, kwargs.get("softcap")).transpose(1, 2), weights

    attention.wraps = text_attention  # type: ignore[attr-defined]
    return attention


def by_span(query: Tensor, prompts: Prompts, spans: tuple[int, ...], scaling: float, softcap: float | None) -> Tensor:
    """`second_softmax` of a packed row, each of whose spans reads prompts of its own.

    Args:
        query: [1, H, T, D].
        prompts: of S spans, [S, H, K, D].
        spans: their tokens, T in all.
        scaling: of the scores.
        softcap: their bound.

    Returns:
        [1, T, H, D].
    """
    # One after another, not all prompts under one mask: a span's values are then nowhere near another's gradient.
    parts = zip(query.split(spans, 2), *(part.split(1) for part in prompts[:2]), strict=True)
    biases = [None] * len(spans) if prompts.bias is None else prompts.bias.split(1)
    added = [
        second_softmax(own, Prompts(key, value, bias), scaling, softcap)
        for (own, key, value), bias in zip(parts, biases, strict=True)
    ]
    return torch.cat(added, 2).transpose(1, 2)


def wrap_attention(config: Any) -> None:
    """Make sure that the attention function `config` names adds the gated term.

    Functions in transformers' registry are wrapped under their own name, which leaves the configuration, the mask
    and code that looks for a stock name as they are. Only "eager" is not in the registry (each model file has its
    own), so such a model gets a name of ours. Done before every forward, because `set_attn_implementation` may have
    been called meanwhile; a dictionary look-up then.
    """
    name = config._attn_implementation
    if name == "eager" or (name == EAGER and EAGER not in ALL_ATTENTION_FUNCTIONS):  # a model read in a new process
        AttentionInterface.register(EAGER, with_zero_init(_eager_attention))
        AttentionMaskInterface.register(EAGER, eager_mask)
        config._attn_implementation = EAGER
    elif name != EAGER:
        stock: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        if not hasattr(stock, "wraps"):
            AttentionInterface.register(name, with_zero_init(stock))


def _eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The eager function of the model file that `module` comes from."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)  # FSDP2 puts a class of its own in front
    function = next((found for file in files if (found := getattr(file, "eager_attention_forward", None))), None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention: load the base with sdpa.")
    return function(module, *args, **kwargs)
