"""The authors' files: V1 (prompts and gates), V2 multi-modal, V2's dialog model (chat65b) and ImageBind's.

One table, `pairs`, pairs their names with ours; the readers and the writers go over it. Their rotation turns pairs of
neighbours, transformers' turns halves, so what comes out of wq and wk has its rows in another order (`to_halves`).
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_adapter.conditions.official import condition_keys, official_condition
from llama_adapter.core.config import AdapterConfig, GateActivation
from llama_adapter.errors import AdapterError
from llama_adapter.formats.stored import Hints, Reading, Stored
from llama_adapter.settings import shown

QUERY, PREFIX = "adapter_query.weight", "prefix_query.weight"
LINEARS = {
    "q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3",
}  # fmt: skip
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
BASE_TENSORS = re.compile(
    r"(llama\.|llma\.)?(tok_embeddings\.weight|output\.weight|norm\.weight|rope\.freqs"
    r"|layers\.\d+\.(attention\.(w[qkvo]|inner_attention\.rope\.freqs)|feed_forward\.w[123]|attention_norm|ffn_norm)(\.weight)?)"
    r"|clip\..*"
)
"""Tensors of the base and of the frozen tower, which training checkpoints hold too."""
UNUSED_GATE = r"(llama\.|llma\.)?layers\.\d+\.attention\.(gate|new_gate)"
"""Gates of layers without prompts, and scales of gates that ImageBind's code does not use."""
LARGEST_GATE = 1024
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Pair(NamedTuple):
    """One tensor: its names, its shape in their file and in ours, and the heads whose rows change their order."""

    theirs: str
    ours: str
    their_shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    heads: int = 0


