"""LitGPT's adapter checkpoints (`lit_model.pth.adapter`, `lit_model.pth.adapter_v2`): gates by head, used as they are.

Its second version multiplies what a linear gives, y = s (Wx + b), and ours what it takes, y = W(s x) + b: the two agree
where s = 1, and other scales are refused. LitGPT since 0.5 stores q, k and v one after another but cuts a prompt's as
if they lay side by side by group, so that its own forward is the method's only with one key-value head.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.base import load_config
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import shape_of
from llama_adapter.core.zero_init import GATE_ACTIVATIONS
from llama_adapter.errors import AdapterError, LlamaAdapterError
from llama_adapter.formats.stored import Hints, Reading, Stored
from llama_adapter.settings import shown

NORM_NAMES = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
LINEAR_NAMES = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
                "mlp.proj": "mlp.down_proj"}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")
BIASED = (*QKV, *(own.rpartition(".")[2] for own in LINEAR_NAMES.values()))
CUT_WRONGLY = (
    "LitGPT 0.5 itself reads a prompt's keys and values from wrong rows unless the base has one key-value head: there "
    "its own outputs differ from these."
)


def read_litgpt(stored: Stored, hints: Hints) -> Reading:
    """A LitGPT adapter of either version.

    Raises:
        AdapterError: the file is incomplete or has what cannot be said here.
    """
    layers = sorted(
        int(match[1])
        for key in stored.tensors
        if (match := re.fullmatch(r"transformer\.h\.(\d{1,4})\.attn\.adapter_wte\.weight", key))
    )
    if not layers or layers[-1] + 1 - layers[0] != len(layers):
        raise AdapterError(
            f"{stored.path} has adapter_wte on layers {shown(layers)}, not on the top ones: copy it again."
        )
    adapter_len, hidden = stored.shape(f"transformer.h.{layers[0]}.attn.adapter_wte.weight", 2)
    shape = dict(hints.base_shape or _shape_beside(stored.path))
    tensors = {}
    heads = 0
    for i in layers:
        theirs = f"transformer.h.{i}.attn."
        tensors[f"layers.{i}.prompt"] = stored.take(f"{theirs}adapter_wte.weight", adapter_len, hidden)
        gate = stored.tensors.get(f"{theirs}gating_factor")
        gate_shape = stored.shape(f"{theirs}gating_factor", 4 if gate is None else gate.dim())
        gates = stored.take(f"{theirs}gating_factor", *gate_shape).flatten()
        if len(gates) == 1 and len(gate_shape) == 1:  # the first lit-llama had one for all heads
            if "num_attention_heads" not in shape:
                raise AdapterError(f"{stored.path} has one gate for all heads and does not say how many: pass --base.")
            gates = gates.repeat(shape["num_attention_heads"])
        heads = heads or len(gates)
        if len(gates) != heads or (len(gate_shape) > 1 and heads not in (gate_shape[1], gate_shape[-2])):
            raise AdapterError(f"{stored.path}: {theirs}gating_factor has shape {[*gate_shape]}: copy the file again.")
        tensors[f"layers.{i}.gate"] = gates
    shape |= {"hidden_size": hidden, "num_hidden_layers": layers[-1] + 1, "num_attention_heads": heads}
    version2 = any(key.endswith("adapter_scale") for key in stored.tensors)
    parts = _read_parts(stored, tensors, shape) if version2 else {}
    if lost := stored.untaken():
        raise AdapterError(f"{stored.path} has {len(lost)} tensors that would be lost, such as {shown(lost[:3])}.")
    config = AdapterConfig(
        adapter_len=adapter_len,
        adapter_layers=len(layers),
        gate_activation="identity",
        base_model_name_or_path=hints.base,
        base_shape=shape,
        **parts,
    )
    one = shape.get("num_key_value_heads") == 1
    left = sorted(stored.beside)
    kind = f"LitGPT adapter{' v2' if version2 else ''}"
    facts = {"litgpt": {"vocabulary": len(stored.tensors["lm_head.adapter_bias"])}} if version2 else {}
    return Reading(kind, config, tensors, len(stored.taken), left, [] if one else [CUT_WRONGLY], facts)


def _shape_beside(path: Path) -> dict[str, Any]:
    """What LitGPT copied beside its checkpoint: the base's config.json."""
    if not (path.parent / "config.json").is_file():
        return {}
    try:
        return shape_of(load_config(str(path.parent)))
    except LlamaAdapterError:
        return {}


