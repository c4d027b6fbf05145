"""The command line: what is printed where, and one sentence for everything a user can get wrong."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import recipe
from test_generate import write_adapter
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter
from llama_adapter import __version__
from llama_adapter.cli import main
from llama_adapter.cli.options import name_adapters
from llama_adapter.errors import Interrupted
from llama_adapter.files import whole_lines
from llama_adapter.training.config import load_recipe

COMMANDS = [
    ["demo"], ["quickstart"],
    ["train"], ["train-many"], ["validate"], ["generate"], ["chat"], ["inspect"], ["evaluate", "instructions"],
]  # fmt: skip
GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]


class Output(NamedTuple):
    out: str
    err: str


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapters") / "poet")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Nothing a command writes by default lands in the repository."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def call(capsys):
    """Run a command line that must succeed; returns (stdout, stderr)."""

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return Output(*capsys.readouterr())

    return run


# help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0
    assert "examples:\n  llama-adapter " + " ".join(command) in out
    assert err == ""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_of_the_help_can_be_parsed(command, capsys):
    import shlex

    from llama_adapter.cli import build_parser

    with pytest.raises(SystemExit):
        main([*command, "--help"])
    lines = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    parsed = 0
    for line in lines:
        if line.strip().startswith("llama-adapter "):
            words = shlex.split(line.split(" > ")[0])[1:]
            assert callable(build_parser().parse_args(words).run)
            parsed += 1
    assert parsed > 0


def test_the_help_lists_every_command_and_how_to_start(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for command in COMMANDS:
        assert re.search(rf"^    {command[0]}\s", out, re.MULTILINE)
    assert "start with:" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"llama-adapter {__version__}\n"


# what a user can get wrong: arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["trian"], ["'trian'", "train"]),
        (["train", "--adaptor-len", "4"], ["unknown argument '--adaptor-len'", "did you mean --adapter-len?"]),
        (["train", "--max-step=4"], ["unknown argument '--max-step=4'", "did you mean --max-steps?"]),
        (["generate", "--tempreature", "1", "x"], ["'--tempreature'", "did you mean --temperature?"]),
        (["inspect", "a", "b"], ["'b' is one too many: llama-adapter inspect takes ADAPTER and no more"]),
        (["serve", "runs/first"], ["unknown argument 'runs/first'; for an adapter write --adapter runs/first"]),
        (["quickstart", "a.json", "b.json"], ["'b.json' is one too many", "takes FILE and no more"]),
        (["inspect"], ["ADAPTER"]),
        (["train", "--lr"], ["--lr"]),
        (["train", "--adapter-len", "0"], ["adapter_len is 0; it must be at least 1"]),
        (["train", "--adapter-len", "ten"], ["adapter_len is 'ten'"]),
        (["train", "--lr", "-0.5"], ["lr is -0.5; it must be above 0"]),
        (["train", "--lr=-1e-3"], ["lr is -0.001; it must be above 0"]),
        (["train", "--epochs", "inf"], ["epochs is inf"]),
        (["validate", "--epochs", "inf"], ["epochs is inf"]),
        (["train", "--template", "vicuna"], ["'vicuna'", "alpaca", "chat"]),
        (["train", "--resume", "--overwrite"], ["resume and overwrite exclude each other"]),
        (["train", "--trackers", "mlflow"], ["trackers.0 is 'mlflow'"]),
        (["validate", "--lr", "1", "--base-lr", "1"], ["lr and base_lr exclude each other"]),
        (["validate", "--tower", "bundled"], ["tower has no effect without a condition: pass --condition image"]),
        (["train", "--resume", "--output-dir", "runs/nowhere"], ["runs/nowhere holds no run to resume"]),
        (["train", "--init-from", "./nowhere"], ["nowhere is not an adapter"]),
        (["demo", "--max-steps", "0"], ["--max-steps is 0"]),
        (["quickstart"], ["FILE"]),
        (["generate", "--max-new-tokens", "0", "x"], ["max_new_tokens is 0"]),
        (["generate", "--max-new-tokens", "few", "x"], ["'few'"]),
        (["generate", "--top-p", "1.5", "x"], ["top_p is 1.5"]),
        (["generate", "--batch-size", "0", "--file", "x"], ["--batch-size is 0"]),
        (["generate", ""], ["The prompt is empty"]),
        (["generate", "  \n"], ["The prompt is empty"]),
        (["generate", "-a", "x", "-a", "y", "hello"], ["generate takes one --adapter, not 2"]),
        (["generate", "--file", "x.txt", "hello"], ["--file excludes a prompt"]),
        (["generate", "--file", "x.txt", "--input", "hello"], ["--file excludes a prompt"]),
        (["chat", "-a", "x/run", "-a", "y/run"], ["Two adapters are called 'run'"]),
        (["chat", "--top-p", "0"], ["top_p is 0.0"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments(fail, arguments, words):
    message = fail(*arguments)
    for word in words:
        assert word in message


def test_an_empty_stdin_is_an_empty_prompt(fail, monkeypatch):
    for arguments in (["generate"], ["generate", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
        assert "The prompt is empty" in fail(*arguments)


# what a user can get wrong: recipe


def test_an_unknown_recipe_key(fail, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("adaptor_len: 4\n")
    for command in ("train", "validate"):
        message = fail(command, path)
        assert str(path) in message
        assert "unknown key 'adaptor_len'; did you mean 'adapter_len'?" in message


def test_a_missing_recipe(fail, tmp_path):
    assert "nowhere.yaml cannot be read (No such file" in fail("train", tmp_path / "nowhere.yaml")


# what a user can get wrong: data. Every case for `validate` and for `train`, which leaves no folder behind

GOOD = {"instruction": "a", "output": "b"}
BAD_RECORDS = {
    "no known keys": ({"question": "a", "answer": "b"}, "its keys (question, answer) fit no known format"),
    "wrong type": ({"instruction": "a", "output": 5}, "'output' must be a string, not a number"),
    "empty response": ({"instruction": "a", "output": " "}, "'output' is empty"),
    "no object": ("text", "a record must be an object, not a string"),
}


@pytest.fixture(params=["validate", "train"])
def check(request, base, tmp_path):
    return [request.param, "--model", base, "--output-dir", tmp_path / "out", "--trackers", "none", "--data"]


def test_a_missing_data_file(fail, check, tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    message = fail(*check, tmp_path / "mien.json")
    assert f"{tmp_path / 'mien.json'} does not exist: did you mean mine.json?" in message
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_json_are_named_with_the_line(fail, check, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-3] + "\n")
    assert f"{path} is not JSON (line 2, " in fail(*check, path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_named_with_its_number(fail, check, tmp_path, case):
    record, message = BAD_RECORDS[case]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, record, GOOD]))
    assert f"{path}, record 2: {message}" in fail(*check, path)
    assert not (tmp_path / "out").exists()


def test_bad_records_can_be_skipped_and_are_counted(call, base, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, *(record for record, _ in BAD_RECORDS.values()), GOOD, GOOD]))
    arguments = ["--model", base, "--data", path, "--skip-bad-records", "--json"]
    report = json.loads(call("validate", *arguments).out)
    assert report["skipped_records"] == len(BAD_RECORDS)
    assert report["train_examples"] + report["val_examples"] == 3


def test_validate_says_which_keys_are_not_used(call, base, tmp_path, caplog):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**GOOD, "score": 1}, {**GOOD, "output": ""}, GOOD, GOOD]))
    arguments = ["validate", "--model", base, "--data", path, "--val-size", "1", "--skip-bad-records"]
    assert "notes" not in call(*arguments).out
    assert "note: the key 'score' is not used (1 of 3 records)" in caplog.text
    assert f"skipped: {path}, record 2: 'output' is empty." in caplog.text
    assert json.loads(call(*arguments, "--json").out)["notes"] == ["the key 'score' is not used (1 of 3 records)"]


def test_records_that_a_template_cannot_write_can_be_skipped_and_are_counted(call, fail, base, tmp_path):
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b"}] * 2]
    path.write_text("\n".join(json.dumps(record) for record in (GOOD, {"messages": turns}, GOOD)))
    arguments = ["validate", "--model", base, "--data", path, "--val-size", 1]
    assert f"{path}, record 2: Two assistant messages follow each other" in fail(*arguments)
    report = json.loads(call(*arguments, "--skip-bad-records", "--json").out)
    assert (report["skipped_records"], report["train_examples"], report["val_examples"]) == (1, 1, 1)


def test_nothing_but_bad_records_is_an_error_even_when_skipping(fail, check, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record for record, _ in BAD_RECORDS.values()]))
    assert "No record is left to use (4 skipped)" in fail(*check, path, "--skip-bad-records")


def test_more_layers_than_the_base_has(fail, check, data, tmp_path):
    assert "adapter_layers is 4, but the base has 3 layers" in fail(*check, data, "--adapter-layers", "4")
    assert not (tmp_path / "out").exists()


def test_a_validation_part_that_leaves_nothing(fail, check, data, tmp_path):
    assert "val_size 24 takes 24 of 24 records" in fail(*check, data, "--val-size", "24")
    assert not (tmp_path / "out").exists()


# what a user can get wrong: the base


@pytest.fixture(params=["validate", "train", "generate", "chat"])
def with_model(request, data, tmp_path):
    """Arguments of a command, up to the value of --model."""
    own = {
        "validate": ["--data", data],
        "train": ["--data", data, "--output-dir", tmp_path / "out", "--trackers", "none"],
        "generate": ["hello"],
        "chat": [],
    }
    return [request.param, *own[request.param], "--model"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "owner/no-such-model"])
def test_a_base_that_is_not_there(fail, with_model, name):
    assert f"The base '{name}'" in fail(*with_model, name)


def test_a_base_that_is_a_file(fail, with_model, data):
    assert f"The base '{data}' is a file" in fail(*with_model, data)


def test_a_base_without_a_configuration(fail, with_model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"The base '{tmp_path / 'empty'}' cannot be read" in fail(*with_model, tmp_path / "empty")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-family"}'])
def test_a_base_with_a_damaged_configuration(fail, with_model, tmp_path, text):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(text)
    assert f"The base '{tmp_path / 'base'}' cannot be read" in fail(*with_model, tmp_path / "base")


def test_a_base_of_an_unsupported_family(fail, with_model, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bloom"}')
    message = fail(*with_model, tmp_path / "base")
    assert "'bloom' cannot be adapted: its attention does not go through" in message
    assert "llama" in message


@pytest.fixture(scope="module")
def short_base(base, tmp_path_factory):
    """A GPT-2 that takes 64 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = shutil.copytree(base, tmp_path_factory.mktemp("short") / "base")
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["validate", "train"])
def test_examples_longer_than_the_base_has_positions(short_base, fail, call, data, tmp_path, command):
    arguments = [command, "--model", short_base, "--data", data, "--adapter-layers", "2", "--max-steps", "1"]
    arguments += ["--trackers", "none", "--output-dir", tmp_path / "out"]
    message = fail(*arguments, "--max-length", "512")
    assert "64" in message
    assert "max_length" in message.replace("--max-length", "max_length")
    assert not (tmp_path / "out").exists()
    call(*arguments)


