"""From raw records to examples: the record formats that are understood, and nothing else."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llama_adapter.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
Media = str | bytes
"""A file's path, or its content."""
MEDIA_KEYS = ("image", "images", "audio", "video")
_TAG = re.compile(r"\s*<(?:image|audio|video)>\s*")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks; "tool" is what a called function returned.
        content: the text.
        weight: 0 for an assistant's message that is read as context and not learnt.
        extra: what else a chat template may write of it, by the template's own names: `tool_calls`, `tool_call_id`,
            `name`, `reasoning_content`, `thinking`.
    """

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Example:
    """One conversation that ends with an answer.

    Attributes:
        messages: an optional system message, then user and assistant messages, the last an assistant's.
        input: Alpaca's extra input; it belongs to the last user message. Empty where there is none.
        raw: prompt-completion text that takes no template; `messages` are then a user's and an assistant's.
        origin: where the example comes from, such as "data.json, record 17", for error messages.
        media: pictures, recordings or videos that belong to the conversation: paths of files, or their content.
        tools: descriptions of functions that may be called, for the chat template.

    Raises:
        DataError: the messages are in another order than this.
    """

    messages: tuple[Message, ...]
    input: str = ""
    raw: bool = False
    origin: str = ""
    media: tuple[Media, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        roles = [message.role for message in self.messages]
        body = roles[1:] if roles[:1] == ["system"] else roles
        if "system" in body:
            raise DataError("a system message may only come first")
        if not body:
            raise DataError("the conversation has no user and no assistant turn")
        if body[0] == "assistant":
            raise DataError("the conversation starts with an assistant turn; a user's must come first")
        if body[-1] == "user":
            raise DataError("the conversation ends with a question nobody answers")
        if self.raw and roles != ["user", "assistant"]:
            raise DataError("a raw example has exactly one user and one assistant message")


def parse_record(record: object) -> Example:
    """Turn one record into an example, by the first entry of `FORMATS` whose keys it has.

    Other keys are ignored. All assistant messages are learnt, also those in the prompt of a
    prompt-completion record.

    Raises:
        DataError: the record fits no format or breaks a rule of its own. The message has no full stop and
            does not say which record it was: the caller knows.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, not {_type_name(record)}")
    for keys, parse in FORMATS:
        if all(key in record for key in keys):
            example, media = parse(record), _media(record)
            if not media:
                return example
            plain = (replace(m, content=without_tags(m.content) or m.content) for m in example.messages)
            return replace(example, messages=tuple(plain), media=media)
    accepted = "; ".join(" + ".join(keys) for keys, _ in FORMATS)
    found = ", ".join(str(key) for key in record) or "none"
    raise DataError(f"its keys ({found}) fit no known format; the formats are: {accepted}")


def _media(record: dict[str, Any]) -> tuple[str, ...]:
    """The files under `MEDIA_KEYS`: one name, or a list of them; null and "" stand for none."""
    found: list[str] = []
    for key in MEDIA_KEYS:
        given = record.get(key)
        names = given if isinstance(given, list) else [given] if given else []
        for name in names:
            if not isinstance(name, str) or not name:
                raise DataError(f"'{key}' must be a file name or a list of them, not {_type_name(name)}")
            found.append(name)
    return tuple(found)


def without_tags(text: str) -> str:
    """The text without the tags that say where a picture stands: it enters beside the text, through the prompts."""
    return _TAG.sub(lambda tag: "\n" if "\n" in tag[0] else " ", text).strip() if _TAG.search(text) else text


def _parse_messages(record: dict[str, Any]) -> Example:
    return Example(tuple(_turns(record, "messages", "role", "content", ROLES)))


def _parse_sharegpt(record: dict[str, Any]) -> Example:
    return Example(tuple(_turns(record, "conversations", "from", "value", SHAREGPT_ROLES)))


def _parse_alpaca(record: dict[str, Any]) -> Example:
    instruction = _filled(record["instruction"], "'instruction'")
    output = _filled(record["output"], "'output'")
    extra = record.get("input")
    extra_text = "" if extra is None else _text(extra, "'input'")
    # Some files write a blank for "no input"; the template without an input is the right one for those.
    return Example(_question_answer(instruction, output), input=extra_text if extra_text.strip() else "")


def _parse_prompt_completion(record: dict[str, Any]) -> Example:
    if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
        prompt = _turns(record, "prompt", "role", "content", ROLES)
        return Example((*prompt, *_turns(record, "completion", "role", "content", ROLES)))
    if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
        raise DataError("'prompt' and 'completion' must both be strings or both be lists of messages")
    prompt_text = _filled(record["prompt"], "'prompt'")
    return Example(_question_answer(prompt_text, _filled(record["completion"], "'completion'")), raw=True)


# The first entry whose keys a record has all of decides, so that datasets which carry a plain "prompt" beside
# their "messages" are read as conversations.
FORMATS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Example]], ...] = (
    (("messages",), _parse_messages),
    (("conversations",), _parse_sharegpt),
    (("instruction", "output"), _parse_alpaca),
    (("prompt", "completion"), _parse_prompt_completion),
)


def _question_answer(question: str, answer: str) -> tuple[Message, ...]:
    return (Message("user", question), Message("assistant", answer))


def _turns(record: dict[str, Any], key: str, role_key: str, text_key: str, roles: dict[str, Role]) -> list[Message]:
    """Read the list of turns under `key`; an empty system message is left out."""
    turns = record[key]
    if not isinstance(turns, list):
        raise DataError(f"'{key}' must be a list, not {_type_name(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number} of '{key}'"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise DataError(f"{where} must be an object with '{role_key}' and '{text_key}'")
        role_name = turn[role_key]
        role = roles.get(role_name) if isinstance(role_name, str) else None
        if role is None:
            raise DataError(f"{where} has the unknown role {role_name!r}; the roles are {', '.join(roles)}")
        content = _text(_join_parts(turn[text_key], where), f"'{text_key}' of {where}")
        if content.strip():
            messages.append(Message(role, content))
        elif role != "system":
            raise DataError(f"'{text_key}' of {where} ({role_name}) is empty")
    return messages


def _join_parts(content: object, where: str) -> object:
    """Join a list of {"type": "text", "text": ...} parts; anything but a list comes back as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(f"{where} has a part that is not text; only parts of type 'text' are accepted")
    return "".join(_text(part.get("text"), f"'text' of a part of {where}") for part in content)


def _filled(value: object, name: str) -> str:
    text = _text(value, name)
    if not text.strip():
        raise DataError(f"{name} is empty")
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, not {_type_name(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half an emoji ("\ud83d"); no tokenizer takes it.
        raise DataError(f"{name} has half a surrogate pair at character {error.start}") from error
    return value


def _type_name(value: object) -> str:
    """Name a value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
