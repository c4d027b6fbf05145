"""The whole front, thrown at: records, recipes, flags, files, bytes, templates, adapters. Whatever a person types or
hands over, the answer is a result or one sentence, and a failure leaves nothing behind."""

import contextlib
import functools
import gzip
import io
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import yaml
from data_helpers import CHAT_TEMPLATES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runs import recipe
from safetensors.torch import load_file, save_file

from llama_adapter.cli import COMMANDS, build_parser, main
from llama_adapter.training import plan
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loop import train

pytestmark = pytest.mark.slow
HANG = 60  # seconds; the slowest example takes less than one


def times(count: int):
    """So many examples, the same in every run."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, base):
    """A working folder with a base, an adapter and sound data in it."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(base, folder / "base")
    (folder / "d.json").write_text(json.dumps([{"instruction": f"Say {i}", "output": "cat"} for i in range(6)]))
    train(recipe(folder / "base", folder / "d.json", folder / "run", max_steps=1, val_size=1))
    shutil.rmtree(folder / "run" / "last")
    before = os.getcwd()
    os.chdir(folder)
    yield SimpleNamespace(folder=folder, base=folder / "base", run=folder / "run", data=folder / "d.json")
    os.chdir(before)


@contextlib.contextmanager
def no_hang(words):
    def stop(*_):
        raise AssertionError(f"hangs: {words}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items() if not Path(name).is_dir()}


def call(place, *words: str, stdin: bytes = b"") -> int:
    """Run a command in this process and hold what it does against the rules; its exit code."""
    out, err = io.StringIO(), io.StringIO()
    read, before = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"), files_of(place.folder)
    code = 0
    with no_hang(words), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", read)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(list(words))
            except SystemExit as stop:
                code = stop.code
    said = err.getvalue()
    assert code in (0, 2, 130), (code, words)
    assert "Traceback" not in said, said
    if code == 2:
        lines = said.split("\n")
        assert lines[-1] == "", said
        assert lines[-2].startswith("Error: "), said
        assert said.count("Error: ") == 1 or said.index("Error: ") == said.index(lines[-2]), said
        assert 15 < len(lines[-2]) < 2500, said
        assert lines[-2].isprintable(), repr(said)
        assert files_of(place.folder) == before, words
    return code


READ_ONCE = {name: functools.cache(getattr(plan, name)) for name in ("load_config", "load_tokenizer")}


def validate(place, *words: str, stdin: bytes = b"") -> int:
    """Check data; the base, which stays as it is, is read for the first alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, read in READ_ONCE.items():
            patch.setattr(plan, name, read)
        return call(place, "validate", "--model", str(place.base), "--val-size", "0", *words, stdin=stdin)


# What people write, and what nobody should.
odd_texts = st.sampled_from([
    "", " ", "\n", "cat", "\ud83d", "\udc80", "\0", "\u2028", "<image>", "<think>", "</s>", "~", "é" * 9, "{}", "[1]",
    "0", "1", "false", "-1", "1e999", "nan", "9" * 30, "data:image/png;base64,AA==", "/dev/null", "a" * 2000, "{{",
])  # fmt: skip
texts = odd_texts | st.text(max_size=12)
numbers = st.sampled_from([0, 1, -1, 0.5, 2**31, 2**63, 10**40, -(10**40), 1e300, 5e-324]) | st.integers()
scalars = st.none() | st.booleans() | numbers | texts
KEYS = [
    "messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion", "system", "tools",
    "functions", "image", "images", "audio", "videos", "label", "kto_tag", "family", "weight", "chosen", "rejected",
    "role", "content", "from", "value", "tool_calls", "function_call", "name", "arguments", "reasoning_content",
    "thinking", "train", "train_detail", "type", "text", "url", "bytes", "path", "tool_call_id", "system_prompt", "id",
]  # fmt: skip
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=5),
    max_leaves=12,
)
roles = st.sampled_from(
    ["system", "user", "human", "assistant", "gpt", "tool", "function_call", "observation", "developer", "critic"]
)
contents = texts | st.just("Say cat.") | json_values


def having(required: dict, optional: dict):
    """Records with these keys, most of them as they should be, and a few of any kind."""
    return st.builds(
        lambda record, more: {**record, **more},
        st.fixed_dictionaries(required, optional=optional),
        st.just({}) | st.just({}) | st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2),
    )


turns = having(
    {"role": roles, "content": contents},
    {"weight": scalars, "tool_calls": json_values, "reasoning_content": contents, "name": texts},
) | having({"from": roles, "value": contents}, {})
pairs = st.lists(st.lists(contents, min_size=2, max_size=2) | json_values, max_size=3)
records = st.one_of(
    having({"instruction": contents, "output": contents}, {"input": contents, "history": pairs, "image": json_values}),
    having(
        {"messages": st.lists(turns, max_size=5)}, {"tools": json_values, "system": contents, "images": json_values}
    ),
    having({"conversations": st.lists(turns, max_size=5)}, {"tools": json_values, "system": contents}),
    having({"prompt": contents, "completion": contents}, {"label": scalars}),
    having({"prompt": st.lists(turns, max_size=3), "completion": st.lists(turns, max_size=2)}, {}),
    json_values,
)


@times(3000)
@given(
    st.lists(records, min_size=1, max_size=4),
    st.sampled_from(["r.json", "r.jsonl", "r.ndjson.gz", "-"]),
    st.sampled_from([(), ("--skip-bad-records",), ("--template", "chat"), ("--condition", "image", "--tower", "t")]),
    st.booleans(),
)
def test_records(place, rows, name, flags, ascii_only):
    separator = "\n" if "l" in name or "nd" in name else ","
    text = separator.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    content = (text if separator == "\n" else f"[{text}]").encode("utf-8", "surrogatepass")
    if name != "-":
        (place.folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    validate(place, "--data", name, *flags, stdin=content)


FIELDS = sorted(get_type_hints(TrainConfig))
sound = {"model": "base", "data": ["d.json"], "val_size": 0}


@times(1500)
@given(
    st.dictionaries(st.sampled_from(FIELDS) | texts, json_values, max_size=3).map(lambda odd: {**sound, **odd})
    | st.dictionaries(st.sampled_from(FIELDS), scalars, min_size=1, max_size=2).map(lambda odd: {**sound, **odd})
    | json_values,
    st.none()
    | st.tuples(st.integers(0, 300), st.binary(max_size=4) | st.sampled_from([b"&a *a", b"!!python/x", b": ["])),
)
def test_recipes(place, values, damage):
    content = yaml.dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
    if damage:
        content = content[: damage[0]] + damage[1] + content[damage[0] :]
    (place.folder / "r.yaml").write_bytes(content)
    call(place, "validate", "r.yaml")


@functools.cache
def flags_of(*command: str) -> list[str]:
    parser = build_parser(command)
    for word in command:
        parser = parser._subparsers._group_actions[0].choices[word]
    # These would serve, train for minutes or read a terminal for as long as nobody stops them.
    return sorted({flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"})


DOORS = [[name] for name in COMMANDS if name != "evaluate"] + [["evaluate", "instructions"], ["evaluate", "scienceqa"]]
STOPPED = {  # by something that is wrong in any case, where the command would otherwise load weights and work
    "demo": ["--max-steps", "0"], "train": ["--model", "nowhere"], "generate": ["--model", "nowhere"],
    "train-many": ["nowhere.yaml"], "chat": ["--model", "nowhere"], "serve": ["--model", "nowhere"],
    "evaluate": ["--model", "nowhere"],
    "quickstart": ["d.json", "--model", "base"], "validate": ["--model", "base", "--data", "d.json"],
    "inspect": ["run"], "convert": ["nowhere", "--output", "out"], "push": ["nowhere", "owner/name"],
}  # fmt: skip
values = (
    texts | numbers.map(str) | st.sampled_from(["d.json", "base", "run", "bundled", "r.yaml", "x=run", "=", "-", "--"])
)


@times(1500)
@given(st.sampled_from(DOORS), st.data())
def test_flags(place, command, data):
    words = []
    for _ in range(data.draw(st.integers(0, 3))):
        flag = data.draw(st.sampled_from(flags_of(*command)) | st.sampled_from(flags_of(*command)) | texts)
        value = data.draw(values)
        words += data.draw(st.sampled_from([[flag], [flag, value], [flag, value], [f"{flag}={value}"], [value]]))
    last = STOPPED[command[0]]
    written = {name for name in ("--output", "-o", "--plot") if any(word.startswith(name) for word in words)}
    words = [word.replace("\0", "") for word in words]  # which no command line can hold
    call(place, *command, *words, *last) if not written else call(place, *command, *words, *last, "--nonsense")


def packed_rows() -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet
    from zstandard import compress

    rows = [{"instruction": f"Say {i}", "input": 'a,b\n"c"', "output": "cat"} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table, nested = io.BytesIO(), io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    talk = [{"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Oh."}], "id": None}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(talk), nested, compression="zstd")
    cells = b'instruction,input,output\n"Say, 1",,cat\nSay 2,"a\nb","c ""d"""\n'
    return {
        "f.json": json.dumps(rows).encode(), "f.jsonl": lines, "f.csv": cells, "f.tsv": cells.replace(b",", b"\t"),
        "f.parquet": table.getvalue(), "g.parquet": nested.getvalue(), "f.jsonl.gz": gzip.compress(lines) * 2,
        "f.csv.gz": gzip.compress(cells), "f.jsonl.zst": compress(lines) * 2, "f.parquet.gz": gzip.compress(b"PAR1"),
    }  # fmt: skip


KINDS = packed_rows()
damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]), st.integers(0, 5000), st.binary(min_size=1, max_size=4)
    ),
    max_size=3,
)


