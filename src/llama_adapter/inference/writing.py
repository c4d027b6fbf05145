"""What is asked, and how it becomes tokens: as in training, within what the base takes. No weights are needed."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase as Tokenizer

from llama_adapter.conditions.config import Kind
from llama_adapter.core.config import WrittenAs
from llama_adapter.data import (
    Encoded,
    Example,
    Media,
    Message,
    data_files,
    encode_all,
    encode_prompt,
    is_data_file,
    load_examples,
    log_findings,
    parse_question,
)
from llama_adapter.data.examples import check_encodable
from llama_adapter.data.limits import Limits
from llama_adapter.data.templates import check_template
from llama_adapter.errors import AdapterError, DataError
from llama_adapter.settings import unknown_name

Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        messages: a conversation that ends with the user.
        input: Alpaca's, to its last message.
        media: pictures (or recordings, or videos) it is about.
        tools: descriptions of functions that may be called, for the chat template.
        raw: the text of its one message as it is, whatever the template; "raw" as template means it for every prompt.
        ids: tokens that are asked as they are, whatever the messages.
        origin: where it comes from, such as "data.json, record 17", for error messages.
    """

    messages: tuple[Message, ...]
    input: str = ""
    media: tuple[Media, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    raw: bool = False
    ids: tuple[int, ...] = ()
    origin: str = field(default="", compare=False)

    @staticmethod
    def of(instruction: str, input: str = "", media: tuple[Media, ...] = ()) -> "Prompt":
        """One instruction without history."""
        return Prompt((Message("user", instruction),), input, media)

    @staticmethod
    def before(example: Example) -> "Prompt":
        """What an example of training data asks, its last answer left out."""
        return Prompt(
            example.messages[:-1], example.input, example.media, example.tools, example.raw, origin=example.origin
        )


@dataclass(frozen=True)
class Writer:
    """Prompts and examples to tokens.

    Attributes:
        tokenizer: the base's.
        templates: how each adapter, and None, the bare base, wants prompts to be written.
        limits: what the base takes.
        given: the template that the user has chosen for all of them, or None.

    Raises:
        DataError: "chat" is given, and the tokenizer has no chat template.
    """

    tokenizer: Tokenizer
    templates: Mapping[str | None, WrittenAs]
    limits: Limits
    given: WrittenAs | None = None

    def __post_init__(self) -> None:
        if self.given == "chat":
            check_template(self.given, self.tokenizer)

    def wanted(self, trained: WrittenAs | None) -> WrittenAs:
        """How an adapter is asked that was trained so, or that does not say how."""
        return self.given or trained or ("chat" if self.tokenizer.chat_template else "alpaca")

    def template(self, adapter: str | None) -> WrittenAs:
        """How an adapter, or None, the bare base, is asked.

        Raises:
            AdapterError: there is no such adapter.
        """
        if adapter not in self.templates:
            known = [name for name in self.templates if name is not None]
            raise AdapterError(f"The session has an {unknown_name('adapter', adapter, known)}")
        return self.templates[adapter]

    def prompt(self, prompt: Prompt, adapter: str | None) -> list[int]:
        """The tokens that ask a prompt; there is room behind them for at least one.

        Raises:
            DataError: it does not fit into the base's context, has a token that the base does not know or text that
                is not UTF-8, or cannot be written with the template; `prompt.origin` is named.
            AdapterError: there is no such adapter.
        """
        template = self.template(adapter)
        raw = prompt.raw or template == "raw"
        try:
            check_encodable(prompt.input, "the input")
            if raw:
                _check_raw(prompt.messages, prompt.input)
            most = self.limits.positions and self.limits.positions - 1
            ids = list(prompt.ids) or encode_prompt(
                prompt.messages, template, self.tokenizer, prompt.input, raw, prompt.tools, most
            )
            self.limits.room(len(ids))
            self.limits.check_ids([ids], self.tokenizer)
        except DataError as error:
            raise _named(error, prompt.origin) from None
        return ids

    def example(self, example: Example, adapter: str | None) -> Encoded:
        """The tokens and labels of an example whose loss is wanted; a raw template takes its text as it is.

        Raises:
            DataError, AdapterError: as `prompt`.
        """
        template = self.template(adapter)
        nameless = replace(example, origin="")
        try:
            if template == "raw" and not example.raw:
                _check_raw(example.messages[:-1], example.input)
                nameless = replace(nameless, raw=True)
            encoded = encode_all([nameless], template, self.tokenizer, 1 << 20)[-1]
            self.limits.check_length(len(encoded.input_ids))
            self.limits.check_ids([encoded.input_ids], self.tokenizer)
        except DataError as error:
            raise _named(error, example.origin) from None
        return encoded


def usable(items: Sequence[Item], check: Callable[[Item], object], skipped: list[str] | None) -> list[Item]:
    """The items that pass a check.

    Args:
        items: records, prompts, tasks or questions.
        check: raises DataError.
        skipped: takes a sentence for each item that does not pass; without it the first one is an error.

    Raises:
        DataError: one does not pass and there is no `skipped`; or none is left.
    """
    good: list[Item] = []
    for item in items:
        try:
            check(item)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
        else:
            good.append(item)
    if items and not good and skipped:
        raise DataError(f"No record is left to use ({len(skipped)} skipped). The first: {skipped[0]}")
    return good


def read_prompts(
    source: str, raw: bool = False, skipped: list[str] | None = None, kinds: Collection[Kind] = ()
) -> list[Prompt]:
    """Prompts from a data file, a folder or pattern of them, or any other file with one instruction a line.

    A record has `instruction` (and `input`), `prompt`, or `messages` that end with the user; `image` names pictures.

    Args:
        source: the file.
        raw: lines keep the blanks they begin and end with, as they will be asked without a template.
        skipped: takes a sentence for each record that cannot be used; without it the first one is an error.
        kinds: see `load_examples`.

    Raises:
        DataError: the file cannot be read, or a record has none of these.
    """
    if data_files(source) != [source] or source == "-" or is_data_file(source):
        loaded = load_examples([source], skipped is not None, parse=parse_question, kinds=kinds)
        log_findings((), loaded.notes)
        if skipped is not None:
            skipped += loaded.skipped
        return [Prompt.before(example) for example in loaded.examples]
    try:
        with open(os.path.expanduser(source), encoding="utf-8-sig") as file:
            lines = [line.removesuffix("\n") if raw else line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"{source} cannot be read ({reason}): give a text file, .json or .jsonl.") from None
    prompts = [
        replace(Prompt.of(line), origin=f"{source}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{source} is empty: write one instruction a line.")
    return prompts


def asked_otherwise(prompts: Sequence[Prompt], writer: Writer, adapter: str | None) -> str | None:
    """A sentence where prompts are asked in another way than an adapter was trained on; the bare base takes any."""
    if adapter is None:
        return None
    template = writer.template(adapter)
    count = sum(prompt.raw != (template == "raw") for prompt in prompts)
    if not count:
        return None
    of = f"{count:,} of {len(prompts):,} records"
    if template == "raw":
        return f"{of} take a template, and the adapter '{adapter}' was trained without one: they are asked without"
    return (
        f"{of} have a 'prompt', which is asked as it is, and the adapter '{adapter}' was trained in the template "
        f"'{template}': call it 'instruction'"
    )


def _check_raw(messages: Sequence[Message], input: str) -> None:
    if len(messages) != 1 or input:
        what = "an input" if input else "more than one message"
        raise DataError(
            f"What is asked without a template cannot have {what}: put all of it into one prompt, or pass --template."
        )


def _named(error: DataError, origin: str) -> DataError:
    return type(error)(f"{origin}: {error}") if origin else error
