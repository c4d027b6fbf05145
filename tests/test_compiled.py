"""Decoding by a compiled step writes what plain decoding writes, and compiles no more often than it must."""

import gc
import random
import weakref

import pytest
import torch
from tiny import VOCAB, adapted, open_gates, tiny_llama, tiny_model
from transformers import GenerationConfig

from llama_adapter import AdapterConfig, add_adapter, use_adapter
from llama_adapter.core.compiler import compile_layers
from llama_adapter.data import IGNORE, Encoded
from llama_adapter.data.batches import collate
from llama_adapter.errors import ModelError
from llama_adapter.inference.compiled import ROUND, compiled_steps, static_cache
from llama_adapter.inference.steps import use_quick_steps
from llama_adapter.training.loss import packed_loss, response_losses
from llama_adapter.training.packing import pack

PROMPT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
GRAPHS = {"llama": 1, "qwen3": 1, "gemma2": 2}
"""How often one sort of batch is compiled; sliding windows count steps in a number, seen to change at the second."""


def written(model, steps=6, prompt=PROMPT, compiled=False):
    """Greedy tokens."""
    cache = static_cache(model, len(prompt), prompt.shape[1] + steps) if compiled else None
    settings = GenerationConfig(max_new_tokens=steps, do_sample=False, disable_compile=True, pad_token_id=0)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, generation_config=settings, past_key_values=cache)


@pytest.fixture
def counted(monkeypatch):
    """Compile with a backend that runs the graph as it is, and count the graphs."""
    graphs = []
    for module in ("core.compiler", "inference.compiled"):
        monkeypatch.setattr(
            f"llama_adapter.{module}.BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward
        )
    monkeypatch.setattr("llama_adapter.inference.compiled._mode", lambda decoder: None)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("family", GRAPHS)
def test_one_graph_serves_every_step_adapter_and_weight(family, counted):
    model = tiny_model(family)
    adapter = adapted(model)
    second = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2), "second")
    open_gates(second)
    for change in (lambda: None, lambda: adapter.layers[2].prompt.data.mul_(-3)):
        change()
        for name in ("default", "second"):
            with use_adapter(model, name):
                plain = written(model)
                with compiled_steps(model):
                    assert torch.equal(written(model, compiled=True), plain)
    assert len(counted) == GRAPHS[family]
    for names in (["default", "second"], ["second", "default"]):
        with use_adapter(model, names):
            plain = written(model)
            with compiled_steps(model):
                assert torch.equal(written(model, compiled=True), plain)
    assert len(counted) == GRAPHS[family] + 1


@pytest.mark.slow
def test_what_torch_compiles_writes_the_same():
    model = tiny_model()
    adapted(model)
    torch._dynamo.reset()
    plain = written(model)
    with compiled_steps(model):
        assert torch.equal(written(model, compiled=True), plain)


def test_outside_the_block_the_model_is_as_it_was(counted):
    model = tiny_model()
    adapted(model)
    before = model.base_model.forward
    with compiled_steps(model):
        assert model.base_model.forward != before
    assert model.base_model.forward == before
    written(model)
    assert not counted


def test_the_last_cache_is_used_again_where_its_size_fits():
    model = tiny_model()
    cache = static_cache(model, 2, 5)
    assert static_cache(model, 2, ROUND) is cache
    assert static_cache(model, 3, 5) is not cache
    assert static_cache(model, 2, ROUND + 1) is not cache


def test_a_compiled_model_can_be_freed(counted):
    model = tiny_model()
    adapted(model)
    with compiled_steps(model):
        written(model, compiled=True)
    gone = weakref.ref(model.base_model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_nothing_to_compile_with_is_told_in_a_sentence(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("llama_adapter.inference.compiled.BACKEND", broken)
    monkeypatch.setattr("llama_adapter.inference.compiled._mode", lambda decoder: None)
    torch._dynamo.reset()
    model = tiny_model()
    adapted(model)
    with pytest.raises(ModelError, match="--compile found no way to compile"), compiled_steps(model):
        written(model, compiled=True)


def test_after_the_block_quick_steps_are_back(counted):
    model = tiny_model()
    adapted(model)
    assert use_quick_steps(model)
    quick = model.base_model.forward
    with compiled_steps(model):
        assert model.base_model.forward is not quick
        written(model, compiled=True)
    assert model.base_model.forward is quick
    assert counted


def examples(count, seed):
    """Encoded examples of different lengths that begin alike."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        ids = [3, 4, 5] + [draw.randrange(3, VOCAB) for _ in range(draw.randrange(5, 20))]
        found.append(Encoded(ids, [IGNORE] * 6 + ids[6:], truncated=False))
    return found


def packed(model, batch):
    return packed_loss(model, pack(batch))


def padded(model, batch):
    return response_losses(model, collate(batch), torch.device("cpu")).sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at what it traces
@pytest.mark.parametrize(("family", "loss"), [("llama", packed), ("llama", padded), ("gemma2", packed)])
def test_training_on_compiled_layers_is_training(family, loss, counted):
    model, plain = tiny_model(family), tiny_model(family)
    compile_layers(model)
    gradients, validation = [], []
    for each in (model, plain):
        adapter = adapted(each)
        for step in range(3):
            loss(each, examples(4 + step, step)).backward()
            with torch.no_grad():
                validation.append(loss(each, examples(3 + step, 10 + step)))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(validation[:3], validation[3:])
    assert gradients[0].abs().max() > 0
    assert counted


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("loss", [packed, padded])
def test_many_layers_are_compiled_no_more_often_than_few(loss, counted):
    """What told layers apart would be compiled for each, until the compiler gives up and goes on without."""
    compilations = []
    for layers in (4, 12):
        torch._dynamo.reset()
        counted.clear()
        model = tiny_llama(num_hidden_layers=layers)
        compile_layers(model)
        adapted(model)
        for step in range(3):
            loss(model, examples(4 + step, step)).backward()
            with torch.no_grad():
                loss(model, examples(3 + step, 10 + step))
        compilations.append(len(counted))
    assert compilations[0] == compilations[1] > 0
