"""Decoding by a compiled step writes what plain decoding writes, and compiles no more often than it must."""

import gc
import random
import threading
import weakref

import pytest
import torch
from tiny import VOCAB, adapted, open_gates, tiny_llama, tiny_model

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.compiler import compile_layers
from llama_adapter.data import IGNORE, Encoded
from llama_adapter.data.batches import collate
from llama_adapter.errors import ModelError
from llama_adapter.inference.choice import Row
from llama_adapter.inference.compiled import ROUND, CompiledSteps
from llama_adapter.inference.engine import Engine
from llama_adapter.training.loss import packed_loss, response_losses
from llama_adapter.training.packing import pack

PROMPT = [[5, 6, 7, 8], [9, 10, 11, 12]]
GRAPHS = {"llama": 1, "qwen3": 1, "gemma2": 2}
"""How often one sort of batch is compiled; sliding windows count steps in a number, seen to change at the second."""


def rows_of(*names, prompt=PROMPT):
    """A row for each name."""
    return [Row(tokens, name, max_new_tokens=6) for tokens, name in zip(prompt, names, strict=True)]


@pytest.fixture
def counted(monkeypatch):
    """Compile with a backend that runs the graph as it is, and count the graphs."""
    graphs = []
    run = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr("llama_adapter.compiler.BACKEND", run)
    monkeypatch.setattr("llama_adapter.inference.compiled._mode", lambda model: None)
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("family", GRAPHS)
def test_one_graph_serves_every_step_adapter_and_weight(family, counted):
    model = tiny_model(family)
    adapter = adapted(model)
    second = add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2), "second")
    open_gates(second)
    engine = Engine(model)
    engine.generate(rows_of("default", "second"))  # room for both: slots of another size are another graph
    for change in (lambda: None, lambda: adapter.layers[2].prompt.data.mul_(-3)):
        change()
        for names in (["default"] * 2, ["second"] * 2, ["default", "second"], ["second", None]):
            plain = engine.generate(rows_of(*names))
            assert engine.generate(rows_of(*names), compile=True) == plain
    assert len(counted) == GRAPHS[family]


def test_padded_rows_are_compiled_right(counted):
    model = tiny_model()
    adapted(model)
    engine, prompt = Engine(model), [[5, 6, 7, 8, 9], [9, 10]]
    plain = engine.generate(rows_of("default", None, prompt=prompt))
    assert engine.generate(rows_of("default", None, prompt=prompt), compile=True) == plain
    assert counted


def test_a_model_without_adapters_is_compiled_too(counted):
    engine = Engine(tiny_model())
    assert engine.generate(rows_of(None, None), compile=True) == engine.generate(rows_of(None, None))
    assert len(counted) == 1


@pytest.mark.slow
def test_what_torch_compiles_writes_the_same():
    model = tiny_model()
    adapted(model)
    torch._dynamo.reset()
    engine = Engine(model)
    assert engine.generate(rows_of("default", None), compile=True) == engine.generate(rows_of("default", None))


def test_the_last_cache_is_used_again_where_its_size_fits():
    steps = CompiledSteps(tiny_model())
    cache = steps.cache(2, 5)
    assert steps.cache(2, ROUND) is cache
    assert steps.cache(3, 5) is not cache
    assert steps.cache(2, ROUND + 1) is not cache


def test_a_compiled_model_can_be_freed(counted):
    model = tiny_model()
    adapted(model)
    Engine(model).generate(rows_of("default", "default"), compile=True)
    gone = weakref.ref(model.base_model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_nothing_to_compile_with_is_told_in_a_sentence(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("llama_adapter.compiler.BACKEND", broken)
    monkeypatch.setattr("llama_adapter.inference.compiled._mode", lambda model: None)
    torch._dynamo.reset()
    model = tiny_model()
    adapted(model)
    with pytest.raises(ModelError, match="--compile found no way to compile"):
        Engine(model).generate(rows_of("default", "default"), compile=True)


def test_threads_share_an_engine_compiled_or_not(counted):
    model = tiny_model()
    for seed, name in enumerate("ab"):
        adapted(model, name, seed)
    engine, names = Engine(model), ["a", "b", None]
    single = {name: engine.generate(rows_of(name, name)) for name in names}
    wrong = []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(15):
            name = draw.choice(names)
            if engine.generate(rows_of(name, name), compile=draw.random() < 0.5) != single[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
    for layers in (3, 9):  # the compiler gives up after eight
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
