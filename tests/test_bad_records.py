"""What can be wrong with one record is said of it, and --skip-bad-records goes on without it; what it means is used."""

import base64
import io
import json

import datasets
import pytest
from data_helpers import CHATML, GEMMA, PLAIN, byte_level
from PIL import Image
from runs import recipe, tiny_tokenizer

from llama_adapter.conditions.recordings import read_audio
from llama_adapter.data import encode, encode_prompt, load_examples, parse_record, read_records
from llama_adapter.data.formats import parse_question
from llama_adapter.data.media import media_of
from llama_adapter.errors import DataError
from llama_adapter.evaluation.instructions import read_tasks
from llama_adapter.inference.writing import read_prompts
from llama_adapter.training.prepare import prepare

GOOD = {"instruction": "Name a colour.", "output": "Blue."}
ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello."}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}
# Writes everything that a message may have, as templates of models with tools do.
FULL = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def learnt(record: dict, template: str = "alpaca", chat: str | None = None) -> str:
    tokenizer = byte_level(chat=chat)
    encoded = encode(parse_record(record), template, tokenizer, 1000)
    return tokenizer.decode([label for label in encoded.labels if label >= 0])


def write(folder, records, name="data.jsonl") -> str:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (folder / name).write_bytes(b"\n".join(lines))
    return str(folder / name)


# Weights


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0}]
)
@pytest.mark.parametrize(("template", "chat"), [("alpaca", None), ("chat", CHATML), ("chat", PLAIN)])
def test_an_answer_without_weight_is_read_and_not_learnt(flag, template, chat):
    wrong = {"role": "assistant", "content": "WRONG", **flag}
    record = {"messages": [ASKED, wrong, ASKED, ANSWERED]}
    found = learnt(record, template, chat)
    assert "Hello." in found
    assert "WRONG" not in found
    tokenizer = byte_level(chat=chat)
    assert "WRONG" in tokenizer.decode(encode(parse_record(record), template, tokenizer, 1000).input_ids)


def test_what_stands_behind_the_last_learnt_answer_is_left_out():
    record = {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": "WRONG", "weight": 0}]}
    assert [message.content for message in parse_record(record).messages] == ["Hi", "Hello."]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"weight": 0}, "every answer has weight 0"),
        ({"weight": 0.5}, "'weight' of turn 2 of 'messages' is 0.5; it must be 0 or 1"),
        ({"weight": "0"}, "'weight' of turn 2 of 'messages' is '0'; it must be 0 or 1"),
        ({"train": "no"}, "'train' of turn 2 of 'messages' is 'no'"),
        ({"weight": 1, "train": False}, "weight, train of turn 2 of 'messages' contradict each other"),
        ({"loss_scale": 2.0}, "weighs parts of a message, which is not supported"),
    ],
)
def test_other_weights_are_refused(flags, sentence):
    with pytest.raises(DataError) as caught:
        parse_record({"messages": [ASKED, {**ANSWERED, **flags}]})
    assert sentence in str(caught.value)


# Tools and thoughts


def test_tools_their_calls_and_results_reach_the_chat_template():
    call = {"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    record = {"messages": [*turns, {**ANSWERED, "reasoning_content": "It is noon."}], "tools": json.dumps([TOOL])}
    found = learnt(record, "chat", FULL)
    assert 'clock({"zone": "UTC"})' in found
    assert "<think>It is noon.</think>Hello." in found
    assert "tool: noon" not in found
    tokenizer = byte_level(chat=FULL)
    asked = parse_question({**record, "messages": turns})
    prompt = tokenizer.decode(encode_prompt(asked.messages[:-1], "chat", tokenizer, tools=asked.tools))
    assert prompt.startswith("tools: [{")
    assert prompt.endswith("tool: noonassistant: ")


def test_sharegpt_calls_of_functions():
    turns = [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "Noon."},
    ]
    found = learnt({"conversations": turns, "tools": '[{"name": "clock"}]'}, "chat", FULL)
    assert 'clock({"zone": "UTC"})' in found


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"tools": [TOOL]}, "tools", "does not write 'tools'"),
        (
            {"messages": [ASKED, {**ANSWERED, "reasoning_content": "Hm."}]},
            "reasoning_content",
            "leaves out the thought",
        ),
        (
            {"messages": [ASKED, {**ANSWERED, "tool_calls": [{"name": "f"}]}]},
            "tool_calls",
            "leaves out the tool calls",
        ),
    ],
)
def test_what_a_template_does_not_write_is_refused(changes, name, reason):
    record = {"messages": [ASKED, ANSWERED], **changes}
    with pytest.raises(DataError, match=f"{name} can only be written by a chat template"):
        learnt(record)
    with pytest.raises(DataError, match=reason):
        learnt(record, "chat", CHATML)


# Records that are no JSON

