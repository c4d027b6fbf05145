"""Norms, scales, biases and LoRA on disk and in runs: what is written, read, refused, trained and gone on with."""

import json

import pytest
import torch
from runs import recipe
from safetensors.torch import load_file, save_file
from test_parts import ALL, IDS, SEVEN, add, moved, of
from tiny import HIDDEN, LAYERS, tiny_llama

from llama_adapter import AdapterCallback, AdapterConfig, add_adapter, get_adapter, load_adapter, save_adapter, train
from llama_adapter.base import load_base
from llama_adapter.cli import main
from llama_adapter.core.config import V2_FIELDS
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.formats.native import CONFIG_FILE, WEIGHTS_FILE, read_config, read_tensors
from llama_adapter.inference.engine import Row
from llama_adapter.inference.session import load_session
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import load_recipe
from llama_adapter.training.optimizer import build_optimizer
from llama_adapter.training.plan import plan_run

CHAT = {"adapter_layers": 0, "norms": True, "linear_scale": SEVEN, "linear_bias": SEVEN}


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    adapter = add(model, "v2", **ALL, lora_alpha=3.0)
    return save_adapter(model, tmp_path), adapter, of(model, "v2")


@pytest.mark.parametrize("config", [{**ALL, "lora_alpha": 3.0}, CHAT, {"lora_rank": 1, "lora_targets": ("o_proj",)}])
def test_what_was_saved_is_read_back_bit_for_bit(config, tmp_path):
    model, other = tiny_llama(), tiny_llama()
    adapter = add(model, "v2", **config)
    save_adapter(model, tmp_path)
    loaded = load_adapter(other, tmp_path, "loaded")
    assert loaded.config == adapter.config
    assert loaded.state_dict().keys() == adapter.state_dict().keys() == load_file(tmp_path / WEIGHTS_FILE).keys()
    assert torch.equal(of(other, "loaded"), of(model, "v2"))
    again = AdapterConfig(**json.loads((tmp_path / CONFIG_FILE).read_text()))
    assert again == adapter.config


def test_names_and_shapes_are_those_of_the_documents(saved):
    tensors = load_file(saved[0] / WEIGHTS_FILE)
    assert tensors["norms.norm.weight"].shape == (HIDDEN,)
    assert tensors["norms.layers.0.post_attention_layernorm.weight"].shape == (HIDDEN,)
    assert tensors["linears.layers.0.mlp.down_proj.scale"].shape == (48,)
    assert tensors["linears.layers.0.mlp.down_proj.bias"].shape == (HIDDEN,)
    assert tensors["lora.layers.2.mlp.down_proj.A"].shape == (2, 48)
    assert tensors["lora.layers.2.mlp.down_proj.B"].shape == (HIDDEN, 2)
    assert tensors["layers.2.gate_scale"].shape == (1,)
    assert len(tensors) == 2 * 3 + (1 + 2 * LAYERS) + LAYERS * 7 * 4


def test_plain_adapters_are_written_without_any_of_it(tmp_path):
    model = tiny_llama()
    add(model, "plain")
    save_adapter(model, tmp_path)
    assert not json.loads((tmp_path / CONFIG_FILE).read_text()).keys() & set(V2_FIELDS)


def test_inspect_counts_each_kind(saved, capsys):
    parts = describe_adapter(saved[0])["parts"]
    assert parts["norms"] == (1 + 2 * LAYERS) * HIDDEN
    assert parts["scales"] == LAYERS * (6 * HIDDEN + 48)
    assert parts["gate_scales"] == 2
    assert sum(parts.values()) == saved[1].num_parameters
    main(["inspect", str(saved[0])])
    assert f"{parts['lora']:,} lora" in capsys.readouterr().out


def test_inspect_without_prompts_has_no_gates(tmp_path, capsys):
    model = tiny_llama()
    add(model, "chat", **CHAT)
    save_adapter(model, tmp_path)
    main(["inspect", str(tmp_path)])
    out = capsys.readouterr().out
    assert "biases" in out
    assert "no prompts and no gates" in out
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(tmp_path), "--plot", str(tmp_path / "gates.png")])


BAD = {
    "missing half": (lambda t: t.pop("lora.layers.1.mlp.up_proj.B"), r"missing \['lora.layers.1.mlp.up_proj.B"),
    "no bias": (lambda t: [t.pop(k) for k in [*t] if k.endswith("v_proj.bias")], "missing|no tensor for bias of v"),
    "extra": (lambda t: t.update({"linears.layers.0.mlp.other.bias": torch.zeros(3)}), "unexpected"),
    "extra kind": (lambda t: t.update({"linears.layers.0.mlp.up_proj.shift": torch.zeros(3)}), "unexpected"),
    "scalar": (lambda t: t.update({"linears.layers.0.mlp.up_proj.bias": torch.zeros(())}), "unexpected|not float"),
    "rank": (lambda t: t.update({"lora.layers.0.mlp.up_proj.A": torch.zeros(3, HIDDEN)}), r"not float \[2, 32\]"),
    "whole numbers": (lambda t: t.update({"norms.norm.weight": torch.ones(HIDDEN, dtype=torch.int64)}), "not float"),
}
ONLY_WITH_BASE = {
    "missing norm": (lambda t: t.pop("norms.layers.1.input_layernorm.weight"), r"missing \['norms.layers.1.input"),
    "width": (lambda t: t.update({"linears.layers.0.mlp.up_proj.scale": torch.ones(7)}), r"not float \[32\]"),
    "layer": (lambda t: t.update({"norms.layers.7.input_layernorm.weight": torch.ones(HIDDEN)}), "unexpected"),
}


