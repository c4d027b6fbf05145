"""Quick one-token steps give what transformers' forward gives, and are taken only where they do."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import adapted, tiny_config, tiny_llama, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from llama_adapter import list_adapters, remove_adapter, use_adapter
from llama_adapter.errors import AdapterError, ConfigError, DataError, LlamaAdapterError
from llama_adapter.inference.cache import ROOM, GrowingCache
from llama_adapter.inference.choice import Choice, Row, drawn
from llama_adapter.inference.engine import Engine
from llama_adapter.inference.joined import Joined, as_slices
from llama_adapter.inference.steps import SHAPED, QuickSteps, why_no_quick_steps

STEPS = 6


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


def rows_of(ids, names, lengths=None, conditions=None):
    """Rows of `ids`, each cut to its length from the left."""
    lengths = lengths or [ids.shape[1]] * len(ids)
    conditions = conditions or [None] * len(ids)
    return [
        Row(row[len(row) - length :].tolist(), name, condition, STEPS)
        for row, name, length, condition in zip(ids, names, lengths, conditions, strict=True)
    ]


SCRIPT = tokens(3, STEPS, seed=5)
"""What every engine of these tests is made to write: logits tell more than the likeliest token of a random model."""


@pytest.fixture
def stepped(monkeypatch):
    """(engine, rows) -> logits [B, STEPS, vocabulary] of each step."""
    seen = []

    def choose(logits, rows, answers, agreed):
        seen.append(logits.clone())
        return [Choice(int(token)) for token in SCRIPT[: len(rows), len(seen) - 1]]

    def run(engine, rows):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr("llama_adapter.inference.batch.choose", choose)
            written = engine.generate(rows)
        assert written == SCRIPT[: len(rows)].tolist()
        return torch.stack(seen, 1)

    return run


@torch.no_grad()
def plain(model, rows):
    """The same from transformers' forward, each row by itself, without a cache."""
    found = []
    for row, script in zip(rows, SCRIPT.tolist(), strict=False):
        ids = torch.tensor([[*row.tokens, *script[:-1]]])
        condition = None if row.condition is None else row.condition[None]
        block = use_adapter(model, row.adapter, condition) if list_adapters(model) else nullcontext()
        with block:
            found.append(model(ids, use_cache=False).logits[0, -STEPS:])
    return torch.stack(found)


def assert_plain(stepped, engine, rows):
    """The engine steps as transformers does; returns its logits."""
    found = stepped(engine, rows)
    torch.testing.assert_close(found, plain(engine.model, rows), rtol=1e-5, atol=2e-5)
    return found


@pytest.fixture
def taken(monkeypatch):
    """How many quick steps were taken."""
    steps, before = [], QuickSteps.__call__
    monkeypatch.setattr(QuickSteps, "__call__", lambda self, *args: steps.append(1) or before(self, *args))
    return steps


@pytest.mark.parametrize("kind", SHAPED)
def test_steps_are_those_of_transformers(kind, taken, stepped):
    model, ids = model_of(kind), tokens(3, 12)
    adapted(model)
    adapted(model, "other", seed=5, adapter_len=7, adapter_layers=3)
    engine = Engine(model)
    found = []
    for names in (["default"] * 3, ["other"] * 3, [None] * 3, ["default", None, "other"], ["other", "default", None]):
        for lengths in (None, [8, 12, 11]):
            found.append(assert_plain(stepped, engine, rows_of(ids, names, lengths)))
    assert len(taken) == 10 * (STEPS - 1)
    assert min((a - b).abs().max() for a, b in zip(found, found[2:], strict=False)) > 1e-2


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "qwen3_moe", "olmo2"])
def test_other_families_step_through_transformers(kind, taken, stepped):
    model, ids = tiny_model(kind), tokens(3, 9)
    adapted(model)
    adapted(model, "other", seed=5, adapter_len=7, adapter_layers=3)
    assert_plain(stepped, Engine(model), rows_of(ids, ["default", None, "other"], [5, 9, 8]))
    assert not taken


def test_a_model_without_adapters_steps_too(taken, stepped):
    model, ids = model_of("llama"), tokens(2, 7)
    assert_plain(stepped, Engine(model), rows_of(ids, [None, None]))
    assert len(taken) == STEPS - 1
    found = Engine(model).generate(rows_of(ids, [None, None]))
    assert torch.equal(torch.tensor(found), model.generate(ids, max_new_tokens=STEPS, do_sample=False)[:, 7:])


