"""Adapters of the authors, PEFT and LitGPT: read, run, written back, and refused where they cannot be right."""

import argparse
import json
import os
import re
import shutil
import zipfile

import pytest
import torch
from official_files import FIXTURES, adapter_of, base_of, read_fixture, same_file
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, adapted, tiny_llama, tokens

from llama_adapter import (
    AdapterConfig,
    LlamaAdapterError,
    add_adapter,
    get_adapter,
    load_adapter,
    load_session,
    save_adapter,
    use_adapter,
)
from llama_adapter.base import resolve_model
from llama_adapter.cli import main
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.core.families import shape_of
from llama_adapter.formats.convert import convert, digest
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.formats.load import read_adapter
from llama_adapter.formats.stored import Hints

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
TANH = Hints(gate_activation="tanh")


@pytest.fixture(scope="module")
def v1():
    shape, tensors = read_fixture("v1")
    return base_of(shape, tensors), tensors


@pytest.fixture
def release(v1, tmp_path):
    """The fixture's adapter as the authors' release file."""
    torch.save(adapter_of(v1[1]), tmp_path / "release.pth")
    return tmp_path / "release.pth"


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@torch.no_grad()
def decoded(model, ids):
    """Logits of the same tokens one at a time, from the cache."""
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, 1)


def fresh(model):
    """The same weights without adapters."""
    other = type(model)(model.config).eval()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "zero_init" not in key})
    return other


# the authors' V1