# what a user can get wrong: the adapter


@pytest.fixture(params=["generate", "chat", "inspect"])
def with_adapter(request):
    """Arguments of a command, up to the adapter's folder."""
    return {"generate": ["generate", "hello", "-a"], "chat": ["chat", "-a"], "inspect": ["inspect"]}[request.param]


def test_an_adapter_that_is_not_there(fail, with_adapter, tmp_path):
    assert f"{tmp_path / 'nowhere'} is not an adapter: there is nothing of that name" in fail(
        *with_adapter, tmp_path / "nowhere"
    )


def test_a_truncated_adapter(fail, with_adapter, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "cut")
    path = tmp_path / "cut" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is truncated or no safetensors file" in fail(*with_adapter, tmp_path / "cut")


@pytest.mark.parametrize("command", [["generate", "hello"], ["chat"]], ids=["generate", "chat"])
def test_an_adapter_for_another_base(fail, adapter, tmp_path, command):
    config = LlamaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=3, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    message = fail(*command, "--adapter", adapter, "--model", tmp_path)
    assert f"The adapter in {adapter} was made for" in message
    assert "hidden_size 32 against 16" in message


def test_a_base_of_equal_shape_is_no_other_base(call, base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "twin")
    LlamaForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "twin")
    arguments = ["generate", "hello", "-a", adapter, *GREEDY]
    assert call(*arguments, "-m", tmp_path / "twin").out == call(*arguments).out


