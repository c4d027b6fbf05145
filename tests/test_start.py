"""What a run starts from: an adapter, a finished run, defaults that give way, packages that are there."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from runs import recipe, write_data
from safetensors.torch import load_file

from llama_adapter.core.config import AdapterConfig
from llama_adapter.errors import AdapterError, ConfigError, MissingExtraError, TrainingError
from llama_adapter.files import whole_lines
from llama_adapter.training import loop, start
from llama_adapter.training.config import TrainConfig, load_recipe
from llama_adapter.training.loop import train
from llama_adapter.training.optimizer import learning_rate
from llama_adapter.training.plan import plan_run

WEIGHTS = "adapter_model.safetensors"
OWN = {"adapter_len": None, "adapter_layers": None, "model": None}


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    """A run of two steps with K 3, identity gates."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe(base, data, folder, max_steps=2, adapter_len=3, gate_activation="identity", lr=0.1))
    return folder


def plan(base, data, tmp_path, **changes):
    return plan_run(recipe(base, data, tmp_path / "out", **changes))


# an adapter to go on from


def test_a_run_goes_on_from_an_adapter_with_its_settings(finished, data, tmp_path):
    other = write_data(tmp_path / "other.json", count=12)
    result = train(recipe(None, other, tmp_path / "on", init_from=str(finished), **OWN, max_steps=1, lr=1e-9))
    config = json.loads((tmp_path / "on" / "adapter_config.json").read_text())
    assert config == json.loads((finished / "adapter_config.json").read_text())
    before, after = load_file(finished / WEIGHTS), load_file(tmp_path / "on" / "last" / WEIGHTS)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], atol=1e-7, rtol=0)
    assert result.base_val_loss == pytest.approx(result.best_val_loss, abs=1e-4)


def test_a_run_that_went_on_from_an_adapter_resumes_without_it(finished, base, data, tmp_path):
    source = shutil.copytree(finished, tmp_path / "source")
    changes = {"init_from": str(source), **OWN, "epochs": 1.0}
    train(recipe(None, data, tmp_path / "cut", **changes, max_steps=2))
    shutil.rmtree(source)
    train(recipe(None, data, tmp_path / "cut", **changes, resume=True))
    assert load_recipe(str(tmp_path / "cut" / "recipe.yaml"), {}).adapter_len == 3
    steps = [line["step"] for line in whole_lines(tmp_path / "cut" / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_len": 10}, r"settings of its own \(adapter_len is 3, not 10\)"),
        ({"adapter_layers": 1}, "adapter_layers is 2, not 1"),
        ({"gate_activation": "tanh"}, "gate_activation is 'identity', not 'tanh'"),
        ({"template": "chat"}, "template is 'alpaca', not 'chat'"),
        ({"condition": "image"}, "condition is None, not 'image'"),
        ({"condition_lr": 0.1}, "condition_lr has no effect without a condition"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(finished, data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(None, data, tmp_path, init_from=str(finished), **{**OWN, **changes})


def test_every_setting_of_an_adapter_can_be_typed_beside_init_from(finished, base, data, tmp_path):
    same = {"adapter_len": 3, "adapter_layers": 2, "gate_activation": "identity", "template": "alpaca"}
    assert plan(base, data, tmp_path, init_from=str(finished), **same)["adapter_layers"] == 2


def test_an_adapter_for_another_base_is_refused_before_weights_are_read(finished, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("read the weights"))
    config = recipe("bundled", data, tmp_path / "out", init_from=str(finished), adapter_len=None, adapter_layers=None)
    for run in (plan_run, train):
        with pytest.raises(AdapterError, match=r"was made for .* hidden_size 32 against"):
            run(config)
    assert not (tmp_path / "out").exists()


def test_the_adapter_is_never_written_over(finished, data, tmp_path):
    for source, output in ((finished, finished), (finished / "last", finished)):
        with pytest.raises(ConfigError, match="lies in the output folder"):
            train(recipe(None, data, output, init_from=str(source), **OWN, overwrite=True))
    assert (finished / WEIGHTS).exists()


def test_an_adapter_that_is_not_there_is_one_sentence(data, tmp_path):
    with pytest.raises(AdapterError, match="is not an adapter: there is nothing of that name"):
        plan(None, data, tmp_path, init_from=str(tmp_path / "nowhere"), **OWN)


def test_data_without_a_template_need_an_adapter_without_one(finished, tmp_path):
    raw = tmp_path / "pairs.jsonl"
    raw.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " a number"}) + "\n" for i in range(6)))
    match = r"the template alpaca, and these records have a 'prompt', which takes none: call it 'instruction'"
    with pytest.raises(ConfigError, match=match):
        plan(None, raw, tmp_path, init_from=str(finished), **OWN)


