"""The authors' files as other people's tools leave them: other shapes, names, dtypes and containers, same adapter."""

import argparse
import math
import shutil

import pytest
import torch
from official_files import adapter_of, base_of, read_fixture, same_file
from safetensors.torch import save_file
from test_convert import decoded, logits, seeing
from tiny import tiny_llama

from llama_adapter import (
    AdapterConfig,
    LlamaAdapterError,
    TrainConfig,
    add_adapter,
    load_adapter,
    load_session,
    save_adapter,
    train,
)
from llama_adapter.base import resolve_model
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.core.families import shape_of
from llama_adapter.formats.convert import convert, digest
from llama_adapter.formats.load import read_adapter
from llama_adapter.formats.official_names import LINEARS, Sizes, pairs
from llama_adapter.formats.stored import Hints
from llama_adapter.training.start import settle

TANH = Hints(gate_activation="tanh")


def v1():
    return adapter_of(read_fixture("v1")[1])


def reshaped(shape):
    return {key: t.reshape(shape) if key.endswith("gate") else t for key, t in v1().items()}


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4), (4,), (4, 1, 1)])
def test_gates_of_any_shape_with_one_number_a_head(tmp_path, shape):
    torch.save(reshaped(shape), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "ours", hints=TANH)
    model = base_of(*read_fixture("v1"))
    load_adapter(model, tmp_path / "ours")
    expected = read_fixture("v1")[1]
    torch.testing.assert_close(decoded(model, expected["tokens"]), expected["logits"], atol=1e-4, rtol=0)
    account = convert(tmp_path / "ours", tmp_path / "back", to="official")
    same_file(torch.load(tmp_path / "back" / account["files"][0], weights_only=True), reshaped(shape))


def test_gates_of_two_numbers_a_head_are_refused(tmp_path):
    torch.save(reshaped((2, 2)), tmp_path / "a.pth")
    with pytest.raises(LlamaAdapterError, match=r"gates of shape \[2, 2\] do not fit"):
        read_adapter(tmp_path / "a.pth", TANH)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_of_the_model_has_lengthened(tmp_path, wrapper):
    torch.save({"model": {wrapper + key: t for key, t in v1().items()}}, tmp_path / "a.pth")
    torch.save(v1(), tmp_path / "plain.pth")
    found = read_adapter(tmp_path / "a.pth", TANH)
    assert digest(found.tensors) == digest(read_adapter(tmp_path / "plain.pth", TANH).tensors)
    assert found.left_over == ["layers.0.attention.gate"]


def test_containers_are_told_by_content(tmp_path):
    torch.save(v1(), tmp_path / "zip")
    torch.save(v1(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(v1(), tmp_path / "new.pth")
    assert len({digest(read_adapter(path, TANH).tensors) for path in tmp_path.iterdir()}) == 1


def test_an_old_pickle_runs_nothing_and_is_not_read_when_cut_short(tmp_path):
    options = {"_use_new_zipfile_serialization": False}
    torch.save({"a": tmp_path}, tmp_path / "code.pth", **options)
    with pytest.raises(LlamaAdapterError, match=r"holds code .*, which is never run"):
        read_adapter(tmp_path / "code.pth")
    torch.save(v1(), tmp_path / "cut.pth", **options)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-500])
    with pytest.raises(LlamaAdapterError, match="is truncated"):
        read_adapter(tmp_path / "cut.pth")


