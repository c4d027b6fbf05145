"""The tokenizer's own chat template: how a conversation asks for an answer, and what the model is to write then.

An answer is learnt behind the very text that asks for it, so training, scoring and generation read one rendering.
Where the finished conversation shows an answer otherwise than it had to be written (thoughts are taken out of earlier
turns, only the last turn ends with the end token), that answer becomes a text of its own. Two things are put in that a
template writes when it asks and not when it shows what was answered: the thought that its generation prompt opens, and
a record's own thought.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from llama_adapter.data.examples import Message
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.settings import BUNDLED, BUNDLED_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Found = TypeVar("Found")
_KNOWN: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, Any]]" = WeakKeyDictionary()

_PLACEHOLDER = "llamaadapterplaceholderofonemessage"
_NAME = r"[\w:]*(?:think|thought|reason)[\w:]*"
_OPENED = re.compile(rf"([<\[])({_NAME})([>\]])\s*\Z", re.IGNORECASE)
_CLOSED = re.compile(rf"[<\[]/{_NAME}[>\]]\s*\Z", re.IGNORECASE)
_THOUGHT = re.compile(rf"\s*(?:[<\[]{_NAME}[>\]])?((?:(?![<\[]/?{_NAME}[>\]]).)*)[<\[]/{_NAME}[>\]]\s*", re.I | re.S)
# transformers' own `strftime_now` reads the clock at every call and takes no other: between two renderings of one
# record, and between a run and its resumption, the text would change.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set clock = llama_adapter_clock %}"
    "{% for part in format.replace('%%', '\0').split('%') %}"
    "{% set size = 0 if loop.first else 2 if part[:2] in clock else 1 %}"
    "{{ (clock.get(part[:size], '%' ~ part[:size]) ~ part[size:]).replace('\0', '%') }}"
    "{% endfor %}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Reply:
    """One answer of a conversation.

    Attributes:
        prompt: the text that asks for it.
        text: what the model writes then, with the token that closes the turn where the template has one.
        closed: whether there is such a token.
    """

    prompt: str
    text: str
    closed: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template at one moment.

    Attributes:
        tokenizer: whose template it is.
        tools: descriptions of functions that may be called.
        now: what a template that writes the date is told.
    """

    tokenizer: "PreTrainedTokenizerBase"
    tools: Sequence[Mapping[str, Any]]
    now: datetime

    @cached_property
    def source(self) -> str:
        """Its Jinja text.

        Raises:
            ConfigError: it has several, none of them named "default".
        """
        try:
            source = self.tokenizer.get_chat_template(tools=list(self.tools) or None)
        except ValueError:
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise ConfigError(
                f"The tokenizer {tokenizer_name(self.tokenizer)} has several chat templates ({names}) and none named "
                "'default': name one so in its tokenizer_config.json, or use --template alpaca."
            ) from None
        return _CLOCK + source if "strftime_now" in source else source

    def write(self, messages: Sequence[Message], ask: bool = False) -> str:
        """The text of a conversation; with `ask` up to where an answer to it begins.

        Raises:
            DataError: the template rejects the conversation.
            ConfigError: it is no Jinja.
        """
        from jinja2 import TemplateSyntaxError

        parts = _remembered(self.tokenizer, self.source, lambda: _wants_parts(self.tokenizer, self.source))
        turns = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}] if parts else m.content, **m.extra}
            for m in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=list(self.tools) or None,
                chat_template=self.source,
                add_generation_prompt=ask,
                tokenize=False,
                llama_adapter_clock=_clock(self.now),
            )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template of {tokenizer_name(self.tokenizer)} is no Jinja ({error.message}): repair it or "
                "use --template alpaca."
            ) from None
        except Exception as error:  # a template is a program, and raises whatever its first wrong value meets
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"The chat template of {tokenizer_name(self.tokenizer)} rejects the conversation ({error}; its roles: "
                f"{roles}): change the record or use --template alpaca."
            ) from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where its next answer begins.

        Raises:
            DataError, ConfigError: see `write`; or it leaves the tools or a message out.
        """
        text = self.write(messages, ask=True)
        if self.tools and text == ChatTemplate(self.tokenizer, (), self.now).write(messages, ask=True):
            raise self._refusal("does not write 'tools': take them out of the record")
        for number, message in enumerate(messages, start=1):
            if calls := message.extra.get("tool_calls"):
                self._check_calls(calls, text, number)
            if message.content.strip() not in text:  # trimmed, quoted, without its thought, or not there at all
                other = [*messages[: number - 1], replace(message, content=_PLACEHOLDER), *messages[number:]]
                if self.write(other, ask=True) == text:
                    raise self._refusal(f"leaves out message {number} ({message.role})")
        return text

    def answers(self, messages: Sequence[Message]) -> list[Reply]:
        """Every answer that is learnt, in order.

        Raises:
            DataError, ConfigError: see `prompt`; or an answer's place in the text is not to be found.
        """
        numbers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight]
        return [self._answer(messages[: number + 1]) for number in numbers]

    def _answer(self, messages: Sequence[Message]) -> Reply:
        """The last message as an answer to those before it.

        Its end is where the text behind a placeholder in its place begins: looking for the content itself would fail
        where the template trims it, and find "hi" inside "<think>".
        """
        *asked, last = messages
        prompt, whole, number = self.prompt(asked), self.write(messages), len(messages)
        head, found, rest = self.write([*asked, Message("assistant", _PLACEHOLDER)]).partition(_PLACEHOLDER)
        # Listing the tokens takes milliseconds; it is done again where some were added.
        key = (len(self.tokenizer), self.tokenizer.eos_token)
        turn_end = _remembered(self.tokenizer, key, lambda: _turn_end(self.tokenizer))
        if calls := last.extra.get("tool_calls"):
            self._check_calls(calls, whole, number)
            ending = re.search(rf"(?:{turn_end.pattern})?\s*\Z", whole)
            rest = ending[0] if ending else ""
        if not found or not whole.endswith(rest):
            raise self._refusal(f"does not write message {number} as it is")
        body = whole[: len(whole) - len(rest)]
        if body.startswith(prompt):
            text = body[len(prompt) :]
        elif prompt.startswith(head) and body.startswith(head):
            text = _behind(prompt[len(head) :], body[len(head) :], last)
        elif body.startswith(head) and (lead := _lead(prompt, head, asked[-1].content.strip())) is not None:
            text = lead + body[len(head) :]
        else:
            raise self._refusal(
                f"asks for message {number} otherwise than it writes it (the prompt for it ends in {prompt[-40:]!r})"
            )
        text = self._with_thought(text, prompt, last, number)
        if not text:
            raise self._refusal(f"writes nothing of message {number}")
        ending = turn_end.match(rest)
        return Reply(prompt, text + (ending[0] if ending else ""), ending is not None)

    def _with_thought(self, text: str, prompt: str, message: Message, number: int) -> str:
        """`text`, or the message as it stands where `text` has lost the thought in it."""
        thought, whole = _thought(message), _THOUGHT.match(message.content)
        if not thought.strip() or thought.strip() in text:
            return text
        if _CLOSED.search(prompt):
            raise self._refusal(f"closes the thought before the answer begins, and message {number} has one")
        if not whole:
            raise self._refusal(f"leaves out the thought of message {number}")
        return message.content.strip()

    def _check_calls(self, calls: Any, text: str, number: int) -> None:
        names = [call.get("function", call).get("name", "") for call in calls]
        if not all(name in text for name in names):
            raise self._refusal(f"leaves out the tool calls of message {number}")

    def _refusal(self, what: str) -> DataError:
        name = tokenizer_name(self.tokenizer)
        return DataError(f"The chat template of {name} {what}: change the record or use --template alpaca.")


def tokenizer_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Name a tokenizer for an error message."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return f"'{BUNDLED if Path(name) == BUNDLED_FOLDER / 'base' else name}'"


def without_thought(text: str) -> str:
    """What an answer says when it has thought; its prompt may have opened the thought."""
    thought = _THOUGHT.match(text)
    return text[thought.end() :] if thought else text


@lru_cache(maxsize=4)
def _clock(now: datetime) -> dict[str, str]:
    """What stands for each code of strftime behind its "%"; "-d" is "d" without a zero, "" is nothing."""
    shown = {code: now.strftime(f"%{code}") for code in "aAwdbBmyYHIMSpfjUWcxXGuVDFTR"}
    return {"": "", **shown, **{f"-{code}": text.lstrip("0") or "0" for code, text in shown.items()}}


def _behind(tail: str, shown: str, message: Message) -> str:
    """The answer behind a prompt whose `tail` the template leaves out where it shows an answer.

    A thought that the tail opens is the message's own, or an empty one, closed as the Qwen3 templates close it.
    """
    opened = _OPENED.search(tail)
    if not opened:
        return shown
    thought = _THOUGHT.match(message.content)
    if thought and not _reasoning(message):
        written = message.content[thought.start(1) :]
        return written.lstrip("\n") if tail.endswith("\n") else written
    left, name, right = opened.groups()
    line = "" if tail.endswith("\n") else "\n"
    return f"{line}{_reasoning(message).strip(chr(10))}\n{left}/{name}{right}\n\n{shown}"


def _lead(prompt: str, head: str, question: str) -> str | None:
    """What stands between prompt and answer where the finished conversation has another history than the prompt.

    Both have to agree from the last question on; Mistral's templates write the system message before it only to ask.
    """
    asking = prompt[prompt.rfind(question) :] if question and question in prompt else None
    _, found, lead = head.rpartition(asking) if asking else ("", "", "")
    return lead if found else None


def _thought(message: Message) -> str:
    thought = _THOUGHT.match(message.content)
    return _reasoning(message) or (thought[1] if thought else "")


def _reasoning(message: Message) -> str:
    keys = ("reasoning_content", "thinking", "reasoning")
    return str(next((message.extra[key] for key in keys if message.extra.get(key)), ""))


def _remembered(tokenizer: "PreTrainedTokenizerBase", key: Any, find: Callable[[], Found]) -> Found:
    """What was found once for a tokenizer; it is forgotten with it."""
    known = _KNOWN.setdefault(tokenizer, {})
    if key not in known:
        known[key] = find()
    return known[key]


def _wants_parts(tokenizer: "PreTrainedTokenizerBase", source: str) -> bool:
    """Whether the template writes nothing of a text, only of a list of parts such as {"type": "text", ...}."""

    def shows(content: object) -> bool:
        turns = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(
                turns,
                chat_template=source,
                tokenize=False,
                llama_adapter_clock={},
            )
        except Exception:  # `write` will say what is wrong with it
            return False
        return _PLACEHOLDER in str(text)

    return not shows(_PLACEHOLDER) and shows([{"type": "text", "text": _PLACEHOLDER}])


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Compile what may close a turn: any special token but BOS, after at most one blank (Llama 2 writes one)."""
    eos = str(tokenizer.eos_token)
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = texts - {tokenizer.bos_token} | {eos}
    return re.compile(" ?(?:" + "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) + ")")