def test_the_release_computes_what_the_authors_code_does_also_from_the_cache(v1, release, tmp_path):
    model, tensors = fresh(v1[0]), v1[1]
    account = convert(release, tmp_path / "ours", hints=TANH)
    load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(model, tensors["tokens"]), tensors["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded(model, tensors["tokens"]), tensors["logits"], atol=1e-4, rtol=0)
    assert (account["read"], account["mapped"]) == (4, 6)
    assert account["parameters"] == 3 * (5 * 64 + 4)
    assert account["left_over"] == ["layers.0.attention.gate"]
    assert "15 rows are taken as K=5 in L=3 layers" in account["notes"][0]


def test_the_release_is_read_without_converting_and_its_gates_are_raw_unless_somebody_says_tanh(v1, release, caplog):
    one, other = fresh(v1[0]), fresh(v1[0])
    load_adapter(one, release)
    assert get_adapter(one).config.gate_activation == "identity"
    assert "The file does not say the gates' activation: identity" in caplog.text
    load_adapter(other, release, gate_activation="tanh")
    torch.testing.assert_close(logits(other, v1[1]["tokens"]), v1[1]["logits"], atol=1e-4, rtol=0)
    assert (logits(one, v1[1]["tokens"]) - v1[1]["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("args", [argparse.Namespace(adapter_len=5, adapter_layer=3, lr=0.1, output_dir="out"), None])
def test_a_training_checkpoint_gives_its_adapter_and_the_base_is_listed_as_left_over(v1, tmp_path, args):
    tensors = v1[1]
    base = {key.removeprefix("base."): value.half() for key, value in tensors.items() if key.startswith("base.")}
    whole = {"model": {**base, **adapter_of(tensors)}, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 4,
             "scaler": {"scale": 2.0}}  # fmt: skip
    torch.save(whole | ({"args": args} if args else {}), tmp_path / "checkpoint-4.pth")
    found = read_adapter(tmp_path / "checkpoint-4.pth", Hints() if args else TANH)
    assert (found.config.adapter_len, found.config.adapter_layers, found.config.gate_activation) == (5, 3, "tanh")
    assert {"optimizer", "epoch", "scaler", "tok_embeddings.weight", "layers.3.attention.wq.weight"} <= {
        *found.left_over
    }
    assert len(found.left_over) == len(base) + 1 + 3  # the gate of the layer without prompts, and what is no tensor
    model = fresh(v1[0])
    add_adapter(model, found.config, state_dict=found.tensors)
    torch.testing.assert_close(logits(model, tensors["tokens"]), tensors["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("half", [False, True])
def test_v1_goes_back_to_the_authors_byte_for_byte(v1, tmp_path, half):
    """A file that the authors' script extracted has the unused gates in half precision."""
    theirs = adapter_of(v1[1])
    if half:
        theirs["layers.0.attention.gate"] = theirs["layers.0.attention.gate"].half()
    torch.save(theirs, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours", hints=Hints() if half else TANH)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["gate_activation"] == "tanh"
    account = convert(tmp_path / "ours", tmp_path / "back", to="official", verify=True, hints=Hints(adapter_len=5))
    assert account["verified"] == {"tensors": 0.0}
    same_file(torch.load(tmp_path / "back" / account["files"][0], weights_only=True), theirs)


def test_an_adapter_that_was_never_theirs_gets_closed_gates_below(tmp_path):
    model = tiny_llama(num_key_value_heads=4)
    adapted(model)
    save_adapter(model, tmp_path / "ours")
    account = convert(tmp_path / "ours", tmp_path / "theirs", to="official")
    content = torch.load(tmp_path / "theirs" / "llama_adapter_len4_layer2_release.pth", weights_only=True)
    assert sorted(content) == ["adapter_query.weight", *(f"layers.{i}.attention.gate" for i in range(3))]
    assert not content["layers.0.attention.gate"].any()
    assert account["notes"] == [
        "The authors' layout does not say the gates' activation: it is tanh; "
        "read it back with convert --gate-activation tanh."
    ]


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        (Hints(adapter_len=15), (15, 1)),
        (Hints(adapter_len=5), (5, 3)),
    ],
)
def test_the_length_of_the_prompts_is_what_the_user_says(release, hints, said):
    config = read_adapter(release, hints).config
    assert (config.adapter_len, config.adapter_layers) == said


def test_the_release_s_own_size_is_ten_prompts_in_thirty_layers(tmp_path):
    gates = {f"layers.{i}.attention.gate": torch.zeros(1, 4, 1, 1) for i in range(32)}
    torch.save({"adapter_query.weight": torch.zeros(300, 8), **gates}, tmp_path / "r.pth")
    config = read_adapter(tmp_path / "r.pth").config
    assert (config.adapter_len, config.adapter_layers) == (10, 30)
    assert config.base_shape == {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 32,
                                 "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 2}  # fmt: skip


def test_one_gate_for_all_heads_of_the_first_release_needs_the_base_s_heads(tmp_path):
    theirs = {"adapter_query.weight": torch.randn(6, 8), **{f"layers.{i}.attention.gate": torch.full((1,), 0.5 + i)
              for i in range(3)}}  # fmt: skip
    torch.save(theirs, tmp_path / "r.pth")
    with pytest.raises(LlamaAdapterError, match="does not say how many attention heads its base has: convert it"):
        read_adapter(tmp_path / "r.pth")
    shape = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 2}  # fmt: skip
    found = read_adapter(tmp_path / "r.pth", Hints(shape, adapter_len=3))
    assert torch.equal(found.tensors["layers.2.gate"], torch.full((4,), 2.5))
    from llama_adapter.formats.official import write_official

    same_file(write_official(found)[1], theirs)


NAMES = ("q_proj", "v_proj")
PICTURE = {"kind": "visual_prompt", "tower": "t", "tower_width": 6, "blocks": 1, "block_width": 8, "block_heads": 2}


@pytest.mark.parametrize(
    ("overrides", "config", "reason"),
    [
        ({"num_key_value_heads": 2}, {}, "their code knows no grouped keys and values"),
        ({}, {"condition": ConditionConfig(kind="image", tower="t", tower_width=6)}, "a condition of kind 'image'"),
        ({}, {"condition": ConditionConfig(**PICTURE, absent="learnt")}, "a learnt condition for no picture"),
        ({}, {"condition": ConditionConfig(**PICTURE, layers=1)}, "without early fusion"),
        ({}, {"norms": True, "gate_activation": "identity"}, r"its gates are always used as tanh\(g\) in V2"),
        ({}, {"gate_scale": True}, "new_gate comes with LoRA alone"),
        ({}, {"lora_rank": 2, "lora_targets": NAMES, "lora_alpha": 4.0, "gate_scale": True}, "no factor alpha / r"),
        ({}, {"linear_scale": NAMES}, "scales belong to its dialog model"),
        ({}, {"linear_bias": NAMES}, "it has no biases on wk and wv"),
        ({}, {"adapter_layers": 0, "norms": True}, "an adapter without prompts is its dialog model"),
    ],
)
def test_what_the_authors_layout_cannot_say_is_refused_by_name(tmp_path, overrides, config, reason):
    model = tiny_llama(**{"num_key_value_heads": 4, **overrides})
    add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **config}))
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(LlamaAdapterError, match=f"cannot be written in the authors' layout: .*{reason}"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="official")
    assert not (tmp_path / "theirs").exists()


# PEFT


def peft_folder(tmp_path, safe=True, **overrides):
    """A PEFT adaption prompt with open gates on a tiny base on disk; the base's folder, and PEFT's model."""
    import peft

    base = tiny_llama(**overrides)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    torch.manual_seed(3)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.7 if ".1." in name else -1.3)
    model.save_pretrained(tmp_path / "peft", safe_serialization=safe)
    return tmp_path / "base", model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("safe", [True, False])