def _read_parts(stored: Stored, tensors: dict[str, Tensor], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Norms and biases of the second version into `tensors`; the fields of the configuration for them."""
    if "head_dim" not in shape:
        raise AdapterError(f"{stored.path} does not say how its qkv is divided: pass --base.")
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    sizes = dict(zip(QKV, (shape["num_attention_heads"] * shape["head_dim"], kv, kv), strict=True))
    hidden = shape["hidden_size"]
    tensors["norms.norm.weight"] = stored.take("transformer.ln_f.weight", hidden)
    for i in range(shape["num_hidden_layers"]):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        for name, own in NORM_NAMES.items():
            tensors[f"norms.{ours}{own}.weight"] = stored.take(f"{theirs}{name}.weight", hidden)
        cut = _bias(stored, f"{theirs}attn.qkv", sum(sizes.values())).split([*sizes.values()])
        tensors |= {f"linears.{ours}self_attn.{name}.bias": part.clone() for name, part in zip(QKV, cut, strict=True)}
        if tensors[f"linears.{ours}self_attn.v_proj.bias"].any() and f"layers.{i}.gate" in tensors:
            raise AdapterError(f"{stored.path}: {theirs}attn.qkv has a bias on values, which prompts do not take here.")
        for name, own in LINEAR_NAMES.items():
            tensors[f"linears.{ours}{own}.bias"] = _bias(stored, theirs + name)
    if _bias(stored, "lm_head").any():
        raise AdapterError(f"{stored.path} has a bias on lm_head, which adapters here do not reach.")
    return {"norms": True, "linear_bias": BIASED}


def _bias(stored: Stored, linear: str, size: int | None = None) -> Tensor:
    """The added bias of a linear whose scale is 1."""
    size = size or stored.shape(f"{linear}.adapter_bias", 1)[0]
    if not bool((stored.take(f"{linear}.adapter_scale", size) == 1).all()):
        raise AdapterError(
            f"{stored.path}: {linear}.adapter_scale is not 1. LitGPT scales what a linear gives, s (Wx + b), and "
            "adapters here what it takes, W(s x) + b: such a file cannot be converted."
        )
    return stored.take(f"{linear}.adapter_bias", size)


def write_litgpt(reading: Reading) -> tuple[str, dict[str, Any]]:
    """An adapter as a LitGPT checkpoint: a file's name, and what torch.save is to write into it.

    Raises:
        AdapterError: LitGPT cannot say it exactly.
    """
    config, tensors = reading.config, reading.tensors
    shape: Mapping[str, Any] = config.base_shape or {}
    size = reading.facts.get("litgpt", {}).get("vocabulary")
    values = any(key.endswith("v_proj.bias") and bool(tensor.any()) for key, tensor in tensors.items())
    version2 = config.norms and {*config.linear_bias} == {*BIASED}
    reasons = {
        "a condition has no place in it": config.condition is not None,
        "it has no adapters without prompts": not config.adapter_layers,
        "its second version has norms and biases of all linears, and neither scales of inputs nor LoRA": bool(
            (config.has_parts and not version2) or config.linear_scale or config.lora_rank
        ),
        "it takes biases on values for prompts too, and adapters here do not": values,
        "its second version wants a bias of lm_head, whose size only a file that came from LitGPT tells": bool(
            version2 and type(size) is not int
        ),
    }
    for reason, broken in reasons.items():
        if broken:
            raise AdapterError(f"This adapter cannot be LitGPT's: {reason}.")
    content: dict[str, Tensor] = {}
    for i in range(shape["num_hidden_layers"] - (config.adapter_layers or 0), shape["num_hidden_layers"]):
        gate = GATE_ACTIVATIONS[config.gate_activation](tensors[f"layers.{i}.gate"])
        if config.gate_scale:
            gate = gate * tensors[f"layers.{i}.gate_scale"]
        content[f"transformer.h.{i}.attn.gating_factor"] = gate[None, None, :, None].clone()
        content[f"transformer.h.{i}.attn.adapter_wte.weight"] = tensors[f"layers.{i}.prompt"]
    if not version2:
        return "lit_model.pth.adapter", {"model": content}
    content["transformer.ln_f.weight"] = tensors["norms.norm.weight"]
    biases = {"lm_head": torch.zeros(size)}
    for i in range(shape["num_hidden_layers"]):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        for name, own in NORM_NAMES.items():
            content[f"{theirs}{name}.weight"] = tensors[f"norms.{ours}{own}.weight"]
        cut = [tensors[f"linears.{ours}self_attn.{name}.bias"] for name in QKV]
        biases |= {f"{theirs}attn.qkv": torch.cat(cut)}
        biases |= {theirs + name: tensors[f"linears.{ours}{own}.bias"] for name, own in LINEAR_NAMES.items()}
    for linear, bias in biases.items():
        content[f"{linear}.adapter_bias"], content[f"{linear}.adapter_scale"] = bias, torch.ones_like(bias)
    return "lit_model.pth.adapter_v2", {"model": content}