def rows_of(tmp_path, rows, opened):
    """A file with so many rows of prompts whose top layers of 4 have open gates."""
    gates = {f"layers.{i}.attention.gate": torch.full((1, 4, 1, 1), float(i >= 4 - opened)) for i in range(4)}
    torch.save({"adapter_query.weight": torch.randn(rows, 64), **gates}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.mark.parametrize(
    ("rows", "opened", "expected"), [(8, 2, (4, 2)), (20, 4, (10, 2)), (9, 4, (3, 3)), (20, 1, (20, 1)), (7, 4, (7, 1))]
)
def test_how_prompts_are_divided_among_layers(tmp_path, rows, opened, expected):
    """Layers whose gates training opened say it, else the usual 10, else the only way there is."""
    config = read_adapter(rows_of(tmp_path, rows, opened), TANH).config
    assert (config.adapter_len, config.adapter_layers) == expected


def test_prompts_that_can_be_divided_in_several_ways_are_not_guessed(tmp_path):
    path = rows_of(tmp_path, 12, 4)
    with pytest.raises(LlamaAdapterError, match=r"12 rows of prompts are divided .* --adapter-len, such as 3 or 6"):
        read_adapter(path, TANH)
    assert read_adapter(path, Hints(gate_activation="tanh", adapter_len=4)).config.adapter_layers == 3


@pytest.mark.parametrize("hints", [TANH, Hints(gate_activation="tanh", adapter_len=3)])
def test_prompts_without_open_gates_mean_that_layers_are_missing(tmp_path, hints):
    with pytest.raises(LlamaAdapterError, match=r"cannot be K=3 a layer in the top 2 of 4 layers that have open gates"):
        read_adapter(rows_of(tmp_path, 9, 2), hints)


def test_trained_parameters_that_were_saved_as_such(tmp_path):
    """`{name: p for name, p in model.named_parameters() if p.requires_grad}`, as the authors' exporter has it."""
    torch.save({key: torch.nn.Parameter(t) for key, t in v1().items()}, tmp_path / "parameters.pth")
    torch.save(v1(), tmp_path / "tensors.pth")
    assert len({digest(read_adapter(path, TANH).tensors) for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("change", [lambda t: t.to_sparse(), lambda t: t.to("meta")])
def test_tensors_without_numbers_of_their_own_are_refused(tmp_path, change):
    torch.save({**v1(), "adapter_query.weight": change(v1()["adapter_query.weight"])}, tmp_path / "a.pth")
    with pytest.raises(LlamaAdapterError, match=r"'adapter_query.weight' is no plain tensor"):
        read_adapter(tmp_path / "a.pth", TANH)


def test_a_base_with_grouped_keys_and_values(tmp_path):
    """Forks of the training code for Llama 3 write the same file."""
    base = tiny_llama(num_key_value_heads=2)
    gates = {f"layers.{i}.attention.gate": torch.randn(1, 4, 1, 1) for i in range(3)}
    content = {"adapter_query.weight": torch.randn(9, 32), **gates}
    torch.save(content, tmp_path / "a.pth")
    found = read_adapter(tmp_path / "a.pth", Hints(shape_of(base.config), gate_activation="tanh"))
    assert found.config.base_shape["num_key_value_heads"] == 2
    torch.save(content | {"layers.2.attention.wk.weight": torch.zeros(8, 32)}, tmp_path / "b.pth")
    assert read_adapter(tmp_path / "b.pth", TANH).config.base_shape["num_key_value_heads"] == 1


# the second version


def v2(tmp_path, change=lambda model, config: None):
    """The fixture with LoRA as a file, and its shapes and tensors."""
    shape, tensors = read_fixture("v2_lora")
    model, config = adapter_of(tensors), dict(shape["config"])
    change(model, config)
    torch.save({"model": model, "config": config}, tmp_path / "v2.pth")
    return shape, tensors


@pytest.mark.parametrize(("rank", "keys", "numbers"), [(0, 363, 63_095_552), (16, 843, 103_072_544)])
def test_the_published_files_have_so_many_keys_and_numbers(rank, keys, numbers):
    """BIAS-7B and LORA-BIAS-7B; they hold the gates of the layer without prompts too."""
    condition = ConditionConfig(kind="visual_prompt", tower="t", tower_width=768)
    biases = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config = AdapterConfig(
        adapter_layers=31, norms=True, linear_bias=biases, condition=condition, lora_rank=rank,
        lora_targets=tuple(LINEARS) if rank else (), gate_scale=bool(rank),
    )  # fmt: skip
    theirs = [pair.their_shape for pair in pairs(config, Sizes(32, 4096, 32, 32, 128, 11008), "llama.")]
    shapes = [*theirs, *condition.shapes(4096, 10).values(), (310, 4096), (1, 32, 1, 1), *[(1, 1, 1, 1)] * bool(rank)]
    assert (len(shapes), sum(map(math.prod, shapes))) == (keys, numbers)


def test_a_projector_that_is_not_the_authors_width_needs_its_heads(tmp_path):
    shape, _ = v2(tmp_path)
    with pytest.raises(LlamaAdapterError, match=r"which is 48 wide .*: convert it with --block-heads"):
        read_adapter(tmp_path / "v2.pth")
    with pytest.raises(LlamaAdapterError, match=r"has 5 prompts a layer: leave --adapter-len 3 out"):
        read_adapter(tmp_path / "v2.pth", Hints(block_heads=4, adapter_len=3))
    v2(tmp_path, lambda model, config: config.update(v_num_heads=shape["v_num_heads"]))
    assert read_adapter(tmp_path / "v2.pth").config.condition.block_heads == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_back_as_it_was(tmp_path, dtype):
    shape, tensors = v2(tmp_path, lambda m, c: m.update({key: t.to(dtype) for key, t in m.items()}))
    convert(tmp_path / "v2.pth", tmp_path / "ours", hints=Hints(block_heads=shape["v_num_heads"]))
    account = convert(tmp_path / "ours", tmp_path / "back", to="official", verify=True)
    content = torch.load(tmp_path / "back" / account["files"][0], weights_only=True)["model"]
    same_file(content, {key: t.to(dtype) for key, t in adapter_of(tensors).items()})


def test_one_prompt_a_layer_passes_the_new_gate_over_as_the_authors_code_does(tmp_path):
    """With K = 1 it computes out += tanh(g) Wv P."""

    def one(model, config):
        model["adapter_query.weight"] = model["adapter_query.weight"][::5].clone()
        model["visual_query.weight"] = model["visual_query.weight"][:1].clone()

    shape, _ = v2(tmp_path, one)
    found = read_adapter(tmp_path / "v2.pth", Hints(block_heads=shape["v_num_heads"]))
    assert not found.config.gate_scale
    assert "llama.layers.3.attention.new_gate" in found.left_over
    account = convert(tmp_path / "v2.pth", tmp_path / "ours", hints=Hints(block_heads=shape["v_num_heads"]))
    assert account["left_over"] == found.left_over
    back = convert(tmp_path / "ours", tmp_path / "back", to="official", verify=True)
    expected = torch.load(tmp_path / "v2.pth", weights_only=True)["model"]
    same_file(torch.load(tmp_path / "back" / back["files"][0], weights_only=True)["model"], expected)


def test_a_training_checkpoint_of_the_second_version(tmp_path):
    """The whole model, its frozen tower and the optimiser's state."""
    shape, tensors = read_fixture("v2_lora")
    base = {f"llama.{key[5:]}": t for key, t in tensors.items() if key.startswith("base.")}
    whole = {**base, "clip.visual.conv1.weight": torch.zeros(3, 3), **adapter_of(tensors)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"model": whole, "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=None)}
    torch.save(content, tmp_path / "checkpoint-3.pth")
    model = base_of(shape, tensors)
    load_adapter(model, tmp_path / "checkpoint-3.pth", block_heads=shape["v_num_heads"])
    torch.testing.assert_close(seeing(model, tensors, logits), tensors["logits"], atol=1e-4, rtol=0)


def without_weights(tmp_path, **changes):
    """A base's configuration and tokenizer of the V2 fixture's shape: whoever reads weights fails."""
    shape, tensors = read_fixture("v2_lora")
    config = base_of(shape, tensors).config
    for key, value in changes.items():
        setattr(config, key, value)
    config.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{resolve_model('bundled')}/{name}", tmp_path / "base")
    return str(tmp_path / "base")


def test_parts_of_another_base_are_refused_before_weights_are_read(tmp_path):
    """`generate`, `chat`, `serve` and `evaluate` plan a session; `train --init-from` checks where it starts."""
    v2(tmp_path, lambda model, config: config.update(v_num_heads=4))
    source, base = str(tmp_path / "v2.pth"), without_weights(tmp_path, intermediate_size=160)
    message = r"v2.pth does not fit this base: .* is \(192,\), and should be \(160,\)"
    with pytest.raises(LlamaAdapterError, match=message):
        load_session(base, {"v2": source}, "cpu")
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "b"}]')
    config = TrainConfig(init_from=source, model=base, data=(str(tmp_path / "d.json"),), output_dir=str(tmp_path / "o"))
    with pytest.raises(LlamaAdapterError, match=message):
        train(config)
    assert not (tmp_path / "o").exists()


def test_a_run_that_goes_on_from_a_foreign_file_says_what_was_taken_as_usual(tmp_path, caplog):
    torch.save(v1(), tmp_path / "release.pth")
    start = settle(TrainConfig(init_from=str(tmp_path / "release.pth"), output_dir=str(tmp_path / "o")))[1]
    assert start.config.gate_activation == "identity"
    assert "release.pth: The file does not say the gates' activation: identity" in caplog.text


def test_lora_without_new_gate_is_theirs_too(tmp_path):
    """Their loader starts new_gate at 1 and takes files that lack it."""
    model = tiny_llama(num_key_value_heads=4)
    config = AdapterConfig(adapter_len=4, adapter_layers=2, lora_rank=2, lora_targets=("q_proj", "o_proj"))
    with torch.no_grad():
        for parameter in add_adapter(model, config).parameters():
            parameter.normal_()
    save_adapter(model, tmp_path / "ours")
    account = convert(tmp_path / "ours", tmp_path / "theirs", to="official", verify=True)
    content = torch.load(tmp_path / "theirs" / account["files"][0], weights_only=True)
    assert content["config"] == {"w_bias": False, "w_lora": True, "lora_rank": 2}
    assert not [key for key in content["model"] if "new_gate" in key]
    back = tiny_llama(num_key_value_heads=4)
    load_adapter(back, tmp_path / "theirs" / account["files"][0], adapter_len=4)
    ids = torch.arange(12)[None]
    assert torch.equal(logits(back, ids), logits(model, ids))
