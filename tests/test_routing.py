"""Who serves which row: an argument of the call, or a block that is found from wherever its code runs."""

import asyncio
import contextvars
import random
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import adapted, at_once, tiny_model, tokens

from llama_adapter import (
    active_adapter,
    disable_adapter,
    get_adapter,
    list_adapters,
    remove_adapter,
    set_adapter,
    use_adapter,
)
from llama_adapter.core import model as core_model
from llama_adapter.errors import AdapterError

IDS = tokens(3, 6)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    """A Llama with open adapters "a" and "b"; "b" is active."""
    model = tiny_model()
    adapted(model, "a", 1)
    adapted(model, "b", 2)
    return model


@torch.no_grad()
def last(model, ids=IDS[:1], **options):
    return model(ids, **options).logits[0, -1]


@pytest.fixture
def served(model):
    """What each name gives; they all differ."""
    found = {name: last(model, adapter_names=name) for name in ("a", "b", None)}
    assert min((found["a"] - found["b"]).abs().max(), (found["b"] - found[None]).abs().max()) > 1e-2
    return found


# names as an argument


def test_names_of_a_forward_serve_its_rows(model, served):
    with torch.no_grad():
        mixed = model(IDS[:1].repeat(3, 1), adapter_names=["b", None, "a"]).logits[:, -1]
    for row, name in enumerate(("b", None, "a")):
        torch.testing.assert_close(mixed[row], served[name], atol=1e-5, rtol=1e-5)


def test_names_of_a_call_win_over_the_block_around_it(model, served):
    with use_adapter(model, "a"):
        assert torch.equal(last(model, adapter_names="b"), served["b"])
        assert torch.equal(last(model, adapter_names=None), served[None])


def test_gradients_follow_the_names_of_a_forward(model):
    model(IDS, labels=IDS, adapter_names=["a", None, None]).loss.backward()
    assert get_adapter(model, "a").layers[2].gate.grad.abs().max() > 0
    assert get_adapter(model, "b").layers[2].gate.grad is None or not get_adapter(model, "b").layers[2].gate.grad.any()


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", None, "a"], []])
def test_too_few_or_too_many_names_are_refused(model, names):
    with pytest.raises(AdapterError, match=f"{len(names)} names for a batch of 3 rows"):
        model(IDS, adapter_names=names)


def test_unknown_names_are_refused_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(type(model.model.embed_tokens), "forward", lambda *args: pytest.fail("computed"))
    for call in (model, model.generate):
        with pytest.raises(AdapterError, match=r"unknown adapter 'c'; known: a, b"):
            call(IDS, adapter_names=["a", "c", None])


def test_generate_takes_names_and_gives_each_row_its_single_run(model):
    mixed = model.generate(IDS, adapter_names=["a", None, "b"], **GREEDY)
    for row, name in enumerate(("a", None, "b")):
        assert torch.equal(mixed[row], model.generate(IDS[row : row + 1], adapter_names=name, **GREEDY)[0])
        with use_adapter(model, name):
            assert torch.equal(mixed[row], model.generate(IDS[row : row + 1], **GREEDY)[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 6}])
def test_generate_refuses_names_that_are_not_one_per_prompt(model, options):
    four = tokens(4, 6)
    for count in (1, 2, 3):
        for call in ({"inputs": four}, {"input_ids": four}):
            with pytest.raises(AdapterError, match=f"Got {count} names for a batch of"):
                model.generate(**call, adapter_names=["a", None, "b"][:count], **GREEDY, **options)
    with use_adapter(model, "a", torch.randn(2, 32)), pytest.raises(AdapterError, match="Got 2 conditions"):
        model.generate(four, **GREEDY, **options)
    model.generate(four, adapter_names=["a", None, "b", "a"], **GREEDY, **options)


def test_names_given_to_a_model_without_adapters_are_refused(model):
    for name in ("a", "b"):
        remove_adapter(model, name)
    for call in (model, model.generate):
        with pytest.raises((AdapterError, ValueError), match="adapter_names"):
            call(IDS, adapter_names="a")


def test_generate_is_transformers_own_again_after_the_last_removal(model):
    assert "generate" in vars(model)
    remove_adapter(model, "a")
    remove_adapter(model, "b")
    assert "generate" not in vars(model)
    assert list_adapters(model) == []


# the active adapter


def test_set_adapter_chooses_who_serves_by_default(model, served):
    for name in ("a", None, "b"):
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert torch.equal(last(model), served[name])
    with pytest.raises(AdapterError, match="unknown adapter 'c'"):
        set_adapter(model, "c")
    assert active_adapter(model) == "b"