def test_peft_to_ours_to_peft(tmp_path, kv_heads, safe):
    import peft

    base, theirs = peft_folder(tmp_path, safe, num_key_value_heads=kv_heads)
    expected = logits(theirs, tokens())
    ours = tiny_llama(num_key_value_heads=kv_heads)
    bare = logits(ours, tokens())
    assert (expected - bare).abs().max() > 1e-2
    account = convert(tmp_path / "peft", tmp_path / "ours", verify=True)
    assert (account["read"], account["mapped"], account["left_over"]) == (4, 4, [])
    load_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-5, rtol=0)
    direct = tiny_llama(num_key_value_heads=kv_heads)
    load_adapter(direct, tmp_path / "peft")
    assert torch.equal(logits(direct, tokens()), logits(ours, tokens()))
    convert(tmp_path / "ours", tmp_path / "back", to="peft", verify=True, base=str(base))
    again = peft.PeftModel.from_pretrained(tiny_llama(num_key_value_heads=kv_heads), tmp_path / "back").eval()
    torch.testing.assert_close(logits(again, tokens()), expected, atol=1e-6, rtol=0)


def test_equal_tanh_gates_are_peft_s_as_their_tanh(tmp_path):
    import peft

    model = tiny_llama()
    adapter = adapted(model)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.9)
    save_adapter(model, tmp_path / "ours")
    account = convert(tmp_path / "ours", tmp_path / "peft", to="peft", verify=True)
    assert account["verified"] == {"tensors": 0.0}
    assert account["notes"] == ["The gates are written as tanh(g), which the target uses as they are."]
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, tokens()), logits(model, tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "change", "reason"),
    [
        ({}, {}, "it has one gate for all heads of a layer, and those of layers.1.gate differ"),
        ({"head_dim": 16}, {}, "its code takes heads x head_dim to be the hidden size"),
    ],
)
def test_what_peft_cannot_say_is_refused_by_name_and_nothing_is_written(tmp_path, overrides, change, reason):
    model = tiny_llama(**overrides)
    adapter = adapted(model, **change)
    if overrides:
        for layer in adapter.layers.values():
            torch.nn.init.ones_(layer.gate)
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(LlamaAdapterError, match=rf"This adapter cannot be PEFT's: {reason}\. Keep it as it is"):
        convert(tmp_path / "ours", tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()


# LitGPT


def litgpt_logits(base, content, ids):
    """LitGPT's formula, y + g * softmax(q (W_k P)') (W_v P), over a transformers Llama, in plain matrices.

    Written out here because LitGPT is no dependency; with one key-value head its own forward gives the same, see
    docs/formats.md.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden = base.model.embed_tokens(ids)
    cos, sin = base.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
    for i, layer in enumerate(base.model.layers):
        attention, x = layer.self_attn, layer.input_layernorm(hidden)

        def cut(states, attention=attention):
            return states.unflatten(-1, (-1, attention.head_dim)).transpose(-2, -3)

        query, key = apply_rotary_pos_emb(cut(attention.q_proj(x)), cut(attention.k_proj(x)), cos, sin)
        groups, scale = attention.num_key_value_groups, attention.head_dim**-0.5
        key, value = (t.repeat_interleave(groups, 1) for t in (key, cut(attention.v_proj(x))))
        y = (query @ key.transpose(-1, -2) * scale + mask).softmax(-1) @ value
        if f"transformer.h.{i}.attn.adapter_wte.weight" in content:
            prompt = content[f"transformer.h.{i}.attn.adapter_wte.weight"][None]
            key, value = (cut(p(prompt)).repeat_interleave(groups, 1) for p in (attention.k_proj, attention.v_proj))
            gate = content[f"transformer.h.{i}.attn.gating_factor"]  # [1, 1, heads, 1]
            extra = (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value
            y = y + gate.transpose(1, 2) * extra
        hidden = hidden + attention.o_proj(y.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return base.lm_head(base.model.norm(hidden))


def litgpt_content(heads=4, hidden=HIDDEN, shape=(1, 1, 4, 1)):
    torch.manual_seed(5)
    return {
        key: tensor
        for i in (1, 2)
        for key, tensor in {
            f"transformer.h.{i}.attn.gating_factor": torch.randn(heads).reshape(shape),
            f"transformer.h.{i}.attn.adapter_wte.weight": torch.randn(4, hidden),
        }.items()
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_litgpt_to_ours_to_litgpt(tmp_path, kv_heads):
    content = litgpt_content()
    torch.save({"model": content}, tmp_path / "lit_model.pth.adapter")
    account = convert(tmp_path / "lit_model.pth.adapter", tmp_path / "ours")
    assert "LitGPT 0.5 itself reads" in str(account["notes"])
    model = tiny_llama(num_key_value_heads=kv_heads)
    expected = litgpt_logits(model, content, tokens())
    torch.testing.assert_close(litgpt_logits(model, {}, tokens()), logits(model, tokens()), atol=1e-5, rtol=0)
    load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-5, rtol=0)
    assert (logits(tiny_llama(num_key_value_heads=kv_heads), tokens()) - expected).abs().max() > 1e-2
    convert(tmp_path / "ours", tmp_path / "back", to="litgpt", verify=True)
    same_file(torch.load(tmp_path / "back" / "lit_model.pth.adapter", weights_only=True)["model"], content)


@pytest.mark.parametrize(("version", "file"), [("v1", "lit_model.pth.adapter"), ("v2", "lit_model.pth.adapter_v2")])
def test_litgpt_s_own_outputs(tmp_path, version, file):
    """What LitGPT 0.5.13 gave for a base with one key-value head, the only kind that it cuts rightly."""
    stored = load_file(FIXTURES / "litgpt_0.5.13.safetensors")
    base = {key[5:]: t for key, t in stored.items() if key.startswith("base.")}
    prefix = f"{version}.adapter."
    torch.save({"model": {key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(prefix)}},
               tmp_path / file)  # fmt: skip
    model = tiny_llama(num_key_value_heads=1)
    model.load_state_dict(base)
    assert (logits(model, stored["tokens"]) - stored[f"{version}.logits"]).abs().max() > 1e-1
    load_adapter(model, tmp_path / file)
    torch.testing.assert_close(logits(model, stored["tokens"]), stored[f"{version}.logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded(model, stored["tokens"]), stored[f"{version}.logits"], atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    convert(tmp_path / file, tmp_path / "ours", base=base)
    convert(tmp_path / "ours", tmp_path / "back", to="litgpt", base=base, verify=True)
    same_file(*(torch.load(f / file, weights_only=True)["model"] for f in (tmp_path / "back", tmp_path)))


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"norms": True}, "has norms and biases of all linears"),
        (
            {"norms": True, "linear_bias": SEVEN, "lora_rank": 1, "lora_targets": ("q_proj",)},
            "neither scales of inputs",
        ),
        ({"norms": True, "linear_bias": SEVEN}, "wants a bias of lm_head, whose size only a file"),
        ({"adapter_layers": 0, "norms": True}, "has no adapters without prompts"),
    ],
)
def test_what_litgpt_cannot_say_is_refused_by_name(tmp_path, config, reason):
    model = tiny_llama()
    add_adapter(model, AdapterConfig(**{"adapter_len": 4, "adapter_layers": 2, **config}))
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(LlamaAdapterError, match=f"This adapter cannot be LitGPT's: .*{reason}"):
        convert(tmp_path / "ours", tmp_path / "lit", to="litgpt")
    assert not (tmp_path / "lit").exists()


def test_litgpt_s_older_gates(tmp_path):
    torch.save({"model": litgpt_content(shape=(1, 4, 1, 1))}, tmp_path / "lit_model.pth.adapter")
    newer = {key: t.reshape(1, 1, 4, 1) if "gating" in key else t for key, t in litgpt_content().items()}
    torch.save({"model": newer}, tmp_path / "new")
    assert digest(read_adapter(tmp_path).tensors) == digest(read_adapter(tmp_path / "new").tensors)


def test_tanh_gates_that_differ_by_head_are_litgpt_s_as_their_tanh(tmp_path):
    model = tiny_llama()
    adapted(model)
    save_adapter(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "lit", to="litgpt", verify=True)
    content = torch.load(tmp_path / "lit" / "lit_model.pth.adapter", weights_only=True)["model"]
    with torch.no_grad():
        expected = litgpt_logits(tiny_llama(), content, tokens())
    torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-5, rtol=0)


# the authors' V2


def v2_file(tmp_path, name, tensors, shape):
    path = tmp_path / f"{name}.pth"
    torch.save({"model": adapter_of(tensors), "config": shape["config"]}, path)
    return path


@torch.no_grad()
def seeing(model, tensors, forward):
    """Logits with the picture's features going through the loaded projector."""
    condition = get_adapter(model).condition(tensors["clip_features"])
    torch.testing.assert_close(condition, tensors["visual_query"], atol=1e-4, rtol=0)
    with use_adapter(model, get_adapter(model).name, condition):
        return forward(model, tensors["tokens"])


@pytest.mark.parametrize("name", ["v2_bias", "v2_lora"])
def test_v2_computes_what_the_authors_code_does_and_goes_back_byte_for_byte(tmp_path, name):
    shape, tensors = read_fixture(name)
    path = v2_file(tmp_path, name, tensors, shape)
    hints = Hints(block_heads=shape["v_num_heads"])
    account = convert(path, tmp_path / "ours", hints=hints, verify=True)
    assert account["left_over"] == [key for key in sorted(adapter_of(tensors)) if "layers.0.attention." in key
                                    and "gate" in key]  # fmt: skip
    for source, options in ((tmp_path / "ours", {}), (path, {"block_heads": shape["v_num_heads"]})):
        model = base_of(shape, tensors)
        load_adapter(model, source, **options)
        torch.testing.assert_close(seeing(model, tensors, logits), tensors["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(seeing(model, tensors, decoded), tensors["logits"], atol=1e-4, rtol=0)
        assert (logits(model, tensors["tokens"]) - tensors["logits"]).abs().max() > 1e-2
    written = convert(tmp_path / "ours", tmp_path / "back", to="official", verify=True)
    content = torch.load(tmp_path / "back" / written["files"][0], weights_only=True)
    same_file(content["model"], adapter_of(tensors))
    assert content["config"] == shape["config"]


def meta_forward(tensors, shape, chat):
    """Logits of the authors' dialog model, y = W(s x) + b in every linear, in Meta's layout and rotation."""

    def linear(name, x):
        return (x * chat[f"{name}_scale"]) @ tensors[f"base.{name}.weight"].T + chat[f"{name}_bias"]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + shape["norm_eps"]).rsqrt() * chat[f"{name}.weight"]

    def turn(x):  # [B, T, H, D], pairs of neighbours
        angles = torch.outer(torch.arange(x.shape[1]), 1e4 ** (-torch.arange(0, x.shape[3], 2) / x.shape[3]))
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()), angles)[None, :, None]
        return torch.view_as_real(turned).flatten(3)

    hidden = tensors["base.tok_embeddings.weight"][tensors["tokens"]]
    mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)
    for i in range(shape["n_layers"]):
        name = f"layers.{i}."
        x = norm(hidden, f"{name}attention_norm")
        q, k, v = (linear(f"{name}attention.w{kind}", x).unflatten(-1, (shape["n_heads"], -1)) for kind in "qkv")
        q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
        y = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v
        hidden = hidden + linear(f"{name}attention.wo", y.transpose(1, 2).flatten(2))
        x = norm(hidden, f"{name}ffn_norm")
        wide = torch.nn.functional.silu(linear(f"{name}feed_forward.w1", x)) * linear(f"{name}feed_forward.w3", x)
        hidden = hidden + linear(f"{name}feed_forward.w2", wide)
    return norm(hidden, "norm") @ tensors["base.output.weight"].T


