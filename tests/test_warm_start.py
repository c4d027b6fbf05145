"""Prompts that start from a text's hidden states: the right ones of the bare base, and nothing else changes."""

import pytest
import torch
from tiny import adapted, tiny_llama, tiny_model, tokens

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.core.warm_start import prompts_from_text
from llama_adapter.errors import ConfigError


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
