"""The authors' fixtures as models and as the files that their code writes."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def read_fixture(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Shapes and tensors of a fixture, such as "v1"."""
    with safe_open(FIXTURES / f"official_{name}_a.safetensors", "pt") as file:
        return json.loads(file.metadata()["params"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def rotate_half_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's interleaved rotary pairs to Hugging Face's halves, per head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def base_of(shape: dict, tensors: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The fixture's base as a transformers model."""
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["dim"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"], rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    state = {f"{ours}.weight": tensors[f"base.{theirs}.weight"] for theirs, ours in TOP.items()}
    for i in range(shape["n_layers"]):
        for theirs, ours in NAMES.items():
            weight = tensors[f"base.layers.{i}.{theirs}.weight"]
            if theirs in ("attention.wq", "attention.wk"):
                weight = rotate_half_rows(weight, shape["n_heads"])
            state[f"model.layers.{i}.{ours}.weight"] = weight
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def adapter_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the authors' names."""
    return {key.removeprefix("adapter."): value for key, value in tensors.items() if key.startswith("adapter.")}


def same_file(one: dict, other: dict) -> None:
    """Two files hold the same tensors, bit for bit."""
    assert sorted(one) == sorted(other)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key
