"""`llama-adapter demo`: the package's main job from any folder."""

import json

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
