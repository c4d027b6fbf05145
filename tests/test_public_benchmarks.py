"""The recipes of the field's public benchmarks: they parse, their records train, their scores count what they must."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_adapter import AdapterConfig, add_adapter, save_adapter
from llama_adapter.base import load_base
from llama_adapter.data import load_examples
from llama_adapter.training.config import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES / "benchmarks"))
metamath = importlib.import_module("metamath")
commonsense = importlib.import_module("commonsense")


@pytest.mark.parametrize("name", ["metamath-3b", "commonsense-7b", "small-chat"])
def test_recipes_parse(name):
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"), {})
    assert recipe.output_dir == f"runs/{name}"


def test_records_of_metamath_train_without_a_template(tmp_path):
    line = metamath.record("What is 1 + 1?", "1 + 1 = 2\nThe answer is: 2")
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    (example,) = load_examples([str(tmp_path / "a.jsonl")]).examples
    assert example.raw
    assert example.messages[0].content == "Question: What is 1 + 1? Think step by step.\nAnswer:"
    assert example.messages[1].content == " 1 + 1 = 2\nThe answer is: 2"


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("so 3 * 4\n#### 12", "The answer is: 12", True),
        ("#### 1,200", "The answer is: $1200.", True),
        ("#### 1200", "The final answer is 1,200.00 dollars", True),
        ("#### -3", "The answer is: -$3", True),
        ("#### 18", "The answer is: 18\n\nQuestion: Tom has 5 boxes.\nAnswer:", True),  # it goes on writing
        ("#### 18", "The answer is: 17. No. The answer is: 18%", True),
        ("#### 4", "The answer is: 20/5", True),
        ("#### 2", "The answer is: 1/2", False),
        ("#### 2", "The answer is: 1/0", False),
        ("#### 7", "The answer is: 10-7", False),
        ("#### 12", "The answer is: 13", False),
        ("#### 12", "The answer is: 13 or 12", False),
        ("#### 12", "12", False),  # nor does it count in PEFT's comparison
        ("#### 3", "The answer is: \N{ARABIC-INDIC DIGIT THREE}", False),
        ("#### 12", "I do not know", False),
    ],
)
def test_the_final_number_counts(reference, answer, right):
    assert metamath.right(reference, answer) is right


@pytest.mark.parametrize("lines", ["", "\ufeff"])
def test_records_may_hold_line_separators(tmp_path, lines):
    record = {"question": "a\u2028b", "answer": "#### 2"}
    (tmp_path / "a.jsonl").write_text(lines + json.dumps(record, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert metamath.asking.read(tmp_path / "a.jsonl") == [record]


@pytest.mark.parametrize(
    ("script", "record", "options", "says"),
    [
        ("metamath", {"question": "1 + 1?", "answer": "two"}, (), "has no number behind '####'"),
        ("metamath", {"question": "1 + 1?", "answer": "#### 2"}, ("--limit", "0"), "is not a whole number above zero"),
        ("metamath", {"question": "1 + 1?", "answer": "#### 2"}, ("--batch-size", "-1"), "is not a whole number"),
        ("commonsense", {"instruction": "Cold?", "answer": True}, (), "has the answer True, which none can be"),
        ("commonsense", {"instruction": "Cold?", "answer": "true"}, ("--limit", "-1"), "is not a whole number"),
    ],
)
def test_what_could_only_be_scored_wrongly_is_refused(tmp_path, monkeypatch, capsys, script, record, options, says):
    (tmp_path / "boolq").mkdir()
    file = tmp_path / "boolq" / "test.json"
    file.write_text(json.dumps([record]))
    where = ["score", "--source", file] if script == "metamath" else ["--data", tmp_path, "--tasks", "boolq"]
    monkeypatch.setattr(sys, "argv", [script, *map(str, where), "--model", "none-is-read", *options])
    with pytest.raises(SystemExit) as ended:
        {"metamath": metamath, "commonsense": commonsense}[script].main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "answer", "choice"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("hellaswag", "ending4, not ending1", "ending4"),
        ("winogrande", "option3", None),
        ("ARC-Easy", "", None),
    ],
)
def test_first_choice_counts(task, answer, choice):
    assert commonsense.chosen(task, answer) == choice


def test_both_score_the_bundled_base(tmp_path):
    model = load_base("bundled", torch.device("cpu"), "fp32")
    add_adapter(model, AdapterConfig(adapter_len=2, adapter_layers=2, template="alpaca"))
    save_adapter(model, tmp_path / "a")
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    folder = tmp_path / "sets" / "boolq"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps([{"instruction": "Is ice cold?", "answer": "true"}]))
    math = _run(
        "metamath.py",
        "score",
        "--adapter",
        tmp_path / "a",
        "--model",
        "bundled",
        "--source",
        tmp_path / "gsm8k.jsonl",
        "--max-new-tokens",
        4,
    )
    assert json.loads(math.stdout)["questions"] == 1
    sense = _run(
        "commonsense.py", "--model", "bundled", "--data", tmp_path / "sets", "--tasks", "boolq", "--max-new-tokens", 4
    )
    assert set(json.loads(sense.stdout)) == {"boolq", "average"}
    missing = _run("commonsense.py", "--model", "bundled", "--data", tmp_path / "none", "--tasks", "boolq")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1


def _run(script, *args):
    command = [sys.executable, str(RECIPES / "benchmarks" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
