"""Early fusion: the first layers read the condition alone, the top ones their prompts alone; and who trains what."""

import json
from dataclasses import replace

import pytest
import torch
from runs import recipe, write_base
from tiny import HIDDEN, LAYERS, adapted, open_gates, tiny_model, tokens

from llama_adapter import AdapterConfig, add_adapter, load_adapter, save_adapter, use_adapter
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.core.routing import Routing
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.formats.native import read_config, tensor_shapes
from llama_adapter.inference.engine import Engine, Row
from llama_adapter.inference.slots import Slots
from llama_adapter.training.config import load_recipe
from llama_adapter.training.learner import Learner
from llama_adapter.training.loop import Run, train
from llama_adapter.training.optimizer import build_optimizer
from llama_adapter.training.plan import plan_run
from llama_adapter.training.prepare import prepare

VISUAL = {"kind": "visual_prompt", "tower": "t", "tower_width": 6, "blocks": 1, "block_width": 8, "block_heads": 2}
EARLY = ConditionConfig(**VISUAL, layers=1, visual_len=5)
FAMILIES = ["llama", "qwen2", "qwen3", "olmo2", "phi3", "gpt_neox", "gpt2", "gemma2"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def fused(model, name="default", seed=1, **config):
    return adapted(model, name, seed, **{"adapter_layers": LAYERS - 1, "condition": EARLY, **config})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_condition_is_the_prompt_of_the_first_layers(family):
    """A row equals a whole model whose first layer has the condition as its prompt, and the top ones their prompts."""
    model, ids, condition = tiny_model(family), tokens(), torch.randn(3, 5, HIDDEN)
    adapter = fused(model)
    assert [key for key, _ in adapter.named_parameters()][:3] == ["layers.0.gate", "layers.1.prompt", "layers.1.gate"]
    with use_adapter(model, "default", condition):
        found = model(ids).logits
    whole = adapted(model, "whole", adapter_len=5, adapter_layers=1)
    for row in range(3):
        parts = {i: (layer.prompt, layer.gate) for i, layer in adapter.layers.items()}
        parts[0] = condition[row], adapter.layers[0].gate
        whole = write(model, parts)
        with use_adapter(model, "whole"):
            expected = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert whole.config.adapter_layers == LAYERS
    assert (found[0] - found[1]).abs().max() > 1e-3


def write(model, parts):
    """An ordinary adapter on every layer with these prompts and gates, whose lengths may differ by layer."""
    config = AdapterConfig(adapter_len=5, adapter_layers=LAYERS)
    adapter = add_adapter(model, config, "whole", activate=False, replace=True)
    for i, (prompt, gate) in parts.items():
        adapter.layers[i].prompt = torch.nn.Parameter(prompt.clone())
        adapter.layers[i].gate.copy_(gate)
    return adapter


@pytest.mark.parametrize(
    "family", ["llama", "qwen2"]
)  # qwen2's values have a bias, which a prompt of zeros would let in
@torch.no_grad()
def test_a_row_without_a_picture_reads_nothing_in_the_first_layers(family):
    model, ids = tiny_model(family), tokens()
    adapter = fused(model)
    condition = torch.randn(3, 5, HIDDEN)
    condition[1] = 0
    with use_adapter(model, "default", condition):
        found = model(ids).logits
    without = model(ids).logits
    torch.testing.assert_close(found[1], without[1], atol=1e-6, rtol=1e-6)
    assert (found[0] - without[0]).abs().max() > 1e-3
    adapter.layers[0].gate.zero_()
    with use_adapter(model, "default", condition):
        torch.testing.assert_close(model(ids).logits, without, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_rows_of_all_kinds_in_one_batch():
    """Early fusion, a condition added, text alone and the bare base; the prompts are of unlike lengths."""
    model, ids = tiny_model(), tokens(5)
    late = replace(EARLY, layers=None, visual_len=None)
    fused(model, "early", adapter_len=7)
    adapted(model, "late", 2, adapter_len=5, adapter_layers=LAYERS, condition=late)
    fused(model, "wide", 3, condition=replace(EARLY, layers=2), adapter_layers=1)
    names = ["early", "late", None, "wide", "early"]
    condition = torch.randn(5, 5, HIDDEN)
    with use_adapter(model, names, condition):
        mixed = model(ids).logits
    for row, name in enumerate(names):
        with use_adapter(model, name, condition[row : row + 1]):
            torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)
    with use_adapter(model, ["early", "late", None, "wide", "early"]):
        assert (model(ids).logits - mixed)[[0, 1, 3, 4]].abs().amax((1, 2)).min() > 1e-3


@torch.no_grad()
def test_the_engine_answers_as_the_model_does():
    """Its slots hold other lengths for the first layers than for the top ones, with and without a picture."""
    model, ids = tiny_model(), tokens(4)
    model.generation_config.eos_token_id = None
    fused(model, "early", adapter_len=3)
    fused(model, "other", 3, adapter_len=7)
    names, condition = ["early", "other", "early", None], 2 * torch.randn(4, 5, HIDDEN)
    condition[2] = 0
    with use_adapter(model, names, condition):
        expected = model.generate(ids, **GREEDY)[:, ids.shape[1] :].tolist()
    plain = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "stops": frozenset()}
    given = [condition[0], condition[1], None, None]
    rows = [
        Row(tokens=ids[i].tolist(), adapter=names[i], condition=given[i], generator=torch.Generator(), **plain)
        for i in range(4)
    ]
    engine = Engine(model)
    for _ in range(2):
        assert engine.generate(rows) == expected
        rows, expected = rows[::-1], expected[::-1]


