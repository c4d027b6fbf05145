"""Adapters on a model: which one is active, what a choice reaches, and what stays as it was."""

import copy
import io
import threading
from functools import partial

import pytest
import torch
from tiny import COMMON, HEADS, HIDDEN, LAYERS, adapted, at_once, open_gates, tiny_llama, tiny_model, tokens
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from llama_adapter import (
    AdapterConfig,
    add_adapter,
    get_adapter,
    list_adapters,
    load_adapter,
    remove_adapter,
    save_adapter,
    use_adapter,
)
from llama_adapter.errors import AdapterError, ConfigError, UnsupportedModelError

IDS = tokens()


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(ids, **options).logits


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def pair(model):
    """A Llama with open adapters "a" and "b" (active), and the logits of base, a and b, which all differ."""
    base = logits(model)
    adapted(model, "a", seed=1)
    a = logits(model)
    adapted(model, "b", seed=2)
    expected = {None: base, "a": a, "b": logits(model)}
    assert not torch.allclose(a, base, atol=1e-3)
    assert not torch.allclose(a, expected["b"], atol=1e-3)
    return model, expected


# which adapter is active


def test_a_new_adapter_is_active(pair):
    model, expected = pair
    assert get_adapter(model).name == "b"
    assert torch.equal(logits(model), expected["b"])


def test_a_loaded_adapter_waits_until_it_is_activated(pair, tmp_path):
    model, expected = pair
    save_adapter(model, tmp_path, "a")
    load_adapter(model, tmp_path, "quiet")
    assert get_adapter(model).name == "b"
    assert torch.equal(logits(model), expected["b"])
    load_adapter(model, tmp_path, "loud", activate=True)
    assert get_adapter(model).name == "loud"
    assert torch.equal(logits(model), expected["a"])


def test_an_adapter_loaded_where_none_is_active_becomes_active(pair, tmp_path):
    model, expected = pair
    save_adapter(model, tmp_path, "a")
    remove_adapter(model, "b")
    load_adapter(model, tmp_path, "again")
    assert get_adapter(model).name == "again"
    assert torch.equal(logits(model), expected["a"])


def test_use_adapter_overrides_inside_its_block_only(pair):
    model, expected = pair
    with use_adapter(model, "a"):
        assert torch.equal(logits(model), expected["a"])
    assert torch.equal(logits(model), expected["b"])


def test_use_adapter_nests(pair):
    model, expected = pair
    with use_adapter(model, "a"):
        with use_adapter(model, None):
            assert torch.equal(logits(model), expected[None])
            with use_adapter(model, "b"):
                assert torch.equal(logits(model), expected["b"])
            assert torch.equal(logits(model), expected[None])
        assert torch.equal(logits(model), expected["a"])


def test_use_adapter_restores_after_an_exception(pair):
    model, expected = pair
    with pytest.raises(ZeroDivisionError), use_adapter(model, "a"):
        raise ZeroDivisionError
    assert torch.equal(logits(model), expected["b"])


def test_none_is_the_bare_base_bit_for_bit(pair):
    model, expected = pair
    with use_adapter(model, None):
        assert torch.equal(logits(model), expected[None])


def test_a_new_adapter_inside_a_block_becomes_active_after_it(pair):
    model, expected = pair
    with use_adapter(model, "a"):
        adapter = adapted(model, "c", seed=3)
        assert torch.equal(logits(model), expected["a"])
    with use_adapter(model, "c"):
        wanted = logits(model)
    assert get_adapter(model) is adapter
    assert torch.equal(logits(model), wanted)


def test_get_adapter_finds_by_name_and_list_adapters_keeps_their_order(pair):
    model, _ = pair
    assert list_adapters(model) == ["a", "b"]
    assert get_adapter(model, "a").name == "a"
    assert get_adapter(model, "a") is not get_adapter(model, "b")


def test_a_model_that_was_never_adapted_has_no_adapters(model):
    assert list_adapters(model) == []
    for call in (
        lambda: get_adapter(model),
        lambda: remove_adapter(model),
        lambda: use_adapter(model, "a").__enter__(),
    ):
        with pytest.raises(AdapterError, match="has no adapter: call add_adapter or load_adapter first"):
            call()


