"""An adapter on disk: what is written, what is refused, and that a refusal leaves the model alone."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import HEADS, HIDDEN, LAYERS, adapted, open_gates, tiny_llama, tiny_model, tokens

from llama_adapter import (
    AdapterConfig,
    get_adapter,
    list_adapters,
    load_adapter,
    remove_adapter,
    save_adapter,
    use_adapter,
)
from llama_adapter.core.config import FORMAT_VERSION
from llama_adapter.errors import AdapterError
from llama_adapter.files import write_atomically
from llama_adapter.formats.native import CONFIG_FILE, WEIGHTS_FILE, config_from, read_config, read_tensors

IDS = tokens()
KEYS = ["layers.1.gate", "layers.1.prompt", "layers.2.gate", "layers.2.prompt"]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def saved(tmp_path):
    """A folder with a sound adapter (K = 4 on layers 1 and 2 of 3, gates open)."""
    model = tiny_llama()
    adapted(model, template="alpaca", base_model_name_or_path="some/base")
    return save_adapter(model, tmp_path / "adapter")


def rewrite_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


# what is written


def test_round_trip_is_bit_equal(tmp_path):
    model = tiny_llama()
    adapter = adapted(model, template="chat", gate_activation="identity")
    save_adapter(model, tmp_path)
    other = tiny_llama()
    loaded = load_adapter(other, tmp_path, "loaded")
    assert loaded.config == adapter.config
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(logits(other), logits(model))


def test_the_file_holds_exactly_prompt_and_gate_of_each_adapted_layer_of_the_base(saved):
    with safe_open(saved / WEIGHTS_FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sorted(tensors) == KEYS
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert tuple(tensor.shape) == ((4, HIDDEN) if key.endswith("prompt") else (HEADS,))


def test_the_file_is_fp32_even_if_the_base_is_not(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    adapter = adapted(model)
    with torch.no_grad():
        adapter.layers[2].prompt.fill_(1 + 2**-20)  # bf16 would round it to 1
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert (tensors["layers.2.prompt"] == 1 + 2**-20).all()


def test_the_config_file_holds_every_field(saved):
    assert json.loads((saved / CONFIG_FILE).read_text()) == {
        "adapter_len": 4,
        "adapter_layers": 2,
        "gate_activation": "tanh",
        "template": "alpaca",
        "base_model_name_or_path": "some/base",
        "base_shape": {
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        "format_version": FORMAT_VERSION,
        "condition": None,
    }


def test_only_the_two_files_are_left_in_the_folder(saved):
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def mode(path):
    return path.stat().st_mode & 0o777


UNIX = pytest.mark.skipif(os.name != "posix", reason="permissions as Unix has them")


@UNIX
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_new_files_have_the_permissions_of_the_user_s_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"new")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o666 & ~umask


@UNIX
@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, permissions):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(permissions)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == permissions


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parents_of_the_folder_are_created(tmp_path):
    model = tiny_llama()
    adapted(model)
    folder = save_adapter(model, str(tmp_path / "a" / "b"))
    assert load_adapter(tiny_llama(), folder).name == "default"


def test_saving_again_replaces_both_files(tmp_path):
    model = tiny_llama()
    adapted(model, "old", adapter_len=2)
    adapted(model, "new", seed=5, adapter_len=6, adapter_layers=1)
    save_adapter(model, tmp_path, "old")
    save_adapter(model, tmp_path, "new")
    other = tiny_llama()
    loaded = load_adapter(other, tmp_path)
    assert loaded.config.adapter_len == 6
    assert torch.equal(logits(other), logits(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_save_takes_the_named_adapter_not_the_active_one(tmp_path):
    model = tiny_llama()
    adapted(model, "a", seed=1)
    wanted = logits(model)
    adapted(model, "b", seed=2)
    save_adapter(model, tmp_path, "a")
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), wanted)


def test_save_takes_the_active_adapter_where_none_is_named(tmp_path):
    model = tiny_llama()
    adapted(model, "a", seed=1)
    adapted(model, "b", seed=2, adapter_len=6)
    save_adapter(model, tmp_path)
    assert read_config(tmp_path).adapter_len == 6
    remove_adapter(model, "b")
    with pytest.raises(AdapterError, match="No adapter is active: name one of a"):
        save_adapter(model, tmp_path)


def test_saving_an_unknown_adapter_is_refused_and_writes_nothing(tmp_path):
    model = tiny_llama()
    adapted(model, "poet")
    with pytest.raises(AdapterError, match="unknown adapter 'peot'; did you mean 'poet'"):
        save_adapter(model, tmp_path / "out", "peot")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, below):
    model = tiny_llama()
    adapted(model)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(AdapterError, match=r"file.* cannot be written \(.+\): .*choose another place"):
        save_adapter(model, tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_base_loaded_from_disk_is_named_in_the_config(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(model)
    save_adapter(model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")


# loading


def test_another_base_of_equal_shape_takes_the_adapter(saved):
    other = tiny_model("llama", seed=7).float()
    other = tiny_llama() if other.config.head_dim != 8 else other
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    base = logits(other)
    load_adapter(other, saved)
    assert not torch.allclose(logits(other), base, atol=1e-3)


def test_loaded_parameters_take_gradients_only_when_asked(saved):
    model = tiny_llama()
    frozen, trainable = load_adapter(model, saved, "frozen"), load_adapter(model, saved, "trainable", trainable=True)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in trainable.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable.parameters()}


def test_a_trainable_loaded_adapter_learns(saved):
    model = tiny_llama()
    adapter = load_adapter(model, saved, trainable=True)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[key], tensor) for key, tensor in adapter.state_dict().items())


def test_loading_leaves_torch_s_random_state_alone(saved):
    model = tiny_llama()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load_adapter(model, saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_name_that_is_taken_is_refused_and_its_adapter_stays(saved):
    model = tiny_llama()
    mine = adapted(model, seed=8)
    wanted = logits(model)
    with pytest.raises(AdapterError, match="already has an adapter 'default'"):
        load_adapter(model, saved)
    assert get_adapter(model) is mine
    assert torch.equal(logits(model), wanted)
    assert all(parameter.requires_grad for parameter in mine.parameters())


def test_a_loaded_adapter_can_be_saved_again_unchanged(saved, tmp_path):
    model = tiny_llama()
    load_adapter(model, saved, "x")
    save_adapter(model, tmp_path / "copy", "x")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "copy" / name).read_bytes() == (saved / name).read_bytes()


# in the place of another


def test_a_replaced_adapter_answers_with_the_new_parameters(saved):
    model = tiny_llama()
    adapted(model, "other", seed=3)
    adapted(model, "mine", seed=4, adapter_len=2, adapter_layers=1)
    new = load_adapter(model, saved, "mine", replace=True)
    assert get_adapter(model) is new
    assert sorted(list_adapters(model)) == ["mine", "other"]
    fresh = tiny_llama()
    load_adapter(fresh, saved)
    assert torch.equal(logits(model), logits(fresh))


def test_replacing_leaves_another_active_adapter_and_the_base_s_flags(saved):
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted(model, "mine", seed=4)
    load_adapter(model, saved, "mine", replace=True)
    adapted(model, "active", seed=3)
    load_adapter(model, saved, "mine", replace=True)
    assert get_adapter(model).name == "active"
    load_adapter(model, saved, "mine", replace=True, activate=True)
    assert get_adapter(model).name == "mine"
    remove_adapter(model, "mine")
    remove_adapter(model, "active")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_replace_of_a_name_that_is_free_adds(saved):
    model = tiny_llama()
    load_adapter(model, saved, "new", replace=True)
    assert list_adapters(model) == ["new"]


def test_an_unreadable_adapter_replaces_nothing(saved):
    model = tiny_llama()
    mine = adapted(model, seed=8)
    spoil_truncated(saved)
    with pytest.raises(AdapterError, match="truncated"):
        load_adapter(model, saved, replace=True)
    assert get_adapter(model) is mine


def test_if_the_new_one_cannot_be_built_the_old_one_is_there(saved, monkeypatch):
    model = tiny_llama()
    mine = adapted(model, "mine", seed=8)
    with_mine = logits(model)
    adapted(model, "active", seed=9)

    def no_room(self, tensors):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("llama_adapter.core.routing.Adapter.load_state_dict", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, saved, "mine", replace=True)
    assert list_adapters(model) == ["mine", "active"]
    assert get_adapter(model, "mine") is mine
    assert get_adapter(model).name == "active"
    with use_adapter(model, "mine"):
        assert torch.equal(logits(model), with_mine)


def test_an_adapter_in_use_is_not_replaced(saved):
    model = tiny_llama()
    mine = adapted(model, "mine", seed=8)
    with use_adapter(model, "mine"), pytest.raises(AdapterError, match="'mine' is in use"):
        load_adapter(model, saved, "mine", replace=True)
    assert get_adapter(model, "mine") is mine
    assert load_adapter(model, saved, "mine", replace=True) is get_adapter(model, "mine")
    assert mine.removed


# from the hub


def test_a_name_that_is_no_folder_comes_from_the_hub(saved, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_adapter(tiny_llama(), "owner/name", revision="v2")
    files = [CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"]  # the last is PEFT's
    assert asked == [("owner/name", {"revision": "v2", "allow_patterns": files})]
    (tmp_path / "owner").mkdir()
    saved.rename(tmp_path / "owner" / "name")
    load_adapter(tiny_llama(), "owner/name")
    assert len(asked) == 1


@pytest.mark.parametrize("source", ["name", "./owner/name", "a/b/c", "/owner/name", "~/name", Path("owner/name"), ""])
def test_what_does_not_look_like_a_repository_is_a_folder(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(AdapterError, match=r"is not an adapter: (it|there) "):
        load_adapter(tiny_llama(), source)


def test_a_hub_that_has_nothing_is_one_sentence(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"^owner/no-such-adapter is not an adapter: there is no folder of that name, and the hub gave none \(.+\)"
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(tiny_llama(), "owner/no-such-adapter")
    assert "\n" not in str(error.value)


# what is refused


def spoil_truncated(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-7])


def spoil_header(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:5])


def spoil_text(folder):
    (folder / WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


def spoil_foreign_keys(folder):
    save_file({"base_model.model.lora_A.weight": torch.zeros(2)}, folder / WEIGHTS_FILE)


def drop_one(tensors):
    del tensors["layers.1.gate"]


def add_one(tensors):
    tensors["layers.0.gate"] = torch.zeros(HEADS)


def wrong_prompt(tensors):
    tensors["layers.2.prompt"] = torch.zeros(5, HIDDEN)


def wrong_gate(tensors):
    tensors["layers.2.gate"] = torch.zeros(1, HEADS, 1)


def integers(tensors):
    tensors["layers.2.prompt"] = torch.zeros(4, HIDDEN, dtype=torch.int64)


def nan(tensors):
    tensors["layers.1.prompt"][2, 3] = float("nan")


def infinity(tensors):
    tensors["layers.1.gate"][0] = -float("inf")


BAD = {
    "truncated": (spoil_truncated, r"adapter_model.safetensors is truncated or no safetensors file"),
    "cut in the header": (spoil_header, r"adapter_model.safetensors is truncated or no safetensors file"),
    "empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), r"adapter_model.safetensors is truncated"),
    "git-lfs pointer": (spoil_text, r"adapter_model.safetensors is a Git LFS pointer, not the weights: run 'git lfs"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), r"has no adapter_model.safetensors"),
    "foreign keys": (spoil_foreign_keys, r"does not fit its.*missing.*layers.1.*unexpected.*lora_A"),
    "a key missing": (lambda f: rewrite_tensors(f, drop_one), r"missing \['layers.1.gate'\], unexpected none"),
    "a key too many": (lambda f: rewrite_tensors(f, add_one), r"missing none, unexpected \['layers.0.gate'\]"),
    "wrong prompt": (
        lambda f: rewrite_tensors(f, wrong_prompt),
        r"layers.2.prompt is .*\[5, 32\], not float \[4, 32\]",
    ),
    "wrong gate": (lambda f: rewrite_tensors(f, wrong_gate), r"layers.2.gate is .*\[1, 4, 1\], not float \[4\]"),
    "integers": (lambda f: rewrite_tensors(f, integers), r"layers.2.prompt is I64"),
    "NaN": (lambda f: rewrite_tensors(f, nan), r"layers.1.prompt holds NaN, infinity or more"),
    "infinity": (lambda f: rewrite_tensors(f, infinity), r"layers.1.gate holds NaN, infinity or more"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), r"is not an adapter: it has no adapter_config.json"),
    "config no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), r"adapter_config.json cannot be read as JSON"),
    "config empty": (lambda f: (f / CONFIG_FILE).write_text(""), r"adapter_config.json cannot be read as JSON"),
    "config not UTF-8": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe"), r"cannot be read as JSON"),
    "config a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), r"is not llama-adapter's"),
    "PEFT": (
        lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "ADAPTION_PROMPT", "adapter_len": 4}'),
        r"is PEFT's \('ADAPTION_PROMPT'\)",
    ),
    "newer format": (
        lambda f: rewrite_config(f, format_version=FORMAT_VERSION + 1),
        rf"format_version is {FORMAT_VERSION + 1}.*upgrade with pip",
    ),
    "newer format as text": (
        lambda f: rewrite_config(f, format_version=str(FORMAT_VERSION + 1)),
        rf"format_version is '?{FORMAT_VERSION + 1}",
    ),
    "newer format with new keys": (lambda f: rewrite_config(f, format_version=99, novelty=1), r"format_version is 99"),
    "unknown key": (
        lambda f: rewrite_config(f, adapter_lenn=4),
        r"unknown key 'adapter_lenn'; did you mean 'adapter_len",
    ),
    "K of 0": (lambda f: rewrite_config(f, adapter_len=0), r"adapter_len is 0; it must be at least 1"),
    "unknown activation": (lambda f: rewrite_config(f, gate_activation="relu"), r"gate_activation is 'relu'"),
    "K of a list": (lambda f: rewrite_config(f, adapter_len=[4]), r"adapter_len is \[4\]"),
    "no shape": (lambda f: rewrite_config(f, base_shape=None), r"does not say adapter_layers and the base's shape"),
    "no layers": (lambda f: rewrite_config(f, adapter_layers=None), r"does not say adapter_layers"),
    "another K": (lambda f: rewrite_config(f, adapter_len=5), r"\[4, 32\], not float \[5, 32\]"),
    "more layers than the base": (lambda f: rewrite_config(f, adapter_layers=9), r"adapter_layers|missing"),
    "shape of words": (
        lambda f: rewrite_config(
            f, base_shape={"num_hidden_layers": "three", "hidden_size": 1, "num_attention_heads": 1}
        ),
        r"num_hidden_layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_and_the_model_stays_as_it_was(saved, case):
    spoil, message = BAD[case]
    spoil(saved)
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    before, names = logits(model), set(model.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(model, saved)
    assert "\n" not in str(error.value)
    assert list_adapters(model) == []
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert set(model.state_dict()) == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_without_a_base_too(saved, case):
    """`inspect` reads a folder this way."""
    spoil, message = BAD[case]
    spoil(saved)
    with pytest.raises(AdapterError, match=message):
        read_tensors(saved, read_config(saved))


def test_a_refused_folder_leaves_the_adapters_there_are(saved):
    model = tiny_llama()
    mine = adapted(model, "mine", seed=4)
    wanted = logits(model)
    spoil_truncated(saved)
    with pytest.raises(AdapterError, match="truncated"):
        load_adapter(model, saved, "new")
    assert list_adapters(model) == ["mine"]
    assert get_adapter(model) is mine
    assert torch.equal(logits(model), wanted)


def test_a_place_without_a_folder_is_named(tmp_path):
    with pytest.raises(AdapterError, match="nowhere is not an adapter: there is nothing of that name"):
        load_adapter(tiny_llama(), tmp_path / "nowhere")


OTHER_BASES = {
    "hidden_size": ({"hidden_size": 64, "head_dim": 8}, "hidden_size 32 against 64"),
    "num_hidden_layers": ({"num_hidden_layers": 4}, "num_hidden_layers 3 against 4"),
    "num_attention_heads": ({"num_attention_heads": 2, "head_dim": 8}, "num_attention_heads 4 against 2"),
    "num_key_value_heads": ({"num_key_value_heads": 4}, "num_key_value_heads 2 against 4"),
    "head_dim": ({"head_dim": 16}, "head_dim 8 against 16"),
}


@pytest.mark.parametrize("dimension", OTHER_BASES)
def test_a_base_of_another_shape_is_refused_by_that_dimension_alone(saved, dimension):
    changes, message = OTHER_BASES[dimension]
    model = tiny_llama(**changes)
    before = logits(model)
    with pytest.raises(AdapterError, match=f"was made for 'some/base', not for this one: {message}. Load it"):
        load_adapter(model, saved)
    assert list_adapters(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), before)


def test_every_dimension_that_differs_is_named(saved):
    with pytest.raises(
        AdapterError, match="hidden_size 32 against 64, num_hidden_layers 3 against 1, head_dim 8 against"
    ):
        load_adapter(tiny_llama(hidden_size=64, num_hidden_layers=1), saved)


def test_another_family_of_equal_dimensions_is_refused(saved):
    with pytest.raises(AdapterError, match="model_type 'llama' against 'qwen2'"):
        load_adapter(tiny_model("qwen2"), saved)


def test_half_precision_files_are_read_into_fp32(saved):
    def halve(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(torch.bfloat16)

    rewrite_tensors(saved, halve)
    loaded = load_adapter(tiny_llama(), saved)
    stored = load_file(saved / WEIGHTS_FILE)
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[key].float())


def test_several_loaded_adapters_serve_one_batch(tmp_path):
    source = tiny_llama()
    expected = {None: logits(source)}
    for seed, name in enumerate(("a", "b")):
        adapter = adapted(source, name, seed=seed)
        open_gates(adapter, seed + 10)
        expected[name] = logits(source)
        save_adapter(source, tmp_path / name, name)
    model = tiny_llama()
    for name in ("a", "b"):
        load_adapter(model, tmp_path / name, name)
    with use_adapter(model, ["b", None, "a"]):
        got = logits(model)
    for row, name in enumerate(("b", None, "a")):
        torch.testing.assert_close(got[row], expected[name][row], atol=1e-5, rtol=0)


# the configuration as JSON


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.builds(
        AdapterConfig,
        adapter_len=st.integers(1, 10**9),
        adapter_layers=st.none() | st.integers(1, 10**6),
        gate_activation=st.sampled_from(["tanh", "identity"]),
        template=st.sampled_from([None, "alpaca", "chat"]),
        base_model_name_or_path=st.none() | st.text(),
        base_shape=st.none() | st.dictionaries(st.text(), st.integers() | st.text()),
    )
)
def test_any_config_survives_json(config):
    assert config_from(json.loads(json.dumps(config.to_dict()))) == config


def test_a_whole_model_s_folder_says_how_adapters_are_saved(tmp_path):
    model = tiny_llama()
    adapted(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"whole model's config.json.*save_adapter keeps them"):
        load_adapter(tiny_llama(), tmp_path)