def test_disable_adapter_is_the_bare_base_within_its_block(model, served):
    with disable_adapter(model):
        assert torch.equal(last(model), served[None])
    assert torch.equal(last(model), served["b"])


def test_remove_takes_the_active_adapter_by_default(model):
    remove_adapter(model)
    assert list_adapters(model) == ["a"]
    with pytest.raises(AdapterError, match="No adapter is active: name one of a"):
        remove_adapter(model)


# blocks, from wherever their code runs


def stream(model, name, steps=3):
    with use_adapter(model, name):
        for _ in range(steps):
            yield last(model)


def test_a_generator_keeps_its_adapter_in_any_context_and_thread(model, served):
    found, chunks = [], stream(model, "a")
    found.append(contextvars.copy_context().run(next, chunks))
    thread = threading.Thread(target=lambda: found.append(next(chunks)))
    thread.start()
    thread.join()
    found.append(next(chunks))
    assert all(torch.equal(logits, served["a"]) for logits in found)
    assert next(chunks, None) is None
    assert torch.equal(last(model), served["b"])


def test_generators_that_take_turns_keep_their_own(model, served):
    streams = {name: stream(model, name) for name in ("a", None, "b")}
    for name in ("a", "b", None, "b", "a", None):
        assert torch.equal(next(streams[name]), served[name])
    streams["b"].close()
    assert torch.equal(next(streams["a"]), served["a"])


def test_a_generator_that_opens_its_block_through_contextlib_keeps_its_own(model, served):
    @contextmanager
    def speaking(name):
        with use_adapter(model, name):
            yield

    def by_helper(name):
        with speaking(name):
            while True:
                yield last(model)

    def by_stack(name):
        with ExitStack() as stack:
            stack.enter_context(use_adapter(model, name))
            while True:
                yield last(model)

    for make in (by_helper, by_stack):
        one, other = make("a"), make("b")
        for _ in range(2):
            assert torch.equal(next(one), served["a"])
            assert torch.equal(next(other), served["b"])
        one.close()
        other.close()


def test_helpers_nest(model, served):
    @contextmanager
    def speaking(name):
        with use_adapter(model, name):
            yield

    with speaking("a"), speaking(None):
        assert torch.equal(last(model), served[None])
    with speaking("a"):
        with speaking("b"):
            pass
        assert torch.equal(last(model), served["a"])


def test_tasks_and_their_threads_get_their_own(model, served):
    async def one(name):
        with use_adapter(model, name):
            await asyncio.sleep(0)
            here = last(model)
            await asyncio.sleep(0)
            return here, await asyncio.to_thread(last, model)

    async def all_of_them():
        return await asyncio.gather(*(one(name) for name in ("a", None, "b", "a")))

    for name, found in zip(("a", None, "b", "a"), asyncio.run(all_of_them()), strict=True):
        assert all(torch.equal(logits, served[name]) for logits in found)


def in_thread(function):
    """What a function gives or raises in a thread of its own."""
    found = []

    def work():
        try:
            found.append(function())
        except AdapterError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    return found[0]


def test_a_thread_that_no_block_reaches_is_refused_and_not_served_by_another(model, served):
    with use_adapter(model, "a"):
        for call in (lambda: last(model), lambda: model.generate(IDS, **GREEDY)):
            refusal = in_thread(call)
            assert isinstance(refusal, AdapterError)
            assert "not around this call" in str(refusal)
        assert torch.equal(in_thread(lambda: last(model, adapter_names="a")), served["a"])
        assert torch.equal(last(model), served["a"])
    assert torch.equal(in_thread(lambda: last(model)), served["b"])


def test_continuous_batching_is_served_by_the_active_adapter_or_refused(model, served):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)

    def batch():
        out = model.generate_batch(
            [row.tolist() for row in IDS], generation_config=settings, continuous_batching_config=small,
            progress_bar=False,
        )  # fmt: skip
        return list(out.values())

    for name in ("a", "b"):
        set_adapter(model, name)
        expected = model.generate(IDS, generation_config=settings)[:, IDS.shape[1] :]
        assert sorted(result.generated_tokens for result in batch()) == sorted(expected.tolist())
    with use_adapter(model, "a"):
        refused = batch()
    assert all(not result.generated_tokens for result in refused)
    assert all("not around this call" in str(result.error) for result in refused)


# removal


