"""One conformance test over every family in the table."""

import copy

import pytest
import torch
from tiny import LAYERS, adapted, tiny_config, tiny_model, tokens
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from llama_adapter import AdapterConfig, add_adapter, remove_adapter, use_adapter
from llama_adapter.core.families import FAMILIES, REFUSED, attention_modules, family_of
from llama_adapter.core.zero_init import second_softmax
from llama_adapter.errors import UnsupportedModelError
from llama_adapter.training.loop import enable_checkpointing

families = pytest.mark.parametrize("family", sorted(FAMILIES))


@families
def test_a_new_adapter_leaves_the_logits_bit_equal(family):
    model, ids = tiny_model(family), tokens()
    with torch.no_grad():
        before = model(ids).logits
        add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
        assert torch.equal(model(ids).logits, before)


@families
def test_at_zero_gate_only_gates_move_and_after_two_steps_everything_has(family):
    model, ids = tiny_model(family), tokens()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2))
    start = {key: value.clone() for key, value in adapter.state_dict().items()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        if step == 0:
            assert all(torch.count_nonzero(layer.prompt.grad) == 0 for layer in adapter.layers.values())
            assert all(torch.count_nonzero(layer.gate.grad) > 0 for layer in adapter.layers.values())
        optimizer.step()
    assert all(not torch.equal(value, start[key]) for key, value in adapter.state_dict().items())
    now = model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in base.items())


@families
def test_adapter_matches_the_formula_on_the_module_s_own_query(family, monkeypatch):
    """The gated term, recomputed in plain loops from the query that the text attention got."""
    model, ids = tiny_model(family), tokens(1, 5)
    adapter = adapted(model)
    module = attention_modules(model)[-1]
    captured = {}

    def spy(query, prompts, scaling, softcap=None):
        out = second_softmax(query, prompts, scaling, softcap)
        captured.update(query=query, out=out.transpose(1, 2), scaling=scaling, softcap=softcap)
        return out

    monkeypatch.setattr("llama_adapter.core.attention.second_softmax", spy)  # the last layer's call comes last
    with torch.no_grad():
        model(ids)
        key, value = family_of(model.config).project(module, adapter.layers[LAYERS - 1].prompt)
    query, gate = captured["query"][0].double(), adapter.layers[LAYERS - 1].gate.double().tanh()
    for head in range(query.shape[0]):
        source = head // (query.shape[0] // key.shape[0])
        scores = query[head] @ key[source].double().T * captured["scaling"]
        if captured["softcap"] is not None:
            scores = captured["softcap"] * torch.tanh(scores / captured["softcap"])
        expected = gate[head] * (scores.softmax(-1) @ value[source].double())
        torch.testing.assert_close(captured["out"][0, :, head].double(), expected, atol=1e-6, rtol=1e-5)


@families
def test_prompt_keys_and_values_are_those_of_an_unrotated_token(family):
    """What a family's table row computes equals what its attention computes for text, but for the rotation.

    A prompt vector put where the attention's input is, at position 0 (where the rotation is the identity), must give
    the same key and value as the table's projection.
    """
    model = tiny_model(family)
    module = attention_modules(model)[-1]
    vector = torch.randn(1, 1, model.config.hidden_size)
    seen = {}

    def spy(attention, query, key, value, mask, **kwargs):
        if attention is module:
            seen["key_value"] = (key, value)
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None

    AttentionInterface.register("spy", spy)
    module.config._attn_implementation = "spy"
    replaced = module.register_forward_pre_hook(lambda m, args, kw: swap(args, kw, vector), with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[3]]))
        key, value = family_of(model.config).project(module, vector[0])
    replaced.remove()
    torch.testing.assert_close(seen["key_value"][0][0], key, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen["key_value"][1][0], value, atol=1e-6, rtol=1e-5)


