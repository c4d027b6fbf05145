"""What is said where data, base and adapter can be used together and hardly should be."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from runs import recipe, write_data
from test_generate import write_adapter

from llama_adapter import AdapterConfig, load_adapter
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.cli import main
from llama_adapter.data import Example, Message
from llama_adapter.errors import AdapterError
from llama_adapter.evaluation.instructions import Task, evaluate_instructions
from llama_adapter.formats.native import names_another_base
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import load_session
from llama_adapter.inference.writing import Prompt
from llama_adapter.serving.protocol import first_fault
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.plan import plan_run
from llama_adapter.training.prepare import prepare
from llama_adapter.training.start import settle

ASKED = [{"instruction": f"Repeat {i}", "output": "sun"} for i in range(6)]
RAW = [{"prompt": f"Count {i}", "completion": " moon"} for i in range(5)]
CPU = torch.device("cpu")


def records(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapters") / "poet")


# records with and without a template


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (ASKED + RAW, (), "5 of 11 records are a prompt and its completion, which take no template, unlike the others"),
        (ASKED, RAW, "validation: 5 of 5 records are a prompt and its completion, which take no template, unlike what"),
        (RAW, ASKED, "validation: 6 of 6 records take a template, unlike what is trained on"),
        (ASKED, ASKED, None),
        (RAW, RAW, None),
        (RAW, (), None),
    ],
)
@pytest.mark.parametrize("streamed", [{}, {"streaming": True, "max_steps": 1}], ids=["read", "streamed"])
def test_records_of_both_kinds_are_counted(base, tmp_path, caplog, train, val, words, streamed):
    held_out = (str(records(tmp_path / "val.jsonl", val)),) if val else ()
    config = recipe(base, records(tmp_path / "d.jsonl", train), tmp_path, val_data=held_out, **streamed)
    prepare(config, load_tokenizer(str(base)))
    found = [sentence for sentence in said(caplog) if "unlike" in sentence]
    assert found == [sentence for sentence in found if words is not None and words in sentence]
    assert len(found) == (words is not None)


@pytest.mark.parametrize("streamed", [{}, {"streaming": True, "max_steps": 1}], ids=["read", "streamed"])
@pytest.mark.parametrize(
    ("data", "val", "changes", "words"),
    [
        (["a.jsonl", "./a.jsonl"], [], {}, "a.jsonl is named twice: what is held out"),
        (["*.jsonl", "link.jsonl"], [], {}, "a.jsonl is named twice: what is held out"),
        (["a.jsonl", "a.jsonl"], [], {"val_size": 0}, None),
        (["a.jsonl", "a.jsonl"], ["b.jsonl"], {}, None),
        (["a.jsonl", "b.jsonl"], [], {}, None),
        (["a.jsonl"], ["."], {}, "validation: {}/a.jsonl is trained on too"),
    ],
)
def test_what_is_trained_on_and_held_out_is_named(
    base, tmp_path, monkeypatch, caplog, data, val, changes, words, streamed
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        records(tmp_path / name, ASKED)
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    config = recipe(base, tmp_path, tmp_path, **changes, **streamed)
    config = replace(config, data=tuple(data), val_data=tuple(val))
    prepare(config, load_tokenizer(str(base)))
    found = [sentence for sentence in said(caplog) if "trained on too" in sentence]
    assert len(found) == (words is not None)
    assert all(words.format(tmp_path) in sentence for sentence in found)


@pytest.mark.parametrize("command", [["generate", "--file"], ["evaluate", "instructions", "--data"]])
def test_prompts_that_an_adapter_never_saw_the_like_of_are_counted(command, adapter, tmp_path, caplog, capsys):
    mixed = records(tmp_path / "mixed.jsonl", ASKED[:1] + RAW[:2])
    main([*command, str(mixed), "-a", str(adapter), "--max-new-tokens", "1"])
    (sentence,) = [sentence for sentence in said(caplog) if "records" in sentence]
    assert "2 of 3 records have a 'prompt', which is asked as it is" in sentence
    assert "in the template 'alpaca': call it 'instruction'" in sentence
    caplog.clear()
    main([*command, str(records(tmp_path / "asked.jsonl", ASKED[:2])), "-a", str(adapter), "--max-new-tokens", "1"])
    assert not [sentence for sentence in said(caplog) if "records" in sentence]


def test_records_with_a_template_for_an_adapter_without_one_are_counted(base, tmp_path, caplog):
    raw = write_adapter(base, tmp_path / "raw", template="raw")
    asked = records(tmp_path / "asked.jsonl", ASKED[:2])
    (tmp_path / "lines.txt").write_text("Repeat 1\n")
    for command in (["evaluate", "instructions", "--data"], ["generate", "--file"]):
        caplog.clear()
        main([*command, str(asked), "-a", str(raw), "--max-new-tokens", "1"])
        (sentence,) = [sentence for sentence in said(caplog) if "records" in sentence]
        assert "2 of 2 records take a template, and the adapter 'raw' was trained without one" in sentence
    caplog.clear()
    main(["generate", "--file", str(tmp_path / "lines.txt"), "-a", str(raw), "--max-new-tokens", "1"])
    assert not [sentence for sentence in said(caplog) if "records" in sentence]


def test_the_bare_base_is_shown_no_file_and_is_measured_without(base):
    session = load_session(str(base), {}, CPU)
    asked = Prompt.of("Repeat 1", media=("red.png",))
    with pytest.raises(AdapterError, match="The bare base cannot look at files: leave them out"):
        session.answer([asked], None, GenerateConfig(1, 0.0))
    plain = Example((Message("user", "Repeat 1"), Message("assistant", "sun")))
    scores = [
        evaluate_instructions(session, None, [Task(example, "all")], max_new_tokens=2)
        for example in (plain, replace(plain, media=("red.png",)))
    ]
    assert scores[0] == scores[1]


# another base


@pytest.mark.parametrize(
    ("made_for", "given", "another"),
    [
        ("meta-llama/Llama-2-7b-hf", "./bases/Llama-2-7B-hf", False),
        ("meta-llama/Llama-2-7b-hf", "/cache/models--meta-llama--Llama-2-7b-hf/snapshots/0123", False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", True),
        ("bundled", "bundled", False),
        ("bundled", "./elsewhere", True),
        (None, "./elsewhere", False),
        ("./base/", "base", False),
        ("./base", "", False),
    ],
)
def test_bases_are_told_apart_by_the_last_part_of_their_names(made_for, given, another):
    sentence = names_another_base(AdapterConfig(base_model_name_or_path=made_for), given)
    assert (sentence is not None) == another
    if another:
        assert made_for in sentence
        assert given in sentence


def test_an_adapter_of_another_base_of_that_shape_is_taken_with_a_warning(base, adapter, data, tmp_path, caplog):
    twin = str(shutil.copytree(base, tmp_path / "twin"))
    main(["generate", "hello", "-a", str(adapter), "-m", twin, "--max-new-tokens", "1"])
    load_adapter(load_base(twin, CPU), adapter)
    settle(TrainConfig(model=twin, data=(str(data),), output_dir=str(tmp_path / "out"), init_from=str(adapter)))
    found = [sentence for sentence in said(caplog) if "was made for the base" in sentence]
    assert len(found) == 3
    assert all(twin in sentence and str(base) in sentence for sentence in found)
    caplog.clear()
    main(["generate", "hello", "-a", str(adapter), "--max-new-tokens", "1"])
    load_adapter(load_base(str(base), CPU), adapter)
    assert not [sentence for sentence in said(caplog) if "was made for" in sentence]


# runs too short to learn


def test_a_run_of_few_steps_is_said_to_be_short(base, tmp_path, caplog):
    data = write_data(tmp_path / "data.json", 29)
    short = recipe(base, data, tmp_path, batch_size=64, epochs=5.0)
    prepare(short, load_tokenizer(str(base)))
    (sentence,) = [sentence for sentence in said(caplog) if "are few" in sentence]
    train = int(sentence.split("(")[1].split()[0])
    assert sentence.startswith(f"5 steps ({train} examples, 64 a step, 5 epochs)")
    caplog.clear()
    prepare(recipe(base, data, tmp_path, batch_size=2, epochs=5.0), load_tokenizer(str(base)))
    prepare(recipe(base, data, tmp_path, batch_size=64, max_steps=3), load_tokenizer(str(base)))
    assert not [sentence for sentence in said(caplog) if "are few" in sentence]


@pytest.mark.parametrize(("more", "warns"), [({}, True), ({"lr": 0.12}, False), ({"lr": 0.001}, False)])
def test_the_bundled_base_is_not_trained_at_a_large_one_s_rate_in_silence(tmp_path, caplog, more, warns):
    data = write_data(tmp_path / "data.json")
    config = TrainConfig(data=(str(data),), output_dir=str(tmp_path / "out"), **more)
    prepare(config, load_tokenizer("bundled"))
    assert any("pass --lr 0.12" in sentence for sentence in said(caplog)) == warns


def test_examples_that_all_lose_their_end_are_pointed_out(base, tmp_path, caplog):
    data = records(tmp_path / "d.jsonl", [{"prompt": "a", "completion": " sun moon cat dog" * 9}] * 5)
    prepare(recipe(base, data, tmp_path, max_length=16), load_tokenizer(str(base)))
    assert any("all examples are longer than 16 tokens" in sentence for sentence in said(caplog))
    caplog.clear()
    prepare(recipe(base, data, tmp_path, max_length=512), load_tokenizer(str(base)))
    assert not any("all examples are longer" in sentence for sentence in said(caplog))


# bodies of requests


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"type": "json_invalid", "loc": ("body", 12), "ctx": {"error": "Expecting ','"}}, "no JSON at character 12"),
        ({"type": "missing", "loc": ("body",), "input": None}, "'Content-Type: application/json'"),
        ({"type": "value_error", "loc": ("body",), "input": b"{}", "msg": "x"}, "'Content-Type: application/json'"),
        (
            {"type": "missing", "loc": ("body", "model"), "input": {}, "msg": "Field required"},
            "'model': Field required",
        ),
    ],
)
def test_a_body_that_is_no_json_object_is_one_plain_sentence(fault, says):
    assert says in first_fault([fault])[0]


# validation parts that choose badly


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (1, "the step whose adapter is kept is chosen by 1 validation example, which is too few: --val-size 0 keeps"),
        (4, "the step whose adapter is kept is chosen by 4 validation examples, which is too few"),
        (20, None),
        (0, None),
    ],
)
def test_a_validation_part_that_is_too_small_to_choose_is_said(base, tmp_path, caplog, size, words):
    plan_run(recipe(base, write_data(tmp_path / "data.json", 60), tmp_path / "out", val_size=size))
    found = [sentence for sentence in said(caplog) if "validation example" in sentence]
    assert found == [] if words is None else words in found[0]


def test_a_small_file_of_validation_is_told_how_to_be_left_out(base, tmp_path, caplog):
    data, few = write_data(tmp_path / "data.json", 60), write_data(tmp_path / "few.json", 5)
    plan_run(recipe(base, data, tmp_path / "out", val_size=None, val_data=(str(few),)))
    assert any(sentence.endswith("--val-size 0 in place of --val-data keeps the last") for sentence in said(caplog))
