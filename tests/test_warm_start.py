"""Prompts that start from a text's hidden states: the right ones of the bare base, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from runs import recipe
from safetensors.torch import load_file
from tiny import adapted, tiny_llama, tiny_model, tokens

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.core.warm_start import prompts_from_text
from llama_adapter.errors import ConfigError
from llama_adapter.training import loop
from llama_adapter.training.loop import train
from llama_adapter.training.prepare import prepare


def test_prompts_are_what_each_layer_reads_at_tokens_spread_over_the_text():
    model, ids = tiny_llama(), tokens(1, 9)[0]
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
    adapter = add_adapter(model, AdapterConfig(adapter_len=3, adapter_layers=2))
    prompts_from_text(model, adapter, ids.tolist())
    assert list(adapter.layers) == [1, 2]
    for index, layer in adapter.layers.items():
        expected = model.model.layers[index].input_layernorm(states[index])[0, [0, 4, 8]]
        assert torch.equal(layer.prompt, expected)
        assert layer.prompt.requires_grad


def test_an_adapter_that_is_active_does_not_colour_them():
    model, ids = tiny_llama(), tokens(1, 9)[0].tolist()
    alone = add_adapter(model, AdapterConfig(adapter_len=3, adapter_layers=3), "alone")
    prompts_from_text(model, alone, ids)
    adapted(model, "strong", adapter_layers=3)
    beside = add_adapter(model, AdapterConfig(adapter_len=3, adapter_layers=3), "beside", activate=False)
    prompts_from_text(model, beside, ids)
    for key, tensor in beside.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[key])


@pytest.mark.parametrize("family", ["gemma2", "phi", "gpt2", "gpt_neox", "cohere"])
def test_other_families_have_an_input_to_start_from(family):
    model, ids = tiny_model(family), tokens(1, 9)
    with torch.no_grad():
        bare = model(input_ids=ids).logits
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    drawn = [layer.prompt.clone() for layer in adapter.layers.values()]
    prompts_from_text(model, adapter, ids[0].tolist())
    for layer, before in zip(adapter.layers.values(), drawn, strict=True):
        assert layer.prompt.isfinite().all()
        assert not torch.equal(layer.prompt, before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, bare)


def test_a_text_shorter_than_the_prompts_is_refused():
    model = tiny_llama()
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    with pytest.raises(ConfigError, match="has 3 tokens, fewer than adapter_len 4"):
        prompts_from_text(model, adapter, [5, 6, 7])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at what it traces
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_starts_from_its_first_example_or_a_text(base, data, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr("llama_adapter.compiler.BACKEND", "aot_eager")  # traced all the same; C++ takes minutes
    config = recipe(base, data, tmp_path / "run", max_steps=1, adapter_len=3, weight_decay=0.0, compile=compiled)
    tokenizer = load_tokenizer(str(base))
    first = prepare(config, tokenizer).train[0].input_ids
    for text, ids in (("data", first), ("one two three four", tokenizer("one two three four")["input_ids"])):
        # closed gates: prompts have no gradient in the first step
        train(replace(config, prompt_init_text=text, overwrite=True))
        model = load_base(str(base), torch.device("cpu"), "fp32")
        adapter = add_adapter(model, AdapterConfig(adapter_len=3, adapter_layers=config.adapter_layers))
        prompts_from_text(model, adapter, ids)
        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        for key, tensor in adapter.state_dict().items():
            if key.endswith("prompt"):
                torch.testing.assert_close(saved[key], tensor, rtol=0, atol=1e-6)


def test_a_resumed_run_goes_on_from_its_own_prompts(base, data, tmp_path):
    config = recipe(base, data, tmp_path / "a", max_steps=4, adapter_len=3, prompt_init_text="data", lr=0.1)
    train(config)
    other = replace(config, output_dir=str(tmp_path / "b"))
    train(replace(other, max_steps=2))
    train(replace(other, resume=True))
    ends = [load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in "ab"]
    assert ends[0].keys() == ends[1].keys()


def test_texts_that_are_too_short_or_idle_are_refused_before_weights_are_read(base, data, tmp_path, fail, monkeypatch):
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("read the weights"))
    given = ("train", "--model", base, "--data", data, "--output-dir", tmp_path / "run")
    message = fail(*given, "--prompt-init-text", "one", "--adapter-len", "50")
    assert "fewer than adapter_len 50" in message
    assert "lower --adapter-len" in message
    message = fail(*given, "--prompt-init-text", "data", "--init-from", tmp_path)
    assert "prompt_init_text has no effect on the prompts of init_from" in message
    message = fail(*given, "--prompt-init-text", "data", "--adapter-layers", "0", "--norms")
    assert "prompt_init_text has no effect without prompts" in message
    for command in ("train", "validate"):
        message = fail(command, *given[1:], "--prompt-init-text", "cat " * 1100)
        assert "tokens and the base takes 1024: shorten it" in message
        assert len(message) < 300