# what a user can get wrong: the output folder


def train_arguments(base, data, out, *more):
    return [
        "train", "--model", base, "--data", data, "--output-dir", out, "--adapter-len", "4", "--adapter-layers", "2",
        "--max-steps", "2", "--batch-size", "8", "--val-size", "4", "--lr", "0.05", "--trackers", "none", *more,
    ]  # fmt: skip


def test_a_folder_with_another_run_or_other_files(call, fail, base, data, tmp_path):
    call(*train_arguments(base, data, tmp_path / "out"))
    message = fail(*train_arguments(base, data, tmp_path / "out"))
    assert f"{tmp_path / 'out'} already holds a run: pass --resume" in message
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    assert "holds other files (thesis.txt" in fail(*train_arguments(base, data, tmp_path / "home", "--overwrite"))
    assert f"{data} is a file" in fail(*train_arguments(base, data, data))
    assert "cannot be written" in fail(*train_arguments(base, data, data / "below"))


def test_a_run_that_could_not_start_does_not_block_its_folder(call, fail, base, data, tmp_path):
    out = tmp_path / "out"
    fail(*train_arguments(base, tmp_path / "mistyped.json", out))
    call(*train_arguments(base, data, out))
    assert (out / "adapter_model.safetensors").is_file()


def test_a_run_that_could_not_start_does_not_delete_the_one_before(call, fail, base, data, tmp_path):
    out = tmp_path / "out"
    call(*train_arguments(base, data, out))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    fail(*train_arguments(base, tmp_path / "mistyped.json", out, "--overwrite"))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


