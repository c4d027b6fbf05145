import json

import pytest

from llama_adapter.data import Example, Message, load_examples, parse_record
from llama_adapter.data.formats import parse_question
from llama_adapter.errors import DataError

USER = Message("user", "Name a colour.")
ASSISTANT = Message("assistant", "Blue.")
SYSTEM = Message("system", "Be brief.")
USER_TURN = {"role": "user", "content": "Name a colour."}
ASSISTANT_TURN = {"role": "assistant", "content": "Blue."}
SYSTEM_TURN = {"role": "system", "content": "Be brief."}
PARTS = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Name a colour.", "output": "Blue."}, Example((USER, ASSISTANT))),
        ({"instruction": "Name a colour.", "input": None, "output": "Blue."}, Example((USER, ASSISTANT))),
        ({"instruction": "Name a colour.", "input": " \n", "output": "Blue."}, Example((USER, ASSISTANT))),
        (
            {"instruction": "Name a colour.", "input": "sky", "output": "Blue.", "text": 3},
            Example((USER, ASSISTANT), input="sky"),
        ),
        ({"messages": [USER_TURN, ASSISTANT_TURN]}, Example((USER, ASSISTANT))),
        ({"messages": [SYSTEM_TURN, USER_TURN, ASSISTANT_TURN]}, Example((SYSTEM, USER, ASSISTANT))),
        (
            {"messages": [{**USER_TURN, "role": "User"}, {**ASSISTANT_TURN, "role": "ASSISTANT "}]},
            Example((USER, ASSISTANT)),
        ),
        (
            {"messages": [{"role": "system", "content": " "}, USER_TURN, ASSISTANT_TURN]},
            Example((USER, ASSISTANT)),
        ),
        ({"messages": [{"role": "user", "content": PARTS}, ASSISTANT_TURN]}, Example((USER, ASSISTANT))),
        (
            {"messages": [USER_TURN, USER_TURN, ASSISTANT_TURN]},
            Example((USER, USER, ASSISTANT)),
        ),
        ({"prompt": "x", "messages": [USER_TURN, ASSISTANT_TURN]}, Example((USER, ASSISTANT))),
        ({"prompt": "Name a colour.", "completion": "Blue."}, Example((USER, ASSISTANT), raw=True)),
        (
            {"prompt": [SYSTEM_TURN, USER_TURN], "completion": [ASSISTANT_TURN]},
            Example((SYSTEM, USER, ASSISTANT)),
        ),
    ],
)
def test_formats(record, expected):
    assert parse_record(record) == expected


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "model", "bot"])
def test_sharegpt_roles(user, assistant):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": user, "value": "Name a colour."},
        {"from": assistant, "value": "Blue."},
    ]
    assert parse_record({"id": "x", "conversations": turns}) == Example((SYSTEM, USER, ASSISTANT))