def chat_tensors(shape, prefix=""):
    """A dialog checkpoint's tensors for the fixture's base, none of them at its start."""
    torch.manual_seed(7)
    sizes = {f"attention.w{kind}": (64, 64) for kind in "qkvo"}
    sizes |= {"feed_forward.w1": (64, 192), "feed_forward.w3": (64, 192), "feed_forward.w2": (192, 64)}
    chat = {f"{prefix}norm.weight": 1 + 0.3 * torch.randn(64)}
    for i in range(shape["n_layers"]):
        for name, (into, out) in sizes.items():
            chat[f"{prefix}layers.{i}.{name}_scale"] = 1 + 0.3 * torch.randn(into)
            chat[f"{prefix}layers.{i}.{name}_bias"] = 0.2 * torch.randn(out)
        for name in ("attention_norm", "ffn_norm"):
            chat[f"{prefix}layers.{i}.{name}.weight"] = 1 + 0.3 * torch.randn(64)
    return chat


def test_the_dialog_checkpoint_scales_inputs_and_adds_biases_and_goes_back(v1, tmp_path):
    shape, tensors = read_fixture("v1")
    chat = chat_tensors(shape)
    torch.save({"model": chat}, tmp_path / "chat65b.pth")
    with pytest.raises(LlamaAdapterError, match="does not say how many attention heads its base has: convert it"):
        read_adapter(tmp_path / "chat65b.pth")
    v1[0].save_pretrained(tmp_path / "base")
    account = convert(tmp_path / "chat65b.pth", tmp_path / "ours", base=str(tmp_path / "base"), verify=True)
    assert (account["read"], account["mapped"], account["left_over"]) == (len(chat), len(chat), [])
    assert account["config"]["adapter_layers"] == 0
    assert account["verified"] == {"tensors": 0.0, "logits": 0.0}
    model = fresh(v1[0])
    load_adapter(model, tmp_path / "chat65b.pth")
    torch.testing.assert_close(logits(model, tensors["tokens"]), meta_forward(tensors, shape, chat), atol=1e-4, rtol=0)
    written = convert(tmp_path / "ours", tmp_path / "back", to="official")
    same_file(torch.load(tmp_path / "back" / written["files"][0], weights_only=True)["model"], chat)


