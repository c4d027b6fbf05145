"""`llama-adapter quickstart`: what it finds, what it chooses, and that the recipe runs."""

import json
import shlex
import shutil

import pytest
from runs import write_data

from llama_adapter.cli import main
from llama_adapter.settings import BUNDLED_LR
from llama_adapter.training.config import load_recipe
from llama_adapter.training.prepare import ENOUGH
from llama_adapter.training.quickstart import choose_length, choose_sizes, look_at, percentile

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def records(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def test_facts_of_the_data_are_counted(base, tmp_path):
    good = [{"instruction": f"Say {i}", "output": "yes " * (i + 1)} for i in range(20)]
    found = look_at(records(tmp_path / "d.jsonl", [*good, good[0], {"instruction": "x", "output": ""}, 5]), str(base))
    assert (found.found["records"], found.found["usable_records"]) == (23, 21)
    assert found.found["format"] == "instructions (21)"
    assert found.recipe["skip_bad_records"] is True
    text = "\n".join(found.warnings)
    for words in (
        "2 records cannot be used (1 empty ones)",
        "record 22",
        "1 records stand there twice",
        "21 records are few",
    ):
        assert words in text
    tokens = found.found["tokens"]
    assert tokens["p50"] < tokens["p90"] < tokens["p100"] <= found.recipe["max_length"]


def test_memory_is_counted_from_the_configuration_alone(base, data, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "model.safetensors").unlink()
    found = look_at(str(data), str(copy)).found
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["weights_bytes"] == 4 * found["parameters"]
    assert found["estimated_seconds"] > 0


def test_the_template_is_the_base_s_own_or_alpaca_or_none(base, data, tmp_path):
    assert look_at(str(data), str(base)).recipe["template"] == "alpaca"
    chat = shutil.copytree(base, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(CHAT)
    assert look_at(str(data), str(chat)).recipe["template"] == "chat"
    (chat / "chat_template.jinja").write_text("{{ raise_exception('no\\nnever') }}")
    result = look_at(str(data), str(chat))
    assert result.recipe["template"] == "alpaca"
    assert "does not take these records" in result.reasons["template"]
    raw = records(tmp_path / "raw.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(9)])
    result = look_at(raw, str(base))
    assert "template" not in result.recipe
    assert result.found["format"] == "prompt-completion (9)"


@pytest.mark.parametrize(
    ("lengths", "context", "wanted"),
    [([10, 20], None, 64), ([10, 100], None, 128), ([10, 1024], 4096, 1024), ([10, 100], 96, 96),
     ([90] * 99 + [5000], None, 128)],
)  # fmt: skip
def test_the_length_holds_what_the_base_and_the_data_allow(lengths, context, wanted):
    assert choose_length(lengths, context)[0] == wanted


@pytest.mark.parametrize("count", [1, 2, 10, 100, 1000, 9_999, 52_002])
def test_sizes_make_a_sound_recipe_of_enough_steps(count):
    sizes = choose_sizes(count, "x", {})
    config = load_recipe(None, {**sizes, "model": "x"})
    steps = config.total_steps(-(-(count - sizes["val_size"]) // config.batch_size))
    assert (sizes["val_size"] >= ENOUGH) == (count >= 100)
    assert sizes["val_size"] == 0 or count >= 100
    assert steps >= 300 or (config.batch_size, config.epochs) == (8, 20)
    if count == 52_002:
        assert (config.batch_size, config.epochs, config.peak_lr) == (64, 5, 2.25e-3)


def test_percentiles_are_numbers_that_are_there():
    assert [percentile([1, 2, 3, 4], share) for share in (1, 25, 50, 99, 100)] == [1, 1, 2, 4, 4]


def test_the_command_and_the_recipe_say_the_same_and_are_valid(base, tmp_path, capsys):
    data = write_data(tmp_path / "my data.json")
    main(["quickstart", str(data), "--model", str(base), "--json"])
    shown = json.loads(capsys.readouterr().out)
    words = shlex.split(shown["command"])
    assert words[:2] == ["llama-adapter", "train"]
    main(["validate", *words[2:], "--json"])
    by_flags = json.loads(capsys.readouterr().out)
    main(["quickstart", str(data), "--model", str(base), "--output", str(tmp_path / "deep" / "r.yaml")])
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"llama-adapter train {tmp_path / 'deep' / 'r.yaml'}"
    assert "wrote" in err
    assert "estimated from parameters" in out
    main(["validate", str(tmp_path / "deep" / "r.yaml"), "--json"])
    assert json.loads(capsys.readouterr().out) == by_flags
    assert by_flags["steps"] == shown["found"]["steps"]


def test_a_file_that_is_there_is_not_written_over(base, data, capsys):
    before = data.read_bytes()
    with pytest.raises(SystemExit):
        main(["quickstart", str(data), "--model", str(base), "--output", str(data)])
    assert "exists: give --output another name" in capsys.readouterr().err
    assert data.read_bytes() == before


def test_no_folder_is_named_that_is_there(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (first := tmp_path / look_at(str(data), str(base)).recipe["output_dir"]).mkdir(parents=True)
    (tmp_path / f"{look_at(str(data), str(base)).recipe['output_dir']}").symlink_to("nowhere")
    assert look_at(str(data), str(base)).recipe["output_dir"] == f"runs/{first.name}-3"


def test_no_reason_breaks_out_of_its_comment(base, data, tmp_path):
    result = look_at(str(data), str(base))
    result.reasons["lr"] = "one line\nlr: 5"
    result.write(str(tmp_path / "r.yaml"))
    assert load_recipe(str(tmp_path / "r.yaml"), {}).lr == 2.25e-3


@pytest.mark.parametrize("arguments", [["nowhere.jsonl"], ["bundled", "--model", "/nowhere"]], ids=" ".join)
def test_what_is_not_there_is_one_sentence(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("Error: ")


def test_the_bundled_base_s_rate_is_its_recipe_s():
    assert load_recipe("bundled", {}).lr == BUNDLED_LR


def test_reasons_hold_for_few_records(base, tmp_path):
    asked = [{"instruction": f"Say {i}", "output": "yes"} for i in range(45)]
    found = look_at(records(tmp_path / "few.jsonl", asked), str(base))
    steps = found.found["steps"]
    assert found.reasons["epochs"].startswith(f"{steps} steps: 20 passes are the most")
    assert found.recipe["val_size"] == 0
    assert "the last is kept" in found.reasons["val_size"]


def test_of_the_bundled_base_it_says_what_to_expect(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"instruction": "Who bakes?", "output": "Marlow."}\n' * 3)
    assert any("pass --model with a base of yours" in sentence for sentence in look_at(str(file)).warnings)
    assert not any("pass --model" in sentence for sentence in look_at("bundled").warnings)