def test_a_condition_becomes_the_settings_of_a_recipe():
    from llama_adapter.conditions.config import ConditionConfig

    image = ConditionConfig("image", "bundled", 20, (1, 2), 8, absent="learnt")
    found = start.settings_of(AdapterConfig(3, 2, condition=image))
    wanted = {
        "condition": "image",
        "tower": "bundled",
        "tower_depths": (1, 2),
        "condition_width": 8,
        "absent": "learnt",
    }
    assert {key: found[key] for key in wanted} == wanted
    TrainConfig(**found)
    TrainConfig(**start.settings_of(AdapterConfig(3, 2, condition=ConditionConfig("visual_prompt", "bundled", 20))))


# a finished run that goes on


def test_a_finished_run_goes_on_at_the_rates_of_the_longer_one(base, data, tmp_path):
    first, longer = recipe(base, data, tmp_path / "out", epochs=1.0), recipe(base, data, tmp_path / "out", epochs=2.0)
    train(first)
    train(dataclasses.replace(longer, resume=True))
    steps = [line for line in whole_lines(tmp_path / "out" / "metrics.jsonl") if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in steps] == pytest.approx(
        [learning_rate(first, step, 3) for step in range(3)] + [learning_rate(longer, step, 6) for step in range(3, 6)]
    )
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml"), {}).epochs == 2.0


def test_a_finished_run_says_that_nothing_was_left_to_do_and_stays_as_it_is(base, data, tmp_path, caplog):
    config = recipe(base, data, tmp_path / "out", max_steps=2)
    train(config)
    before = load_file(tmp_path / "out" / WEIGHTS)
    caplog.clear()
    caplog.set_level("INFO")
    assert train(dataclasses.replace(config, resume=True)).steps == 2
    assert "nothing was left to do" in caplog.text
    assert "steps of 8 examples, learning rate" not in caplog.text  # of a training that was none
    assert all(torch.equal(tensor, before[key]) for key, tensor in load_file(tmp_path / "out" / WEIGHTS).items())


def test_a_run_cannot_become_shorter(finished, base, data):
    config = recipe(base, data, finished, adapter_len=3, gate_activation="identity", lr=0.1, max_steps=1, resume=True)
    for run in (plan_run, train):
        with pytest.raises(TrainingError, match="has 2 steps and cannot be resumed with 1: it may become longer"):
            run(config)


def test_a_run_whose_recipe_was_cut_short_says_what_it_has_done(finished):
    recipe_file = finished / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("max_steps: 2", "max_steps: 1"))
    config = load_recipe(str(recipe_file), {"resume": True})
    for run in (plan_run, train):
        with pytest.raises(TrainingError, match="has 2 steps and cannot be resumed with 1: it may become longer"):
            run(config)


def test_resume_needs_a_run(base, data, tmp_path):
    for run in (plan_run, train):
        with pytest.raises(TrainingError, match="holds no run to resume: check --output-dir, or leave --resume out"):
            run(recipe(base, data, tmp_path / "mistyped", resume=True))
    assert not (tmp_path / "mistyped").exists()


def test_flags_alone_resume_with_the_run_s_own_settings(finished):
    before = load_recipe(str(finished / "recipe.yaml"), {})
    got = load_recipe(None, {"resume": True, "output_dir": str(finished)})
    assert got == dataclasses.replace(before, resume=True)
    longer = load_recipe(None, {"resume": True, "output_dir": str(finished), "epochs": "3"})
    assert longer == dataclasses.replace(before, resume=True, max_steps=None, epochs=3.0)