def damaged(content: bytes, steps) -> bytes:
    for how, at, piece in steps:
        at %= len(content) + 1
        if how == "flip":
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == "cut":
            content = content[:at]
        elif how == "insert":
            content = content[:at] + piece + content[at:]
        else:
            content += content[at:]
    return content


@times(1500)
@given(st.sampled_from(sorted(KINDS)), damages, st.sampled_from([(), ("--skip-bad-records",)]), st.booleans())
def test_files(place, name, steps, flags, piped):
    content = damaged(KINDS[name], steps)
    (place.folder / name).write_bytes(content)
    validate(place, "--data", "-" if piped else name, *flags, stdin=content)


@times(600)
@given(
    st.binary(max_size=60)
    | st.sampled_from([b"\xef\xbb\xbf[]", b"\xff\xfe[\0]\0", b"\x1f\x8b", b"PAR1PAR1", b"[" * 9999]),
    st.sampled_from(
        [f"b{s}{p}" for s in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", "") for p in ("", ".gz", ".zst")]
    ),
    st.sampled_from([["validate", "--model", "base", "--data"], ["quickstart", "--model", "base"]]),
)
def test_bytes(place, content, name, words):
    (place.folder / name).write_bytes(content)
    call(place, *words, name)


def changed_base(place, name: str, content: bytes) -> str:
    """The base beside itself with one other file; its weights are links."""
    folder = place.folder / "changed"
    if not folder.exists():
        shutil.copytree(place.base, folder)
    (folder / name).write_bytes(content)
    return str(folder)


SETTINGS = [
    "eos_token_id", "bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "num_beams", "repetition_penalty",
    "suppress_tokens", "forced_eos_token_id", "guidance_scale", "no_repeat_ngram_size", "temperature", "do_sample",
    "cache_implementation", "max_time", "stop_strings", "watermarking_config", "num_return_sequences", "early_stopping",
    "compile_config", "assistant_early_exit", "sequence_bias", "return_dict_in_generate", "output_scores", "use_cache",
]  # fmt: skip


@times(400)
@given(
    st.dictionaries(st.sampled_from(SETTINGS) | texts, json_values, max_size=4).map(json.dumps).map(str.encode)
    | st.binary(max_size=30)
    | json_values.map(json.dumps).map(str.encode)
)
def test_generation_configs(place, content):
    base = changed_base(place, "generation_config.json", content)
    call(place, "generate", "Say cat.", "--model", base, "--max-new-tokens", "2", "--temperature", "0")


pieces = st.sampled_from(
    [
        "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}",
        "{% if add_generation_prompt %}",
        "{% endif %}", "{{ raise_exception('no') }}", "{{ messages[0].content | trim }}",
        "{{ strftime_now('%d %b %Y') }}",
        "{{ strftime_now(5) }}", "<think>\n", "</s>", "{{ 1 / 0 }}", "{{ x.y.z }}", "{% set ns = namespace(a=0) %}",
        "{{ m.content.split('</think>')[5] }}", "{{ tools | tojson }}", "{% generation %}", "{% endgeneration %}",
        "{% macro f(x) %}", "{% endmacro %}", "{{ f(1) }}", "{% break %}", "{{ [1] * 3 }}", "{{", "%}", "assistant",
        "\n",
        "{{ messages | length }}", "{{ bos_token }}", "{{ m.content + 1 }}", "{% include 'x' %}", "{{ ''.__class__ }}",
        "{{ loop.index0 }}", "{% else %}", "{% if m.role == 'user' %}", "{{ m.tool_calls[0].function.name }}",
    ]
)  # fmt: skip
templates = st.lists(pieces | texts, max_size=9).map("".join) | st.tuples(
    st.sampled_from(sorted(CHAT_TEMPLATES.values())), pieces, st.integers(0, 400)
).map(lambda three: three[0][: three[2]] + three[1] + three[0][three[2] :])
TALK = [
    {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Oh."}]},
    {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hm?"},
                  {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
                  {"role": "tool", "content": "1"}, {"role": "assistant", "content": "Oh."}]},
]  # fmt: skip


@times(1000)
@given(templates, st.sampled_from([(), ("--skip-bad-records",)]))
def test_chat_templates(place, template, flags):
    base = changed_base(place, "chat_template.jinja", template.encode("utf-8", "surrogatepass"))
    (place.folder / "talk.json").write_text(json.dumps(TALK))
    words = ("--model", base, "--data", "talk.json", "--template", "chat", "--val-size", "0", *flags)
    try:
        call(place, "validate", *words)
    finally:
        (place.folder / "changed" / "chat_template.jinja").unlink()


@times(900)
@given(
    st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    st.none() | damages,
    st.dictionaries(st.integers(0, 20), json_values, min_size=1, max_size=2),
)
def test_adapters(place, name, steps, changes):
    folder = place.folder / "odd"
    shutil.copytree(place.run, folder, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    if steps is not None:
        content = damaged(content, steps)
    elif name.endswith("json"):
        config = json.loads(content)
        config |= {sorted(config)[number % len(config)]: value for number, value in changes.items()}
        content = json.dumps(config).encode()
    else:
        tensors = load_file(folder / name)
        number = min(changes)
        key = sorted(tensors)[number % len(tensors)]
        wrong = {0: {}, 1: {key: tensors[key][:0]}, 2: {key: tensors[key].bool()}, 3: {"x": tensors[key].clone()}}
        save_file({**({} if number % 5 == 0 else tensors), **wrong[number % 4]}, folder / name)
        content = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    call(place, "inspect", "odd")


@times(300)
@given(
    st.lists(records | texts, min_size=1, max_size=3),
    st.sampled_from(["p.jsonl", "p.txt", "-"]),
    st.sampled_from([["generate", "--json"], ["evaluate", "instructions", "--batch-size", "2"]]),
    st.sampled_from([(), ("--skip-bad-records",)]),
    st.binary(max_size=3),
)
def test_prompts(place, rows, name, words, flags, end):
    lines = [row if isinstance(row, str) and name == "p.txt" else json.dumps(row) for row in rows]
    content = "\n".join(lines).encode("utf-8", "surrogatepass") + end
    (place.folder / "p.jsonl").write_bytes(content)
    (place.folder / "p.txt").write_bytes(content)
    source = [] if name == "-" and words[0] == "generate" else ["--data" if words[0] == "evaluate" else "--file", name]
    skip = flags if source else ()
    call(place, *words, *source, *skip, "--adapter", "run", "--max-new-tokens", "2", stdin=content)


@times(300)
@given(
    st.sampled_from(["config.json", "tokenizer_config.json"]),
    st.dictionaries(st.integers(0, 60), scalars | json_values, min_size=1, max_size=2),
)
def test_bases(place, name, changes):
    config = json.loads((place.base / name).read_text())
    config |= {sorted(config)[number % len(config)]: value for number, value in changes.items()}
    base = changed_base(place, name, json.dumps(config).encode())
    try:
        call(place, "validate", "--model", base, "--data", "d.json", "--val-size", "0")
    finally:
        shutil.copy(place.base / name, base)