def swap(args, kwargs, vector):
    if args:
        return (vector, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": vector}


@families
def test_generation_with_cache_equals_generation_without(family):
    model, ids = tiny_model(family), tokens(2, 6)
    adapted(model)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, use_cache=True, **options),
        model.generate(ids, attention_mask=mask, use_cache=False, **options),
    )


@families
def test_left_padded_batch_equals_single(family):
    model, ids = tiny_model(family), tokens(1, 6)
    adapted(model)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = torch.cat([padded, tokens(1, 9, seed=5)])
    with torch.no_grad():
        single = model(ids).logits[0]
        both = model(
            batch,
            attention_mask=torch.cat([mask, torch.ones_like(mask)]),
            position_ids=torch.cat([positions, torch.arange(9)[None]]),
        ).logits[0, 3:]
    torch.testing.assert_close(both, single, atol=1e-5, rtol=1e-4)


@families
def test_a_batch_of_rows_with_different_adapters_equals_single_runs(family):
    model, ids = tiny_model(family), tokens(3, 7)
    adapted(model, "a", seed=1)
    adapted(model, "b", seed=2, adapter_len=3, adapter_layers=3, gate_activation="identity")
    names = ["a", None, "b"]
    with torch.no_grad():
        with use_adapter(model, names):
            together = model(ids).logits
        for row, name in enumerate(names):
            with use_adapter(model, name):
                torch.testing.assert_close(together[row], model(ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(together[0], together[2], atol=1e-3)


@families
def test_removing_the_adapter_restores_the_base(family):
    model, ids = tiny_model(family), tokens()
    with torch.no_grad():
        before, keys, attention = model(ids).logits, list(model.state_dict()), model.config._attn_implementation
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        adapted(model)
        assert not torch.equal(model(ids).logits, before)
        remove_adapter(model)
        assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == attention
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


@families
def test_a_deep_copy_is_independent(family):
    model, ids = tiny_model(family), tokens()
    adapted(model)
    with torch.no_grad():
        before = model(ids).logits
        copied = copy.deepcopy(model)
        assert torch.equal(copied(ids).logits, before)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["bloom", "falcon", "mamba", "gptj"])
def test_refused_families_are_named_with_the_reason(family):
    with pytest.raises(UnsupportedModelError, match=f"family '{family}' cannot be adapted: {REFUSED[family]}"):
        family_of(AutoConfig.for_model(family))


def test_unknown_family_lists_the_supported_ones():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "opt",
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
            word_embed_proj_dim=16,
        )
    )
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"'opt'.*Supported: .*llama"):
        add_adapter(model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree_also_when_switched_later(implementation):
    model, ids = tiny_model("llama"), tokens()
    adapted(model)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-6, rtol=1e-5)
        with use_adapter(model, None):
            assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_every_configured_family_is_built_with_its_own_class():
    for family, row in FAMILIES.items():
        assert tiny_config(family).model_type == family
        assert row.attention.endswith("Attention")


@families
def test_checkpointing_recomputes_the_layers_of_a_base_that_answers_as_in_evaluation(family):
    config = tiny_config(family)
    noise = [key for key in config.to_dict() if "drop" in key or "jitter" in key]
    for key in noise:
        setattr(config, key, 0.5)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens()
    adapter, calls = adapted(model), []
    for module in attention_modules(model):
        module.register_forward_pre_hook(lambda *_: calls.append(1))

    def loss_and_gradients():
        calls.clear()
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())]

    plain = loss_and_gradients()
    assert len(calls) == LAYERS
    enable_checkpointing(model)
    for _ in range(3):
        for mine, expected in zip(loss_and_gradients(), plain, strict=True):
            torch.testing.assert_close(mine, expected)
        assert len(calls) == 2 * LAYERS
        with torch.no_grad():
            torch.testing.assert_close(model(ids, labels=ids, use_cache=False).loss, plain[0])
    if noise:  # it would show
        model.train()
        assert not torch.allclose(loss_and_gradients()[1], plain[1])