def test_an_adapter_that_a_block_uses_cannot_be_removed(model, served):
    chunks = stream(model, "a")
    next(chunks)
    with pytest.raises(AdapterError, match="'a' is in use"):
        remove_adapter(model, "a")
    assert torch.equal(next(chunks), served["a"])
    chunks.close()
    with use_adapter(model, ["b", "a", None]), pytest.raises(AdapterError, match="in use"):
        remove_adapter(model, "a")
    remove_adapter(model, "a")
    assert list_adapters(model) == ["b"]


def test_an_adapter_that_a_generation_uses_cannot_be_removed(model):
    from transformers import LogitsProcessor

    class Removing(LogitsProcessor):
        def __call__(self, ids, scores):
            remove_adapter(model, "a")

    with pytest.raises(AdapterError, match="'a' is in use"):
        model.generate(IDS, adapter_names="a", logits_processor=[Removing()], **GREEDY)


def test_an_adapter_removed_while_a_forward_runs_ends_that_forward(model):
    handle = model.model.layers[1].register_forward_pre_hook(lambda *args: remove_adapter(model, "a"))
    with pytest.raises(AdapterError, match="'a' was removed while a forward used it"):
        model(IDS, adapter_names="a")
    handle.remove()


def test_the_last_adapter_removed_while_a_forward_runs_ends_that_forward():
    model = tiny_model()
    adapted(model, "only")
    generate = model.generate
    model.model.layers[1].register_forward_pre_hook(lambda *args: remove_adapter(model, "only"))
    with pytest.raises(AdapterError, match="'only' was removed while a forward used it"):
        model(IDS)
    with pytest.raises(AdapterError, match="has no adapter"):
        generate(IDS)


def test_a_name_that_comes_back_is_another_adapter(model, served):
    def swap(*args):
        remove_adapter(model, "a")
        adapted(model, "a", 9)

    handle = model.model.layers[1].register_forward_pre_hook(swap)
    with pytest.raises(AdapterError, match="was removed while a forward used it"):
        model(IDS, adapter_names="a")
    handle.remove()
    assert not torch.allclose(last(model, adapter_names="a"), served["a"], atol=1e-3)


def test_a_block_can_be_entered_once(model):
    block = use_adapter(model, "a")
    with block, pytest.raises(AdapterError, match="open already"), block:
        pass


def test_nested_forwards_inside_a_generation_follow_their_own_block(model, served):
    from transformers import LogitsProcessor

    class Contrast(LogitsProcessor):
        def __call__(self, ids, scores):
            with use_adapter(model, None):
                bare = last(model)
            assert torch.equal(bare, served[None])
            return scores

    model.generate(IDS[:1], adapter_names="a", logits_processor=[Contrast()], **GREEDY)


@pytest.mark.slow
def test_eight_threads_of_random_requests_get_their_single_runs_or_the_refusal(model, served):
    adapted(model, "c", 3)
    wrong, refused = [], []
    single = {name: model.generate(IDS[:1], adapter_names=name, **GREEDY) for name in ("a", "b", None)}

    def work(seed):
        draw = random.Random(seed)
        for _ in range(200):
            name, kind = draw.choice(["a", "b", None, "gone"]), draw.randrange(4)
            try:
                if kind == 0:
                    right = torch.equal(last(model, adapter_names=name), served[name])
                elif kind == 1:
                    with use_adapter(model, name):
                        right = torch.equal(last(model), served[name])
                elif kind == 2:
                    right = torch.equal(model.generate(IDS[:1], adapter_names=name, **GREEDY), single[name])
                else:
                    right = torch.equal(next(stream(model, name)), served[name])
            except AdapterError as error:
                right = name == "gone" and "unknown adapter 'gone'" in str(error)
                refused.append(name)
            if not right:
                wrong.append((name, kind))

    at_once([partial(work, seed) for seed in range(8)])
    assert not wrong
    assert set(refused) == {"gone"}


def test_requests_say_which_adapters_they_use(model):
    registry = vars(model)["_llama_adapters"]
    request = registry.request(["a", None])
    assert request.uses(get_adapter(model, "a"))
    assert not request.uses(get_adapter(model, "b"))
    assert replace(request, adapters=get_adapter(model, "b")).uses(get_adapter(model, "b"))
    assert core_model.list_adapters(model) == ["a", "b"]


# what stands between a block and its owner


class Speaking:
    """A context manager of somebody's own that opens a block."""

    def __init__(self, model, name):
        self.block = use_adapter(model, name)

    def __enter__(self):
        self.block.__enter__()

    def __exit__(self, *exception):
        self.block.__exit__(*exception)