@torch.no_grad()
def test_slots_forget_nothing_of_other_layers():
    model = tiny_model()
    adapter = fused(model)
    slots = Slots(model)
    text, seen = slots.admit(adapter), slots.fill(Routing((adapter,), condition=torch.randn(1, 5, HIDDEN)))
    found = slots.rows([text, seen])
    assert {layer: prompts.key.shape[2] for layer, prompts in found.items()} == {0: 5, 1: 4, 2: 4}
    assert found[0].value[0].abs().max() == 0 < found[0].value[1].abs().max()
    assert 0 not in slots.rows([text]) or slots.rows([text])[0].value.abs().max() == 0


def test_a_file_and_back(tmp_path):
    model, ids, condition = tiny_model(), tokens(), torch.randn(3, 5, HIDDEN)
    adapter = fused(model, gate_scale=True)
    save_adapter(model, tmp_path)
    assert read_config(tmp_path) == adapter.config
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter.state_dict().items()}
    assert shapes == tensor_shapes(adapter.config)
    assert shapes["layers.0.gate"] == (4,)
    assert "layers.0.prompt" not in shapes
    assert shapes["condition.visual_query.weight"] == (5, 8)
    other = tiny_model()
    load_adapter(other, tmp_path)
    with torch.no_grad(), use_adapter(model, "default", condition), use_adapter(other, "default", condition):
        assert torch.equal(model(ids).logits, other(ids).logits)
    described = describe_adapter(tmp_path)["layers"]
    assert [layer["layer"] for layer in described] == [0, 1, 2]
    assert described[0]["prompt_rms"] is None


