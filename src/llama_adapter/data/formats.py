"""From raw records to examples: the record formats that are understood, and nothing else.

What becomes of every key stands in one table in docs/formats.md, which the tests read.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llama_adapter.data.examples import Example, Message, type_name
from llama_adapter.data.media import MEDIA_KEYS, PICTURE_TAG, count_tags, media_of, without_tags
from llama_adapter.data.turns import Turns, learnt_part, plain_text, read_turns, role_of, tools_of
from llama_adapter.errors import DataError
from llama_adapter.settings import shown

Record = dict[str, Any]

HARMLESS = (
    "id", "uid", "uuid", "idx", "index", "source", "dataset", "data_source", "split", "url", "license", "lang",
    "language", "category", "topic", "tags", "prompt_id", "conversation_id", "created_at", "timestamp",
    "__index_level_0__",
)  # fmt: skip
"""Keys of a record that say where it comes from: nobody misses them."""
COMMON = (*MEDIA_KEYS, "system", "system_prompt", "tools", "functions", "label", "kto_tag", "family")
"""Keys that mean the same in every format."""
PREFERENCE = ("chosen", "rejected")
"""Keys of the two answers of a preference pair, see `pairs.py`."""


def parse_record(record: object) -> Example:
    """Turn one record into an example, by the first entry of `FORMATS` whose keys it has.

    A key whose value is null counts as absent. All assistant messages are learnt but those with weight 0, also those in
    the prompt of a prompt-completion record. What is not used is named in `Example.notes`.

    Raises:
        DataError: the record fits no format or breaks a rule of its own. The message has no full stop and
            does not say which record it was: the caller knows.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, not {type_name(record)}")
    present = {key: value for key, value in record.items() if value is not None}
    compared = [f"'{key}'" for key in PREFERENCE if key in present]
    for keys, parse, optional in FORMATS:
        if not all(key in present for key in keys):
            continue
        try:
            return _finished(parse(present), present, (*keys, *optional))
        except DataError as error:
            if compared and "nobody answers" in str(error):
                break
            raise
    if compared:
        raise DataError(
            f"it is of a preference file ({', '.join(compared)}), which 'llama-adapter train --method dpo' trains "
            "on; to learn the better answer alone, write it where the format has its answer"
        )
    accepted = "; ".join(" + ".join(keys) for keys, _, _ in FORMATS)
    found = ", ".join(shown(key).strip("'") for key in list(record)[:20]) or "none"
    plain = {str(key).strip().lower() for key in present}
    if any(plain.issuperset(keys) for keys, _, _ in FORMATS):
        raise DataError(f"its keys ({found}) are known in small letters and without blanks alone: rename them so")
    raise DataError(
        f"its keys ({found}) fit no known format; the formats are: {accepted}; rename its keys so, or in a table its "
        "columns: the first row must name them"
    )


def parse_question(record: object) -> Example:
    """An example of a record that asks: the answer at its end, or under its key for one, is "?" in place of its own.

    What it asks is so parsed and checked by the rules of training. A text under `prompt` is an instruction.

    Raises:
        DataError: as `parse_record`.
    """
    if isinstance(record, dict):
        asking = dict.fromkeys(keys[0] for keys, _, _ in FORMATS)
        if all(record.get(key) is None for key in asking):
            found = ", ".join(shown(key).strip("'") for key in list(record)[:20]) or "none"
            raise DataError(f"its keys ({found}) ask nothing; what is asked stands under {' or '.join(asking)}")
        record = _answered(record)
    return parse_record(record)


def _answered(record: Record) -> Record:
    asked = {key: value for key, value in record.items() if key not in ("completion", *PREFERENCE, "label", "kto_tag")}
    if asked.get("instruction") is None and isinstance(asked.get("prompt"), str):
        if record.get("completion") is not None:  # training reads it as text without a template
            return {**asked, "completion": "?"}
        asked["instruction"] = asked.pop("prompt")
    for key in ("messages", "conversations", "prompt"):
        turns = asked.get(key)
        if isinstance(turns, list):
            last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
            role = last.get("role", last.get("from"))
            answered = role_of(role) == "assistant"
            del asked[key]
            name = "messages" if key == "prompt" else key
            return {**asked, name: [*(turns[:-1] if answered else turns), {"role": "assistant", "content": "?"}]}
    return {**asked, "output": "?"}