def test_a_block_that_a_helper_opened_belongs_to_its_caller(model, served):
    def enter(stack):
        stack.enter_context(use_adapter(model, "a"))

    with use_adapter(model, "b"):
        with Speaking(model, "a"):
            assert torch.equal(last(model), served["a"])
        with ExitStack() as stack:
            enter(stack)
            assert torch.equal(last(model), served["a"])
        assert torch.equal(last(model), served["b"])

    def turns(name):
        with Speaking(model, name):
            while True:
                yield last(model)

    one, other = turns("a"), turns(None)
    for _ in range(2):
        assert torch.equal(next(one), served["a"])
        assert torch.equal(next(other), served[None])


def test_a_generator_s_block_is_not_its_consumer_s(model, served):
    chunks = stream(model, "a")
    next(chunks)
    with pytest.raises(AdapterError, match="not around this call"):
        last(model)
    assert torch.equal(last(model, adapter_names="b"), served["b"])
    chunks.close()
    assert torch.equal(last(model), served["b"])

    async def consume():
        async def agen():
            with use_adapter(model, "a"):
                yield last(model)
                yield last(model)

        async for logits in agen():
            assert torch.equal(logits, served["a"])
            with pytest.raises(AdapterError, match="not around this call"):
                last(model)

    asyncio.run(consume())


def test_a_generation_is_nobody_else_s_block(model, served):
    from transformers import LogitsProcessor

    found = []

    class Elsewhere(LogitsProcessor):
        def __call__(self, ids, scores):
            found.append(in_thread(lambda: last(model)))
            found.append(in_thread(lambda: model.generate(IDS[:1], **GREEDY)))
            return scores

    alone = model.generate(IDS[:1], **GREEDY)
    model.generate(IDS[:1], adapter_names="a", logits_processor=[Elsewhere()], **GREEDY)
    assert all(torch.equal(logits, served["b"]) for logits in found[::2])
    assert all(torch.equal(tokens, alone) for tokens in found[1::2])


def test_a_forward_of_another_size_inside_a_generation_is_refused(model):
    from transformers import LogitsProcessor

    class Twice(LogitsProcessor):
        def __call__(self, ids, scores):
            model(torch.cat([IDS, IDS]))
            return scores

    with pytest.raises(AdapterError, match="Got 3 names for a batch of 6 rows"):
        model.generate(IDS, adapter_names=["a", None, "b"], logits_processor=[Twice()], **GREEDY)


def test_names_do_not_drop_the_condition_of_the_block_around(model):
    with use_adapter(model, "a", torch.randn(3, 32)):
        with pytest.raises(AdapterError, match="inside a use_adapter block with a condition"):
            model(IDS, adapter_names="a")
        with use_adapter(model, "b"):
            model(IDS, adapter_names="a")


def test_a_generate_of_somebody_s_own_is_called_and_comes_back():
    model, calls = tiny_model(), []

    def mine(*args, **kwargs):
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = mine
    adapted(model, "a", 1)
    adapted(model, "b", 2)
    assert torch.equal(
        model.generate(IDS, adapter_names="a", **GREEDY)[0], model.generate(IDS[:1], adapter_names="a", **GREEDY)[0]
    )
    assert len(calls) == 2
    remove_adapter(model, "a")
    remove_adapter(model, "b")
    assert model.generate is mine


def test_a_decoder_inside_another_model_is_routed_when_called_alone():
    from test_composites import llava

    model = llava()
    adapted(model, "a", 1)
    embeds = torch.randn(1, 5, model.config.text_config.hidden_size)
    with torch.no_grad():
        bare = model.model.language_model(inputs_embeds=embeds, adapter_names=None).last_hidden_state
        served = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    assert (served - bare).abs().max() > 1e-3


def test_a_first_adapter_that_cannot_be_built_leaves_the_model_alone(monkeypatch):
    from llama_adapter import AdapterConfig, add_adapter

    model = tiny_model()
    before = list(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            add_adapter(model, AdapterConfig(adapter_layers=1))
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.model._forward_pre_hooks
    model.generate(IDS, **GREEDY)
    add_adapter(model)


def test_an_eager_model_runs_where_it_was_pickled_to(tmp_path):
    import subprocess

    model = tiny_model("llama", attn_implementation="eager")
    adapted(model)
    expected = last(model)
    torch.save(model, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    torch.save(model(torch.tensor({IDS[:1].tolist()})).logits[0, -1], {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, atol=1e-6, rtol=1e-5)


def test_no_block_is_lost_where_threads_open_many_at_once(model):
    scope, lost = vars(model)["_llama_adapters"].scope, []

    def work():
        for _ in range(1500):
            block = use_adapter(model, "a")
            with block:
                if block not in scope.blocks:
                    lost.append(block)

    at_once([work] * 8)
    assert not lost
    assert not scope.blocks
