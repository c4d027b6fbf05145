"""docs/formats.md says what becomes of every key of a record; what it says is tried, row by row."""

import copy
import json
import re
from pathlib import Path

import pytest

from llama_adapter.data import parse_record
from llama_adapter.data.formats import COMMON, FORMATS, HARMLESS, PREFERENCE
from llama_adapter.data.media import MEDIA_KEYS
from llama_adapter.data.turns import HARMLESS_OF_TURN, PARTIAL_WEIGHTS, TEMPLATE_TEXTS, WEIGHTS
from llama_adapter.errors import DataError

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
ROW = re.compile(r"\| ([\w -]+) \| `(\w+)` \| `(.+?)` \| (used|reported|refused|ignored)\b[^|]*\|")
ASKED = {"role": "user", "content": "Name a colour."}
ANSWERED = {"role": "assistant", "content": "Blue."}
RECORDS = {
    "Alpaca": {"instruction": "Name a colour.", "output": "Blue."},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Name one."}, {"from": "gpt", "value": "Blue."}]},
    "messages": {"messages": [ASKED, ANSWERED]},
    "prompt-completion": {"prompt": "Colours:", "completion": " blue"},
    "LLaVA": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
    },
    "preference": {"prompt": "Hm?", "chosen": "Yes.", "rejected": "Maybe."},
}
CHATS = ("Alpaca", "ShareGPT", "messages")
PLAIN = (*CHATS, "prompt-completion")


def rows() -> list[tuple[str, str, str, str]]:
    return [match.groups() for line in DOCS.read_text(encoding="utf-8").splitlines() if (match := ROW.match(line))]


def cases():
    for place, key, value, verdict in rows():
        names = {"every format": PLAIN, "every chat format": CHATS, "each message": ("messages",)}.get(place, (place,))
        for name in names:
            yield pytest.param(
                name, place == "each message", key, json.loads(value), verdict, id=f"{name}-{key}-{value[:12]}"
            )


def with_key(name: str, in_message: bool, key: str, value: object) -> tuple[dict, dict]:
    """A record without the key, or with another value of it; and the record with it."""
    before = copy.deepcopy(RECORDS[name])
    if in_message:  # the first of two answers, so that one is left to learn
        before["messages"] += [ASKED, ANSWERED]
        if value == "function_call":
            before["messages"][1] = {"role": "assistant", "content": '{"name": "f", "arguments": {}}'}
    after = copy.deepcopy(before)
    (after["messages"][1] if in_message else after)[key] = value
    return before, after


@pytest.mark.parametrize(("name", "in_message", "key", "value", "verdict"), list(cases()))
def test_what_the_table_says_happens(name, in_message, key, value, verdict):
    before, after = with_key(name, in_message, key, value)
    if verdict == "refused":
        if name != "preference":
            parse_record(before)
        with pytest.raises(DataError):
            parse_record(after)
        return
    plain, changed = parse_record(before), parse_record(after)
    fresh = set(changed.notes) - set(plain.notes)
    if verdict == "used":
        assert changed != plain
        assert not any(f"'{key}'" in note for note in fresh)
    elif verdict == "reported":
        assert any(f"'{key}'" in note for note in fresh)
        assert [message.content for message in changed.messages] == [message.content for message in plain.messages]
    else:
        assert changed == plain
        assert not fresh


def test_the_table_names_every_key_that_the_code_knows():
    listed = {key for place, key, _, _ in rows() if place != "each message"}
    known = {key for keys, _, optional in FORMATS for key in (*keys, *optional)} | {*COMMON, *HARMLESS, *PREFERENCE}
    assert known - listed == set()
    of_messages = {key for place, key, _, _ in rows() if place == "each message"}
    of_turns = {*WEIGHTS, *PARTIAL_WEIGHTS, *TEMPLATE_TEXTS, *HARMLESS_OF_TURN, "tool_calls", "function_call"}
    assert of_turns | {"role", "content", "from", "value"} == of_messages - {"refusal"}
    assert set(MEDIA_KEYS) <= listed


def test_every_row_of_the_table_is_read():
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("| format | key | such as |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(rows()) > 80