def test_image_bind_s_checkpoint(tmp_path):
    shape, tensors = read_fixture("v2_lora")
    theirs = {key: t for key, t in adapter_of(tensors).items() if key.startswith("llama.")}
    theirs = {key.replace("llama.", "llma."): t for key, t in theirs.items()}
    torch.manual_seed(8)
    theirs["prefix_query.weight"] = torch.randn(shape["n_layers"], 64)
    config = ConditionConfig(kind="image_bind", tower="imagebind_huge", tower_width=24)
    theirs |= {key: 0.1 * torch.randn(size) for key, size in config.shapes(64, 1).items()}
    torch.save({"model": theirs}, tmp_path / "imagebind.pth")
    found = read_adapter(tmp_path / "imagebind.pth")
    assert found.kind == "the authors' ImageBind-LLM checkpoint"
    assert (found.config.adapter_len, found.config.adapter_layers, found.config.gate_scale) == (
        1,
        shape["n_layers"],
        False,
    )
    assert found.left_over == [f"llma.layers.{i}.attention.new_gate" for i in range(shape["n_layers"])]
    model = base_of(shape, tensors)
    adapter = load_adapter(model, tmp_path / "imagebind.pth")
    assert torch.equal(adapter.layers[2].prompt[0], theirs["prefix_query.weight"][2])
    features = torch.randn(len(tensors["tokens"]), 24)
    with torch.no_grad(), use_adapter(model, "default", adapter.condition(features)):
        seen = logits(model, tensors["tokens"])
    assert (seen - logits(model, tensors["tokens"])).abs().max() > 1e-3
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(LlamaAdapterError, match="a condition of kind 'image_bind' has no place in it"):
        convert(tmp_path / "ours", tmp_path / "back", to="official")