def test_contents_are_kept_verbatim():
    record = {"instruction": " {input}\n", "output": "  Blue.\u2028 "}
    assert [message.content for message in parse_record(record).messages] == [" {input}\n", "  Blue.\u2028 "]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "a record must be an object, not a string"),
        (None, "a record must be an object, not null"),
        (
            {"question": 1, "answer": 2},
            "its keys (question, answer) fit no known format; the formats are: messages; conversations; "
            "instruction + output; prompt + completion",
        ),
        ({}, "its keys (none) fit no known format"),
        (
            {"a": "b"},
            "prompt + completion; rename its keys so, or in a table its columns: the first row must name them",
        ),
        (
            {"Instruction": "a", " Output": "b"},
            "its keys (Instruction,  Output) are known in small letters and without blanks alone: rename them so",
        ),
        ({"instruction": 3, "output": "x"}, "'instruction' must be a string, not a number"),
        ({"instruction": "x", "output": ["y"]}, "'output' must be a string, not a list"),
        ({"instruction": "x", "output": "y", "input": True}, "'input' must be a string, not a boolean"),
        ({"instruction": " \n", "output": "y"}, "'instruction' is empty"),
        ({"instruction": "x", "output": " "}, "'output' is empty"),
        ({"instruction": "x", "output": "a\ud83d"}, "'output' has half a surrogate pair at character 1"),
        ({"messages": {"role": "user"}}, "'messages' must be a list, not an object"),
        ({"messages": []}, "the conversation has no user and no assistant turn"),
        ({"messages": [SYSTEM_TURN]}, "the conversation has no user and no assistant turn"),
        ({"messages": ["x"]}, "turn 1 of 'messages' must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "turn 1 of 'messages' must be an object with 'role' and 'content'"),
        (
            {"messages": [USER_TURN, {"role": "critic", "content": "x"}]},
            "turn 2 of 'messages' has the unknown role 'critic'; the roles are system, developer, user, human",
        ),
        (
            {"messages": [USER_TURN, {"role": ["user"], "content": "x"}]},
            "turn 2 of 'messages' has the unknown role ['user']",
        ),
        (
            {"messages": [USER_TURN, {"role": "assistant", "content": None}]},
            "'content' of turn 2 of 'messages' must be a string, not null",
        ),
        (
            {"messages": [USER_TURN, {"role": "assistant", "content": "\n"}]},
            "'content' of turn 2 of 'messages' (assistant) is empty",
        ),
        (
            {"messages": [{"role": "user", "content": [*PARTS, {"type": "image"}]}, ASSISTANT_TURN]},
            "its text has a tag <image>, and it names no picture: add 'image', or take the tag out",
        ),
        (
            {"messages": [{"role": "user", "content": [*PARTS, {"type": "refusal"}]}, ASSISTANT_TURN]},
            "turn 1 of 'messages' has a part of the unknown type 'refusal'; the types are text, image, image_url",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}, ASSISTANT_TURN]}, "has a part that is a string; parts are"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT_TURN]},
            "'text' of a part of turn 1 of 'messages' must be a string, not null",
        ),
        ({"messages": [USER_TURN, SYSTEM_TURN, ASSISTANT_TURN]}, "a system message may only come first"),
        ({"messages": [USER_TURN, ASSISTANT_TURN, USER_TURN]}, "ends with a question nobody answers"),
        ({"messages": [SYSTEM_TURN, ASSISTANT_TURN]}, "the conversation starts with an assistant turn"),
        ({"conversations": [human("x")]}, "ends with a question nobody answers"),
        ({"conversations": [gpt("x"), human("y"), gpt("z")]}, "starts with an assistant turn"),
        (
            {"conversations": [human("x"), {"from": "critic", "value": "y"}]},
            "turn 2 of 'conversations' has the unknown role 'critic'; the roles are system, developer, user, human",
        ),
        ({"conversations": [human("x"), gpt("")]}, "'value' of turn 2 of 'conversations' (gpt) is empty"),
        ({"prompt": "", "completion": "x"}, "'prompt' is empty"),
        ({"prompt": "x", "completion": "\t"}, "'completion' is empty"),
        ({"prompt": 1.5, "completion": "x"}, "'prompt' must be a string, not a number"),
        ({"prompt": [USER_TURN], "completion": "x"}, "must both be strings or both be lists of messages"),
        ({"prompt": "x", "completion": [ASSISTANT_TURN]}, "must both be strings or both be lists of messages"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(DataError) as caught:
        parse_record(record)
    assert message in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_raw_example_has_two_messages():
    with pytest.raises(DataError, match="a raw example has exactly one user and one assistant message"):
        Example((USER, ASSISTANT, USER, ASSISTANT), raw=True)


GOOD = {"instruction": "Name a colour.", "output": "Blue."}
BAD = {"instruction": "Name a colour.", "output": ""}


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "bad.json"]
    paths[0].write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(BAD)}\n")
    paths[1].write_text(json.dumps([{"prompt": "x", "completion": "y"}]))
    paths[2].write_text(json.dumps([BAD, BAD]))
    return [str(path) for path in paths]


def test_first_bad_record_is_an_error_with_its_place(files):
    with pytest.raises(DataError) as caught:
        load_examples(files)
    expected = f"{files[0]}, record 3: 'output' is empty; fix it or pass --skip-bad-records."
    assert str(caught.value) == expected


def test_bad_records_are_skipped_and_counted(files):
    loaded = load_examples(files, skip_bad_records=True)
    assert [example.origin for example in loaded.examples] == [
        f"{files[0]}, record 1",
        f"{files[1]}, record 1",
    ]
    assert [example.raw for example in loaded.examples] == [False, True]
    assert loaded.skipped == [
        f"{files[0]}, record 3: 'output' is empty.",
        f"{files[2]}, record 1: 'output' is empty.",
        f"{files[2]}, record 2: 'output' is empty.",
    ]


def test_nothing_left(files):
    with pytest.raises(DataError) as caught:
        load_examples([files[2]], skip_bad_records=True)
    expected = f"No record is left to use (2 skipped). The first: {files[2]}, record 1: 'output' is empty."
    assert str(caught.value) == expected


def test_no_sources():
    with pytest.raises(DataError, match=r"No record is left to use \(0 skipped\)\. Give at least one data source\."):
        load_examples([])


def test_a_record_that_asks_nothing_is_named_by_its_own_keys():
    with pytest.raises(DataError, match=r"its keys \(question, answer\) ask nothing; what is asked stands"):
        parse_question({"question": "Why?", "answer": "So."})
