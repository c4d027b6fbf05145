"""Quick one-token steps give what transformers' forward gives, and are taken only where they do."""

import copy

import pytest
import torch
from tiny import adapted, tiny_config, tiny_llama, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from llama_adapter import use_adapter
from llama_adapter.inference.cache import ROOM, GrowingCache
from llama_adapter.inference.joined import Joined, as_slices
from llama_adapter.inference.steps import SHAPED, Layer, QuickSteps, use_quick_steps, why_no_quick_steps

STEPS = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(kind):
    """A tiny model with grouped heads, and biases where its family knows them; no norm is all ones."""
    config = tiny_config(kind)
    config.sliding_window = None
    if kind == "llama":
        config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def stepped(model, ids, mask=None, cache=None):
    """Logits of the last `STEPS` positions, one step each."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, start, logits = cache or GrowingCache(model.config), ids.shape[1] - STEPS, []
    for begin, end in [(0, start), *((i, i + 1) for i in range(start, ids.shape[1]))]:
        out = model(
            input_ids=ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
    return torch.cat(logits[1:], 1)


def assert_as_transformers(model, ids, logits):
    """These are what the model gives without quick steps, which it is without from now on."""
    del model.base_model.forward
    torch.testing.assert_close(logits, stepped(model, ids), **CLOSE)


@pytest.fixture
def taken(monkeypatch):
    """How many quick steps were taken."""
    steps = []
    before = QuickSteps._mask
    monkeypatch.setattr(QuickSteps, "_mask", staticmethod(lambda mask: steps.append(1) or before(mask)))
    return steps


@pytest.mark.parametrize("kind", SHAPED)
def test_steps_are_those_of_transformers(kind, taken):
    model, ids = model_of(kind), tokens(3, 12)
    adapted(model)
    adapted(model, "other", seed=5, adapter_len=7, adapter_layers=3)
    padded = torch.ones_like(ids)
    padded[0, :4] = padded[2, :1] = 0

    def everything():
        found = []
        for names in ("default", "other", None, ["default", None, "other"]):
            with use_adapter(model, names):
                found += [stepped(model, ids), stepped(model, ids, padded)]
        return found

    expected = everything()
    assert not taken
    assert use_quick_steps(model)
    made = everything()
    assert len(taken) == STEPS * len(made)
    for mine, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert min((a - b).abs().max() for a, b in zip(expected, expected[2:], strict=False)) > 1e-2


def test_a_condition_reaches_the_steps(taken):
    model, ids = model_of("llama"), tokens(2, 10)
    adapted(model)
    condition = 10 * torch.randn(2, 1, 32)
    found = []
    for _ in range(2):
        with use_adapter(model, "default", condition):
            found.append(stepped(model, ids))
        use_quick_steps(model)
    assert len(taken) == STEPS
    torch.testing.assert_close(*found, **CLOSE)
    assert (found[0] - stepped(model, ids)).abs().max() > 1e-2


def test_a_changed_gate_is_seen_at_the_next_step(taken):
    model, ids = model_of("llama"), tokens(2, 10)
    adapter = adapted(model)
    use_quick_steps(model)
    before = stepped(model, ids)
    with torch.no_grad():
        adapter.layers[2].gate.mul_(-3)
    after = stepped(model, ids)
    assert (after - before).abs().max() > 1e-2
    assert_as_transformers(model, ids, after)


def scale_all(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def replace_one(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)


def move_one(model):
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.data = weight.data * 3


@pytest.mark.parametrize("change", [scale_all, replace_one, move_one])
@torch.no_grad()
def test_whatever_is_replaced_or_moved_is_read_where_it_is(change, taken):
    model, ids = model_of("qwen2"), tokens(2, 10)
    adapted(model)
    use_quick_steps(model)
    before = stepped(model, ids)
    change(model)
    made = stepped(model, ids)
    assert (made - before).abs().max() > 1e-3
    assert_as_transformers(model, ids, made)


@torch.no_grad()
def test_weights_are_joined_once(monkeypatch):
    model, ids, made = model_of("llama"), tokens(2, 10), []
    monkeypatch.setattr("llama_adapter.inference.steps.Layer", lambda module: made.append(1) or Layer(module))
    use_quick_steps(model)
    stepped(model, ids)
    stepped(model, ids)
    assert len(made) == 3


def test_a_copy_steps_on_weights_of_its_own(taken):
    model, ids = model_of("llama"), tokens(2, 10)
    use_quick_steps(model)
    before, copied = stepped(model, ids), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    made = stepped(copied, ids)
    torch.testing.assert_close(stepped(model, ids), before, rtol=0, atol=0)
    assert len(taken) == 3 * STEPS
    assert_as_transformers(copied, ids, made)


def test_what_is_no_plain_step_goes_through_transformers(taken):
    model, ids = model_of("llama"), tokens(2, 10)
    adapted(model)
    use_quick_steps(model)
    stepped(model, ids, cache=StaticCache(config=model.config, max_cache_len=16))
    cache = GrowingCache(model.config)
    more = {"past_key_values": cache, "position_ids": torch.tensor([[0]] * 2), "use_cache": True}
    assert model(ids[:, :1], **more).logits.requires_grad  # gradients are wanted
    with torch.no_grad():
        more["position_ids"] = torch.tensor([[1]] * 2)
        assert len(model(ids[:, 1:2], output_hidden_states=True, **more).hidden_states) == 4
        more.update(position_ids=torch.tensor([[2]] * 2), use_cache=False)  # prompts are not prepared for this
        adapted_logits = model(ids[:, 2:3], **more).logits
        cache.crop(-1)
        with use_adapter(model, None):
            assert (model(ids[:, 2:3], **more).logits - adapted_logits).abs().max() > 1e-2
        taken.clear()  # the bare base has no prompts to prepare
        model(ids)
        stepped(model.train(), ids)  # where dropout may be
        model.eval().config._attn_implementation = "eager"
        stepped(model, ids)
    assert not taken


def test_a_base_that_learns_goes_through_transformers(taken):
    model = tiny_model()
    use_quick_steps(model)
    cache, positions = GrowingCache(model.config), torch.tensor([[0]])
    model(torch.tensor([[5]]), position_ids=positions, past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert not taken


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "sliding_window", 4), "sliding window"),
        (lambda model: model.model.layers[1].mlp.register_forward_hook(print), "something else has changed"),
        (lambda model: setattr(model.model.layers[0], "forward", print), "something else has changed"),
        (lambda model: model.model.layers[2].add_module("third_norm", nn.Identity()), "in another way"),
        (lambda model: model.model.layers[2].self_attn.add_module("sink", nn.Identity()), "in another way"),
        (lambda model: setattr(model.model.layers[0].mlp, "gate_proj", None), "in another way"),
        (lambda model: model.model.norm.to(torch.float64), "another precision"),
    ],
)
def test_a_model_that_is_not_what_is_known_is_left_alone(change, reason):
    model = tiny_model()
    change(model)
    assert reason in (why_no_quick_steps(model) or "")
    assert not use_quick_steps(model)
    assert "forward" not in vars(model.base_model)


def test_other_families_are_left_alone():
    model = tiny_model("gemma2")
    assert "gemma2" in (why_no_quick_steps(model) or "")
    assert not use_quick_steps(model)


def test_generation_with_nothing_said_takes_quick_steps(taken):
    model, ids = model_of("llama"), tokens(2, 6)
    adapted(model)
    written = model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    use_quick_steps(model)
    assert torch.equal(model.generate(ids, max_new_tokens=STEPS, do_sample=False), written)
    assert len(taken) == STEPS - 1


def test_a_second_time_changes_nothing():
    model = tiny_model()
    use_quick_steps(model)
    first = model.base_model.forward
    assert use_quick_steps(model)
    assert model.base_model.forward is first


def test_joined_weights_are_slices_of_one_tensor_and_keep_their_values():
    layers = [nn.Linear(6, size) for size in (4, 2, 8)]
    inputs, before = torch.randn(3, 6), [layer.weight.detach().clone() for layer in layers]
    expected = [layer(inputs) for layer in layers]
    joined = Joined(*layers)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
    for mine, theirs in zip(joined.each(inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(joined(inputs), torch.cat(expected, -1))
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    again = Joined(*layers)
    assert again.weight.data_ptr() == joined.weight.data_ptr()  # no second copy


def test_layers_of_another_kind_are_called_one_by_one():
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    layers, inputs = [nn.Linear(6, 4), Doubled(6, 2)], torch.randn(3, 6)
    joined = Joined(*layers)
    assert joined.weight is None
    torch.testing.assert_close(joined(inputs), torch.cat([layer(inputs) for layer in layers], -1))
    assert [part.shape[-1] for part in joined.each(inputs)] == [4, 2]


def test_slices_that_are_not_neighbours_are_copied():
    whole = torch.arange(12.0).reshape(6, 2)
    parts = [whole[0:2], whole[4:6], whole[2:4]]
    expected = torch.cat(parts)
    assert torch.equal(as_slices(parts), expected)
    assert torch.equal(torch.cat(parts), expected)


def test_a_base_with_joined_weights_is_saved_as_it_was(tmp_path):
    model, ids = tiny_llama(), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_quick_steps(model)
    stepped(model, ids)
    weights = [getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj")]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_growing_cache_holds_what_the_dynamic_one_holds():
    model = tiny_model()
    caches, where = (GrowingCache(model.config), DynamicCache(config=model.config)), []
    for length in (5, 1, 1, ROOM, 1, 2 * ROOM, 1):
        new = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
        for mine, theirs in zip(*(cache.update(*new, 1) for cache in caches), strict=True):
            assert torch.equal(mine, theirs)
        where.append(caches[0].layers[1].keys.data_ptr())
    assert [caches[0].get_seq_length(layer) for layer in (0, 1)] == [caches[1].get_seq_length(n) for n in (0, 1)]
    assert where[0] == where[1] == where[2]  # nothing was copied
    assert len(set(where)) < 5


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.reset(),
    ],
)
def test_a_growing_cache_that_was_changed_goes_on_from_there(change):
    model, torch_state = tiny_model(), torch.Generator().manual_seed(0)
    found = []
    for cache in (GrowingCache(model.config), DynamicCache(config=model.config)):
        torch_state.manual_seed(0)
        new = torch.randn(2, 2, 6, 16, generator=torch_state)
        for layer in range(3):
            cache.update(new, -new, layer)
        change(cache)
        rows = cache.layers[0].keys.shape[0] if cache.get_seq_length() else 2
        more = torch.randn(rows, 2, 1, 16, generator=torch_state)
        cache.update(more, -more, 0)
        found.append(cache.update(2 * more, -2 * more, 0))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_windows_stay_transformers_own():
    kinds = [type(layer).__name__ for layer in GrowingCache(tiny_config("gemma2")).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer", "DynamicSlidingWindowLayer"]