@pytest.mark.parametrize("names", ["defualt", ["default", "defualt"]])
def test_an_unknown_name_is_refused_with_a_suggestion(model, names):
    adapted(model)
    with (
        pytest.raises(AdapterError, match="unknown adapter 'defualt'; did you mean 'default'"),
        use_adapter(model, names),
    ):
        pytest.fail("entered the block")


def test_unknown_names_are_refused_by_get_and_remove(model):
    adapted(model)
    for call in (get_adapter, remove_adapter):
        with pytest.raises(AdapterError, match="unknown adapter 'other'; known: default"):
            call(model, "other")


# a list: one name a row


def test_each_row_gets_its_own_adapter(pair):
    model, expected = pair
    names = ["b", None, "a"]
    with use_adapter(model, names):
        got = logits(model)
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], expected[name][row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_list_of_the_wrong_length_is_refused(pair, count):
    model, _ = pair
    message = f"Got {count} names for a batch of 3 rows"
    with use_adapter(model, ["a"] * count), pytest.raises(AdapterError, match=message):
        logits(model)


def test_a_list_of_none_is_the_bare_base_bit_for_bit(pair):
    model, expected = pair
    with use_adapter(model, [None] * 3):
        assert torch.equal(logits(model), expected[None])


def test_a_list_of_one_name_equals_that_name(pair):
    model, expected = pair
    with use_adapter(model, ["a"] * 3):
        assert torch.equal(logits(model), expected["a"])


def test_adapters_of_different_length_depth_and_activation_share_a_batch(model):
    shapes = {
        "short": {"adapter_len": 1, "adapter_layers": 3},
        "long": {"adapter_len": 7, "adapter_layers": 1},
        "other": {"adapter_len": 3, "adapter_layers": 2, "gate_activation": "identity"},
    }
    alone = {None: logits(model)}
    for seed, (name, shape) in enumerate(shapes.items()):
        adapted(model, name, seed=seed, **shape)
        alone[name] = logits(model)
        assert not torch.allclose(alone[name], alone[None], atol=1e-3)
    names = ["long", None, "short", "other", "long"]
    rows = [0, 1, 2, 0, 1]
    with use_adapter(model, names):
        got = logits(model, IDS[rows])
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        torch.testing.assert_close(got[i], alone[name][row], atol=1e-5, rtol=0)


def test_inputs_embeds_are_counted_as_rows_too(pair):
    model, expected = pair
    embeds = model.get_input_embeddings()(IDS)
    with use_adapter(model, ["a", None, "b"]), torch.no_grad():
        got = model(inputs_embeds=embeds).logits
    for row, name in enumerate(["a", None, "b"]):
        torch.testing.assert_close(got[row], expected[name][row], atol=1e-5, rtol=0)
    with use_adapter(model, ["a"]), pytest.raises(AdapterError, match="Got 1 names for a batch of 3 rows"):
        model(inputs_embeds=embeds)


# names


@pytest.mark.parametrize("name", ["v1.2", "a.b.c", "...", "A-b_c.0", "weight", "training", "_modules"])
def test_names_with_dots_or_of_module_attributes_work(model, tmp_path, name):
    adapter = adapted(model, name)
    wanted = logits(model)
    assert list_adapters(model) == [name]
    save_adapter(model, tmp_path / "saved", name)
    other = tiny_llama()
    load_adapter(other, tmp_path / "saved", name)
    assert torch.equal(logits(other), wanted)
    assert list(adapter.state_dict()) == ["layers.1.prompt", "layers.1.gate", "layers.2.prompt", "layers.2.gate"]
    remove_adapter(model, name)
    assert list_adapters(model) == []


def test_names_that_differ_in_a_dot_are_two_adapters(model):
    one, two = adapted(model, "a.b", seed=1), adapted(model, "a_b", seed=2)
    assert not torch.equal(one.layers[2].prompt, two.layers[2].prompt)
    assert list_adapters(model) == ["a.b", "a_b"]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a:b", "ä", "a\n", "../x"])
def test_a_malformed_name_is_refused_and_the_model_stays_bare(model, name):
    with pytest.raises(AdapterError, match="malformed: use letters, digits"):
        add_adapter(model, AdapterConfig(), name)
    assert list_adapters(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_name_that_is_taken_is_refused_and_its_adapter_stays(pair):
    model, expected = pair
    with pytest.raises(AdapterError, match="already has an adapter 'a'"):
        add_adapter(model, AdapterConfig(), "a")
    assert get_adapter(model).name == "b"
    with use_adapter(model, "a"):
        assert torch.equal(logits(model), expected["a"])


# what is added, and to what


@pytest.mark.parametrize(("num_layers", "expected"), [(1, [0]), (2, [1]), (3, [2]), (6, [2, 3, 4, 5])])
def test_without_adapter_layers_all_but_the_lowest_two_are_adapted(num_layers, expected):
    adapter = add_adapter(tiny_llama(num_hidden_layers=num_layers))
    assert list(adapter.layers) == expected
    assert adapter.config.adapter_layers == len(expected)


def test_the_handle_has_the_layers_shapes_and_count_of_its_config(model):
    adapter = add_adapter(model, AdapterConfig(adapter_len=5, adapter_layers=2))
    assert list(adapter.layers) == [1, 2]
    for layer in adapter.layers.values():
        assert (layer.prompt.shape, layer.gate.shape) == ((5, HIDDEN), (HEADS,))
        assert layer.prompt.dtype == layer.gate.dtype == torch.float32
    assert adapter.num_parameters == 2 * (5 * HIDDEN + HEADS)
    assert adapter.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter.config.base_shape["num_hidden_layers"] == LAYERS


def test_more_layers_than_the_base_has_are_refused_before_anything_changes(model):
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="adapter_layers is 4, but the base has 3 layers"):
        add_adapter(model, AdapterConfig(adapter_layers=4))
    assert [name for name, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.base_model._forward_pre_hooks
    assert list_adapters(model) == []


def test_an_unsupported_model_is_refused_before_anything_changes():
    from transformers import ElectraConfig, ElectraModel

    model = ElectraModel(
        ElectraConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(UnsupportedModelError, match="'electra' cannot be adapted: nobody has added it"):
        add_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_the_adapter_is_trainable(model):
    adapter = adapted(model)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


def test_a_second_adapter_leaves_the_first_untouched(model):
    first = adapted(model, "first", seed=1)
    before = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    wanted = logits(model)
    adapted(model, "second", seed=2, adapter_len=2, adapter_layers=3)
    assert all(torch.equal(before[key], tensor) for key, tensor in first.state_dict().items())
    assert all(parameter.requires_grad for parameter in first.parameters())
    with use_adapter(model, "first"):
        assert torch.equal(logits(model), wanted)


def test_prompts_are_drawn_anew_and_repeat_with_the_seed(model):
    draws = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        draws.append(add_adapter(model, AdapterConfig(adapter_layers=2), f"n{len(draws)}").state_dict())
    assert torch.equal(draws[0]["layers.2.prompt"], draws[2]["layers.2.prompt"])
    assert not torch.equal(draws[0]["layers.2.prompt"], draws[1]["layers.2.prompt"])
    assert not torch.equal(draws[0]["layers.1.prompt"], draws[0]["layers.2.prompt"])


def test_a_bare_decoder_can_be_adapted():
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**COMMON)).eval()
    with torch.no_grad():
        base = model(IDS).last_hidden_state
        adapter = add_adapter(model, AdapterConfig(adapter_layers=2))
        assert torch.equal(model(IDS).last_hidden_state, base)
        open_gates(adapter)
        got = model(IDS).last_hidden_state
        assert not torch.allclose(got, base, atol=1e-3)
        with use_adapter(model, [None, "default", "default"]):
            mixed = model(IDS).last_hidden_state
    torch.testing.assert_close(mixed, torch.cat([base[:1], got[1:]]), atol=1e-5, rtol=0)


def test_a_classifier_can_be_adapted():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**COMMON, num_labels=5)).eval()
    base = logits(model)
    adapter = add_adapter(model, AdapterConfig(adapter_layers=2))
    assert torch.equal(logits(model), base)
    open_gates(adapter)
    got = logits(model)
    assert got.shape == (3, 5)
    assert not torch.allclose(got, base, atol=1e-4)
    with use_adapter(model, ["default", None, "default"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed[[0, 2]], got[[0, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], base[1], atol=1e-5, rtol=0)


# removal


def test_removing_the_active_adapter_leaves_the_base_answering(pair):
    model, expected = pair
    remove_adapter(model, "b")
    assert list_adapters(model) == ["a"]
    assert torch.equal(logits(model), expected[None])
    with pytest.raises(AdapterError, match="No adapter is active: name one of a"):
        get_adapter(model)
    with use_adapter(model, "a"):
        assert torch.equal(logits(model), expected["a"])


def test_removing_another_adapter_leaves_the_active_one(pair):
    model, expected = pair
    remove_adapter(model, "a")
    assert torch.equal(logits(model), expected["b"])
    with pytest.raises(AdapterError, match="unknown adapter 'a'"):
        get_adapter(model, "a")


def test_after_the_last_removal_only_what_was_trainable_is_so_again(model):
    names, base = set(model.state_dict()), logits(model)
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted(model, "a")
    adapted(model, "b")
    remove_adapter(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapter_b" not in n)
    remove_adapter(model, "b")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert set(model.state_dict()) == names
    assert not model.base_model._forward_pre_hooks
    assert torch.equal(logits(model), base)


def test_a_removed_name_can_be_used_again(pair):
    model, expected = pair
    remove_adapter(model, "b")
    adapted(model, "b", seed=2)
    assert torch.equal(logits(model), expected["b"])


def test_an_eager_model_is_eager_again_after_removal():
    model = tiny_model("llama", attn_implementation="eager")
    base = logits(model)
    adapted(model)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    remove_adapter(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model), base)


# independence


def test_two_models_with_adapters_of_one_name_do_not_mix():
    left, right = tiny_llama(), tiny_llama()
    base = logits(left)
    adapted(left, seed=1)
    adapted(right, seed=2)
    wanted = logits(right)
    with use_adapter(left, None):
        assert torch.equal(logits(left), base)
        assert torch.equal(logits(right), wanted)
        with use_adapter(right, None):
            assert torch.equal(logits(right), base)
        assert torch.equal(logits(right), wanted)
    assert not torch.equal(logits(left), wanted)


def test_a_model_with_adapters_leaves_a_bare_model_of_its_class_alone(model):
    bare = tiny_llama()
    base = logits(bare)
    adapted(model)
    logits(model)
    with use_adapter(model, "default"):
        assert torch.equal(logits(bare), base)
    assert list_adapters(bare) == []


def test_threads_with_different_adapters_at_once_get_their_own(pair):
    model, expected = pair
    names, wrong = ["a", "b", None, "a", "b", None], []
    barrier = threading.Barrier(len(names))

    def work(name):
        with use_adapter(model, name):
            barrier.wait(60)
            for _ in range(40):
                if not torch.allclose(logits(model, IDS[:1]), expected[name][:1], atol=1e-5):
                    wrong.append(name)

    at_once([partial(work, name) for name in names])
    assert not wrong


def test_gradients_reach_the_chosen_adapter_alone(pair):
    model, _ = pair
    with use_adapter(model, "a"):
        model(IDS, labels=IDS).loss.backward()
    for parameter in get_adapter(model, "a").parameters():
        assert parameter.grad.abs().max() > 0
    chosen = {id(p) for p in get_adapter(model, "a").parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in chosen)


def test_rows_of_two_adapters_give_each_its_own_gradient(pair):
    model, _ = pair
    wanted = {}
    for name, row in (("a", 0), ("b", 1)):
        with use_adapter(model, name):
            model(IDS[row : row + 1]).logits.square().sum().backward()
        wanted[name] = [p.grad.clone() for p in get_adapter(model, name).parameters()]
    model.zero_grad()
    with use_adapter(model, ["a", "b", None]):
        model(IDS).logits.square().sum().backward()
    for name, gradients in wanted.items():
        for parameter, gradient in zip(get_adapter(model, name).parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


# decoding


def test_beam_search_with_a_list_of_repeated_names_equals_single_runs(pair):
    model, _ = pair
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = {}
    for name in ("a", None, "b"):
        with use_adapter(model, name):
            alone[name] = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert not torch.equal(alone["a"][0], alone[None][0])
    with use_adapter(model, ["a", "a", None, None, "b", "b"]):
        got = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    for row, name in enumerate(("a", None, "b")):
        assert torch.equal(got[row], alone[name][row])


def test_beam_search_with_one_name_per_prompt_repeats_them(pair):
    model, _ = pair
    options = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(IDS), "eos_token_id": None}
    alone = {name: model.generate(IDS, adapter_names=name, **options) for name in ("a", "b", None)}
    with use_adapter(model, ["a", "b", None]):
        in_block = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, adapter_names=["a", "b", None], **options), in_block)
    for row, name in enumerate(("a", "b", None)):
        assert torch.equal(in_block[2 * row : 2 * row + 2], alone[name][2 * row : 2 * row + 2])


