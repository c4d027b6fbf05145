"""The turns of a conversation: who speaks, what is learnt, and what a message holds besides its text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_adapter.data.examples import Media, Message, Role, check_encodable, type_name
from llama_adapter.data.media import media_of_part
from llama_adapter.errors import DataError
from llama_adapter.settings import shown

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""OpenAI's names, ShareGPT's and LLaMA-Factory's; see `role_of`."""
WEIGHTS = ("weight", "train", "training", "loss")
"""Names of the flag that says whether a message is learnt: OpenAI's and Mistral's, Axolotl's two, ms-swift's."""
PARTIAL_WEIGHTS = ("train_detail", "training_detail", "loss_scale")
"""Names of what says so of a part of a message, which is refused."""
TEMPLATE_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
HARMLESS_OF_TURN = ("id", "index", "timestamp", "created_at")
_READ = {
    "role", "from", "content", "value", "tool_calls", "function_call",
    *WEIGHTS, *TEMPLATE_TEXTS, *PARTIAL_WEIGHTS, *HARMLESS_OF_TURN,
}  # fmt: skip


def role_of(name: object) -> Role | None:
    """The role that a turn's name of its speaker means, in small letters or capitals; None for an unknown one."""
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


@dataclass
class Turns:
    """What a list of turns holds.

    Attributes:
        messages: in their order, an empty system message left out.
        media: files that parts of messages hold.
        slots: parts that say where a file stands and do not hold it.
        notes: see `Example.notes`.
        input: Alpaca's.
        raw: whether the messages take no template.
    """

    messages: list[Message] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)
    slots: int = 0
    notes: list[str] = field(default_factory=list)
    input: str = ""
    raw: bool = False


def read_turns(turns: object, key: str, into: Turns | None = None) -> Turns:
    """Read the list of turns under `key`, behind those that `into` has already.

    Raises:
        DataError: it is no list of objects with a known role and a text, or breaks one of the rules in docs/formats.md.
    """
    if not isinstance(turns, list):
        raise DataError(f"'{key}' must be a list, not {type_name(turns)}")
    result = Turns() if into is None else into
    for number, turn in enumerate(turns, start=1):
        _read_turn(turn, key, f"turn {number} of '{key}'", result)
    return result


def _read_turn(turn: object, key: str, where: str, result: Turns) -> None:
    names = ("from", "value") if isinstance(turn, dict) and "role" not in turn else ("role", "content")
    if not isinstance(turn, dict) or names[0] not in turn or not {names[1], "tool_calls", "function_call"} & set(turn):
        expected = "'from' and 'value'" if key == "conversations" else "'role' and 'content'"
        raise DataError(f"{where} must be an object with {expected}")
    name = turn[names[0]]
    role = role_of(name)
    if role is None:
        raise DataError(f"{where} has the unknown role {shown(name)}; the roles are {', '.join(ROLES)}")
    content = turn.get(names[1])
    extra: dict[str, Any] = {
        text: _text_of(turn, text, where) for text in TEMPLATE_TEXTS if turn.get(text) not in (None, "")
    }
    if name.strip().lower() == "function_call":
        extra["tool_calls"], content = _calls(content, where), ""
    elif calls := turn.get("tool_calls") or turn.get("function_call"):
        extra["tool_calls"], content = _calls(calls, where), "" if content is None else content
    if "name" in extra and role != "tool":
        result.notes.append(f"'name' in {key} is written only by a chat template that asks for it")
    weight = _weight(turn, role, key, where, result)
    for unknown in turn:
        if unknown not in _READ and turn[unknown] not in (None, "", [], {}):
            result.notes.append(f"the key {shown(unknown)} in {key} is not used")
    text = plain_text(_join_parts(content, where, result), f"'{names[1]}' of {where}")
    if text.strip() or "tool_calls" in extra or role == "tool":
        result.messages.append(Message(role, text, weight, extra))
    elif role != "system":
        raise DataError(f"'{names[1]}' of {where} ({name}) is empty")


def learnt_part(messages: list[Message]) -> tuple[Message, ...]:
    """The messages up to the last answer that is learnt: what stands behind it teaches nothing.

    Raises:
        DataError: no answer is.
    """
    if not messages or messages[-1].role != "assistant":
        return tuple(messages)
    learnt = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight]
    if not learnt:
        raise DataError("every answer has weight 0 (or train false), so nothing is learnt from it")
    return tuple(messages[: learnt[-1] + 1])


def _weight(turn: Mapping[str, Any], role: Role, key: str, where: str, result: Turns) -> Literal[0, 1]:
    for name in PARTIAL_WEIGHTS:
        if turn.get(name) not in (None, "", []):
            raise DataError(
                f"'{name}' of {where} weighs parts of a message, which is not supported: use 'weight' 0 or 1"
            )
    given = {name: turn[name] for name in WEIGHTS if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"'{name}' of {where} is {shown(value)}; it must be 0 or 1, or false or true")
    if len(set(given.values())) > 1:
        raise DataError(f"{', '.join(given)} of {where} contradict each other")
    if role != "assistant":
        result.notes += [
            f"'{name}' 1 in {key} on a {role} message: only answers are learnt" for name in given if given[name]
        ]
        return 1
    return 0 if given and not next(iter(given.values())) else 1


def _join_parts(content: object, where: str, result: Turns) -> object:
    """Join the text parts of a list and keep the others' files; anything but a list comes back as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise DataError(f"{where} has a part that is {type_name(part)}; parts are objects with a 'type'")
        if part.get("type") in ("text", "input_text", "output_text"):
            texts.append(plain_text(part.get("text"), f"'text' of a part of {where}"))
        else:
            files = media_of_part(part, where)
            result.media += files
            result.slots += not files
    return "".join(texts)


def _calls(value: Any, where: str) -> list[Any]:
    """Calls of functions in the form of chat templates: arguments as an object, not as its text.

    A call without "function" is that function itself, as LLaMA-Factory and OpenAI's older `function_call` have it.
    """
    value = _from_text(value)
    calls = value if isinstance(value, list) else [value]
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where} calls a function without a name: write {{'name': ..., 'arguments': ...}}")
        rest = call if "function" in call else {}
        arguments = _from_text(function.get("arguments", {}))
        result.append({**rest, "type": "function", "function": {**function, "arguments": arguments}})
    return result


def tools_of(value: object) -> tuple[Mapping[str, Any], ...]:
    """The functions that may be called, from a list or, as LLaMA-Factory has it, the text of one.

    Raises:
        DataError: it is no list of objects.
    """
    value = _from_text(value) or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"'tools' must be a list of objects, not {type_name(value)}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _from_text(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _text_of(turn: Mapping[str, Any], key: str, where: str) -> str:
    return plain_text(turn[key], f"'{key}' of {where}")


def plain_text(value: object, name: str) -> str:
    """A string that a tokenizer takes.

    Raises:
        DataError: it is another type, or has half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, not {type_name(value)}")
    check_encodable(value, name)
    return value