def test_conditions_reach_the_rows_that_have_one(taken, stepped):
    model, ids = model_of("llama"), tokens(3, 10)
    adapted(model)
    engine = Engine(model)
    condition = 10 * torch.randn(1, 32)
    with_one = assert_plain(
        stepped, engine, rows_of(ids, ["default", "default", None], conditions=[condition, None, None])
    )
    assert_plain(stepped, engine, rows_of(ids, ["default"] * 3, conditions=[10 * torch.randn(4, 32), condition, None]))
    without = assert_plain(stepped, engine, rows_of(ids, ["default", "default", None]))
    assert [(a - b).abs().max() > 1e-2 for a, b in zip(with_one, without, strict=True)] == [True, False, False]
    assert len(engine.slots.lengths) - len(engine.slots.free) == 2, "only the base and the adapter keep a slot"


def scale_all(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def replace_one(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)


def move_one(model):
    weight = model.model.layers[2].self_attn.o_proj.weight
    weight.data = weight.data * -3


def hook_one(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0)


def steer(model):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.model.layers[1].register_forward_hook(lambda module, args, out: out + 3 * vector)


def patch_one(model):
    mlp = model.model.layers[0].mlp
    before = mlp.forward
    mlp.forward = lambda states: -before(states)


def replace_norm(model):
    norm = copy.deepcopy(model.model.norm)
    norm.weight = nn.Parameter(torch.randn(32), requires_grad=False)
    model.model.norm = norm


def loosen_norms(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1.0


def prune(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])


def leave_early(model):
    model.config.num_hidden_layers = 2


def hook_the_head(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out.roll(1, -1))


CHANGES = [
    scale_all, replace_one, move_one, hook_one, steer, patch_one, replace_norm, loosen_norms, hook_the_head,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_between_batches_is_seen(change, stepped):
    model, ids = model_of("qwen2"), tokens(2, 10)
    engine, rows = Engine(model), rows_of(ids, [None, None])
    before = stepped(engine, rows)
    with torch.no_grad():
        change(model)
    assert (assert_plain(stepped, engine, rows) - before).abs().max() > 1e-3


@pytest.mark.parametrize("change", [prune, leave_early])
def test_a_pruned_model_goes_through_transformers(change, taken, stepped):
    model, ids = model_of("qwen2"), tokens(2, 10)
    change(model)
    assert_plain(stepped, Engine(model), rows_of(ids, [None, None]))
    assert not taken


def write_through_data(adapter):
    adapter.layers[2].gate.data.mul_(-3)


def write_through_numpy(adapter):
    adapter.layers[2].prompt.detach().numpy()[:] *= -30


def fused_step(adapter):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.5, fused=True)
    for parameter in adapter.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def swap_data(adapter):
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter)


@pytest.mark.parametrize("write", [write_through_data, write_through_numpy, fused_step, swap_data])
def test_an_adapter_that_was_written_to_is_projected_anew(write, stepped):
    model, ids = model_of("llama"), tokens(2, 10)
    adapter = adapted(model)
    engine, rows = Engine(model), rows_of(ids, ["default"] * 2)
    before = stepped(engine, rows)
    write(adapter)
    assert (assert_plain(stepped, engine, rows) - before).abs().max() > 1e-2


def test_slots_are_given_to_the_next_after_a_removal(stepped):
    model, ids = model_of("llama"), tokens(2, 10)
    adapted(model, "kept")
    engine = Engine(model)
    for seed in range(5):
        adapted(model, "guest", seed=seed + 2, adapter_len=3 + seed)
        assert_plain(stepped, engine, rows_of(ids, ["guest", "kept"]))
        remove_adapter(model, "guest")
    assert len(engine.slots.lengths) <= 4


def test_joining_under_inference_mode_leaves_a_base_that_can_train():
    model, ids = model_of("llama"), tokens(2, 6)
    adapter = adapted(model)
    with torch.inference_mode():
        Engine(model).generate(rows_of(ids, ["default"] * 2))
    assert not model.model.layers[0].self_attn.q_proj.weight.is_inference()
    model(ids).logits.sum().backward()
    assert adapter.layers[2].gate.grad.abs().max() > 0