def test_greedy_generation_uses_the_chosen_adapter_at_every_step(pair):
    model, _ = pair
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with use_adapter(model, "a"):
        got = model.generate(IDS[:1], attention_mask=torch.ones(1, IDS.shape[1]).long(), **options)
        ids = IDS[:1]
        for _ in range(8):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


# a model stays a model


def test_a_deep_copy_has_adapters_of_its_own(pair):
    model, expected = pair
    twin = copy.deepcopy(model)
    assert list_adapters(twin) == ["a", "b"]
    with use_adapter(model, "a"):
        assert torch.equal(logits(twin), expected["b"])
    open_gates(get_adapter(twin, "b"), seed=9)
    assert torch.equal(logits(model), expected["b"])
    assert not torch.allclose(logits(twin), expected["b"], atol=1e-3)
    remove_adapter(twin, "a")
    remove_adapter(twin, "b")
    assert torch.equal(logits(twin), expected[None])
    assert list_adapters(model) == ["a", "b"]
    assert torch.equal(logits(model), expected["b"])


def test_a_deep_copy_after_decoding_does_not_keep_old_prompts(pair):
    model, expected = pair
    twin = copy.deepcopy(model)
    get_adapter(twin, "b").load_state_dict(get_adapter(model, "a").state_dict())
    assert torch.equal(logits(twin), expected["a"])