class Sizes(NamedTuple):
    """Dimensions of the base that the pairs need; `wide` is that of the MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    wide: int = 0

    def of(self, linear: str) -> tuple[int, int]:
        """(in, out) of a linear layer."""
        attention = self.heads * self.head_dim
        return {
            "q_proj": (self.hidden, attention), "o_proj": (attention, self.hidden),
            "gate_proj": (self.hidden, self.wide), "up_proj": (self.hidden, self.wide),
            "down_proj": (self.wide, self.hidden),
        }.get(linear, (self.hidden, self.kv_heads * self.head_dim))  # fmt: skip


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads x D, ...] from Meta's order, pairs side by side, to transformers', halves one after the other."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def pairs(config: AdapterConfig, sizes: Sizes, prefix: str) -> Iterator[Pair]:
    """All tensors of an adapter but the prompts, which the authors keep in one matrix.

    Args:
        config: what the adapter has.
        sizes: of its base.
        prefix: "" or "llama.", before their names of the decoder's parts.
    """
    for i in range(sizes.layers - (config.adapter_layers or 0), sizes.layers):
        theirs = f"{prefix}layers.{i}.attention."
        yield Pair(f"{theirs}gate", f"layers.{i}.gate", (1, sizes.heads, 1, 1), (sizes.heads,))
        if config.gate_scale:
            yield Pair(f"{theirs}new_gate", f"layers.{i}.gate_scale", (1, 1, 1, 1), (1,))
    if config.norms:
        yield Pair(f"{prefix}norm.weight", "norms.norm.weight", (sizes.hidden,), (sizes.hidden,))
    for i in range(sizes.layers if config.has_parts else 0):
        layer = f"{prefix}layers.{i}."
        for ours, theirs in NORMS.items() if config.norms else ():
            shape = (sizes.hidden,)
            yield Pair(f"{layer}{theirs}.weight", f"norms.layers.{i}.{ours}.weight", shape, shape)
        for name, theirs in LINEARS.items():
            yield from _of_linear(config, sizes, name, layer + theirs, f"layers.{i}.{_path(name)}")


def _of_linear(config: AdapterConfig, sizes: Sizes, name: str, theirs: str, path: str) -> Iterator[Pair]:
    into, out = sizes.of(name)
    turned = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}.get(name, 0)
    if name in config.linear_scale:
        yield Pair(f"{theirs}_scale", f"linears.{path}.scale", (into,), (into,))
    if name in config.linear_bias:
        bias = f"{theirs}_bias" if config.linear_scale else f"{theirs}.bias"
        yield Pair(bias, f"linears.{path}.bias", (out,), (out,), turned)
    if name in config.lora_targets:
        lora = re.sub(r"\.(w.)$", r".lora_\1", theirs)
        rank = config.lora_rank
        yield Pair(f"{lora}_l1.weight", f"lora.{path}.A", (rank, into), (rank, into))
        yield Pair(f"{lora}_l2.weight", f"lora.{path}.B", (out, rank), (out, rank), turned)


def _path(linear: str) -> str:
    return ("self_attn." if LINEARS[linear].startswith("attention") else "mlp.") + linear


def read_official(stored: Stored, hints: Hints) -> Reading:
    """An adapter of the authors.

    Raises:
        AdapterError: the file is incomplete, holds what no such file has, or leaves open what `hints` do not say.
    """
    prefix = next((p for p in ("llama.", "llma.") if any(key.startswith(f"{p}layers.") for key in stored.tensors)), "")
    found = {int(match[1]) for key in stored.tensors if (match := re.match(rf"{prefix}layers\.(\d{{1,4}})\.", key))}
    if not found:
        raise AdapterError(f"{stored.path} has no gates (layers.N.attention.gate): it is incomplete, copy it again.")
    args = vars(stored.beside["args"]) if isinstance(stored.beside.get("args"), argparse.Namespace) else {}
    prompts = next((name for name in (PREFIX, QUERY) if name in stored), None)
    parts = _parts(stored, prefix)
    sizes, gate_shape = _sizes(stored, prefix, 1 + max(found), prompts, parts, hints)
    notes: list[str] = []
    config = _config(stored, hints, sizes, prefix, prompts, parts, args, notes)
    tensors = {}
    if prompts is not None:
        layers = config.adapter_layers or 0
        matrix = stored.take(prompts, layers * config.adapter_len, sizes.hidden)
        for i, prompt in zip(range(sizes.layers - layers, sizes.layers), matrix.split(config.adapter_len), strict=True):
            tensors[f"layers.{i}.prompt"] = prompt.clone()
    for pair in pairs(config, sizes, prefix):
        gate = pair.theirs.endswith(".gate")
        tensor = stored.take(pair.theirs, *(gate_shape if gate else pair.their_shape))
        tensor = tensor.flatten().expand(sizes.heads).contiguous() if gate else tensor.reshape(pair.our_shape)
        tensors[pair.ours] = to_halves(tensor, pair.heads) if pair.heads else tensor
    for key in condition_keys(stored.tensors):
        tensors[f"condition.{key}"] = stored.take(key, *stored.tensors[key].shape)
    kind = "V2" if prefix or config.condition or parts else "V1"
    kind = "ImageBind-LLM" if prompts == PREFIX else "V2 dialog (scale and bias)" if prompts is None else kind
    kind = f"the authors' {kind}{' training' if args else ''} checkpoint"
    return _finished(stored, kind, config, tensors, notes, prefix, gate_shape)


def _config(
    stored: Stored, hints: Hints, sizes: Sizes, prefix: str, prompts: str | None, parts: Mapping[str, Any],
    args: Mapping[str, Any], notes: list[str],
) -> AdapterConfig:  # fmt: skip
    """The configuration; what was taken as usual goes to `notes`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in stored.tensors.items()}
    condition = official_condition(shapes, None, hints.block_heads or 16)
    visual = condition is not None and condition.kind == "visual_prompt"
    if condition is not None and visual and hints.block_heads is None:
        notes.append(
            f"The file does not say the attention heads of its projector: {condition.block_heads}, as the authors'; "
            "--block-heads says otherwise."
        )
    adapter_len, layers = 10, 0
    if prompts is not None:
        known = 1 if prompts == PREFIX else stored.shape("visual_query.weight", 2)[0] if visual else None
        known = hints.adapter_len or known or args.get("adapter_len")
        adapter_len, layers = _lengths(stored, stored.shape(prompts, 2)[0], sizes.layers, known, notes)
    version1 = not (prefix or condition or parts)
    return AdapterConfig(
        adapter_len=adapter_len,
        adapter_layers=layers,
        gate_activation=_activation(stored, args, hints, notes) if version1 else "tanh",
        base_model_name_or_path=hints.base,
        base_shape={
            "model_type": "llama", "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, "head_dim": sizes.head_dim,
        },
        condition=condition,
        gate_scale=prompts == QUERY and f"{prefix}layers.{sizes.layers - 1}.attention.new_gate" in stored,
        **parts,
    )  # fmt: skip