# LitGPT's second version


def litgpt_v2_content(scale=1.0):
    """Prompts, norms and biases of LitGPT's second version for a tiny Llama with two key-value heads."""
    content = litgpt_content() | {"transformer.ln_f.weight": 1 + 0.3 * torch.randn(HIDDEN)}
    sizes = {"attn.qkv": 64, "attn.proj": 32, "mlp.fc_1": 48, "mlp.fc_2": 48, "mlp.proj": 32}
    for i in range(3):
        for name in ("norm_1", "norm_2"):
            content[f"transformer.h.{i}.{name}.weight"] = 1 + 0.3 * torch.randn(HIDDEN)
        for name, size in sizes.items():
            bias = 0.2 * torch.randn(size)
            if name == "attn.qkv":
                bias[48:] = 0
            content[f"transformer.h.{i}.{name}.adapter_bias"] = bias
            content[f"transformer.h.{i}.{name}.adapter_scale"] = torch.full((size,), scale)
    content["lm_head.adapter_bias"], content["lm_head.adapter_scale"] = torch.zeros(97), torch.ones(97)
    return content


@torch.no_grad()
def test_litgpt_s_second_version_where_its_scales_are_one(tmp_path):
    content = litgpt_v2_content()
    torch.save({"model": content}, tmp_path / "lit_model.pth.adapter_v2")
    tiny_llama().save_pretrained(tmp_path / "base")
    convert(tmp_path / "lit_model.pth.adapter_v2", tmp_path / "ours", base=str(tmp_path / "base"), verify=True)
    by_hand = tiny_llama(attention_bias=True, mlp_bias=True)
    state = {key: torch.zeros_like(value) for key, value in by_hand.state_dict().items()} | tiny_llama().state_dict()
    for key, value in content.items():
        name = key.replace("transformer.h.", "model.layers.").replace("adapter_bias", "bias")
        name = name.replace("norm_1", "input_layernorm").replace("norm_2", "post_attention_layernorm")
        name = name.replace("attn.proj", "self_attn.o_proj").replace("fc_1", "gate_proj").replace("fc_2", "up_proj")
        name = name.replace("mlp.proj", "mlp.down_proj").replace("transformer.ln_f", "model.norm")
        if name in state:
            state[name] = value
        elif name.endswith("qkv.bias"):
            for part, kind in zip(value.split([32, 16, 16]), "qkv", strict=True):
                state[name.replace("attn.qkv", f"self_attn.{kind}_proj")] = part
    by_hand.load_state_dict(state)
    model = tiny_llama()
    load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(model, tokens()), litgpt_logits(by_hand, content, tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c["transformer.h.1.mlp.fc_1.adapter_scale"].fill_(1.1),
            r"mlp.fc_1.adapter_scale is not 1. LitGPT scales",
        ),
        (lambda c: c["transformer.h.2.attn.qkv.adapter_bias"].fill_(1.0), "has a bias on values"),
        (lambda c: c["lm_head.adapter_bias"].fill_(1.0), "has a bias on lm_head"),
        (lambda c: c.pop("transformer.h.0.norm_2.weight"), "has no tensor transformer.h.0.norm_2.weight"),
        (lambda c: c.update({"transformer.h.0.attn.more": torch.ones(2)}), "1 tensors that would be lost"),
    ],
)
def test_what_of_litgpt_s_second_version_cannot_be_said_is_refused(tmp_path, change, reason):
    content = litgpt_v2_content()
    change(content)
    torch.save({"model": content}, tmp_path / "lit_model.pth.adapter_v2")
    shape = shape_of(tiny_llama().config)
    with pytest.raises(LlamaAdapterError, match=reason):
        read_adapter(tmp_path / "lit_model.pth.adapter_v2", Hints(shape))


