"""The one table of what differs between model families; everything else in this package is the same for all.

A family says which modules are its self-attention and how that attention turns inputs into keys and values, so that
a prompt takes the same way: through the model's own projections and, where there is one, its key norm, but not
through the rotation. Families missing here cannot be adapted; the known reasons stand in `REFUSED`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.core.families_encoder import ENCODERS, TOWERS_OF
from llama_adapter.core.zero_init import Projection
from llama_adapter.errors import UnsupportedModelError


def heads(states: Tensor, head_dim: int) -> Tensor:
    """[K, heads x D] -> [heads, K, D]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(-2, -3)


def separate(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """k_proj and v_proj apart (Llama, Mistral, Qwen2, Gemma, Granite, ...)."""
    return heads(attention.k_proj(prompt), attention.head_dim), heads(attention.v_proj(prompt), attention.head_dim)


def normed_by(name: str, *, per_head: bool) -> Projection:
    """k_proj, then the key norm called `name`, over each head (Qwen3, Gemma3) or over all heads at once (OLMo2)."""
    return partial(_normed, name=name, per_head=per_head)  # a partial can be pickled, a closure cannot


def _normed(attention: Any, prompt: Tensor, name: str, per_head: bool) -> tuple[Tensor, Tensor]:
    head_dim = attention.head_dim
    key = attention.k_proj(prompt)
    norm = getattr(attention, name, None)  # several families switch their norm off by configuration
    if norm is not None:
        key = norm(key.unflatten(-1, (-1, head_dim))).flatten(-2) if per_head else norm(key)
    return heads(key, head_dim), heads(attention.v_proj(prompt), head_dim)


def clipped(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """k_proj and v_proj, both clamped where the configuration says so (OLMo)."""
    key, value = separate(attention, prompt)
    limit = attention.config.clip_qkv
    return (key, value) if limit is None else (key.clamp(-limit, limit), value.clamp(-limit, limit))


def fused_by_kind(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """One projection, all queries first, then all keys, then all values (Phi-3)."""
    kv_size = attention.config.num_key_value_heads * attention.head_dim
    states = attention.qkv_proj(prompt)
    key, value = states[..., -2 * kv_size :].split(kv_size, dim=-1)
    return heads(key, attention.head_dim), heads(value, attention.head_dim)


def fused_by_head(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """One projection, each head's query, key and value side by side (GPT-NeoX)."""
    states = heads(attention.query_key_value(prompt), 3 * attention.head_size)
    _, key, value = states.chunk(3, dim=-1)
    return key, value


def fused_conv1d(attention: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-2's c_attn: queries, keys, values, each of the hidden size."""
    _, key, value = attention.c_attn(prompt).split(attention.split_size, dim=-1)
    return heads(key, attention.head_dim), heads(value, attention.head_dim)


def called(attention: Any, prompt: Tensor, key: str, value: str) -> tuple[Tensor, Tensor]:
    """Two projections of these names (encoders)."""
    size = getattr(attention, "head_dim", None) or attention.attention_head_size
    return heads(getattr(attention, key)(prompt), size), heads(getattr(attention, value)(prompt), size)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        attention: class name of the self-attention modules in transformers.
        project: prompt [K, hidden] -> keys and values [kv heads, K, head_dim].
    """

    attention: str
    project: Projection = separate


def _k_norm(attention: str, name: str = "k_norm", *, per_head: bool = True) -> Family:
    return Family(attention, normed_by(name, per_head=per_head))


FAMILIES: dict[str, Family] = {
    "arcee": Family("ArceeAttention"),
    "cohere": _k_norm("CohereAttention"),
    "cohere2": Family("Cohere2Attention"),
    "ernie4_5": Family("Ernie4_5Attention"),
    "exaone4": _k_norm("Exaone4Attention"),
    "gemma": Family("GemmaAttention"),
    "gemma2": Family("Gemma2Attention"),
    "gemma3_text": _k_norm("Gemma3Attention"),
    "glm": Family("GlmAttention"),
    "glm4": Family("Glm4Attention"),
    "gpt2": Family("GPT2Attention", fused_conv1d),
    "gpt_neox": Family("GPTNeoXAttention", fused_by_head),
    "gpt_oss": Family("GptOssAttention"),
    "granite": Family("GraniteAttention"),
    "granitemoe": Family("GraniteMoeAttention"),
    "helium": Family("HeliumAttention"),
    "hunyuan_v1_dense": _k_norm("HunYuanDenseV1Attention", "key_layernorm"),
    "llama": Family("LlamaAttention"),
    "ministral": Family("MinistralAttention"),
    "mistral": Family("MistralAttention"),
    "mixtral": Family("MixtralAttention"),
    "olmo": Family("OlmoAttention", clipped),
    "olmo2": _k_norm("Olmo2Attention", per_head=False),
    "olmo3": _k_norm("Olmo3Attention", per_head=False),
    "phi": _k_norm("PhiAttention", "k_layernorm"),
    "phi3": Family("Phi3Attention", fused_by_kind),
    "qwen2": Family("Qwen2Attention"),
    "qwen2_moe": Family("Qwen2MoeAttention"),
    "qwen3": _k_norm("Qwen3Attention"),
    "qwen3_moe": _k_norm("Qwen3MoeAttention"),
    "seed_oss": Family("SeedOssAttention"),
    "smollm3": Family("SmolLM3Attention"),
    "starcoder2": Family("Starcoder2Attention"),
}

_NO_INTERFACE = "its attention does not go through transformers' attention interface"
_LATENT = "its latent attention has no key and value projection that a prompt of hidden size could take"
_NO_ATTENTION = "its layers are not softmax attention"
_CROSS = "its decoder reads an encoder through cross-attention"
REFUSED: dict[str, str] = {
    "bloom": _NO_INTERFACE,
    "codegen": _NO_INTERFACE,
    "falcon": _NO_INTERFACE,
    "gptj": _NO_INTERFACE,
    "mpt": _NO_INTERFACE,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "kimi_k2": _LATENT,
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "rwkv": _NO_ATTENTION,
    "recurrent_gemma": _NO_ATTENTION,
    "jamba": "some of its layers are not softmax attention",
    "qwen3_next": "some of its layers are not softmax attention",
    "t5": _CROSS,
    "bart": _CROSS,
}


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a configuration that may describe several modalities."""
    return config.get_text_config(decoder=True)


def max_positions(config: PretrainedConfig) -> int | None:
    """How many tokens the base takes, where its configuration says so."""
    return getattr(text_config(config), "max_position_embeddings", None)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a base model, from its configuration alone (no weights needed).

    Raises:
        UnsupportedModelError: the family is not in the table, or the decoder reads an encoder; the message has the
            family's name and the reason.
    """
    text = text_config(config)
    name, reason = text.model_type, REFUSED.get(text.model_type)
    if config.model_type in TOWERS_OF:
        name = config.model_type
        reason = f"it has two encoders, each for an adapter of its own: pass model.{TOWERS_OF[name]}"
    if reason is None and (config.is_encoder_decoder or getattr(text, "add_cross_attention", False)):
        # Its decoder may well be in the table, but the wrapper hands it neither our argument nor our hook.
        name, reason = config.model_type, "its decoder reads an encoder through cross-attention"
    if reason is None and name in FAMILIES:
        return FAMILIES[name]
    if reason is None and name in ENCODERS:
        attention, key, value = ENCODERS[name]
        return Family(attention, partial(called, key=key, value=value))
    reason = reason or "nobody has added it to the table in llama_adapter/core/families.py yet"
    supported = ", ".join(sorted(FAMILIES | ENCODERS))
    raise UnsupportedModelError(f"Models of family '{name}' cannot be adapted: {reason}. Supported: {supported}.")


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a supported model is an encoder, which reads and does not write."""
    return text_config(config).model_type in ENCODERS


def class_name(module: nn.Module) -> str:
    """The class of a module in transformers; FSDP2 gives a module that it shards a class of its own over that."""
    return type(module).__name__.removeprefix("FSDP")


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The self-attention modules of a supported model, lowest layer first.

    Raises:
        UnsupportedModelError: see `family_of`; or the model has none of its family's attention modules, or a second
            decoder of the family, which `model.base_model` does not run or whose layers are counted alike.
    """
    family = family_of(model.config)
    found = [
        module
        for module in model.modules()
        if class_name(module) == family.attention and not getattr(module, "is_cross_attention", False)
    ]
    if not found:
        raise UnsupportedModelError(
            f"This {type(model).__name__} has no module of class {family.attention}; "
            "llama-adapter was tested with transformers 5.17 to 5.23, see which version is installed."
        )
    for number, module in enumerate(found):
        if not hasattr(module, "layer_idx"):  # an encoder's, in the order of its layers
            module.layer_idx = number
    found.sort(key=lambda module: int(module.layer_idx))
    reached = {id(module) for module in model.base_model.modules()}
    if not all(id(module) in reached for module in found) or len({module.layer_idx for module in found}) < len(found):
        # An adapter on layers that the hooked decoder does not run would be silently inert.
        raise UnsupportedModelError(
            f"This {type(model).__name__} has {len(found)} modules of class {family.attention}, not all of them in one "
            "decoder: call add_adapter on the part that holds the decoder alone."
        )
    return found


def shape_of(config: PretrainedConfig) -> dict[str, int | str]:
    """The dimensions an adapter depends on; two bases with equal shapes take the same adapter files."""
    text = text_config(config)
    num_heads = text.num_attention_heads
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // num_heads,
    }