def test_rows_end_each_for_itself():
    model, ids = model_of("llama"), tokens(3, 8)
    whole = Engine(model).generate(rows_of(ids, [None] * 3))
    rows = [
        Row(ids[0].tolist(), max_new_tokens=2),
        Row(ids[1].tolist(), max_new_tokens=STEPS, stops=frozenset([whole[1][3]])),
        Row(ids[2].tolist(), max_new_tokens=STEPS),
    ]
    pieces = []
    found = Engine(model).generate(rows, lambda row, token: pieces.append((row, token)))
    assert found == [whole[0][:2], whole[1][: whole[1].index(whole[1][3]) + 1], whole[2]]
    assert [[token for row, token in pieces if row == number] for number in range(3)] == found


def test_an_engine_is_not_entered_from_its_own_callback():
    engine, rows = Engine(model_of("llama")), [Row([5, 6], max_new_tokens=2)]
    whole = engine.generate(rows)
    with pytest.raises(LlamaAdapterError, match="from within its own on_tokens"):
        engine.generate(rows, lambda row, token: engine.generate(rows))
    assert engine.generate(rows) == whole


def test_a_draw_does_not_depend_on_the_rows_beside_it():
    model, ids = model_of("llama"), tokens(3, 8)
    engine = Engine(model)

    def drawing(number):
        generator = torch.Generator().manual_seed(number)
        return Row(ids[number].tolist(), max_new_tokens=12, temperature=1.5, top_p=0.9, generator=generator)

    together = engine.generate([drawing(number) for number in range(3)])
    assert together == [engine.generate([drawing(number)])[0] for number in range(3)]
    assert together[0] != engine.generate([Row(ids[0].tolist(), max_new_tokens=12)])[0]


def test_top_p_draws_from_the_likeliest_tokens_of_that_probability():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, allowed in ((1e-9, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        row = Row([1], temperature=1.0, top_p=top_p, generator=torch.Generator().manual_seed(0))
        draws = [int(drawn(logits, [row])) for _ in range(400)]
        assert set(draws) == allowed
    shares = torch.bincount(torch.tensor(draws)) / 400
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "sliding_window", 4), "sliding window"),
        (lambda model: setattr(model.config, "_attn_implementation", "eager"), "sdpa"),
        (lambda model: setattr(model.config, "num_hidden_layers", 2), "another number of layers"),
        (lambda model: model.model.layers[1].mlp.register_forward_hook(print), "something else has changed"),
        (lambda model: model.lm_head.register_forward_pre_hook(print), "something else has changed"),
        (lambda model: setattr(model.model.layers[0], "forward", print), "something else has changed"),
        (lambda model: model.model.layers[2].add_module("third_norm", nn.Identity()), "in another way"),
        (lambda model: model.model.layers[2].self_attn.add_module("sink", nn.Identity()), "in another way"),
        (lambda model: setattr(model.model.layers[0].mlp, "gate_proj", None), "in another way"),
        (lambda model: model.model.norm.to(torch.float64), "another precision"),
    ],
)
def test_a_model_that_is_not_what_is_known_goes_through_transformers(change, reason):
    model = tiny_model()
    change(model)
    assert reason in (why_no_quick_steps(model) or "")
    assert QuickSteps.of(model) is None


def test_the_model_s_forward_is_never_replaced(taken):
    model, ids = model_of("llama"), tokens(2, 6)
    Engine(model).generate(rows_of(ids, [None, None]))
    assert taken
    assert not any("forward" in vars(module) for module in model.modules())


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
    Engine(model).generate(rows_of(ids, [None] * 3))
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


@torch.no_grad()
@pytest.mark.parametrize("piece", [None, 4])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral", "llama", "gpt2"])
def test_rows_that_join_and_leave_a_running_batch_get_what_they_get_alone(kind, piece):
    config = tiny_config(kind)
    if kind == "mistral":
        config.sliding_window = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, length in (("a", 3), ("b", 5)):
        adapted(model, name, seed=length, adapter_len=length, adapter_layers=2)
    asked = [
        Row(tokens(1, length, seed=number)[0].tolist(), name, max_new_tokens=new)
        for number, (length, name, new) in enumerate(
            [(7, "a", 12), (2, "b", 3), (9, None, 6), (4, "b", 9), (1, "a", 2), (11, "b", 5)]
        )
    ]
    engine = Engine(model)
    alone = [engine.generate([row])[0] for row in asked]
    waiting, members, pieces = list(asked), {}, 0
    with engine.batch() as batch:
        while waiting or batch.joining or batch.members:
            if waiting and not batch.joining:
                begun = batch.admit(waiting[:2])
                batch.begin(begun)
                members[id(waiting.pop(0))] = begun[0]
            batch.read(piece)
            batch.drop(begun[1:])  # the second leaves again, here before the whole of its prompt is read
            begun, pieces = begun[:1], pieces + 1
            batch.drop([member for member, _ in batch.choose() if member.ended])
            batch.advance()
    assert (pieces > 16) == bool(piece)
    assert [members[id(row)].answer for row in asked] == alone
    assert len({tuple(answer[:2]) for answer in alone}) > 3


