"""From an example to the text a model reads, with the character spans that it learns to write.

Two templates. "alpaca" is the text of the LLaMA-Adapter authors and fits any base model; a system message
takes the place of its first paragraph, and further turns repeat the Instruction and Response blocks, each
earlier response closed by the tokenizer's end token. "chat" is the tokenizer's own chat template, see
`chat_templates`. Raw (prompt-completion) examples take neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llama_adapter.data.chat_templates import ChatTemplate, tokenizer_name
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


def render(
    example: Example, template: str, tokenizer: "PreTrainedTokenizerBase", now: datetime | None = None
) -> list[Rendered]:
    """Write one example as text, up to the end of its last response.

    It is one text, or several, each with responses of its own, where a chat template shows earlier answers otherwise
    than they are asked for. `now` is what a template that writes the date is told (default: the clock).

    Raises:
        ConfigError, DataError: see `check_template`.
        DataError: the tokenizer has no end token, or the template cannot write the conversation.
    """
    eos = end_token(tokenizer)
    if example.raw:
        prompt, completion = (message.content for message in example.messages)
        span = (len(prompt), len(prompt) + len(completion))
        return [Rendered(prompt + completion, (span,), True, completion.endswith(eos))]
    check_template(template, tokenizer)
    if template == "alpaca":
        check_plain(example.messages, example.tools)
        return [_render_alpaca(example.messages, example.input, eos)]
    chat = ChatTemplate(tokenizer, example.tools, now or datetime.now())
    return _render_chat(_with_input(example.messages, example.input), chat)


def render_prompt(
    messages: Sequence[Message],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    input: str = "",
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    now: datetime | None = None,
) -> Rendered:
    """Write a conversation that waits for an answer, up to where the answer begins; it has no response spans.

    For an example's messages without the last, this is exactly the beginning of the last text of `render`.
    `input` belongs to the last user message; `raw` takes that message's content as it is, without a template.

    Raises:
        ConfigError, DataError: as `render`; also if the last message is not a user's or a tool's.
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
    chat = ChatTemplate(tokenizer, tools, now or datetime.now())
    return Rendered(chat.prompt(_with_input(messages, input)), (), False, False)


def end_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of the tokenizer's end token.

    Raises:
        DataError: it has none, so that a response could not be taught to stop.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {tokenizer_name(tokenizer)} has no end token: set its eos_token in tokenizer_config.json."
        )
    return tokenizer.eos_token


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


def _render_alpaca(messages: Sequence[Message], input_text: str, eos: str) -> Rendered:
    preamble = PREAMBLE_WITH_INPUT if input_text else PREAMBLE
    if messages[0].role == "system":
        preamble, messages = messages[0].content, messages[1:]
    text = preamble
    spans = []
    turns = _alpaca_turns(messages)
    for number, (instruction, response, weight) in enumerate(turns, start=1):
        text += "\n\n### Instruction:\n" + instruction
        if number == len(turns) and input_text:
            text += "\n\n### Input:\n" + input_text
        text += "\n\n### Response:"
        if response is not None:
            start = len(text)
            text += response
            if number < len(turns) and not response.endswith(eos):
                text += eos
            if weight:
                spans.append((start, len(text)))
    return Rendered(text, tuple(spans), True, bool(spans) and text.endswith(eos))


def _alpaca_turns(messages: Sequence[Message]) -> list[tuple[str, str | None, int]]:
    """Pair instructions with responses and their weights; user messages in a row are one instruction.

    The response is None where the conversation ends with a question.
    """
    turns: list[tuple[str, str | None, int]] = []
    questions: list[str] = []
    for message in messages:
        if message.role == "user":
            questions.append(message.content)
            continue
        if message.role == "system":
            raise DataError("A system message may only come first, and once: make one of them.")
        if not turns and not questions:
            raise DataError("The conversation starts with an assistant's message; a user's must come first.")
        if not questions:
            raise DataError("Two assistant messages follow each other, which the alpaca template cannot write.")
        turns.append(("\n\n".join(questions), message.content, message.weight))
        questions = []
    if questions:
        turns.append(("\n\n".join(questions), None, 0))
    return turns


def _with_input(messages: Sequence[Message], input_text: str) -> list[Message]:
    """Join `input_text` to the last user message, on a line of its own."""
    result = list(messages)
    if input_text:
        last = max(index for index, message in enumerate(result) if message.role == "user")
        result[last] = replace(result[last], content=f"{result[last].content}\n{input_text}")
    return result


def _render_chat(messages: list[Message], chat: ChatTemplate) -> list[Rendered]:
    """Texts that begin with every answer's prompt and hold the answer behind it: one where they begin each other."""
    texts: list[Rendered] = []
    for answer in reversed(chat.answers(messages)):
        text, span = answer.prompt + answer.text, (len(answer.prompt), len(answer.prompt + answer.text))
        place = next((i for i, other in enumerate(texts) if other.text.startswith(text)), None)
        if place is None:
            texts.insert(0, Rendered(text, (span,), False, answer.closed))
        else:
            texts[place] = replace(texts[place], responses=(span, *texts[place].responses))
    return texts