BROKEN = [
    (b'{"instruction": "a", "output": "b", "id": ' + b"7" * 5000 + b"}", "a number of more than 4,300 digits"),
    (b'{"instruction": "a", "output": "b", "x": NaN}', "NaN, which JSON does not have"),
    (b'{"instruction": "a", "output": "b", "x": -Infinity}', "-Infinity, which JSON does not have"),
    (b'{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' stands twice"),
    (b'{"instruction": "a", "output": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"instruction": "caf\xe9", "output": "b"}', "bytes that are not UTF-8"),
    (b'{"instruction": "\\ud83d", "output": "b"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
@pytest.mark.parametrize("listed", [False, True])
def test_a_record_that_is_no_json_is_skipped_alone(tmp_path, line, reason, listed):
    if listed:
        path = tmp_path / "data.json"
        path.write_bytes(b"[" + json.dumps(GOOD).encode() + b",\n" + line + b",\n" + json.dumps(GOOD).encode() + b"]")
    else:
        path = write(tmp_path, [GOOD, line, GOOD])
    with pytest.raises(DataError):
        load_examples([str(path)])
    loaded = load_examples([str(path)], skip_bad_records=True)
    assert len(loaded.examples) == 2
    (sentence,) = loaded.skipped
    assert sentence.startswith(f"{path}, record 2: ")
    assert reason in sentence
    assert "surrogate" in reason or "line 2" in sentence
    assert len(read_prompts(str(path), skipped=[])) == 2
    assert len(read_tasks(str(path), [])) == 2


def test_a_torn_line_is_skipped_and_a_torn_list_is_not(tmp_path):
    assert len(load_examples([write(tmp_path, [b'{"instruction": "a"', GOOD])], True).examples) == 1
    path = tmp_path / "torn.json"
    path.write_text(f"[{json.dumps(GOOD)}, {json.dumps(GOOD)[:-5]}", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        load_examples([str(path)], True)


@pytest.mark.parametrize(
    "text",
    ["[]x", "[1 2]", "[1,]", "[,1]", "[", "[1", '["a]', "[1]]", "[{}}", "{}", "[1}", "[tru]", "[01]", "\ufeff[,"],
)
def test_a_list_is_read_as_strictly_as_by_the_standard_library(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError):
        read_records(str(tmp_path / "a.json"), bad=[])


def test_a_coco_file_with_a_number_of_thousands_of_digits(tmp_path):
    (tmp_path / "c.json").write_text('{"images": [],\n"annotations": [], "x": ' + "7" * 5000 + "}", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: a number of more than 4,300 digits"):
        load_examples([f"coco:{tmp_path / 'c.json'}"])


def test_odd_entries_of_a_coco_file_are_bad_records(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "a.png"}, {"id": [2], "file_name": "a.png"}, {"id": 3, "file_name": "x" * 9000}]
    odd = [{"image_id": i, "caption": "A cat."} for i in ([2], 3, {}, None)] + [{"image_id": 1, "caption": "\ud83d"}]
    data = {"images": images, "annotations": [*odd, {"image_id": 1, "caption": "A dog."}]}
    (tmp_path / "c.json").write_text(json.dumps(data), encoding="utf-8")
    loaded = load_examples([f"coco:{tmp_path / 'c.json'}"], skip_bad_records=True)
    assert [example.messages[-1].content for example in loaded.examples] == ["A dog."]
    assert len(loaded.skipped) == 5


# Templates


def test_a_record_that_the_template_cannot_write_is_skipped(tmp_path):
    twice = {"messages": [ASKED, ANSWERED, ANSWERED]}
    system = {"messages": [{"role": "system", "content": "Be kind."}, ASKED, ANSWERED]}
    path = write(tmp_path, [{"messages": [ASKED, ANSWERED]}, twice, system])
    for template, chat, skipped in (("alpaca", None, [2]), ("chat", GEMMA, [2, 3])):
        config = recipe("unused", path, "unused", template=template, val_size=0, skip_bad_records=True)
        prepared = prepare(config, byte_level(chat=chat))
        assert [sentence.partition(": ")[0] for sentence in prepared.skipped] == [
            f"{path}, record {n}" for n in skipped
        ]
        assert prepared.report()["skipped_records"] == len(skipped) == 3 - len(prepared.train)
    path = write(tmp_path, [twice])
    with pytest.raises(DataError, match="No record is left to use"):
        prepare(recipe("unused", path, "unused", val_size=0, skip_bad_records=True), tiny_tokenizer())


# Files


@pytest.fixture
def pictures(tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "ok.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "ok.jpg").read_bytes()[:300])
    return tmp_path


def test_damaged_pictures_are_found_before_weights_and_skipped(pictures):
    path = write(pictures, [{**GOOD, "image": name} for name in ("ok.jpg", "cut.jpg", "gone.jpg", "ok.jpg")])
    config = {"condition": "image", "val_size": 0}
    with pytest.raises(DataError, match=r"record 3: 'gone\.jpg' is neither there nor in"):
        prepare(recipe("unused", path, "unused", **config), tiny_tokenizer())
    prepared = prepare(recipe("unused", path, "unused", **config, skip_bad_records=True), tiny_tokenizer())
    assert len(prepared.train) == 2
    assert ["gone.jpg" in prepared.skipped[0], "cut.jpg is damaged" in prepared.skipped[1]] == [True, True]
    assert prepared.skipped[1].startswith(f"{path}, record 2: ")
    path = write(pictures, [{**GOOD, "image": "cut.jpg"}, {**GOOD, "image": "ok.jpg"}])
    with pytest.raises(DataError, match=r"record 1: .*cut.jpg is damaged or truncated"):
        read_prompts(path, kinds={"image"})
    assert len(read_prompts(path, False, [], {"image"})) == len(read_tasks(path, [], {"image"})) == 1


def test_a_picture_may_be_held_by_its_record(pictures):
    content = (pictures / "ok.jpg").read_bytes()
    text = base64.b64encode(content).decode()
    assert len(text) > 1024
    for value in (text, f"data:image/jpeg;base64,{text}", {"bytes": content, "path": None}, {"bytes": text}, content):
        assert media_of(value, "'image'") == [content]
    assert media_of({"bytes": None, "path": "ok.jpg"}, "'image'") == ["ok.jpg"]
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}"}}
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}, ANSWERED]}
    assert parse_record(record).media == (content,)


@pytest.mark.parametrize("value", [None, "", "  ", []])
def test_no_picture(value):
    example = parse_record({**GOOD, "image": value})
    assert (example.media, example.notes) == ((), ())


@pytest.mark.parametrize(
    "value",
    [
        7,
        True,
        [None],
        [""],
        [[]],
        {},
        {"path": ""},
        {"bytes": None},
        {"bytes": "%"},
        "http://x/a.png",
        "data:x;base64,%",
    ],
)
def test_what_is_no_picture_is_named(value):
    with pytest.raises(DataError, match="'image'"):
        parse_record({**GOOD, "image": value})


@pytest.mark.parametrize("name", ["x." * 5000, "a\0b", "~nobody-has-this-name/x.png"])
def test_impossible_names_of_files_are_bad_records(tmp_path, name):
    path = write(tmp_path, [{**GOOD, "image": name}, GOOD])
    (sentence,) = load_examples([path], skip_bad_records=True).skipped
    assert "is neither there nor in" in sentence
    assert len(sentence) < 500


def test_tags_and_files_are_held_against_each_other():
    tagged = {**GOOD, "instruction": "<image> What is it?"}
    for record in (tagged, {**GOOD, "input": "<image>"}, {**tagged, "images": ["a.png", "b.png"]}):
        with pytest.raises(DataError, match="its text has"):
            parse_record(record)
    assert "a file without a tag" in parse_record({**GOOD, "image": "a.png"}).notes[0]
    assert parse_record({**GOOD, "input": "<image>", "image": "a.png"}).input == ""
    html = {"instruction": "Close this: <video>", "output": "Add </video>."}
    assert "a tag such as <video> without a file" in parse_record(html).notes[0]
    assert parse_record(html).messages[0].content == "Close this: <video>"


def test_a_recording_may_be_held_by_its_record():
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, [0.0, 0.5] * 800, 16_000, format="WAV")
    assert len(read_audio(file.getvalue())) == 1600
    with pytest.raises(DataError, match="truncated"):
        read_audio(file.getvalue()[:-100])