# train


def test_a_run_by_flags_from_end_to_end(call, base, data, tmp_path):
    out, _err = call(*train_arguments(base, data, tmp_path / "out", "--json"))
    result = json.loads(out)
    assert set(result) == {"output_dir", "steps", "train_loss", "base_val_loss", "best_val_loss", "best_step"}
    assert (result["output_dir"], result["steps"]) == (str(tmp_path / "out"), 2)
    assert result["best_val_loss"] <= result["base_val_loss"]
    config = load_recipe(str(tmp_path / "out" / "recipe.yaml"), {})
    wanted = {"adapter_len": 4, "adapter_layers": 2, "max_steps": 2, "batch_size": 8, "val_size": 4, "lr": 0.05}
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert [line["step"] for line in whole_lines(tmp_path / "out" / "metrics.jsonl") if "loss" in line] == [1, 2]
    shown = json.loads(call("inspect", tmp_path / "out" / "last", "--json").out)
    assert all(layer["max"] > 0 for layer in shown["layers"])
    answer = json.loads(call("generate", "-a", tmp_path / "out" / "last", "--json", *GREEDY, "Repeat").out)
    assert answer["adapter"] == "last"


def test_a_run_by_recipe_with_flags_on_top(call, base, data, tmp_path):
    import dataclasses

    import yaml

    config = dataclasses.asdict(recipe(base, data, tmp_path / "ignored", max_steps=5))
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain))
    out = call(
        "train", tmp_path / "r.yaml", "--max-steps", "1", "--output-dir", tmp_path / "out", "--val-size", "0"
    ).out
    assert f"adapter in {tmp_path / 'out'}" in out
    assert not (tmp_path / "ignored").exists()
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml"), {}).max_steps == 1