def test_layers_may_not_overlap():
    model = tiny_model()
    with pytest.raises(ConfigError, match="The first 2 layers for the condition and the top 2 for the prompts overlap"):
        fused(model, condition=replace(EARLY, layers=2), adapter_layers=2)
    adapter = add_adapter(model, AdapterConfig(condition=replace(EARLY, layers=2)))
    assert adapter.config.adapter_layers == 1
    with pytest.raises(AdapterError, match="does not fit adapter 'default'"):
        use_adapter(model, "default", torch.randn(3, 5, HIDDEN + 1))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers": None}, "visual_len is for kinds patches and visual_prompt with layers"),
        ({"kind": "image"}, "visual_len is for kinds patches and visual_prompt with layers"),
        ({"absent": "learnt"}, "absent is 'learnt', and in early fusion"),
        ({"layers": 0}, "layers is 0; it must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(EARLY, **change)


# training


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a tower's name, and records of which half have a picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("world")
    base = write_base(folder / "base")
    records = []
    for number in range(16):
        record = {"instruction": f"colour {number}?", "input": "", "output": ["red", "blue"][number % 2]}
        if number % 4 < 2:
            record["image"] = f"{number}.png"
            Image.new("RGB", (16, 16), record["output"]).save(folder / record["image"])
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return base, folder / "data.json"


def settings(**changes):
    values = {"condition": "visual_prompt", "tower": "bundled", "visual_blocks": 1, "visual_width": 16}
    return {**values, "visual_heads": 2, "condition_layers": 1, "visual_len": 3, **changes}


def made_run(base, data, output, **changes):
    from accelerate import Accelerator

    from llama_adapter.base import load_base, load_tokenizer
    from llama_adapter.conditions.perception import Perception
    from llama_adapter.training.checkpoint import RunFolder
    from llama_adapter.training.perceive import condition_of

    config = recipe(base, data, output, **settings(**changes))
    prepared = prepare(config, load_tokenizer(config.model))
    condition = condition_of(config, prepared)
    model = load_base(config.model, torch.device("cpu"), "fp32")
    torch.manual_seed(0)
    adapter = add_adapter(model, replace(config.adapter_config(), condition=condition))
    open_gates(adapter)
    perception = Perception(condition, torch.device("cpu"))
    optimizer = build_optimizer(adapter, config)
    expert = Learner(config, RunFolder(output), prepared, model, adapter, optimizer, perception=perception)
    return Run([expert], Accelerator(cpu=True), model), expert


def gradients(run, expert, examples):
    """Whether each parameter gets a gradient in one optimiser step over these examples."""
    run._gradients([(expert, examples)], False)
    return {key: bool(parameter.grad.abs().sum() > 0) for key, parameter in expert.adapter.named_parameters()}


@pytest.mark.parametrize("disjoint", [True, False])
def test_whose_gradient_reaches_what(world, tmp_path, disjoint):
    run, expert = made_run(*world, tmp_path, disjoint=disjoint)
    kinds = [e for e in expert.data.train if e.media], [e for e in expert.data.train if not e.media]
    assert all(len(kind) > 2 for kind in kinds)
    pictures = {"condition", "layers.0"}
    of_pictures, of_texts, of_both = (gradients(run, expert, kind) for kind in (*kinds, [*kinds[0], *kinds[1]]))
    # A key's bias moves all scores alike, which a softmax does not see.
    seen = {key for key in of_pictures if key.startswith(tuple(pictures))}
    assert all(of_pictures[key] for key in seen)
    assert all(of_texts[key] is not (key in seen) for key in of_texts)
    assert all(of_pictures[key] is not (disjoint and key not in seen) for key in of_pictures)
    assert all(of_both.values())
    assert all(parameter.requires_grad for parameter in expert.adapter.parameters())


def test_disjoint_gradients_are_those_of_each_kind_alone(world, tmp_path):
    """Joint training adds up what image-text records give the one group, and texts the other."""
    run, expert = made_run(*world, tmp_path, disjoint=True)
    kinds = [[e for e in expert.data.train if bool(e.media) is media] for media in (True, False)]
    found = {}
    for kind in kinds:
        run._gradients([(expert, kind)], False)
        tokens_of = sum(label != -100 for e in kind for label in e.labels[1:])
        for key, parameter in expert.adapter.named_parameters():
            found[key] = found.get(key, 0) + parameter.grad * tokens_of
    both = [*kinds[0], *kinds[1]]
    run._gradients([(expert, both)], False)
    total = sum(label != -100 for e in both for label in e.labels[1:])
    for key, parameter in expert.adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, found[key] / total, atol=1e-6, rtol=1e-4, msg=key)


def test_a_run_from_recipe_to_file(world, tmp_path):
    config = recipe(*world, tmp_path / "run", **settings(disjoint=True))
    plan = plan_run(config)
    result = train(config)
    assert result.best_val_loss < result.base_val_loss
    found = read_config(tmp_path / "run")
    assert (found.condition.layers, found.condition.visual_len, found.adapter_layers) == (1, 3, 2)
    assert describe_adapter(tmp_path / "run")["parameters"] == plan["adapter_parameters"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"condition_layers": None, "visual_len": None, "disjoint": True}, "disjoint needs early fusion"),
        ({"condition": None}, "condition_layers has no effect without a condition"),
        ({"condition_layers": 2}, "The first 2 layers for the condition and the top 2 for the prompts overlap"),
    ],
)
def test_recipes_that_cannot_be(world, tmp_path, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train(recipe(*world, tmp_path / "run", **settings(**change)))
    assert not (tmp_path / "run").exists()


def test_the_paper_s_recipe():
    config = load_recipe("recipes/v2-7b.yaml", {})
    condition = ConditionConfig(
        "visual_prompt", config.tower, 768, layers=config.condition_layers, visual_len=config.visual_len
    )
    assert (config.adapter_layers, config.condition_layers, config.visual_len, config.disjoint) == (31, 1, 20, True)
    shape = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    shapes = tensor_shapes(replace(config.adapter_config(), base_shape=shape, condition=condition))
    assert sum(key.endswith(".prompt") for key in shapes) == 31
    assert sum(key.endswith(".gate") for key in shapes) == 32
    assert shapes["condition.visual_query.weight"] == (20, 768)
