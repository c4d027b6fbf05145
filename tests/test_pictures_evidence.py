"""The evidence about pictures: a plan that the recipe understands, and a page that says what the figures say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.base import load_base
from llama_adapter.training import draft
from llama_adapter.training.config import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes" / "pictures"
sys.path.insert(0, str(FOLDER))

import evidence  # noqa: E402
import results_page  # noqa: E402


def result(label, seed, scenes="one", **figures):
    settings = {"seed": seed, "scenes": scenes, "changes": {}, "gate_start": 0.0}
    shared = {"parameters": 31496, "val_loss": 0.2, "chance": 0.46, "text": 0.7, "blind": 0.45, "decoded": 0.5}
    return {"label": label, "settings": settings, **shared, **figures}


def test_the_recipe_takes_every_change_of_the_plan():
    for trial in evidence.trials():
        config = load_recipe(str(FOLDER / "recipe.yaml"), {"seed": trial.seed, **trial.changes})
        assert config.scienceqa_style == "words"
        assert config.condition == trial.changes.get("condition", "image")


def test_no_two_trials_are_the_same():
    keys = [trial.key() for trial in evidence.trials()]
    assert all(keys.count(key) == 1 for key in keys)


def test_gates_start_open_within_the_block_alone():
    base = load_base("bundled", torch.device("cpu"))
    with evidence.gates_from(1.0):
        opened = draft.add_adapter(base, AdapterConfig(adapter_layers=1), "open")
    closed = draft.add_adapter(base, AdapterConfig(adapter_layers=1), "closed")
    assert draft.add_adapter is add_adapter
    assert all(layer.gate.abs().min() > 0 for layer in opened.layers.values())
    assert all(layer.gate.abs().max() == 0 for layer in closed.layers.values())


def test_the_page_has_means_and_ranges_by_label(tmp_path):
    lines = [
        result("last layer", 0, **{"with": 0.96, "swapped": 0.5, "by_kind": {"Sizes": 1.0}}),
        result("last layer", 1, **{"with": 0.94, "swapped": 0.5, "by_kind": {"Sizes": 0.9}}),
        result("text only", 0),
        result("two things", 0, "two", **{"chance": 0.41, "with": 0.55, "swapped": 0.4, "by_kind": {"Maps": 0.6}}),
    ]
    results_page.write_page(lines, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| last layer | 95.0% (94.0% to 96.0%) |" in page
    assert "| text only |  | 50.0% | 45.0% |  | 70.0% | 0.200 | 31,496 |" in page
    assert "| last layer | 95.0% (90.0% to 100.0%) |" in page
    assert page.index("| two things | 55.0% |") > page.index("### Two drawn things in a picture")
    assert page.index("Guessing gives 41.0%.") > page.index("### Two drawn things in a picture")


def test_nothing_is_written_without_results(tmp_path):
    results_page.write_page([], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


@pytest.mark.slow
def test_the_demo_ends_with_a_page_of_pictures_and_answers(tmp_path):
    command = [sys.executable, str(FOLDER / "demo.py"), "--max-steps", "2", "--questions", "40"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Right answers to" in done.stdout
    page = (tmp_path / "runs" / "pictures-demo" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == page.count("data:image/png;base64,") > 5
