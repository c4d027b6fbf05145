"""One-token steps of Llama-shaped decoders: what transformers' forward gives, up to rounding, in half the operations.

A step of decoding is many small operations, and transformers' layers, built to be read and changed, spend much of its
time beside its products. Here queries, keys and values are one product, as are the two halves of the feed-forward; a
norm is one call; queries and keys are rotated together; masks are not built anew. Whatever is not such a step (reading
the prompt, training, hidden states asked for, ...) goes through transformers' forward.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llama_adapter.core.prompt_cache import Place, PromptCache
from llama_adapter.core.zero_init import CHOICE, SLOT, Choice, second_softmax
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
USUAL = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", CHOICE}
"""What a step is told."""


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
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: DynamicCache, choice: Choice | None
    ) -> Tensor:
        """The layer's output for `hidden` [B, 1, hidden]; cos and sin [B, 1, 1, D], mask [B, 1, 1, tokens] or None."""
        query, key, value = self._query_key_value(hidden, cos, sin)
        keys, values = cache.update(key, value, self.index)
        attended = scaled_dot_product_attention(query, keys, values, mask, scale=self.scaling, enable_gqa=self.grouped)
        prompts = None if choice is None else choice.prepared.get(self.index)
        if prompts is not None:
            attended = attended + second_softmax(query, prompts, self.scaling, None)
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
    """Stands in for a decoder's `forward`; takes and returns what that does."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.stock, self.norm = decoder, decoder.forward, Norm(decoder.norm)
        self.kept: PromptCache[list[Layer]] = PromptCache()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step, quickly, where it is one."""
        if args or not self._is_step(kwargs):
            return self.stock(*args, **kwargs)
        cache: DynamicCache = kwargs["past_key_values"]
        hidden = self.decoder.embed_tokens(kwargs["input_ids"])
        cos, sin = (part.unsqueeze(1) for part in self.decoder.rotary_emb(hidden, kwargs["position_ids"]))
        mask, choice = self._mask(kwargs.get("attention_mask")), kwargs.get(CHOICE)
        for layer in self._layers():
            hidden = layer.forward(hidden, cos, sin, mask, cache, choice)
        return BaseModelOutputWithPast(self.norm(hidden), cache)

    def _layers(self) -> list[Layer]:
        """Made anew when a part has been replaced or its weights have moved."""
        layers = self.kept.find(None)
        if layers is None:
            layers = [Layer(module) for module in self.decoder.layers]
            self.kept.keep(None, layers, [place for module in self.decoder.layers for place in places(module)])
        return layers

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether this is one token a row behind others in a cache that grows, and nothing else is asked."""
        ids, positions, choice = (kwargs.get(name) for name in ("input_ids", "position_ids", CHOICE))
        config = self.decoder.config
        return (
            isinstance(kwargs.get("past_key_values"), DynamicCache)
            and ids is not None
            and ids.shape[1] == 1
            and positions is not None
            and (choice is None or bool(choice.prepared))
            and all(value is None or name in USUAL for name, value in kwargs.items())
            and not (torch.is_grad_enabled() or self.decoder.training)
            and not torch.is_autocast_enabled(ids.device.type)
            and config._attn_implementation == "sdpa"
            and not (config.output_hidden_states or config.output_attentions)
            and bool(config.return_dict)
        )

    @staticmethod
    def _mask(attention_mask: Tensor | None) -> Tensor | None:
        """[B, tokens] of a batch with padding as sdpa takes it; None where every token is seen."""
        if attention_mask is None or bool(attention_mask.all()):
            return None
        return attention_mask.bool()[:, None, None]


def why_no_quick_steps(model: PreTrainedModel) -> str | None:
    """The reason why a model takes all its steps through transformers' forward, or None where it need not."""
    kind, decoder = model.config.model_type, model.base_model
    if kind not in SHAPED:
        return f"there are none for models of family '{kind}'"
    if getattr(model.config, "sliding_window", None):
        return "its attention has a sliding window"
    for layer in decoder.layers:
        if any("forward" in vars(module) or module._forward_hooks for module in layer.modules()):
            return "something else has changed its layers"
        if type(layer).__name__ != SHAPED[kind] or not has_known_parts(layer):
            return "this version of transformers builds its layers in another way"
    norms = [module for module in decoder.modules() if hasattr(module, "variance_epsilon")]
    if any(norm.weight.dtype != model.dtype for norm in norms):
        return "its norms have another precision"
    return None


def places(layer: Any) -> list[Place]:
    """Where a decoder layer holds what `Layer` reads, adapters apart."""
    held = {
        layer: PARTS - {"self_attn", "mlp"},
        layer.self_attn: ATTENTION_PARTS | set(HEAD_NORMS),
        layer.mlp: MLP_PARTS,
    }
    return [(module, name) for module, names in held.items() for name in names]


def has_known_parts(layer: Any) -> bool:
    """Whether a decoder layer consists of what is computed here, and of nothing else."""
    parts, attention, mlp = ({name for name, _ in m.named_children()} for m in (layer, layer.self_attn, layer.mlp))
    return parts == PARTS and attention - {SLOT, *HEAD_NORMS} == ATTENTION_PARTS and mlp == MLP_PARTS


def use_quick_steps(model: PreTrainedModel) -> bool:
    """Let a model take its one-token steps by the forward above, where `why_no_quick_steps` has no objection.

    They are taken so without gradients and with a cache that grows, which is transformers' default; `GrowingCache` is
    quicker. Logits are the same up to rounding.

    Returns:
        Whether it does from now on.
    """
    decoder = model.base_model
    if isinstance(decoder.forward, QuickSteps):
        return True
    reason = why_no_quick_steps(model)
    if reason is not None:
        log.debug("steps of decoding go through transformers' forward: %s", reason)
        return False
    decoder.forward = QuickSteps(decoder)
    return True
