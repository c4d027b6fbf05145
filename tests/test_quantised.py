"""Bases in fewer bits: GGUF files, bitsandbytes, torchao, folders that are quantised already."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from runs import recipe, tiny_tokenizer, write_base, write_data
from tiny import open_gates
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_adapter import AdapterConfig, add_adapter, load_adapter, merge_adapter, remove_adapter, train, use_adapter
from llama_adapter.base import load_base, load_config, load_tokenizer, pretrained
from llama_adapter.cli import main
from llama_adapter.core.quantised import check_backward, is_quantised
from llama_adapter.errors import AdapterError, ConfigError, MissingExtraError, ModelError
from llama_adapter.formats.card import base_licence
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Prompt, load_session
from llama_adapter.settings import one_quantization

CPU = torch.device("cpu")
PACKAGES = {"int8": "torchao", "4bit": "bitsandbytes", "8bit": "bitsandbytes"}
NOISE = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
pytestmark = NOISE  # of the packages' own imports


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose linears are large enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=320, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)  # a base whose answers depend on its weights
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["int8", "4bit", "8bit"])
def quantization(request):
    pytest.importorskip(PACKAGES[request.param])
    return request.param


@pytest.fixture(scope="module")
def gguf_file(base, tmp_path_factory):
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    return write_gguf(base, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def dequantised(model, path):
    """The same model with plain linears of the weights that the quantised ones stand for."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, linear in model.named_modules():
        if hasattr(linear, "in_features") and name != "lm_head":
            eye = torch.eye(linear.in_features, dtype=model.dtype)
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(linear(eye).T)
    return plain


def gradients(model, **settings):
    torch.manual_seed(1)
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, **settings))
    open_gates(adapter)
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(ids)  # a validation: some kernels lay their weights out anew for it
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {key: parameter.grad for key, parameter in adapter.named_parameters()}
    return loss.item(), found, adapter


V2 = {"norms": True, "linear_scale": ("q_proj", "v_proj", "down_proj"), "linear_bias": ("k_proj", "up_proj")}
V2 |= {"lora_rank": 2, "lora_targets": ("q_proj", "gate_proj")}


@pytest.mark.parametrize("settings", [{}, V2], ids=["prompts", "v2"])
def test_gradients_are_those_of_the_weights_that_the_base_has(wide, quantization, settings):
    model = load_base(str(wide), CPU, "fp32", quantization)
    assert is_quantised(model)
    plain = dequantised(load_base(str(wide), CPU, "fp32", quantization), wide)
    loss, found, _ = gradients(model, **settings)
    expected_loss, expected, _ = gradients(plain, **settings)
    assert loss == pytest.approx(expected_loss, rel=0.02 if quantization == "8bit" else 1e-3)  # 8bit rounds inputs too
    for key, gradient in expected.items():
        if gradient.norm() > 1e-6:  # B of LoRA is 0, and so is A's gradient
            assert torch.cosine_similarity(found[key].flatten(), gradient.flatten(), 0) > 0.99, key


def test_a_run_on_a_quantised_base_learns_and_its_adapter_answers_there(wide, quantization, tmp_path):
    switch = {"int8": {"base_precision": "int8"}, "4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
    data = write_data(tmp_path / "data.json")
    options = {**switch[quantization], "epochs": 6.0, "max_length": 300}
    result = train(recipe(wide, data, tmp_path / "run", **options))
    assert result.best_val_loss < result.base_val_loss - 0.05
    again = train(recipe(wide, data, tmp_path / "again", **options, gradient_checkpointing=True, packing=False))
    assert again.best_val_loss == pytest.approx(result.best_val_loss, abs=5e-3)
    session = load_session(None, {"a": str(tmp_path / "run")}, CPU, "fp32", quantization)
    assert is_quantised(session.model)
    answer = session.answer([Prompt.of("Repeat 3")], "a", GenerateConfig(8, temperature=0))[0]
    assert answer.new_tokens
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), use_adapter(session.model, "a"):
        adapted = session.model(ids).logits
    with torch.no_grad(), use_adapter(session.model, None):
        assert (session.model(ids).logits - adapted).abs().max() > 0.05


def test_a_quantised_base_is_never_merged_into(wide, quantization):
    model = load_base(str(wide), CPU, "fp32", quantization)
    settings = {"adapter_layers": 0, "linear_scale": ("q_proj",), "lora_rank": 2, "lora_targets": ("q_proj",)}
    add_adapter(model, AdapterConfig(**settings))
    with pytest.raises(AdapterError, match=r"cannot be merged into \w+: load the base in bf16 or fp32"):
        merge_adapter(model)


