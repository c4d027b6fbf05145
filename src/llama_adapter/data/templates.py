"""From an example to the text a model reads, with the character spans that it learns to write.

Two templates. "alpaca" is the text of the LLaMA-Adapter authors and fits any base model; a system message
takes the place of its first paragraph, and further turns repeat the Instruction and Response blocks, each
earlier response closed by the tokenizer's end token. "chat" is the tokenizer's own chat template. Raw
(prompt-completion) examples take neither.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llama_adapter.data.examples import Example, Message
from llama_adapter.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("alpaca", "chat")

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message has the thought before its answer."""

_PLACEHOLDER = "llamaadapterplaceholderofoneresponse"


@dataclass(frozen=True)
class Rendered:
    """The text of one example or prompt.

    Attributes:
        text: what is tokenised, in one piece.
        responses: the (start, end) character spans of `text` that carry loss, in order; none in a prompt.
        special_tokens: whether the tokenizer is to add its own, such as BOS; a chat template writes them.
        ends_with_eos: whether `text` already closes the last response; if not, the encoder appends the end
            token.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    special_tokens: bool
    ends_with_eos: bool


def check_template(template: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that `template` is known and that `tokenizer` can serve it.

    Raises:
        ConfigError: the template's name is unknown.
        DataError: "chat" is asked of a tokenizer that has no chat template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"The template {template!r} is unknown: choose {' or '.join(TEMPLATES)}.")
    if template == "chat" and not tokenizer.chat_template:
        raise DataError(f"The tokenizer {tokenizer_name(tokenizer)} has no chat template: use --template alpaca.")


def render(example: Example, template: str, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    """Write one example as text, up to the end of its last response.

    Raises:
        ConfigError, DataError: see `check_template`.
        DataError: the tokenizer has no end token, or the chat template rejects or rewrites the conversation.
    """
    eos = end_token(tokenizer)
    if example.raw:
        prompt, completion = (message.content for message in example.messages)
        span = (len(prompt), len(prompt) + len(completion))
        return Rendered(prompt + completion, (span,), True, completion.endswith(eos))
    check_template(template, tokenizer)
    if template == "alpaca":
        check_plain(example.messages, example.tools)
        return _render_alpaca(example.messages, example.input, eos)
    return _render_chat(_with_input(example.messages, example.input), example.tools, tokenizer)


def render_prompt(
    messages: Sequence[Message],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    input: str = "",
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Rendered:
    """Write a conversation that waits for an answer, up to where the answer begins; it has no response spans.

    For an example's messages without the last, this is exactly the beginning of `render(...).text`.
    `input` belongs to the last user message; `raw` takes that message's content as it is, without a template; `tools`
    are handed to the chat template.

    Raises:
        ConfigError, DataError: as `render`; also if the last message is neither a user's nor a tool's.
    """
    eos = end_token(tokenizer)
    if not messages or messages[-1].role not in ("user", "tool"):
        raise DataError("A prompt must end with a user message: add the question to be answered.")
    if raw or template == "alpaca":
        check_plain(messages, tools)
    if raw:
        return Rendered(messages[-1].content, (), True, False)
    check_template(template, tokenizer)
    if template == "alpaca":
        return replace(_render_alpaca(messages, input, eos), responses=())
    turns = _with_input(messages, input)
    text = _apply_chat_template(turns, tools, tokenizer, for_answer=True)
    _check_written(turns, tools, text, tokenizer, for_answer=True)
    return Rendered(text, (), False, False)


def end_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of the tokenizer's end token.

    Raises:
        DataError: it has none, so that a response could not be taught to stop.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"The tokenizer {tokenizer_name(tokenizer)} has no end token: set its eos_token.")
    return tokenizer.eos_token


def tokenizer_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Name a tokenizer for an error message."""
    return f"'{tokenizer.name_or_path or type(tokenizer).__name__}'"


def _render_alpaca(messages: Sequence[Message], input_text: str, eos: str) -> Rendered:
    preamble = PREAMBLE_WITH_INPUT if input_text else PREAMBLE
    if messages[0].role == "system":
        preamble, messages = messages[0].content, messages[1:]
    text = preamble
    spans = []
    turns = _alpaca_turns(messages)
    for number, (instruction, response) in enumerate(turns, start=1):
        text += "\n\n### Instruction:\n" + instruction
        if number == len(turns) and input_text:
            text += "\n\n### Input:\n" + input_text
        text += "\n\n### Response:"
        if response is not None:
            start = len(text)
            text += response.content
            if number < len(turns) and not response.content.endswith(eos):
                text += eos
            if response.weight:
                spans.append((start, len(text)))
    return Rendered(text, tuple(spans), True, bool(spans) and text.endswith(eos))