@pytest.mark.parametrize("case", [*BAD, *ONLY_WITH_BASE])
def test_files_that_do_not_fit_are_refused(saved, case):
    folder = saved[0]
    change, message = {**BAD, **ONLY_WITH_BASE}[case]
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    model = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert not hasattr(model, "_llama_adapters")
    if case in BAD:
        with pytest.raises(AdapterError, match=message):
            read_tensors(folder, read_config(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": 10**9}, "not float|missing"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_targets": ["nothing"]}, "unknown linear 'nothing'"),
        ({"lora_targets": "q_proj"}, "unexpected"),
        ({"lora_rank": 0}, "belong together"),
        ({"norms": 1}, "norms is 1"),
        ({"adapter_layers": 0}, "gate_scale need prompts"),
        ({"gate_scale": False}, "unexpected"),
    ],
)
def test_edited_configurations_are_refused(saved, values, message):
    path = saved[0] / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_llama(), saved[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_layers": 0}, "at least 1 without norms"),
        ({"lora_rank": 4}, "belong together"),
        ({"lora_alpha": 4.0}, "without lora_rank"),
    ],
)
def test_configurations_that_say_nothing_whole_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**values)


# --- runs


@pytest.mark.parametrize("config", [ALL, CHAT], ids=["all", "chat"])
def test_a_run_trains_resumes_and_answers(config, base, data, tmp_path):
    config = {**config, "lr": 0.01, "save_every": 3, "weight_decay": 0.1}
    whole = recipe(base, data, tmp_path / "whole", **config)
    planned = plan_run(whole)["adapter_parameters"]
    result = train(whole)
    assert result.best_val_loss < result.base_val_loss
    first = load_adapter(load_base(str(base), torch.device("cpu")), tmp_path / "whole" / "last")
    assert first.num_parameters == planned

    with pytest.MonkeyPatch.context() as patch:

        def stop(self, *args):
            saving(self, *args)
            raise KeyboardInterrupt

        saving = RunFolder.save_checkpoint
        patch.setattr(RunFolder, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, data, tmp_path / "parts", **config))
    train(recipe(base, data, tmp_path / "parts", **config, resume=True))
    second = load_file(tmp_path / "parts" / "last" / WEIGHTS_FILE)
    for key, tensor in first.state_dict().items():
        torch.testing.assert_close(second[key], tensor, atol=1e-6, rtol=1e-5)

    session = load_session(str(base), {"v2": str(tmp_path / "whole" / "last")}, torch.device("cpu"), "fp32")
    model = load_base(str(base), torch.device("cpu"), "fp32")
    load_adapter(model, tmp_path / "whole" / "last", "v2")
    ids = session.tokenizer("Repeat 1", return_tensors="pt").input_ids
    expected = model.generate(ids, adapter_names="v2", max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    rows = [Row(ids[0].tolist(), name, max_new_tokens=4) for name in ("v2", None)]
    assert session.engine.generate(rows)[0] == expected.tolist()


def test_a_recipe_says_the_same_in_yaml(base, tmp_path):
    file = tmp_path / "v2.yaml"
    lines = (f"model: {base}", "norms: true", "linear_bias: [q_proj, o_proj]", "lora_rank: 4", "lora_targets: q_proj")
    file.write_text("\n".join(lines))
    config = load_recipe(str(file), {}).adapter_config()
    assert (config.norms, config.linear_bias, config.lora_targets) == (True, ("q_proj", "o_proj"), ("q_proj",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norms": True, "compile": True}, "compile knows no norms"),
        ({**CHAT, "condition": "image"}, "a condition is added to prompts"),
        ({"lora_rank": 2}, "belong together"),
    ],
)
def test_recipes_that_cannot_be_are_refused(values, message, base, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        recipe(base, data, tmp_path, **values)


def test_an_unknown_linear_is_found_before_weights_are_read(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_adapter.training.loop.load_base", None)
    for command in (train, plan_run):
        with pytest.raises(ConfigError, match="unknown linear 'w1'"):
            command(recipe(base, data, tmp_path / "run", linear_bias=("w1",)))
    assert not (tmp_path / "run").exists()


def test_only_prompts_gates_and_lora_decay(base, data, tmp_path):
    adapter = add_adapter(tiny_llama(), AdapterConfig(adapter_len=4, adapter_layers=2, **ALL))
    optimizer = build_optimizer(adapter, recipe(base, data, tmp_path, weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(adapter.parameters())
    for key, parameter in adapter.named_parameters():
        assert decay[id(parameter)] == (0.0 if key.startswith(("norms.", "linears.")) else 0.5), key


def test_norms_scales_biases_and_lora_have_a_rate_of_their_own(base, data, tmp_path):
    adapter = add_adapter(tiny_llama(), AdapterConfig(adapter_len=4, adapter_layers=2, **ALL))
    optimizer = build_optimizer(adapter, recipe(base, data, tmp_path, **ALL, lr=0.1, parts_lr=0.01))
    factor = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in adapter.named_parameters():
        assert factor[id(parameter)] == pytest.approx(1.0 if key.startswith("layers.") else 0.1), key


def test_a_trainer_s_checkpoint_holds_the_parts(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    adapter = moved(add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2, **ALL)))
    examples = [{"input_ids": ids, "labels": ids} for ids in IDS]
    args = TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, learning_rate=0.01)
    Trainer(model, args, train_dataset=examples, callbacks=[AdapterCallback()]).train()
    other = tiny_llama()
    load_adapter(other, tmp_path / "checkpoint-2", "read")
    assert torch.equal(of(other, "read"), of(model, adapter.name))
    assert get_adapter(other).num_parameters == adapter.num_parameters