def _parts(stored: Stored, prefix: str) -> dict[str, Any]:
    """The second version's fields of `AdapterConfig`, as the lowest layer's tensors tell."""
    layer = f"{prefix}layers.0."

    def having(name: Callable[[str], str]) -> tuple[str, ...]:
        return tuple(linear for linear, theirs in LINEARS.items() if layer + name(theirs) in stored)

    scale = having(lambda theirs: f"{theirs}_scale")
    bias = having(lambda theirs: f"{theirs}_bias" if scale else f"{theirs}.bias")
    lora = having(lambda theirs: re.sub(r"\.(w.)$", r".lora_\1_l1.weight", theirs))
    parts: dict[str, Any] = {"linear_scale": scale, "linear_bias": bias}
    if lora:
        first = re.sub(r"\.(w.)$", r".lora_\1_l1.weight", LINEARS[lora[0]])
        parts |= {"lora_targets": lora, "lora_rank": stored.shape(layer + first, 2)[0]}
    # A training checkpoint of V1 has the whole base's norms, which were frozen.
    if (prefix or scale) and f"{layer}attention_norm.weight" in stored:
        parts["norms"] = True
    return {key: value for key, value in parts.items() if value}


def _sizes(
    stored: Stored, prefix: str, layers: int, prompts: str | None, parts: Mapping[str, Any], hints: Hints
) -> tuple[Sizes, tuple[int, ...]]:
    """The base's dimensions, and the shape of a gate."""
    top, given = f"{prefix}layers.{layers - 1}.", hints.base_shape or {}
    gate_shape: tuple[int, ...] = ()
    heads = given.get("num_attention_heads", 0)
    if prompts is None:
        hidden = stored.shape(f"{top}attention.wq_scale", 1)[0]
    else:
        hidden = stored.shape(prompts, 2)[1]
        gate = stored.tensors.get(f"{top}attention.gate")
        gate_shape = stored.shape(f"{top}attention.gate", 4 if gate is None else gate.dim())
        if math.prod(gate_shape) > 1:
            heads = math.prod(gate_shape)
    if not heads:
        raise AdapterError(f"{stored.path} does not say how many attention heads its base has: pass --base.")
    if hidden % heads or (math.prod(gate_shape) > 1 and gate_shape != (1, heads, 1, 1)):
        raise AdapterError(f"{stored.path}: gates of shape {[*gate_shape]} do not fit prompts of width {hidden}.")
    wide = 0
    for suffix in ("w1.bias", "w3.bias", "w1_bias", "w3_bias", "w2_scale", "lora_w1_l2.weight", "lora_w3_l2.weight"):
        if (name := f"{top}feed_forward.{suffix}") in stored:
            wide = stored.tensors[name].shape[0] if stored.tensors[name].dim() else 0
    if (name := f"{top}feed_forward.lora_w2_l1.weight") in stored and not wide:
        wide = stored.shape(name, 2)[1]
    return Sizes(layers, hidden, heads, heads, hidden // heads, wide), gate_shape


def _lengths(stored: Stored, rows: int, layers: int, known: Any, notes: list[str]) -> tuple[int, int]:
    """K and L of prompts that stand in one matrix of K x L rows."""
    if known is None:
        fits = [rows // count for count in range(min(layers, rows), 0, -1) if rows % count == 0]
        known = 10 if 10 in fits else fits[0]
        notes.append(f"The file does not say how long its prompts are: {rows} rows are taken as K={known} in "
                     f"L={rows // known} layers; --adapter-len says otherwise.")  # fmt: skip
    if type(known) is not int or known < 1 or rows % known or rows // known > layers:
        raise AdapterError(
            f"{stored.path}: prompts of {rows} rows in {layers} layers cannot be K={shown(known)} a layer: pass the "
            "--adapter-len that it was trained with."
        )
    return known, rows // known


def _activation(stored: Stored, args: Mapping[str, Any], hints: Hints, notes: list[str]) -> GateActivation:
    """How V1's gates are meant, which no file says: the training code applies tanh, the release's code does not."""
    if hints.gate_activation is not None:
        return hints.gate_activation
    # What the authors' script extracts has the gates that nothing trained in half precision, and no others.
    dtypes = {tensor.dtype for key, tensor in stored.tensors.items() if key.endswith("attention.gate")}
    trained = bool(args) or dtypes == {torch.float16, torch.float32}
    why = "a checkpoint of the authors' training code, which applies tanh" if trained else (
        "in the layout of the authors' release, whose code takes the gates as they are")  # fmt: skip
    found: GateActivation = "tanh" if trained else "identity"
    notes.append(
        f"The file does not say the gates' activation: {found}, as it is {why}; --gate-activation says otherwise."
    )
    return found


def _finished(
    stored: Stored, kind: str, config: AdapterConfig, tensors: dict[str, Tensor], notes: list[str], prefix: str,
    gate_shape: tuple[int, ...],
) -> Reading:  # fmt: skip
    """Account for all that was not taken, and keep what a file of theirs has beside the adapter."""
    untaken = stored.untaken()
    unused = [key for key in untaken if re.fullmatch(UNUSED_GATE, key) and stored.tensors[key].numel() <= LARGEST_GATE]
    lost = [key for key in untaken if key not in unused and not BASE_TENSORS.fullmatch(key)]
    if lost:
        raise AdapterError(
            f"{stored.path} has {len(lost)} tensors that no file of this kind ({kind}) has, such as {shown(lost[:3])}: "
            "they would be lost."
        )
    dtypes = {key: stored.tensors[key].dtype for key in sorted(stored.tensors)}
    facts: dict[str, Any] = {
        "prefix": prefix,
        "dtypes": {key: _name(dtypes[key]) for key in sorted(stored.taken) if dtypes[key] != torch.float32},
        "unused": {key: _values(stored.take(key, *stored.tensors[key].shape), dtypes[key]) for key in unused},
        "gate_shape": list(gate_shape),
    }
    plain = stored.beside.get("config")
    if isinstance(plain, dict) and len(plain) < 20 and all(type(v) in (bool, int, str) for v in plain.values()):
        facts["config"] = plain
    left = untaken + sorted(stored.beside.keys() - {"config", "args"})
    return Reading(kind, config, tensors, len(stored.taken) - len(unused), left, notes, {"official": facts})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _values(tensor: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": _name(dtype), "shape": list(tensor.shape), "values": tensor.flatten().tolist()}


def write_official(reading: Reading) -> tuple[str, dict[str, Any]]:
    """An adapter in the authors' layout: a file's name, and what torch.save is to write into it.

    Raises:
        AdapterError: the layout cannot say it exactly.
    """
    config, facts = reading.config, reading.facts.get("official", {})
    shape: Mapping[str, Any] = config.base_shape or {}
    _refuse(config, shape)
    heads, layers = shape["num_attention_heads"], shape["num_hidden_layers"]
    sizes = Sizes(layers, shape["hidden_size"], heads, heads, shape["hidden_size"] // heads)
    version1 = config.condition is None and not config.has_parts
    prefix = facts.get("prefix", "" if version1 or config.linear_scale else "llama.")
    content = {}
    if config.adapter_layers:
        order = range(layers - config.adapter_layers, layers)
        content[QUERY] = torch.cat([reading.tensors[f"layers.{i}.prompt"] for i in order])
    for pair in pairs(config, sizes, prefix):
        tensor = reading.tensors[pair.ours]
        tensor = to_pairs(tensor, pair.heads) if pair.heads else tensor
        content[pair.theirs] = tensor.reshape(pair.their_shape) if pair.ours.startswith("layers.") else tensor
    for key, tensor in reading.tensors.items():
        if key.startswith("condition."):
            content[key.removeprefix("condition.")] = tensor
    _as_it_was(content, facts, heads, f"{prefix}layers.{{}}.attention.gate", layers - (config.adapter_layers or 0))
    if version1 and not prefix:
        return f"llama_adapter_len{config.adapter_len}_layer{config.adapter_layers}_release.pth", content
    if not config.adapter_layers:
        return "llama_adapter_v2_chat.pth", {"model": content}
    said = {"w_bias": bool(config.linear_bias), "w_lora": bool(config.lora_rank), "lora_rank": config.lora_rank or 16}
    return "llama_adapter_v2.pth", {"model": content, "config": facts.get("config", said)}


def _as_it_was(content: dict[str, Tensor], facts: Mapping[str, Any], heads: int, gate: str, below: int) -> None:
    """Give the tensors the dtypes and shapes of the file that they came from, and back the gates that nothing uses."""
    for key, tensor in content.items():
        if key.endswith(".gate") and facts.get("gate_shape") == [1] and bool((tensor == tensor.flatten()[0]).all()):
            tensor = tensor.flatten()[:1]
        dtype = getattr(torch, str(facts.get("dtypes", {}).get(key, "float32")), None)
        content[key] = tensor.to(dtype) if dtype in DTYPES else tensor
    unused = {gate.format(i): torch.zeros(1, heads, 1, 1) for i in range(below if content else 0)}
    if "unused" in facts:
        unused = {
            key: torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
            for key, value in facts["unused"].items()
        }
    elif QUERY not in content:
        unused = {}
    content.update(unused)


def _refuse(config: AdapterConfig, shape: Mapping[str, Any]) -> None:
    """Name the first thing that the authors' code does not compute."""
    version2 = config.condition is not None or config.has_parts or config.gate_scale
    kind = getattr(config.condition, "kind", None)
    reasons = {
        f"their code runs Llama, not {shape.get('model_type')}": shape.get("model_type") not in (None, "llama"),
        "their code knows no grouped keys and values": shape.get("num_key_value_heads") not in (
            None, shape["num_attention_heads"]),
        f"a condition of kind '{kind}' has no place in it": kind not in (None, "visual_prompt"),
        "its pictures are added to every layer's prompts, without early fusion": getattr(
            config.condition, "layers", None) is not None,
        "a learnt condition for no picture has no place in it": getattr(config.condition, "absent", "zero") != "zero",
        "modules of the adapter's own have no place in it": bool(config.modules_to_save),
        "its gates are always used as tanh(g) in V2": version2 and config.gate_activation != "tanh",
        "new_gate comes with LoRA alone": config.gate_scale and not config.lora_rank,
        "LoRA comes with new_gate": bool(config.lora_rank) and not config.gate_scale,
        "its LoRA has no factor alpha / r": config.lora_alpha not in (None, float(config.lora_rank)),
        "scales belong to its dialog model, which has neither prompts nor LoRA": bool(
            config.linear_scale and (config.adapter_layers or config.lora_rank)),
        "an adapter without prompts is its dialog model, which has scales and biases":
            not config.adapter_layers and not config.linear_scale,
        "it has no biases on wk and wv": not config.linear_scale and bool({"k_proj", "v_proj"} & {*config.linear_bias}),
        "it knows no linears but Llama's": bool(
            {*config.linear_scale, *config.linear_bias, *config.lora_targets} - LINEARS.keys()),
    }  # fmt: skip
    for reason, broken in reasons.items():
        if broken:
            raise AdapterError(f"This adapter cannot be written in the authors' layout: {reason}.")