def test_model_to_moves_the_base_s_dtype_and_keeps_the_adapter_s(pair):
    model, expected = pair
    model.to(torch.float64)
    assert model.lm_head.weight.dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in get_adapter(model, "b").parameters())
    torch.testing.assert_close(logits(model), expected["b"].double(), atol=1e-5, rtol=0)
    model.to(torch.float32)
    torch.testing.assert_close(logits(model), expected["b"], atol=1e-5, rtol=0)


def test_the_model_s_state_dict_carries_the_adapters(pair):
    model, expected = pair
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tiny_llama()
    for name in ("a", "b"):
        add_adapter(other, AdapterConfig(adapter_len=4, adapter_layers=2), name)
    logits(other)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(other), expected["b"])
    with use_adapter(other, "a"):
        assert torch.equal(logits(other), expected["a"])


def test_an_adapter_s_state_dict_goes_onto_another_adapter(pair):
    model, expected = pair
    state = {key: tensor.clone() for key, tensor in get_adapter(model, "a").state_dict().items()}
    get_adapter(model, "b").load_state_dict(state)
    assert torch.equal(logits(model), expected["a"])


@torch.no_grad()
def test_a_change_of_the_parameters_is_seen_by_the_next_forward(pair):
    model, expected = pair
    adapter = get_adapter(model, "b")
    for parameter in (adapter.layers[2].gate, adapter.layers[2].prompt, model.model.layers[2].self_attn.v_proj.weight):
        before = logits(model)
        parameter.mul_(0.5)
        assert not torch.allclose(logits(model), before, atol=1e-5)
    for layer in adapter.layers.values():
        layer.gate.zero_()
    model.model.layers[2].self_attn.v_proj.weight.mul_(2)
    assert torch.equal(logits(model), expected[None])


def test_a_decoder_of_an_adapted_model_is_not_adapted_a_second_time():
    model = tiny_model()
    adapted(model)
    with pytest.raises(AdapterError, match="through another object"):
        add_adapter(model.model)
    assert list_adapters(model) == ["default"]
