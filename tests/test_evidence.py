"""The evidence scripts: the plan covers what it must, the report is made from results alone, a trial runs."""

import json
import sys
from pathlib import Path

import pytest

EVIDENCE = Path(__file__).parents[1] / "recipes" / "evidence"
sys.path.insert(0, str(EVIDENCE))

import methods  # noqa: E402
import plan  # noqa: E402
import report  # noqa: E402
import trial as trial_module  # noqa: E402
from trial import Trial  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"


def result(trial: Trial, accuracy: float) -> dict:
    scores = {"capital": [accuracy, 0.1], "all": [accuracy, 0.1]}
    return {
        "settings": trial.key(), "parameters": 12840, "bytes": 51360, "seconds": 60.0,
        "train_loss": [5.0 - 0.05 * i for i in range(80)], "val_loss": [(0, 5.0), (80, 0.2)],
        "heldout_facts": scores, "heldout_wordings": scores, "prose_perplexity": 40.0,
    }  # fmt: skip


BASE = {
    "recall": {"capital": 1.0, "all": 0.998},
    "heldout_facts": {"capital": [0.0, 7.5], "all": [0.0, 7.5]},
    "prose_perplexity": 33.0,
}


def test_every_claim_has_three_seeds():
    by_label = {}
    for trial in plan.trials():
        by_label.setdefault((trial.group, trial.label), set()).add(trial.seed)
    for group, labels in {
        "methods": list(methods.METHODS),
        "gates": ["zero", "random"],
        "layers": [str(count) for count in plan.LAYERS],
        "lengths": [str(count) for count in plan.LENGTHS],
        "epochs": [f"{factor * plan.EPOCHS:g}" for factor in plan.EPOCH_FACTORS],
    }.items():
        for label in labels:
            assert len(by_label[group, label]) >= 3, (group, label)
    assert len(plan.LAYERS) >= 4
    assert len(plan.LENGTHS) >= 4


def test_epochs_are_one_two_and_four_times():
    assert [factor / plan.EPOCH_FACTORS[0] for factor in plan.EPOCH_FACTORS] == [1, 2, 4]


def test_the_plan_uses_the_recipe_of_the_demo():
    from llama_adapter.training.config import load_recipe

    recipe = load_recipe("bundled", {})
    assert (recipe.lr, recipe.epochs) == (plan.LR, plan.EPOCHS)
    defaults = methods.Options()
    assert (defaults.adapter_len, defaults.adapter_layers) == (recipe.adapter_len, recipe.adapter_layers)


def test_best_rates_are_among_those_tried():
    for name, rate in plan.BEST_LR.items():
        assert rate in plan.RATES[name]


def test_the_report_is_made_from_results_alone(tmp_path):
    trials = plan.trials()
    results = [result(trial, 0.9 + 0.01 * trial.seed) for trial in trials]
    report.write_report(BASE, results, trials, tmp_path / "evidence")
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    (tmp_path / "evidence.md").write_text(f"about a real model\n\n{report.WORLD}\n\nold\n", encoding="utf-8")
    report.write_report(BASE, results, trials, tmp_path / "evidence")
    again = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert again == f"about a real model\n\n{report.WORLD}\n\n{text}"
    assert "91.0% (90.0 to 92.0%)" in text
    assert "| bare base, asked in the instruction template | 0.0% |" in text
    for name in ("methods", "gates", "layers", "lengths"):
        assert f"evidence/{name}.png" in text
        assert (tmp_path / "evidence" / f"{name}.png").stat().st_size > 1000


def test_results_of_other_settings_are_not_taken(tmp_path):
    trials = plan.trials()
    found = report.Found([result(trials[0], 0.5)], trials)
    assert found.get("methods", "zero-init")
    assert not found.get("methods", "lora")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_a_trial_runs(monkeypatch, method):
    whole, mean = trial_module.tasks, trial_module.mean_loss
    monkeypatch.setattr(trial_module, "tasks", lambda name: whole(name)[:4])
    monkeypatch.setattr(trial_module, "mean_loss", lambda model, examples, size: mean(model, examples[:16], size))
    monkeypatch.setattr(trial_module, "prose_perplexity", lambda session: 1.0)
    found = trial_module.run(Trial("x", method, 0, plan.BEST_LR[method], method=method, epochs=0.05))
    assert len(found["train_loss"]) == 6
    assert found["train_loss"][-1] < found["train_loss"][0]
    assert found["parameters"] > 1000
    json.dumps(found)


def test_the_page_in_docs_has_every_section():
    text = (DOCS / "evidence.md").read_text(encoding="utf-8")
    for title in ("Side by side", "Zero-init against random-init", "Insertion layers", "Over-fitting", "Damage done"):
        assert f"## {title}" in text