# bad input


QUERY, PEFT_LAYER = "adapter_query.weight", "base_model.model.model.layers.2.self_attn."


class Evil:
    def __reduce__(self):
        return os.system, ("echo ran > ran.txt",)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def changed(change):
    """Rewrite a .pth after `change` on its dictionary."""

    def rewrite(path):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return rewrite


def packed(path):
    """The same archive, but deflated: a small file may claim any size then."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


BAD = {
    "truncated": (truncated, "is not an adapter: it is no folder, and no whole file of torch.save or safetensors"),
    "empty": (lambda p: p.write_bytes(b""), "is not an adapter"),
    "packed": (packed, "is packed"),
    "not there": (lambda p: p.unlink(), "is not an adapter: there is nothing of that name"),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "code": (lambda p: torch.save({"a": Evil()}, p), r"holds code \(posix.system\), which is never run"),
    "a class": (lambda p: torch.save({"a": Hints()}, p), r"holds code \(llama_adapter.formats.stored.Hints\)"),
    "a list": (lambda p: torch.save([1], p), "holds list, not tensors by name"),
    "a number": (changed(lambda c: c.update(x=1)), "'x' is no plain tensor"),
    "numbered": (changed(lambda c: c.update({1: torch.ones(1)})), "1 is no plain tensor"),
    "missing gate": (changed(lambda c: c.pop("layers.2.attention.gate")), "has no tensor layers.2.attention.gate"),
    "missing gates": (changed(lambda c: [c.pop(k) for k in list(c) if "gate" in k]), "has no gates"),
    "extra": (changed(lambda c: c.update(more=torch.ones(2))), r"has 1 tensors that .* such as \['more'\]"),
    "other gate": (changed(lambda c: c.update({"layers.2.attention.gate": torch.ones(1, 2, 1, 1)})),
                   r"layers.2.attention.gate is float32 \[1, 2, 1, 1\], not float \[1, 4, 1, 1\]"),
    "wrong width": (changed(lambda c: c.update({"adapter_query.weight": torch.ones(15, 62)})), "do not fit prompts of"),
    "whole numbers": (changed(lambda c: c.update({QUERY: torch.ones(15, 64).int()})), "is int32"),
    "NaN": (changed(lambda c: c["adapter_query.weight"].fill_(float("nan"))), "holds NaN or infinity"),
    "claims more than it has": (changed(lambda c: c.update({QUERY: torch.ones(1).expand(15 << 30, 64)})),
                                "cannot be|not float"),
    "many prompts": (changed(lambda c: c.update({"adapter_query.weight": torch.ones(17, 64)})), None),
    "a base": (lambda p: torch.save({"tok_embeddings.weight": torch.ones(2)}, p), "convert_llama_weights_to_hf"),
    "another model": (lambda p: torch.save({"encoder.weight": torch.ones(2)}, p), "is no adapter of the authors"),
    "PEFT's weights": (lambda p: torch.save({"a.adaption_prompt": torch.ones(1)}, p), "give its folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_sentence_and_nothing_is_written(release, tmp_path, fail, kind, monkeypatch):
    break_it, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    break_it(release)
    if message is None:  # 17 prompts of one layer: unusual, but said
        convert(release, tmp_path / "out")
        return
    assert re.search(message, fail("convert", release, "--output", tmp_path / "out", "--adapter-len", 5))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran.txt").exists()


def test_a_folder_of_meta_s_base_names_the_command(tmp_path, fail):
    (tmp_path / "meta").mkdir()
    weights, out = tmp_path / "meta" / "consolidated.00.pth", tmp_path / "out"
    weights.touch()
    for command in (
        ("convert", tmp_path / "meta", "--output", out), ("generate", "--model", tmp_path / "meta", "Hi"),
        ("generate", "--model", weights, "Hi"), ("train", "--model", tmp_path / "meta", "--output-dir", out),
    ):  # fmt: skip
        assert f"convert_llama_weights_to_hf --input_dir {tmp_path / 'meta'} " in fail(*command)
    assert not out.exists()


def test_a_peft_folder_of_lora_is_one_sentence(tmp_path, fail):
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora")
    for command in (("convert", tmp_path / "lora", "--output", tmp_path / "out"), ("inspect", tmp_path / "lora")):
        assert "is PEFT's ('LORA')" in fail(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.pop("adapter_len"), "does not say adapter_len"),
        (lambda c, t: c.update(adapter_layers=10**9), "does not hold prompts and gates of the top 1000000000 layers"),
        (lambda c, t: c.update(adapter_len=7), r"adaption_prompt is float32 \[1, 4, 32\], not float \[1, 7, 32\]"),
        (lambda c, t: c.update(base_model_name_or_path=None), "does not name its base, which says how many heads"),
        (lambda c, t: c.update(base_model_name_or_path=""), "does not name its base, which says how many heads"),
        (lambda c, t: c.update(base_model_name_or_path="./nowhere"), "'./nowhere' does not exist"),
        (lambda c, t: t.pop(f"{PEFT_LAYER}adaption_gate"), "has no tensor layers.2.self_attn.adaption_gate"),
        (lambda c, t: t.update(more=torch.ones(1)), "such as 'more'"),
    ],
)  # fmt: skip
def test_a_broken_peft_folder_is_one_sentence(tmp_path, fail, change, message):
    peft_folder(tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    assert re.search(message, fail("convert", tmp_path / "peft", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_or_is_not_there(release, tmp_path, fail):
    tiny_llama().save_pretrained(tmp_path / "base")
    out = ("--output", tmp_path / "out", "--base")
    error = fail("convert", release, *out, tmp_path / "base")
    assert "hidden_size 64 against 32" in error
    assert "does not exist" in fail("convert", release, *out, tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_v2_on_a_base_with_another_mlp_is_refused_before_anything_is_written(tmp_path, fail):
    shape, tensors = read_fixture("v2_bias")
    path = v2_file(tmp_path, "v2", tensors, shape)
    tiny_llama(hidden_size=64, num_hidden_layers=4, num_key_value_heads=4, intermediate_size=160).save_pretrained(
        tmp_path / "base")  # fmt: skip
    out = ("--output", tmp_path / "out", "--block-heads", 4)
    error = fail("convert", path, *out, "--base", tmp_path / "base")
    assert "mlp.gate_proj.bias is (192,), and should be (160,)" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(release, tmp_path, fail):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "exists and is not empty" in fail("convert", release, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_gates_of_a_format_that_says_how_they_are_used_are_not_to_be_changed(tmp_path, fail):
    peft_folder(tmp_path)
    out = ("--output", tmp_path / "out", "--gate-activation", "tanh")
    assert "are used with identity, not with tanh" in fail("convert", tmp_path / "peft", *out)


# the command line


def test_the_command_accounts_for_every_tensor(release, v1, tmp_path, capsys):
    v1[0].save_pretrained(tmp_path / "base")
    options = ("--gate-activation", "tanh", "--adapter-len", "5", "--base", str(tmp_path / "base"), "--verify")
    main(["convert", str(release), "--output", str(tmp_path / "one"), *options])
    out = capsys.readouterr().out
    for line in ("read        4 tensors", "mapped      6 tensors of ours", "left over   1: layers.0.attention.gate",
                 "parameters  972", "verified    tensors differ by 0, logits differ by 0"):  # fmt: skip
        assert line in out
    main(["convert", str(release), "--output", str(tmp_path / "two"), *options, "--json"])
    account = json.loads(capsys.readouterr().out)
    assert account["digest"] == digest(read_adapter(tmp_path / "one").tensors)
    assert account["digest"] in out
    assert account["left_over"] == ["layers.0.attention.gate"]
    assert account["config"]["base_model_name_or_path"] == str(tmp_path / "base")


def test_other_programs_adapters_are_inspected_and_generate(tmp_path, capsys):
    peft_folder(tmp_path, num_key_value_heads=2)
    found = describe_adapter(tmp_path / "peft")
    assert (found["format"], found["parameters"]) == ("PEFT adaption prompt", 2 * (4 * HIDDEN + 4))
    assert found["bytes"] == (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size
    main(["inspect", str(tmp_path / "peft")])
    assert "format      PEFT adaption prompt" in capsys.readouterr().out


def test_a_session_takes_them_directly(tmp_path):
    base, theirs = peft_folder(tmp_path)
    shutil.copy(resolve_model("bundled") + "/tokenizer.json", base)
    shutil.copy(resolve_model("bundled") + "/tokenizer_config.json", base)
    for model in (None, str(base)):
        session = load_session(model, {"peft": str(tmp_path / "peft")}, torch.device("cpu"), "fp32")
        torch.testing.assert_close(logits(session.model, tokens()), logits(theirs, tokens()), atol=1e-5, rtol=0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_place_of_a_checkpoint_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "adapter.pth")
    for source in (tmp_path, tmp_path / "adapter.pth"):
        with pytest.raises(LlamaAdapterError, match=r"is no file|is not an adapter"):
            read_adapter(source)


def test_the_base_may_be_called_model_as_everywhere_else(tmp_path):
    base, _ = peft_folder(tmp_path)
    main(["convert", str(tmp_path / "peft"), "--output", str(tmp_path / "ours"), "--model", str(base)])
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
