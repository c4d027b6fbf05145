"""The authors' files: V1 (prompts and gates), V2 multi-modal, V2's dialog model (chat65b) and ImageBind's.

`official_names.pairs` pairs their names with ours; the reader and the writer go over it.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llama_adapter.conditions.official import condition_keys, official_condition
from llama_adapter.core.config import AdapterConfig, GateActivation
from llama_adapter.errors import AdapterError
from llama_adapter.formats.official_names import LINEARS, Sizes, pairs, to_halves, to_pairs
from llama_adapter.formats.stored import Hints, Reading, Stored
from llama_adapter.settings import shown

QUERY, PREFIX = "adapter_query.weight", "prefix_query.weight"
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
    condition = official_condition(shapes, None, _block_heads(stored, args, hints, notes))
    adapter_len, layers = 10, 0
    if prompts is not None:
        known = 1 if prompts == PREFIX else None
        known = stored.shape("visual_query.weight", 2)[0] if "visual_query.weight" in stored else known
        if known and hints.adapter_len not in (None, known):
            raise AdapterError(
                f"{stored.path} has {known} prompts a layer: leave --adapter-len {hints.adapter_len} out."
            )
        known = known or hints.adapter_len or args.get("adapter_len")
        gates = {i: stored.tensors.get(f"{prefix}layers.{i}.attention.gate") for i in range(sizes.layers)}
        opened = [i for i, gate in gates.items() if gate is not None and bool(gate.any())]
        adapter_len, layers = _lengths(stored, stored.shape(prompts, 2)[0], sizes.layers, known, opened, notes)
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
        # With one prompt a layer the authors' code adds tanh(g) Wv P and passes new_gate over.
        gate_scale=adapter_len > 1 and f"{prefix}layers.{sizes.layers - 1}.attention.new_gate" in stored,
        **parts,
    )  # fmt: skip


def _block_heads(stored: Stored, args: Mapping[str, Any], hints: Hints, notes: list[str]) -> int:
    """Attention heads of a visual projector, which no tensor tells.

    Raises:
        AdapterError: nobody says, and it is not of the authors' width.
    """
    plain = stored.beside.get("config")
    said = hints.block_heads or (plain.get("v_num_heads") if isinstance(plain, dict) else None)
    said = said or args.get("v_num_heads")
    if "visual_query.weight" not in stored or (type(said) is int and said > 0):
        return said if type(said) is int and said > 0 else 16
    width = stored.shape("visual_query.weight", 2)[1]
    if width != 768:
        raise AdapterError(
            f"{stored.path} does not say the attention heads of its projector, which is {width} wide and the "
            "authors' 768: convert it with --block-heads."
        )
    notes.append(
        "The file does not say the attention heads of its projector: 16, as the authors'; convert --block-heads says "
        "otherwise."
    )
    return 16


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
        raise AdapterError(f"{stored.path} does not say how many attention heads its base has: convert it with --base.")
    if hidden % heads or math.prod(gate_shape) > max(gate_shape, default=1):
        raise AdapterError(f"{stored.path}: gates of shape {[*gate_shape]} do not fit prompts of width {hidden}.")
    kv_heads = given.get("num_key_value_heads", heads)
    for suffix in ("wk.weight", "wk.bias", "wk_bias", "lora_wk_l2.weight"):
        rows = [*getattr(stored.tensors.get(f"{top}attention.{suffix}"), "shape", ())][:1]
        kv_heads = rows[0] * heads // hidden if rows else kv_heads
    wide = 0
    for suffix in ("w1.bias", "w3.bias", "w1_bias", "w3_bias", "w2_scale", "lora_w1_l2.weight", "lora_w3_l2.weight"):
        if (name := f"{top}feed_forward.{suffix}") in stored:
            wide = stored.tensors[name].shape[0] if stored.tensors[name].dim() else 0
    if (name := f"{top}feed_forward.lora_w2_l1.weight") in stored and not wide:
        wide = stored.shape(name, 2)[1]
    return Sizes(layers, hidden, heads, kv_heads, hidden // heads, wide), gate_shape


def _lengths(
    stored: Stored, rows: int, layers: int, known: Any, opened: list[int], notes: list[str]
) -> tuple[int, int]:
    """K and L of prompts that stand in one matrix of K x L rows; `opened` are layers whose gates are not 0.

    Raises:
        AdapterError: the rows can be divided in several ways, or in none that fits the gates.
    """
    # Training opens the gates of every layer with prompts; those below were never trained, and most files have them.
    trained = layers - min(opened, default=layers)
    trained = trained if 0 < trained < layers else layers
    if known is None:
        fits = [rows // count for count in range(2, layers + 1) if rows % count == 0] or [rows]
        known = 10 if 10 in fits else fits[0] if len(fits) == 1 else None
        known = rows // trained if trained < layers and rows % trained == 0 else known
        if known is None:
            raise AdapterError(
                f"{stored.path} does not say how its {rows} rows of prompts are divided among {layers} layers: "
                f"convert it with --adapter-len, such as {fits[-1]} or {fits[0]}."
            )
        notes.append(f"The file does not say how long its prompts are: {rows} rows are taken as K={known} in "
                     f"L={rows // known} layers; convert --adapter-len says otherwise.")  # fmt: skip
    if type(known) is not int or known < 1 or rows % known or rows // known > trained:
        raise AdapterError(
            f"{stored.path}: prompts of {rows} rows cannot be K={shown(known)} a layer in the top {trained} of "
            f"{layers} layers that have open gates: it is incomplete, or was trained with another --adapter-len."
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
        f"The file does not say the gates' activation: {found}, as it is {why}; convert --gate-activation says "
        "otherwise."
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
    shape = facts.get("gate_shape")
    for key, tensor in content.items():
        if key.endswith(".gate") and isinstance(shape, list):
            one = math.prod(shape) == 1 and bool((tensor == tensor.flatten()[0]).all())
            tensor = tensor.flatten()[:1].reshape(shape) if one else tensor
            tensor = tensor.reshape(shape) if math.prod(shape) == heads else tensor
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
        "with one prompt a layer its code passes new_gate over": config.gate_scale and config.adapter_len == 1,
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