def _finished(turns: Turns, record: Record, read: tuple[str, ...]) -> Example:
    """The example of a record's turns and of the keys that mean the same in every format."""
    _check_label(record)
    tools = tools_of(record.get("tools", record.get("functions")))
    _add_system(turns, record)
    if turns.raw and (tools or len(turns.messages) > 2):
        raise DataError("'system' and 'tools' have no place beside a 'prompt' that is a text: use a list of messages")
    named = [file for key in MEDIA_KEYS for file in media_of(record.get(key), f"'{key}'")]
    media = (*turns.media, *named)
    _check_tags(turns, len(named), len(media))
    messages = learnt_part(turns.messages)
    extra = turns.input
    if media:
        messages = tuple(replace(m, content=without_tags(m.content) or m.content) for m in messages)
        extra = without_tags(extra)
    family = record.get("family", "")
    notes = [*turns.notes, *_unused(record, (*read, *COMMON, *HARMLESS))]
    return Example(
        messages,
        extra,
        turns.raw,
        media=media,
        tools=tools,
        family=family if isinstance(family, str) else shown(family),
        notes=tuple(dict.fromkeys(notes)),
    )


def _add_system(turns: Turns, record: Record) -> None:
    """Put a system text that stands beside the conversation in front of it."""
    for key in ("system", "system_prompt"):
        text = plain_text(record.get(key, ""), f"'{key}'")
        own = turns.messages[0].content if turns.messages and turns.messages[0].role == "system" else None
        if own is None and text.strip():
            turns.messages.insert(0, Message("system", text))
        elif own is not None and text.strip() not in ("", own.strip()):
            raise DataError(f"'{key}' and the system message of the conversation differ: keep one of them")


def _check_label(record: Record) -> None:
    for key in ("label", "kto_tag"):
        label = record.get(key)
        if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
            raise DataError(f"'{key}' is false, which marks an answer that nobody wants (a KTO preference file)")


def _check_tags(turns: Turns, named: int, files: int) -> None:
    """Hold the tags and the parts that stand for a file against the files that there are.

    Raises:
        DataError: they are neither none, nor as many as the files, nor as many as those the record names.
    """
    texts = [*(message.content for message in turns.messages), turns.input]
    tags = turns.slots + sum(map(count_tags, texts))
    if files:
        if tags not in (0, files, named):
            raise DataError(f"its text has {tags} tags such as <image>, and it names {files} files: make them as many")
        if named and not tags:
            turns.notes.append("a file without a tag such as <image> in the text, used all the same")
        return
    asked = [message.content for message in turns.messages if message.role != "assistant"] + [turns.input]
    if turns.slots or any(PICTURE_TAG in text for text in asked):
        raise DataError(f"its text has a tag {PICTURE_TAG}, and it names no picture: add 'image', or take the tag out")
    if tags:
        turns.notes.append("a tag such as <video> without a file, left in the text")


def _unused(record: Record, read: tuple[str, ...]) -> list[str]:
    """A note for each key that nobody reads; one without content is not missed."""
    notes = []
    if isinstance(record.get("label"), int | float | str) and not isinstance(record["label"], bool):
        notes.append("the key 'label' is not used")
    for key, value in record.items():
        if key in PREFERENCE:
            notes.append(f"the key '{key}' of a preference pair is not used: only the other keys' answer is learnt")
        elif key not in read and value not in ("", [], {}):
            notes.append(f"the key {shown(key)} is not used")
    return notes


def _parse_alpaca(record: Record) -> Turns:
    turns = Turns()
    history = record.get("history", [])
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list of pairs of texts, not {type_name(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"entry {number} of 'history' must be a pair of texts, a question and its answer")
        turns.messages += _question_answer(*(_filled(text, f"entry {number} of 'history'") for text in pair))
    turns.messages += _question_answer(
        _filled(record["instruction"], "'instruction'"), _filled(record["output"], "'output'")
    )
    extra = plain_text(record.get("input", ""), "'input'")
    # Some files write a blank for "no input"; the template without an input is the right one for those.
    turns.input = extra if extra.strip() else ""
    return turns


def _parse_prompt_completion(record: Record) -> Turns:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return read_turns(completion, "completion", read_turns(prompt, "prompt"))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError("'prompt' and 'completion' must both be strings or both be lists of messages")
    return Turns(_question_answer(_filled(prompt, "'prompt'"), _filled(completion, "'completion'")), raw=True)


# The first entry whose keys a record has all of decides, so that datasets which carry a plain "prompt" beside
# their "messages" are read as conversations. The last column: keys of this format that it may have besides.
FORMATS: tuple[tuple[tuple[str, ...], Callable[[Record], Turns], tuple[str, ...]], ...] = (
    (("messages",), lambda record: read_turns(record["messages"], "messages"), ()),
    (("conversations",), lambda record: read_turns(record["conversations"], "conversations"), ()),
    (("instruction", "output"), _parse_alpaca, ("input", "history")),
    (("prompt", "completion"), _parse_prompt_completion, ()),
)


def _question_answer(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def _filled(value: object, name: str) -> str:
    text = plain_text(value, name)
    if not text.strip():
        raise DataError(f"{name} is empty")
    return text