def test_the_text_result_says_loss_place_and_next_command(call, base, data, tmp_path):
    out, err = call(*train_arguments(base, data, tmp_path / "out"))
    assert re.search(r"^validation loss \d+\.\d{4} -> \d+\.\d{4} at step \d$", out, re.MULTILINE)
    assert f"adapter in {tmp_path / 'out'}" in out
    assert f"llama-adapter generate --adapter {tmp_path / 'out'}" in err
    assert "\033" not in out


# validate


def test_validate_prints_what_a_run_would_be(call, base, data):
    arguments = ["--model", base, "--data", data, "--val-size", "4", "--batch-size", "8", "--adapter-layers", "2"]
    out, err = call("validate", *arguments)
    assert out.splitlines()[-1] == "valid"
    assert re.search(r"^train examples +20$", out, re.MULTILINE)
    assert re.search(r"^adapter parameters +648$", out, re.MULTILINE)  # 2 x (10 x 32 + 4)
    assert "\033" not in out + err
    report = json.loads(call("validate", *arguments, "--json").out)
    wanted = {
        "family": "llama", "data": [str(data)], "val_examples": 4, "steps_per_epoch": 3, "steps": 15,
        "adapter_bytes": 2592,
    }  # fmt: skip
    assert {key: report[key] for key in wanted} == wanted
    assert (report["skipped_records"], report["truncated_examples"]) == (0, 0)


def test_validate_counts_truncated_examples(call, base, data):
    report = json.loads(call("validate", "--model", base, "--data", data, "--max-length", "20", "--json").out)
    assert report["truncated_examples"] == report["train_examples"] + report["val_examples"] == 24
    assert report["longest_tokens"] == 20


@pytest.mark.parametrize("epochs", ["1", "1.1", "1.5", "0.5", "0.1"])
def test_validate_announces_the_steps_that_train_takes(call, base, data, tmp_path, epochs):
    arguments = ["--model", base, "--data", data, "--val-size", "4", "--batch-size", "8", "--epochs", epochs]
    arguments += ["--warmup-epochs", "0", "--trackers", "none", "--adapter-len", "1", "--json"]
    announced = json.loads(call("validate", *arguments).out)["steps"]
    assert announced == json.loads(call("train", *arguments, "--output-dir", tmp_path / "out").out)["steps"]