# what a batch must not do to its rows, or a caller to an engine


def test_rows_that_have_ended_stay_within_the_positions_of_the_base():
    model = tiny_model("gpt2")
    model = AutoModelForCausalLM.from_config(type(model.config)(**{**model.config.to_dict(), "n_positions": 32})).eval()
    short, long = tokens(1, 4)[0].tolist(), tokens(1, 30, seed=3)[0].tolist()
    rows = [Row(short, max_new_tokens=28), Row(long, max_new_tokens=2)]
    engine = Engine(model)
    assert engine.generate(rows) == [engine.generate([row])[0] for row in rows]


def test_an_ended_row_does_not_stretch_the_rotation_of_others():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_llama(max_position_embeddings=32, rope_parameters=scaled)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight.mul_(6)
    engine = Engine(model)
    row = Row(tokens(1, 5)[0].tolist(), max_new_tokens=24)
    neighbour = Row(tokens(1, 29, seed=4)[0].tolist(), max_new_tokens=1)
    assert engine.generate([row, neighbour])[0] == engine.generate([row])[0]


def test_an_adapter_that_answers_cannot_be_removed():
    model = model_of("llama")
    adapted(model)
    engine, row = Engine(model), Row([5, 6, 7], "default", max_new_tokens=3)
    whole = engine.generate([row])
    with pytest.raises(AdapterError, match="'default' is in use"):
        engine.generate([row], lambda number, token: remove_adapter(model, "default"))
    assert engine.generate([row]) == whole
    remove_adapter(model, "default")


def test_a_base_in_training_mode_answers_without_dropout_and_trains_on():
    model = tiny_model("gpt2")
    adapted(model)
    engine, rows = Engine(model), [Row([5, 6, 7], "default", max_new_tokens=8)]
    expected = engine.generate(rows)
    model.train()
    modes = [module.training for module in model.modules()]
    assert engine.generate(rows) == expected
    assert [module.training for module in model.modules()] == modes


def other_base(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.mul_(-1.5)


def in_double(model):
    model.to(torch.float64)


@pytest.mark.parametrize("change", [other_base, in_double])
def test_prompts_are_projected_anew_through_a_changed_base(change, stepped):
    model, ids = model_of("llama"), tokens(2, 8)
    adapted(model)
    adapted(model, "other", 5, adapter_len=7)
    engine, rows = Engine(model), rows_of(ids, ["default", "other"])
    before = stepped(engine, rows)
    with torch.no_grad():
        change(model)
    assert (assert_plain(stepped, engine, rows) - before).abs().max() > (1e-3 if change is other_base else 0)


def test_an_engine_used_under_inference_mode_goes_on_outside_of_it(stepped):
    model, ids = model_of("llama"), tokens(2, 8)
    adapter = adapted(model)
    engine, rows = Engine(model), rows_of(ids, ["default"] * 2)
    with torch.inference_mode():
        engine.generate(rows)
    fused_step(adapter)
    assert_plain(stepped, engine, rows)


def test_rows_that_ask_nothing_are_refused():
    with pytest.raises(DataError, match="no token"):
        Row([])
    with pytest.raises(ConfigError, match="max_new_tokens is 0; it must be at least 1"):
        Row([1], max_new_tokens=0)


def test_every_row_draws_for_itself_and_at_any_temperature():
    engine = Engine(model_of("llama"))
    answers = engine.generate([Row([5, 6], temperature=3.0, max_new_tokens=12) for _ in range(3)])
    assert len({tuple(answer) for answer in answers}) == 3
    logits = torch.tensor([[0.1, 30.0, -2.0]])
    assert int(drawn(logits, [Row([1], temperature=1e-39)])) == 1


@torch.no_grad()
def test_a_hook_on_the_decoder_is_called():
    model, called = model_of("llama"), []
    model.model.register_forward_hook(lambda *args: called.append(1))
    Engine(model).generate([Row([5, 6], max_new_tokens=4)])
    assert len(called) == 4
