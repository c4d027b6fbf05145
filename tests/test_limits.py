"""What a base can take, said before its weights are read: the context, token ids, text that is text, raw prompts."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import tiny_tokenizer
from test_generate import GREEDY, write_adapter
from transformers import GPT2Config, GPT2LMHeadModel

from llama_adapter.base import load_config, load_tokenizer
from llama_adapter.cli import main
from llama_adapter.data import Message
from llama_adapter.data.limits import Limits
from llama_adapter.errors import ConfigError, DataError, ModelError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import load_session, plan_session
from llama_adapter.inference.writing import Prompt, read_prompts

CPU = torch.device("cpu")
FEW = ["--temperature", "0", "--max-new-tokens", "3"]
LONG = "word " * 60
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def short(base, tmp_path_factory):
    """A GPT-2 that takes 64 tokens, beyond which its positions raise an IndexError."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("short") / "base")
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapters") / "poet")


@pytest.fixture(scope="module")
def raw_adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapters") / "raw", template="raw")


@pytest.fixture(scope="module")
def more_tokens(base, tmp_path_factory):
    """A base whose tokenizer has two tokens more than it has embeddings, in its chat template too."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("more") / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    embeddings = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) == embeddings + 2
    return str(folder), embeddings


@pytest.fixture
def no_weights(monkeypatch):
    for module in ("inference.session", "training.loop"):
        monkeypatch.setattr(f"llama_adapter.{module}.load_base", lambda *_: pytest.fail("read the weights"))


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Run a command line; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=None):
        if stdin is not None:
            binary = io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(binary, encoding="utf-8"))
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def write(path: Path, records) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records))
    return path


# more tokens than embeddings


@pytest.mark.parametrize("command", ["validate", "train", "generate", "evaluate"])
def test_tokens_without_embedding_are_one_sentence_before_the_weights(call, no_weights, more_tokens, data, command):
    model, embeddings = more_tokens
    own = {
        "validate": ["--data", data],
        "train": ["--data", data, "--trackers", "none", "--output-dir", "out"],
        "generate": ["hello"],
        "evaluate": ["instructions", "--data", data],
    }[command]
    code, _, err = call(command, *own, "--model", model, "--template", "chat")
    assert code == 2
    last = err.splitlines()[-1]
    assert f"token ids up to {embeddings + 1}, but the base has {embeddings} embeddings" in last
    assert "'<|im_start|>'" in last


def test_tokens_that_no_text_has_are_a_warning_in_validate_and_generate(call, more_tokens, data, caplog):
    model, embeddings = more_tokens
    for arguments in (["validate", "--data", data], ["generate", *FEW, "hello"]):
        caplog.clear()
        assert call(*arguments, "--model", model, "--template", "alpaca")[0] == 0
        assert f"ids up to {embeddings + 1}, but the base has {embeddings} embeddings" in caplog.text


def test_chat_goes_on_after_a_token_without_embedding(call, more_tokens):
    model, _ = more_tokens
    code, out, err = call("chat", *FEW, "--model", model, "--template", "alpaca", stdin="<|im_start|>\nsun\n")
    assert code == 0
    assert "has the token '<|im_start|>'" in err
    assert out.count("\n") == 1


def test_more_embeddings_than_tokens_are_fine(base):
    tokenizer = tiny_tokenizer()
    assert Limits(None, len(tokenizer) + 64).warning(tokenizer) is None
    assert Limits(None, len(tokenizer)).warning(tokenizer) is None
    assert Limits(None, len(tokenizer) - 1).warning(tokenizer) is not None


# beyond the context


@pytest.mark.parametrize("skip", [False, True])
def test_a_record_beyond_the_context_is_named_or_skipped(call, short, tmp_path, skip, monkeypatch):
    path = write(tmp_path / "p.jsonl", [{"prompt": "sun"}, {"prompt": LONG}, {"prompt": 5}, {"prompt": "cat"}])
    arguments = ["generate", *FEW, "--model", short, "--template", "raw", "-f", path, "--json"]
    if skip:
        code, out, err = call(*arguments, "--skip-bad-records")
        assert code == 0
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["sun", "cat"]
        assert "2 skipped_records" in err
        assert f"{path}, record 2: The prompt has" in err
    else:
        write(path, [{"prompt": "sun"}, {"prompt": LONG}])
        monkeypatch.setattr("llama_adapter.inference.session.load_base", lambda *_: pytest.fail("read the weights"))
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert f"{path}, record 2: The prompt has" in err
        assert "tokens; the base takes at most 63" in err


def test_lines_of_a_text_file_are_named_too(call, short, tmp_path, no_weights):
    (tmp_path / "p.txt").write_text(f"sun\n\n{LONG}\n")
    assert (
        f"{tmp_path / 'p.txt'}, line 3: The prompt has"
        in call("generate", "--model", short, "--template", "raw", "-f", tmp_path / "p.txt")[2]
    )


@pytest.mark.parametrize("model", ["short", "base"])
def test_losses_beyond_the_context_are_refused_or_skipped(call, request, tmp_path, model):
    folder = request.getfixturevalue(model)
    records = [{"prompt": "sun", "completion": "moon"}, {"prompt": "sun", "completion": LONG * 20}]
    arguments = ["evaluate", "instructions", *FEW[2:], "--model", folder, "--template", "raw", "--data"]
    path = write(tmp_path / "d.json", records)
    code, _, err = call(*arguments, path)
    assert code == 2
    assert f"{path}, record 2: Prompt and answer have" in err
    code, out, err = call(*arguments, path, "--skip-bad-records", "--json")
    assert code == 0
    assert json.loads(out)["base"][-1]["count"] == 1
    assert "1 skipped_records" in err


def test_every_row_has_its_own_room_and_less_than_asked_is_said_once(short, caplog):
    session = load_session(short, {}, "cpu", template="raw")
    config = GenerateConfig(max_new_tokens=40, temperature=0)
    session.model.generation_config.eos_token_id = None
    few, many = Prompt.of("z"), Prompt.of("z" * 50)
    alone = session.answer([few], None, config)[0]
    beside = session.answer([few, many], None, config)
    session.answer([many], None, config)
    assert (beside[0].text, beside[0].new_tokens) == (alone.text, alone.new_tokens)
    assert beside[1].prompt_tokens + beside[1].new_tokens <= 64
    told = [text for text in caplog.messages if "there is room for" in text]
    assert len(told) == 1
    assert "the base takes 64" in told[0]


# raw prompts


PAIRS = [{"prompt": f"Question: {w}\nAnswer:\n ", "completion": "It is."} for w in ("sun", "moon", "cat")]


def test_raw_prompts_have_the_tokens_of_training_however_they_are_given(call, base, raw_adapter, tmp_path):
    text = PAIRS[0]["prompt"]
    tokens = len(tiny_tokenizer()(text)["input_ids"])
    path = write(tmp_path / "p.jsonl", [{"prompt": text}, PAIRS[0]])
    arguments = ["generate", "-a", raw_adapter, *FEW, "--json"]
    outs = [call(*arguments, text)[1], call(*arguments, stdin=text)[1], call(*arguments, "-f", path)[1]]
    assert [json.loads(line)["prompt_tokens"] for out in outs for line in out.splitlines()] == [tokens] * 4
    (tmp_path / "p.txt").write_text("sun  \n")
    assert read_prompts(str(tmp_path / "p.txt"), raw=True) == [Prompt.of("sun  ")]


@pytest.mark.parametrize("way", [["--input", "x"], ["-f", "m.json"], ["-f", "i.json"]])
def test_what_a_raw_prompt_cannot_have_is_refused_with_the_way_out(call, raw_adapter, tmp_path, no_weights, way):
    turns = [("system", "Be brief."), ("user", "hi")]
    write(tmp_path / "m.json", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    write(tmp_path / "i.json", [{"instruction": "a", "input": "b", "output": "c"}])
    code, _, err = call("generate", "-a", raw_adapter, *([] if way[0] == "-f" else ["hi"]), *way)
    assert code == 2
    assert "pass --template" in err
    if way[0] == "-f":
        assert f"{way[1]}, record 1: " in err
        assert "pass --template" in call("evaluate", "instructions", "-a", raw_adapter, "--data", way[1])[2] or (
            way[1] == "m.json"  # which has no answer
        )


def test_chat_without_a_template_completes_lines_and_says_so(call, raw_adapter, no_weights, monkeypatch):
    assert "--system needs a template" in call("chat", "-a", raw_adapter, "--system", "x", stdin="")[2]
    monkeypatch.undo()
    from llama_adapter.inference.session import Session

    seen, answer = [], Session.answer
    monkeypatch.setattr(Session, "answer", lambda *a, **k: seen.append(a[1][0].messages) or answer(*a, **k))
    code, _, err = call("chat", "-a", raw_adapter, *FEW, stdin="sun  \nmoon\n")
    assert code == 0
    assert seen == [(Message("user", "sun  "),), (Message("user", "moon"),)]
    assert "what was said before is not remembered" in err


def test_prompt_completion_records_are_asked_as_they_are_scored(base, adapter):
    session = load_session(None, {"a": adapter}, CPU)
    from llama_adapter.data import parse_record
    from llama_adapter.evaluation.instructions import Task

    task = Task(parse_record(PAIRS[0]), "all")
    asked, scored = session.writer.prompt(task.prompt, "a"), session.writer.example(task.example, "a")
    assert scored.input_ids[: len(asked)] == asked
    assert asked == session.tokenizer(PAIRS[0]["prompt"])["input_ids"]


def test_instructions_are_scored_under_a_raw_template_as_they_are_asked(call, raw_adapter, data, tmp_path):
    path = write(tmp_path / "d.json", [{"instruction": "sun", "output": "moon"}])
    code, out, _ = call("evaluate", "instructions", "-a", raw_adapter, *FEW[2:], "--data", path, "--json")
    assert code == 0
    assert len(json.loads(out)) == 2


# text that is none


def test_bytes_that_are_not_utf8_are_one_sentence_and_chat_goes_on(call, base, no_weights, monkeypatch):
    with_base = ["--model", base, "--template", "alpaca", *FEW]
    latin = os.fsdecode(b"caf\xe9")
    for arguments, stdin in (
        (["generate", *with_base], b"caf\xe9 is"),
        (["generate", *with_base, latin], None),
        (["generate", *with_base, "x", "--input", latin], None),
        (["chat", *with_base, "--system", latin], b""),
    ):
        code, _, err = call(*arguments, stdin=stdin)
        assert code == 2
        assert "is not UTF-8 text (at character 4)" in err
    monkeypatch.undo()
    code, out, err = call("chat", *with_base, stdin=b"caf\xe9\nsun\n")
    assert code == 0
    assert "is not UTF-8 text (at character 4)" in err
    assert out.count("\n") == 1


def test_prompts_from_python_are_checked_too(base):
    with pytest.raises(DataError, match="not UTF-8"):
        load_session(str(base), {}, CPU).answer([Prompt.of("caf\udce9")], None, GREEDY)


# where the base is


def test_a_base_that_is_not_here_asks_for_model(call, base, tmp_path):
    folder = write_adapter(base, tmp_path / "poet", base_model_name_or_path="models/tiny")
    for arguments in (["generate", "-a", folder, "hi"], ["chat", "-a", folder]):
        code, _, err = call(*arguments)
        assert code == 2
        assert "The adapter's base 'models/tiny' is not here: pass --model FOLDER" in err
        assert err.count("\n") == 1


def test_a_base_is_found_from_here_and_from_the_adapter_s_folder(base, tmp_path, monkeypatch):
    folder = write_adapter(base, tmp_path / "poet", base_model_name_or_path="../models/tiny")
    shutil.copytree(base, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path.parent)
    assert Path(plan_session(None, {"a": folder}).model).samefile(tmp_path / "models" / "tiny")
    (tmp_path / "poet" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "poet" / "sub")
    with pytest.raises(ModelError, match="pass --model"):
        plan_session(None, {"a": write_adapter(base, tmp_path / "b", base_model_name_or_path="../nowhere")})


def test_a_device_may_be_a_string(base):
    assert load_session(str(base), {}, "cpu").model.device == CPU
    with pytest.raises(ConfigError, match="There is no device 'toaster'"):
        load_session(str(base), {}, "toaster")


def test_chat_s_image_command_is_named_as_it_is_typed(call, adapter):
    _, _, err = call("chat", "-a", adapter, stdin="/image nofile\n/wat\n")
    assert "/image needs an adapter that was trained with --condition" in err
    assert "--image" not in err
    assert "known: /reset, /adapter, /help, /exit." in err


def test_the_hub_s_retries_are_not_printed():
    code = (
        "import logging\nfrom llama_adapter.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
        "import huggingface_hub.utils.logging\n"
        "print(logging.getLogger('huggingface_hub').getEffectiveLevel() >= logging.ERROR)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "num_hidden_layers", -1),
        ("config.json", "num_hidden_layers", 10**30),
        ("tokenizer_config.json", "chat_template", 5),
        ("tokenizer_config.json", "model_max_length", "x"),
    ],
)
def test_what_no_base_has_is_named(base, tmp_path, file, key, value):
    shutil.copytree(base, tmp_path / "b")
    path = tmp_path / "b" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    load = load_config if file == "config.json" else load_tokenizer
    with pytest.raises(ModelError, match=rf"{key}.* '?{value}"):
        load(str(tmp_path / "b"))