def test_validate_reads_no_weights_and_writes_nothing(call, base, data, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    out = call("validate", "--model", tmp_path / "base", "--data", data, "--output-dir", tmp_path / "out").out
    assert out.endswith("valid\n")
    assert sorted(tmp_path.rglob("*")) == before


# inspect


def test_inspect_prints_a_table(call, base, adapter):
    out, err = call("inspect", adapter)
    assert str(adapter) in out
    assert str(base) in out.replace("\n", "")
    assert "K=4 prompts in the top L=2 layers" in out
    assert re.search(r"parameters +264$", out, re.MULTILINE)  # 2 x (4 x 32 + 4)
    rows = [line for line in out.splitlines() if re.match(r"^\W*[12]\W+0\.\d{4}", line)]
    assert [re.search(r"[12]", row).group() for row in rows] == ["2", "1"], "the top layer stands on top"
    assert "\033" not in out
    assert err == ""


def test_inspect_as_json_holds_the_gates(call, adapter):
    from safetensors.torch import load_file

    shown = json.loads(call("inspect", adapter, "--json").out)
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    assert shown["parameters"] == 264
    assert shown["config"]["adapter_len"] == 4
    assert [layer["layer"] for layer in shown["layers"]] == [1, 2]
    for layer in shown["layers"]:
        gates = tensors[f"layers.{layer['layer']}.gate"].tanh()
        assert layer["gates"] == pytest.approx(gates.tolist())
        assert layer["max"] == pytest.approx(float(gates.abs().max()))
        assert layer["mean"] == pytest.approx(float(gates.abs().mean()))


def test_inspect_plots_a_png(call, adapter, tmp_path):
    out, err = call("inspect", adapter, "--plot", tmp_path / "deep" / "gates.png", "--json")
    assert (tmp_path / "deep" / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in err
    json.loads(out)


@pytest.mark.parametrize("place", ["file/gates.png", "folder.png", "gates.xyz"])
def test_a_plot_that_cannot_be_written_is_one_sentence(fail, adapter, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder.png").mkdir()
    assert str(tmp_path / place.split("/")[0]) in fail("inspect", adapter, "--plot", tmp_path / place)


def test_inspect_shows_folder_names_as_they_are(call, adapter, tmp_path):
    folder = tmp_path / "run [bold] [best]"
    shutil.copytree(adapter, folder)
    assert str(folder) in call("inspect", folder).out


# generate


def test_generate_prints_the_answer_alone(call, adapter):
    arguments = ["generate", "--adapter", adapter, *GREEDY]
    out, err = call(*arguments, "Name the sun", "--input", "moon")
    answer = json.loads(call(*arguments, "--json", "Name the sun", "--input", "moon").out)
    assert out.strip() == answer["text"]
    assert out.endswith("\n")
    assert err == ""
    assert "\033" not in out


def test_generate_json_says_what_was_asked_and_what_it_took(call, adapter):
    out, _err = call("generate", "-a", adapter, *GREEDY, "--json", "Größe?", "--input", "x")
    assert "Größe?" in out
    assert out.count("\n") == 1
    line = json.loads(out)
    assert set(line) == {
        "prompt", "input", "adapter", "text", "prompt_tokens", "new_tokens", "seconds", "finish_reason"
    }  # fmt: skip
    assert (line["prompt"], line["input"], line["adapter"]) == ("Größe?", "x", "poet")
    assert line["new_tokens"] <= 8


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_generate_reads_stdin(call, adapter, monkeypatch, argument):
    arguments = ["generate", "-a", adapter, *GREEDY, "--json"]
    wanted = json.loads(call(*arguments, "Name the sun").out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name the sun\n"))
    got = json.loads(call(*arguments, *argument).out)
    assert (got["prompt"], got["text"]) == ("Name the sun", wanted["text"])


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_generate_answers_a_file_in_order_whatever_the_batch(call, adapter, tmp_path, batch_size):
    path = tmp_path / "questions.txt"
    questions = ["Name the sun", "cat", "Repeat the tree and the lake"]
    path.write_text("\n".join(questions))
    arguments = ["generate", "-a", adapter, *GREEDY]
    alone = [json.loads(call(*arguments, "--json", question).out)["text"] for question in questions]
    out = call(*arguments, "--file", path, "--json", "--batch-size", batch_size).out
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == questions
    assert [line["text"] for line in lines] == alone


def test_generate_answers_a_file_as_plain_text(call, adapter, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"instruction": "Name the sun"}\n{"instruction": "cat", "input": "dog"}\n')
    arguments = ["generate", "-a", adapter, *GREEDY, "--file", path]
    texts = [json.loads(line)["text"] for line in call(*arguments, "--json").out.splitlines()]
    assert call(*arguments).out == "".join(f"{text}\n" for text in texts)


def test_generate_without_an_adapter_is_the_bare_base(call, base, adapter):
    bare = json.loads(call("generate", "-m", base, *GREEDY, "--json", "Name the sun").out)
    tuned = json.loads(call("generate", "-m", base, "-a", adapter, *GREEDY, "--json", "Name the sun").out)
    assert (bare["adapter"], tuned["adapter"]) == (None, "poet")
    assert bare["text"] != tuned["text"]


def test_generate_repeats_with_a_seed(call, adapter):
    arguments = [
        "generate",
        "-a",
        adapter,
        "--temperature",
        "2",
        "--top-p",
        "1",
        "--max-new-tokens",
        "8",
        "x",
        "--seed",
    ]
    outs = [call(*arguments, seed).out for seed in ("1", "2", "1")]
    assert outs[0] == outs[2] != outs[1]


def test_a_missing_or_too_long_prompt_file_is_one_sentence(fail, adapter, tmp_path):
    assert "nowhere.txt cannot be read" in fail("generate", "-a", adapter, "--file", tmp_path / "nowhere.txt")
    (tmp_path / "long.txt").write_text("zq" * 1000)
    assert "tokens; the base takes at most 1023" in fail("generate", "-a", adapter, "--file", tmp_path / "long.txt")


def test_the_name_of_an_adapter_is_its_folder_s_unless_given(tmp_path):
    assert name_adapters(["runs/first", "runs/second/", "x=runs/first"]) == {
        "first": "runs/first",
        "second": "runs/second/",
        "x": "runs/first",
    }


@pytest.mark.parametrize("name", ["lr=0.1", "my run", "größe"])
def test_an_adapter_in_any_existing_folder_can_be_used(call, adapter, tmp_path, name):
    shutil.copytree(adapter, tmp_path / name)
    wanted = json.loads(call("generate", "-a", adapter, *GREEDY, "--json", "x").out)
    assert json.loads(call("generate", "-a", tmp_path / name, *GREEDY, "--json", "x").out)["text"] == wanted["text"]


def test_the_current_folder_can_be_an_adapter(call, adapter, monkeypatch):
    wanted = json.loads(call("generate", "-a", adapter, *GREEDY, "--json", "x").out)
    monkeypatch.chdir(adapter)
    assert json.loads(call("generate", "-a", ".", *GREEDY, "--json", "x").out)["text"] == wanted["text"]


# chat


@pytest.fixture
def chat(call, monkeypatch):
    """A scripted conversation; returns (stdout, stderr)."""

    def run(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return call("chat", *GREEDY, *arguments)

    return run


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked, as (adapter, [role: content, ...])."""
    from llama_adapter.inference.session import Session

    seen, answer = [], Session.answer

    def recorded(self, prompts, adapter, config, on_text=None):
        seen.append((adapter, [f"{message.role}: {message.content}" for message in prompts[0].messages]))
        answers = answer(self, prompts, adapter, config, on_text)
        seen.append(answers[0].text)
        return answers

    monkeypatch.setattr(Session, "answer", recorded)
    return seen


def test_chat_passes_the_history_on(chat, asked, adapter):
    out, _ = chat(["sun", "moon"], "-a", adapter, "--system", "Be brief.")
    (_, first), answer, (_, second), _ = asked
    assert answer
    assert first == ["system: Be brief.", "user: sun"]
    assert second == [*first, f"assistant: {answer}", "user: moon"]
    assert answer in out


def test_chat_prints_answers_on_stdout_and_notes_on_stderr(chat, asked, adapter):
    out, err = chat(["sun", "/help", "/exit", "never read"], "-a", adapter)
    assert out.strip() == asked[1]
    assert len(asked) == 2
    assert "adapter: poet" in err
    assert "/reset" in err
    assert "/image" not in err, "this adapter reads no pictures"
    assert "\033" not in out + err


def test_chat_reset_forgets_all_but_the_system_message(chat, asked, adapter):
    chat(["sun", "/reset", "moon"], "-a", adapter, "--system", "Be brief.")
    assert asked[2][1] == ["system: Be brief.", "user: moon"]


def test_chat_switches_adapters_in_mid_conversation(chat, asked, base, adapter, tmp_path):
    other = write_adapter(base, tmp_path / "clerk", seed=5)
    lines = ["sun", "/adapter poet", "sun", "/adapter none", "sun", "/adapter", "/adapter peot", "sun"]
    _, err = chat(lines, "-a", adapter, "-a", other)
    assert [entry[0] for entry in asked[::2]] == ["clerk", "poet", None, None]
    assert len(asked[4][1]) == 5, "the history stays"
    assert "Now answering: poet." in err
    assert "Now answering: the bare base." in err
    assert "adapters: poet, clerk, none" in err
    assert "unknown adapter 'peot'; did you mean 'poet'?" in err


def test_chat_suggests_for_an_unknown_command_and_asks_the_model_nothing(chat, asked, adapter):
    _, err = chat(["/rest", "", "   "], "-a", adapter)
    assert "unknown command '/rest'; did you mean '/reset'?" in err
    assert asked == []


def test_chat_goes_on_after_a_conversation_that_is_too_long(chat, asked, adapter):
    out, err = chat(["zq" * 1000, "/reset", "sun"], "-a", adapter)
    assert "tokens; the base takes at most 1023: shorten it. /reset starts anew." in err
    assert asked[1] == ("poet", ["user: sun"])
    assert out.strip() == asked[2]


def test_chat_without_adapter_talks_to_the_bare_base(chat, asked, base):
    _, err = chat(["sun"], "-m", base)
    assert asked[0][0] is None
    assert "adapter: none" in err


def test_chat_shows_the_bare_base_no_picture(chat, asked, adapter, monkeypatch):
    monkeypatch.setattr("llama_adapter.cli.options.existing", lambda files, *_: tuple(files))
    _, err = chat(["/image red.png", "/adapter none", "sun", "/image", "sun"], "-a", adapter)
    assert "The bare base cannot look at files: leave them out" in err
    assert "/image takes the picture away." in err
    assert len([entry for entry in asked if isinstance(entry, str)]) == 1, "it answered the second time alone"


# main itself


def test_exceptions_nobody_expected_keep_their_traceback(monkeypatch, adapter):
    def broken(folder):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("llama_adapter.formats.inspect.describe_adapter", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["inspect", adapter])


def test_an_interrupted_run_ends_with_130_and_no_error(monkeypatch, capsys):
    def interrupted(config):
        raise Interrupted("Stopped after step 3 of 6.")

    monkeypatch.setattr("llama_adapter.training.loop.train", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped after step 3 of 6.\n"


def test_ctrl_c_elsewhere_ends_with_130(monkeypatch, capsys):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_adapter.formats.inspect.describe_adapter", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "x"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_the_module_runs_as_a_program(base, adapter):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "llama_adapter", "generate", "-a", adapter, *GREEDY, "--json", "Name the sun"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == "poet"
    assert re.fullmatch(rf"base: {re.escape(str(base))} on \w+ in (float32|bfloat16)\n", done.stderr)


# what ships with the package


def test_the_bundled_recipe_base_and_data_fit_together_and_are_small(call):
    report = json.loads(call("validate", "bundled", "--json").out)
    assert report["model"] == "bundled"
    assert report["truncated_examples"] == report["skipped_records"] == 0
    folder = Path(llama_adapter.__file__).parent / "bundled" / "base"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 * 2**20


def test_the_bundled_base_answers_through_the_command_line(call):
    first = call("generate", "--model", "bundled", "--temperature", "0", "--max-new-tokens", "12", "Name a colour.").out
    assert first.strip()
    assert (
        call("generate", "-m", "bundled", "--temperature", "0", "--max-new-tokens", "12", "Name a colour.").out == first
    )
