"""One-token steps of Llama-shaped decoders: what transformers' forward gives, up to rounding, in half the operations.

A step of decoding is many small operations, and transformers' layers, built to be read and changed, spend much of its
time beside its products. Here queries, keys and values are one product, as are the two halves of the feed-forward; a
norm is one call; queries and keys are rotated together; masks are not built anew. Whatever is not such a step (reading
the prompt, training, hidden states asked for, ...) goes through transformers' forward.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from llama_adapter.core.attention import SLOT
from llama_adapter.core.parts import PartsHook
from llama_adapter.core.registry import Router
from llama_adapter.core.zero_init import Prompts, second_softmax
from llama_adapter.inference.joined import Joined

log = logging.getLogger(__name__)

SHAPED = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
"""Model type -> class of its decoder layers."""
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = ("q_norm", "k_norm")
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Layer:
    """The parts of a decoder layer in the order of their use, and what is asked of them at every step."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.index, self.scaling = attention.layer_idx, attention.scaling
        self.norm, self.second_norm = Norm(module.input_layernorm), Norm(module.post_attention_layernorm)
        self.query_key_value = Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Joined(attention.o_proj)
        self.gate_and_up, self.down = Joined(mlp.gate_proj, mlp.up_proj), Joined(mlp.down_proj)
        self.activation = mlp.act_fn
        heads, self.head_dim = attention.config.num_attention_heads, attention.head_dim
        kv_heads = heads // attention.num_key_value_groups
        self.turned, self.kinds = [heads, kv_heads], [heads + kv_heads, kv_heads]
        self.grouped = kv_heads < heads
        self.head_norms = [Norm(getattr(attention, name)) for name in HEAD_NORMS if hasattr(attention, name)]

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any, prompts: Prompts | None
    ) -> Tensor:
        """The layer's output for `hidden` [B, 1, hidden]; cos and sin [B, 1, 1, D], mask [B, 1, 1, tokens] or None."""
        query, key, value = self._query_key_value(hidden, cos, sin)
        keys, values = cache.update(key, value, self.index)
        attended = scaled_dot_product_attention(query, keys, values, mask, scale=self.scaling, enable_gqa=self.grouped)
        if prompts is not None:
            attended = attended + second_softmax(query, prompts, self.scaling)
        hidden = hidden + self.out(attended.flatten(1).unsqueeze(1))
        gate, up = self.gate_and_up.each(self.second_norm(hidden))
        return hidden + self.down(self.activation(gate) * up)

    def _query_key_value(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values, each [B, heads, 1, D]."""
        states = self.query_key_value(self.norm(hidden)).view(len(hidden), -1, 1, self.head_dim)
        turned, value = states.split_with_sizes(self.kinds, 1)
        if self.head_norms:
            parts = zip(self.head_norms, turned.split_with_sizes(self.turned, 1), strict=True)
            turned = torch.cat([norm(part) for norm, part in parts], 1)
        left, right = turned.chunk(2, -1)
        turned = torch.addcmul(turned * cos, torch.cat((-right, left), -1), sin)
        query, key = turned.split_with_sizes(self.turned, 1)
        return query, key, value


class Norm:
    """A root-mean-square norm in one call."""

    def __init__(self, module: Any) -> None:
        self.module, self.eps = module, module.variance_epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., size] -> the same shape."""
        weight = self.module.weight
        return rms_norm(hidden, weight.shape, weight, self.eps)


class QuickSteps:
    """One-token steps of a model, without gradients, on a cache that grows.

    Made anew for every batch of an engine, so that whatever was replaced, moved or hooked since is seen.
    """

    def __init__(self, model: Any) -> None:
        self.decoder, self.head = model.model, model.lm_head
        self.norm = Norm(self.decoder.norm)
        self.layers = [Layer(module) for module in self.decoder.layers]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "QuickSteps | None":
        """Steps for a model, or None where `why_no_quick_steps` has an objection."""
        reason = why_no_quick_steps(model)
        if reason is not None:
            log.debug("steps of decoding go through transformers' forward: %s", reason)
        return None if reason else cls(model)

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any, prompts: Mapping[int, Prompts | None]
    ) -> Tensor:
        """Logits [B, vocabulary] behind `ids` [B, 1] at `positions` [B, 1]; `mask` [B, tokens] is 0 on padding."""
        hidden = self.decoder.embed_tokens(ids)
        cos, sin = (part.unsqueeze(1) for part in self.decoder.rotary_emb(hidden, positions))
        seen = None if mask is None else mask.bool()[:, None, None]
        for layer in self.layers:
            hidden = layer.forward(hidden, cos, sin, seen, cache, prompts.get(layer.index))
        return self.head(self.norm(hidden))[:, -1]


def why_no_quick_steps(model: PreTrainedModel) -> str | None:
    """The reason why a model takes all its steps through transformers' forward, or None where it need not."""
    kind, decoder = model.config.model_type, model.base_model
    if kind not in SHAPED or type(model).__name__ != SHAPED[kind].replace("DecoderLayer", "ForCausalLM"):
        return f"there are none for {type(model).__name__}"
    if model.config._attn_implementation != "sdpa":
        return "they need sdpa attention"
    if any("forward" in vars(module) or hooked(module) for module in model.modules()):
        return "something else has changed its layers"
    if len(decoder.layers) != model.config.num_hidden_layers:
        return "its configuration says another number of layers"
    if getattr(model.config, "sliding_window", None):
        return "its attention has a sliding window"
    for layer in decoder.layers:
        if type(layer).__name__ != SHAPED[kind] or not has_known_parts(layer):
            return "this version of transformers builds its layers in another way"
    norms = [module for module in decoder.modules() if hasattr(module, "variance_epsilon")]
    if any(norm.weight.dtype != model.dtype for norm in norms):
        return "its norms have another precision"
    return None


def hooked(module: Any) -> bool:
    """Whether somebody else listens to a module's forward; these steps are not taken where our hooks have work."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(isinstance(hook, Router | PartsHook) for hook in hooks)


def has_known_parts(layer: Any) -> bool:
    """Whether a decoder layer consists of what is computed here, and of nothing else."""
    parts, attention, mlp = ({name for name, _ in m.named_children()} for m in (layer, layer.self_attn, layer.mlp))
    return parts == PARTS and attention - {SLOT, *HEAD_NORMS} == ATTENTION_PARTS and mlp == MLP_PARTS
