"""What every record becomes: a conversation that ends with an answer, and what belongs to it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_adapter.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
Media = str | bytes
"""A file's path, or its content."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks; "tool" is what a called function returned.
        content: the text.
        weight: 0 for an assistant's message that is read as context and not learnt.
        extra: what else a chat template may write of it, by the template's own names: `tool_calls`, `tool_call_id`,
            `name`, `reasoning_content`, `thinking`.

    Raises:
        DataError: a text holds half a surrogate pair, which no tokenizer takes.
    """

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_encodable(self.content, f"the text of a message ({self.role})")
        if self.extra:
            check_encodable(self.extra, f"{', '.join(self.extra)} of a message ({self.role})")


@dataclass(frozen=True)
class Example:
    """One conversation that ends with an answer.

    Attributes:
        messages: an optional system message, then user, assistant and tool messages, the last an assistant's that is
            learnt.
        input: Alpaca's extra input; it belongs to the last user message. Empty where there is none.
        raw: prompt-completion text that takes no template; `messages` are then a user's and an assistant's.
        origin: where the example comes from, such as "data.json, record 17", for error messages.
        media: pictures, recordings or videos that belong to the conversation: paths of files, or their content.
        tools: descriptions of functions that may be called, for the chat template.
        family: what groups it with others in an evaluation.
        rejected: of a preference pair the same conversation with the worse answer; else empty.
        notes: what its record holds and nobody uses, in half-sentences that are counted over all records.

    Raises:
        DataError: the messages are in another order than this.
    """

    messages: tuple[Message, ...]
    input: str = ""
    raw: bool = False
    origin: str = ""
    media: tuple[Media, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    family: str = ""
    rejected: tuple[Message, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_encodable(self.input, "the input")
        if self.tools:
            check_encodable(self.tools, "'tools'")
        roles = [message.role for message in self.messages]
        body = roles[1:] if roles[:1] == ["system"] else roles
        if "system" in body:
            raise DataError("a system message may only come first")
        if not body:
            raise DataError("the conversation has no user and no assistant turn")
        if body[0] != "user":
            article = "an assistant" if body[0] == "assistant" else "a tool"
            raise DataError(f"the conversation starts with {article} turn; a user's must come first")
        if body[-1] != "assistant":
            raise DataError("the conversation ends with a question nobody answers")
        if self.messages[-1].weight == 0:
            raise DataError("the last answer has weight 0, so nothing is learnt from it")
        if self.raw and roles != ["user", "assistant"]:
            raise DataError("a raw example has exactly one user and one assistant message")


def check_encodable(value: Any, name: str) -> None:
    """Check a text, or every text in a JSON value: JSON can spell half an emoji ("\\ud83d"), no tokenizer takes it.

    Raises:
        DataError: it cannot be written as UTF-8, or the value is nested too deeply or no JSON.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if "\udc80" <= error.object[error.start] <= "\udcff":  # how Python hands on bytes that it cannot read
            raise DataError(f"{name} is not UTF-8 text (at character {error.start + 1}): write it in UTF-8") from error
        raise DataError(f"{name} has half a surrogate pair at character {error.start}") from error
    except RecursionError:
        raise DataError(f"{name} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} cannot be written as JSON ({error})") from None


def type_name(value: object) -> str:
    """Name a value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