def test_a_hub_data_set_keeps_its_pictures_as_they_are_stored(monkeypatch, pictures):
    rows = [{**GOOD, "image": str(pictures / name), "images": [str(pictures / name)]} for name in ("ok.jpg", "cut.jpg")]
    features = {"instruction": datasets.Value("string"), "output": datasets.Value("string")}
    features |= {"image": datasets.Image(), "images": [datasets.Image()]}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    loaded = load_examples(["owner/name"], True, kinds=["image"])
    assert (len(loaded.examples), len(loaded.skipped)) == (1, 1)
    assert len(loaded.examples[0].media) == 2


# What is said


def test_what_is_not_used_is_said_once_with_counts(tmp_path):
    records = [{**GOOD, "score": 1, "id": i} for i in range(3)] + [{**GOOD, "score": None, "mood": "good"}]
    loaded = load_examples([write(tmp_path, records)])
    assert loaded.notes == [
        "the key 'score' is not used (3 of 4 records)",
        "the key 'mood' is not used (1 of 4 records)",
    ]
    many = load_examples([write(tmp_path, [{**GOOD, f"k{i}": 1} for i in range(50)])])
    assert many.notes[-1] == "and 30 more such keys"


def test_preference_files_are_called_by_their_name():
    for record in (
        {"prompt": "Hm?", "chosen": "Yes.", "rejected": "No."},
        {"instruction": "Hm?", "chosen": "Yes.", "rejected": "No."},
        {
            "conversations": [{"from": "human", "value": "Hm?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {},
        },
    ):
        with pytest.raises(DataError, match=r"it is of a preference file \('chosen', 'rejected'\)"):
            parse_record(record)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi"},
        {"prompt": [ASKED]},
        {"messages": [ASKED]},
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello.", "weight": 0}]},
        {"instruction": "Hi", "output": ""},
        {"prompt": "Hi", "completion": "Hello.", "label": False},
    ],
)
def test_whatever_asks_is_a_prompt(record):
    assert [message.content for message in parse_question(record).messages] == ["Hi", "?"]
