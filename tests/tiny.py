"""Tiny random models of every family, and small helpers that several test files share."""

import sys
import threading
from collections.abc import Callable, Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_adapter import AdapterConfig, add_adapter

VOCAB, HIDDEN, LAYERS, HEADS = 97, 32, 3, 4
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
APART = {"head_dim": 16}  # unlike hidden / heads = 8
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
SPECIAL: dict[str, dict] = {
    "cohere": {"use_qk_norm": True},
    "ernie4_5": APART,
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "gemma": APART,
    "gemma2": {**APART, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 11},
    "gemma3_text": {**APART, "sliding_window": 4, "query_pre_attn_scalar": 11},
    "glm": APART,
    "glm4": APART,
    "gpt_oss": {**APART, **ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "granite": {"attention_multiplier": 0.2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": APART,
    "llama": APART,
    "ministral": APART,
    "mistral": APART,
    "olmo": {"clip_qkv": 0.05},
    "phi": {"qk_layernorm": True},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3": APART,
    "qwen3_moe": {**APART, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "seed_oss": APART,
}


def tiny_config(model_type: str):
    """A configuration of that family with 3 layers of width 32."""
    if model_type == "gpt2":
        special = {key: COMMON[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return AutoConfig.for_model("gpt2", **GPT2, **special)
    return AutoConfig.for_model(model_type, **{**COMMON, **SPECIAL.get(model_type, {})})


def tiny_model(model_type: str = "llama", seed: int = 0, **options):
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), **options).eval()


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """A Llama whose dimensions a test chooses."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, **overrides})).eval()


def open_gates(adapter, seed: int = 1, scale: float = 1.0) -> None:
    """Random gates away from zero: a closed gate would hide any mistake in the prompt's path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.copy_(scale * torch.randn(layer.gate.shape, generator=generator))


def adapted(model, name: str = "default", seed: int = 1, **config):
    """Add an adapter with open gates."""
    torch.manual_seed(seed)
    adapter = add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **config}), name)
    open_gates(adapter, seed)
    return adapter


def tokens(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones, [rows, length]."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def at_once(work: Sequence[Callable[[], object]]) -> None:
    """Run functions in a thread each, switching between them as often as Python can."""
    threads = [threading.Thread(target=function) for function in work]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