def test_a_recipe_of_a_run_from_before_defaults_gave_way_resumes(base, data, tmp_path):
    config = recipe(base, data, tmp_path / "out", warmup_epochs=None, epochs=5.0, max_steps=2)
    train(config)
    path = tmp_path / "out" / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    del values["init_from"]
    old = {"warmup_epochs": 2.0, "max_length": 512, "template": "alpaca", "gate_activation": "tanh", "absent": "zero"}
    path.write_text(yaml.safe_dump(values | old | {"tower": "bundled", "condition_width": 64, "visual_blocks": 8}))
    assert train(dataclasses.replace(config, resume=True)).steps == 2


# defaults that give way to the data and the base


@pytest.mark.parametrize(("count", "train_examples"), [(1, 1), (2, 1), (3, 2)])
def test_few_records_can_be_trained_on(base, tmp_path, count, train_examples):
    data = write_data(tmp_path / "few.json", count=count)
    report = plan(base, data, tmp_path, val_size=None)
    assert (report["train_examples"], report["val_examples"]) == (train_examples, count - train_examples)
    if count == 1:
        with pytest.raises(ConfigError, match=r"val_size 0\.5 takes 1 of 1 records"):
            plan(base, data, tmp_path, val_size=0.5)


def test_the_longest_example_gives_way_to_the_base_s_context(base, tmp_path):
    short = shutil.copytree(base, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    data = write_data(tmp_path / "data.json")
    report = plan(short, data, tmp_path)
    assert report["longest_tokens"] == 64
    assert report["truncated_examples"] > 0
    with pytest.raises(ConfigError, match="the base takes 64: pass --max-length 64"):
        plan(short, data, tmp_path, max_length=512)


def test_a_template_that_prompt_completion_records_do_not_take_is_named(base, tmp_path, caplog):
    raw = tmp_path / "pairs.jsonl"
    raw.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " a number"}) + "\n" for i in range(6)))
    plan(base, raw, tmp_path)
    assert "take no template" not in caplog.text
    plan(base, raw, tmp_path, template="alpaca")
    assert "prompt-completion records take no template: alpaca has no effect" in caplog.text


# packages


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_stops_train_and_validate(base, data, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(start, "is_installed", lambda package: package != tracker)
    command = "tensorboard" if tracker == "tensorboard" else rf"'llama-adapter\[{tracker}\]'"
    for run in (plan_run, train):
        with pytest.raises(MissingExtraError, match=f"--trackers {tracker} needs '{tracker}'.*: pip install {command}"):
            run(recipe(base, data, tmp_path / "out", trackers=(tracker,)))
    assert not (tmp_path / "out").exists()
    assert start.chosen_trackers(TrainConfig()) == ([] if tracker == "tensorboard" else ["tensorboard"])


def test_a_tracker_that_cannot_start_is_one_sentence(base, data, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise ValueError("No login. Run this and that.")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", refused)
    with pytest.raises(TrainingError, match=r"trackers \(tensorboard\) cannot start: No login\. Set them up, or"):
        train(recipe(base, data, tmp_path / "out", trackers=(), max_steps=1))


def test_a_folder_of_a_package_s_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandbx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert start.is_installed("torch")
    assert not start.is_installed("wandbx")


# what is there already


def test_somebody_s_own_recipe_makes_no_folder_a_run(base, data, tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: 0.5\n")
    (tmp_path / "last").mkdir()
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(TrainingError, match="holds other files"):
            train(recipe(base, data, tmp_path, **options))
    assert (tmp_path / "recipe.yaml").read_text() == "lr: 0.5\n"
    assert (tmp_path / "last").is_dir()


def test_a_name_that_no_file_system_takes_is_one_sentence(base, data, tmp_path):
    with pytest.raises(AdapterError, match="cannot be written"):
        train(recipe(base, data, tmp_path / ("a" * 300)))