def _alpaca_turns(messages: Sequence[Message]) -> list[tuple[str, Message | None]]:
    """Pair instructions with responses; user messages in a row are one instruction.

    The response is None where the conversation ends with a question.
    """
    turns: list[tuple[str, Message | None]] = []
    questions: list[str] = []
    for message in messages:
        if message.role == "user":
            questions.append(message.content)
            continue
        if not questions:
            raise DataError("Two assistant messages follow each other, which the alpaca template cannot write.")
        turns.append(("\n\n".join(questions), message))
        questions = []
    if questions:
        turns.append(("\n\n".join(questions), None))
    return turns


def _with_input(messages: Sequence[Message], input_text: str) -> list[Message]:
    """Join `input_text` to the last user message, on a line of its own."""
    result = list(messages)
    if input_text:
        last = max(index for index, message in enumerate(result) if message.role == "user")
        result[last] = replace(result[last], content=f"{result[last].content}\n{input_text}")
    return result


def _render_chat(
    messages: list[Message], tools: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> Rendered:
    text = _apply_chat_template(messages, tools, tokenizer)
    _check_written(messages, tools, text, tokenizer)
    turn_end = _turn_end(tokenizer, len(tokenizer), end_token(tokenizer))
    spans = []
    closed = False
    for index, message in enumerate(messages):
        if message.role == "assistant" and message.weight:
            start, end = _chat_response(text, messages, tools, index, tokenizer)
            match = turn_end.match(text, end)
            closed = match is not None
            spans.append((start, match.end() if match else end))
    # Nothing is learnt after the last response, and an end token to be appended belongs right behind it.
    return Rendered(text[: spans[-1][1]], tuple(spans), False, closed)


def _chat_response(
    text: str,
    messages: list[Message],
    tools: Sequence[Mapping[str, Any]],
    index: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[int, int]:
    """Find the characters of `text` that the assistant writes in message `index`, its end token left out.

    It begins where the prompt for it ends. What follows it is what follows a placeholder put in its place:
    looking for the content itself would fail where the template trims it, and find "hi" inside "<think>".
    """
    prompt = _apply_chat_template(messages[:index], tools, tokenizer, for_answer=True)
    swapped = [*messages[:index], Message("assistant", _PLACEHOLDER), *messages[index + 1 :]]
    _, found, rest = _apply_chat_template(swapped, tools, tokenizer).partition(_PLACEHOLDER)
    start, end = len(prompt), len(text) - len(rest)
    if not (found and text.startswith(prompt) and text.endswith(rest) and start < end):
        raise DataError(
            f"The chat template of {tokenizer_name(tokenizer)} rewrites earlier turns, so the place of "
            f"message {index + 1} in the text is unknown: use --template alpaca or split the conversation."
        )
    return start, end


@lru_cache(maxsize=4)
def _turn_end(tokenizer: "PreTrainedTokenizerBase", size: int, eos: str) -> re.Pattern[str]:
    """Compile what may close a turn: any special token but BOS, after at most one blank (Llama 2 writes one).

    `size` and `eos` only renew the cached pattern when tokens were added: listing them takes milliseconds.
    """
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = texts - {tokenizer.bos_token} | {eos}
    return re.compile(" ?(?:" + "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) + ")")


def check_plain(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that a conversation is text alone: everything else is a chat template's to write.

    Raises:
        DataError: tools, their calls or results, or a thought beside an answer.
    """
    found = {key for message in messages for key in message.extra if key != "name"}
    found |= {"tools"} if tools else set()
    found |= {"role tool" for message in messages if message.role == "tool"}
    if found:
        raise DataError(f"{', '.join(sorted(found))} can only be written by a chat template: use --template chat")


def _check_written(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    for_answer: bool = False,
) -> None:
    """Refuse what the chat template would leave out in silence: tools, calls, the thought of the last answer.

    Those of earlier answers are left out on purpose by templates of models that think.
    """
    without: list[tuple[str, Sequence[Message], Sequence[Mapping[str, Any]]]] = []
    if tools:
        without.append(("'tools'", messages, ()))
    for index, message in enumerate(messages):
        for key in message.extra:
            if key == "tool_calls" or (key in THOUGHTS and index == len(messages) - 1):
                kept = {name: value for name, value in message.extra.items() if name != key}
                changed = [*messages[:index], replace(message, extra=kept), *messages[index + 1 :]]
                without.append((f"'{key}' of message {index + 1}", changed, tools))
    for name, fewer, offered in without:
        try:
            same = _apply_chat_template(fewer, offered, tokenizer, for_answer) == text
        except DataError:  # it cannot do without, so it is written
            same = False
        if same:
            raise DataError(
                f"The chat template of {tokenizer_name(tokenizer)} does not write {name}: take another base, or "
                "leave it out of the record"
            )


def _apply_chat_template(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    for_answer: bool = False,
) -> str:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": message.content, **message.extra} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=for_answer
        )
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"The chat template of {tokenizer_name(tokenizer)} rejects the conversation ({error}): "
            "change the record or use --template alpaca."
        ) from error