def test_a_base_is_the_same_after_an_adapter_was_there(wide, quantization):
    model = load_base(str(wide), CPU, "fp32", quantization)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
    gradients(model, **V2)
    remove_adapter(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


class Inference(nn.Linear):
    """A kernel without a backward pass, as some of GPTQ and AWQ are."""

    def forward(self, x):
        return super().forward(x.detach())


class Wrong(nn.Linear):
    """One that scales on the way there and not on the way back."""

    def forward(self, x):
        return super().forward(x.detach() + 0.5 * (x - x.detach()))


@pytest.mark.parametrize("kind", [Inference, Wrong])
def test_training_refuses_linears_without_a_right_gradient(wide, kind, tmp_path, monkeypatch):
    model = load_base(str(wide), CPU, "fp32")
    check_backward(model)
    model.model.layers[1].mlp.up_proj.__class__ = kind
    check_backward(model)  # of a plain base nothing is asked
    model.is_quantized = True
    with pytest.raises(ModelError, match=rf"layers.1.mlp.up_proj, a {kind.__name__} on cpu, gives no gradient or a wr"):
        check_backward(model)
    monkeypatch.setattr("llama_adapter.training.loop.load_base", lambda *_: model)
    with pytest.raises(ModelError, match="prompts would not learn"):
        train(recipe(wide, write_data(tmp_path / "data.json"), tmp_path / "run", max_length=300))
    assert not (tmp_path / "run").exists()


def quantised_folder(wide, tmp_path, **settings):
    folder = shutil.copytree(wide, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def test_a_folder_that_is_quantised_already_is_not_quantised_again(wide, tmp_path):
    folder = quantised_folder(wide, tmp_path, quant_method="gptq", bits=4)
    for quantization in PACKAGES:
        with pytest.raises(ModelError, match=r"is quantised already \(gptq\): quantise no more"):
            load_base(str(folder), CPU, "fp32", quantization)
    with pytest.raises(ModelError, match="fp8 needs a base in bf16 or fp32, and this one is quantised"):
        train(recipe(folder, write_data(tmp_path / "d.json"), tmp_path / "run", base_precision="fp8"))


def test_a_folder_whose_package_is_missing_says_which(wide, tmp_path):
    folder = quantised_folder(wide, tmp_path, quant_method="gptq", bits=4)
    with pytest.raises(ModelError, match=r"needs another package: .*(optimum|gptqmodel)"):
        load_base(str(folder), CPU, "fp32")


def test_a_compressed_tensors_folder_trains(wide, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    folder = quantised_folder(wide, tmp_path, **settings, config_groups=groups, ignore=["lm_head"])
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        weight = tensors.pop(key)
        scale = weight.abs().amax(-1, keepdim=True) / 127
        packed = pack_to_int32((weight / scale).round().to(torch.int8), 8)
        tensors |= {f"{key}_packed": packed, f"{key}_scale": scale, f"{key}_shape": torch.tensor(weight.shape)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_base(str(folder), CPU, "fp32")
    assert is_quantised(model)
    check_backward(model)
    _, found, _ = gradients(model, **V2)
    _, expected, _ = gradients(dequantised(load_base(str(folder), CPU, "fp32"), wide), **V2)
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=1e-3, atol=1e-6), key


@pytest.mark.parametrize(("quantization", "package"), PACKAGES.items())
def test_without_the_package_the_message_says_how_to_get_it(base, monkeypatch, quantization, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    extra = "bnb" if package == "bitsandbytes" else package
    with pytest.raises(
        MissingExtraError, match=rf"needs '{package}', which is not installed: pip install 'llama-adapter\[{extra}\]'"
    ):
        load_base(str(base), CPU, "fp32", quantization)


def test_one_way_to_round_at_a_time():
    assert one_quantization(True, False, "auto") == "4bit"
    assert one_quantization(False, True, "auto") == "8bit"
    assert one_quantization(False, False, "int8") == "int8"
    assert one_quantization(False, False, "auto") is one_quantization(False, False, "fp8") is None
    with pytest.raises(ConfigError, match="base_precision int8 and load_in_4bit exclude each other"):
        one_quantization(True, False, "int8")


def test_the_flags_reach_the_base(wide, monkeypatch, capsys):
    command = ["generate", "--model", str(wide), "--max-new-tokens", "2", "--precision", "fp32", "sun"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--base-precision", "int8", "--load-in-8bit"])
    assert "base_precision int8 and load_in_8bit exclude each other" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(
        "llama_adapter.inference.session.load_base",
        lambda name, device, precision, kind: asked.append(kind) or load_base(name, device, precision),
    )
    for flags in (["--base-precision", "int8"], ["--load-in-8bit"], ["--load-in-4bit"], []):
        main([*command, *flags])
    assert asked == ["int8", "8bit", "4bit", None]


def test_a_base_with_missing_or_foreign_weights_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: model.layers.1.mlp.up_proj.weight not there or of another"):
        load_base(str(folder), CPU, "fp32")


def test_a_gguf_base_is_that_base(base, gguf_file):
    ids = torch.arange(3, 40)[None]
    model, plain = load_base(str(gguf_file), CPU, "fp32"), load_base(str(base), CPU, "fp32")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    text = "Repeat: sun, moon! Ünïcode 42\n"
    tokenizer, expected = load_tokenizer(str(gguf_file)), load_tokenizer(str(base))
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.eos_token == expected.eos_token
    assert load_config(str(gguf_file)).hidden_size == 32


def test_a_rounded_gguf_trains_answers_and_merges(base, tmp_path, capsys):
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    file, data = write_gguf(base, tmp_path / "q8.gguf", "Q8_0"), write_data(tmp_path / "data.json")
    main(["validate", "--model", str(file), "--data", str(data)])
    parts = {"adapter_layers": 0, "norms": True, "lora_rank": 2, "lora_targets": ("q_proj",)}
    result = train(recipe(file, data, tmp_path / "run", **parts))
    assert result.best_val_loss < result.base_val_loss
    main(["inspect", str(tmp_path / "run")])
    assert "q8.gguf (llama)" in capsys.readouterr().out
    main(["generate", "-a", str(tmp_path / "run"), "--precision", "fp32", "--max-new-tokens", "3", "sun"])
    model = load_base(str(file), CPU, "fp32")
    load_adapter(model, tmp_path / "run")
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits
    merge_adapter(model)
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(load_base(str(tmp_path / "merged"), CPU, "fp32")(ids).logits, expected, atol=1e-5)


def test_names_of_gguf_files_here_and_on_the_hub(gguf_file, tmp_path, monkeypatch):
    assert pretrained(str(gguf_file)) == (str(gguf_file.parent), {"gguf_file": gguf_file.name})
    assert pretrained("owner/name/deep/Q4.gguf") == ("owner/name", {"gguf_file": "deep/Q4.gguf"})
    monkeypatch.chdir(gguf_file.parent)
    assert pretrained(gguf_file.name) == (".", {"gguf_file": gguf_file.name})
    (tmp_path / "folder.gguf").mkdir()
    assert pretrained(str(tmp_path / "folder.gguf")) == (str(tmp_path / "folder.gguf"), {})
    assert base_licence(str(gguf_file)) == "apache-2.0"


@pytest.mark.parametrize("quantization", PACKAGES)
def test_a_gguf_is_not_quantised_again(gguf_file, quantization):
    with pytest.raises(ModelError, match="is rounded already"):
        load_base(str(gguf_file), CPU, "fp32", quantization)


def test_a_transformers_that_reads_gguf_tokenizers_wrongly_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ModelError, match=r"needs transformers 5.23.0 or newer, and this is 5.17.0: pip install"):
        load_config("any.gguf")


def test_bad_gguf_files_are_one_sentence(gguf_file, tmp_path, monkeypatch, capsys):
    cases = {"short.gguf": gguf_file.read_bytes()[:3000], "foreign.gguf": b"not a model" * 100, "empty.gguf": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name}' cannot be read"):
            load_config(str(tmp_path / name))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cut.gguf' cannot be read"):
        load_base(str(cut), CPU, "fp32")
    for name in ("/nowhere/a.gguf", "a.gguf", "./b/c/a.gguf"):
        with pytest.raises(ModelError, match="does not exist: give a GGUF file"):
            load_config(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(SystemExit, match="2"):
        main(["validate", "--model", str(gguf_file)])
    assert "pip install 'llama-adapter[gguf]'" in capsys.readouterr().err
    assert "gguf" in sys.modules  # it was there all the time
