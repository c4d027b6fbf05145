"""From text to tokens and labels: one tokenisation of the whole text, labels by character spans."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from llama_adapter.data.chat_templates import tokenizer_name
from llama_adapter.data.examples import Example, Media, Message
from llama_adapter.data.templates import Rendered, check_template, end_token, render, render_prompt
from llama_adapter.errors import ConfigError, DataError, TooLongError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100

# Tokenizers work on a batch in parallel; beyond a few hundred texts nothing is gained.
_BATCH = 512
_LETTERS = 8
"""Of a token, and more than most have."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one text of an example.

    Attributes:
        input_ids: the whole text, at most `max_length` tokens.
        labels: as long as `input_ids` and not shifted: the token itself where it carries loss, else `IGNORE`.
        truncated: whether tokens were cut off.
        media: files that belong to the example.
        merged: whether a token holds both characters of a response and others, as no answer to the prompt can.
        rejected: of a preference pair the text with the worse answer, which begins with the same prompt.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    media: tuple[Media, ...] = ()
    merged: bool = False
    rejected: "Encoded | None" = None


def texts_of(examples: Iterable[Encoded]) -> list[Encoded]:
    """Every text that a model reads for these: of a preference pair the chosen one, then the rejected one."""
    return [text for example in examples for text in (example, example.rejected) if text is not None]


def encode(example: Example, template: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
    """Encode an example with one answer; see `encode_all`.

    Raises:
        DataError: also if the chat template makes several texts of it.
    """
    texts = encode_all([example], template, tokenizer, max_length)
    if len(texts) > 1:
        raise DataError(f"The example is {len(texts)} texts in its chat template: take encode_all.")
    return texts[0]


def encode_all(
    examples: Sequence[Example],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    now: datetime | None = None,
) -> list[Encoded]:
    """Every text of every example, in order; see `encode_records`."""
    return [text for texts in encode_records(examples, template, tokenizer, max_length, now) for text in texts]


def encode_records(
    examples: Sequence[Example],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    now: datetime | None = None,
    skipped: list[str] | None = None,
) -> list[list[Encoded]]:
    """Encode every example to at most `max_length` tokens, in order: one text each, or several, see `render`.

    A token carries loss if any of its characters lies in a response; the end token after the last response
    does too. What is too long loses its end, and the prompt its beginning where the first response would not
    keep a quarter of `max_length`; so each result has at least one token that carries loss.

    Args:
        examples: what is encoded.
        template: how it is written.
        tokenizer: the base's.
        max_length: in tokens.
        now: what a chat template that writes the date is told (default: the clock, read once).
        skipped: gets a sentence for each example that cannot be written, which is then left out.

    Raises:
        ConfigError: `max_length` is below 2, or the template is unknown.
        DataError: the tokenizer cannot serve (not fast, no end token, no chat template); or an example cannot
            be written with the template and `skipped` is not given; this names the example's origin.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}: it must be at least 2, one token to read and one to learn.")
    _check_fast(tokenizer)
    end_token(tokenizer)
    if not all(example.raw for example in examples):
        check_template(template, tokenizer)
    now = now or datetime.now()
    encoded = []
    for first in range(0, len(examples), _BATCH):
        batch: list[tuple[Example, list[Rendered]]] = []
        for example in examples[first : first + _BATCH]:
            try:
                batch.append((example, _render(example, template, tokenizer, now)))
            except DataError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
        tokens = iter(_tokenise([text for _, texts in batch for text in texts], tokenizer))
        for example, texts in batch:
            whole = [_encoded(text, *next(tokens), tokenizer, example.media) for text in texts]
            bos = tokenizer.bos_token_id
            if not example.rejected:
                encoded.append([_cut(text, max_length, bos) for text in whole])
                continue
            try:
                encoded.append([_pair(whole[0], whole[1], max_length, bos)])
            except DataError as error:
                if skipped is None:
                    raise DataError(f"{example.origin}: {error}" if example.origin else str(error)) from None
                skipped.append(f"{example.origin}: {error}.")
    return encoded


def _pair(chosen: Encoded, rejected: Encoded, max_length: int, bos: int | None) -> Encoded:
    """The pair of two texts, whose prompt loses the same beginning in both: the answers are to one question."""
    drop = max(_surplus(text, max_length) for text in (chosen, rejected))
    chosen, rejected = (_cut(text, max_length, bos, drop) for text in (chosen, rejected))
    if chosen.input_ids == rejected.input_ids:
        raise DataError(f"'chosen' and 'rejected' are the same {len(chosen.input_ids)} tokens, which teaches nothing")
    return replace(chosen, rejected=rejected)


def _encoded(
    rendered: Rendered,
    ids: list[int],
    offsets: list[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerBase",
    media: tuple[Media, ...],
) -> Encoded:
    """A whole text, however long."""
    spans = list(_without_gaps(offsets))
    edges = [edge for response in rendered.responses for edge in response]
    merged = any(start < edge < end for edge in edges for start, end in spans)
    labels = _label(rendered, ids, spans)
    if not rendered.ends_with_eos:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return Encoded(ids, labels, False, media, merged)


def encode_prompt(
    messages: Sequence[Message],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    input: str = "",
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    most: int | None = None,
) -> list[int]:
    """Return the tokens of a conversation that waits for an answer; see `render_prompt` for the other arguments.

    Of a text whose beginning alone has more than twice as many tokens as `most` no more is read.

    Raises:
        ConfigError, DataError: as `render_prompt`; also if the tokenizer is not fast.
        TooLongError: no more is read.
    """
    _check_fast(tokenizer)
    rendered = render_prompt(messages, template, tokenizer, input, raw, tools)
    seen = _LETTERS * (most or 1)
    while most and seen < len(rendered.text):
        tokens = len(_tokenise([replace(rendered, text=rendered.text[:seen])], tokenizer)[0][0])
        if tokens > 2 * most:  # so many that it does not matter how the last word of the beginning was cut
            raise TooLongError(f"The prompt has more than {tokens} tokens; the base takes at most {most}: shorten it.")
        seen *= 2
    ids, _ = _tokenise([rendered], tokenizer)[0]
    return ids


def _check_fast(tokenizer: "PreTrainedTokenizerBase") -> None:
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {tokenizer_name(tokenizer)} is not a fast one and cannot tell which characters "
            "a token covers: load the model's fast tokenizer (one with a tokenizer.json)."
        )


def _render(example: Example, template: str, tokenizer: "PreTrainedTokenizerBase", now: datetime) -> list[Rendered]:
    worse = [replace(example, messages=example.rejected, rejected=())] if example.rejected else []
    try:
        texts = [render(one, template, tokenizer, now) for one in (example, *worse)]
        if worse and any(len(found) > 1 for found in texts):
            raise DataError("its chat template makes several texts of a conversation, and a pair needs one of each")
        return [text for found in texts for text in found]
    except DataError as error:
        raise DataError(f"{example.origin}: {error}" if example.origin else str(error)) from error


def _tokenise(
    batch: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return (ids, character offsets) of each text, without an end token that the tokenizer adds by itself.

    Such a tokenizer would close a prompt, too; whether an end token is due is `encode_all`'s decision.
    """
    results = []
    for special_tokens, group in groupby(batch, key=attrgetter("special_tokens")):
        output = tokenizer(
            [rendered.text for rendered in group],
            add_special_tokens=special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, offsets in zip(output["input_ids"], output["offset_mapping"], strict=True):
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and offsets[-1] == (0, 0):
                ids, offsets = ids[:-1], offsets[:-1]
            results.append((ids, offsets))
    return results


def _label(rendered: Rendered, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return a label for each token: itself if its characters overlap a response, else `IGNORE`."""
    return [
        token if any(start < right and left < end for left, right in rendered.responses) else IGNORE
        for token, (start, end) in zip(ids, spans, strict=True)
    ]


def _without_gaps(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Give characters that belong to no token to the next one.

    Byte-level tokenizers may report " cat" without its blank, and a token that is all blanks as empty.
    """
    covered = 0
    for start, end in offsets:
        yield min(start, covered), end
        covered = end


def _surplus(text: Encoded, max_length: int) -> int:
    """How many tokens its prompt loses so that of what is too long a fair part of the first response is left."""
    if len(text.input_ids) <= max_length:
        return 0
    labels = text.labels
    first = next(index for index, label in enumerate(labels) if label != IGNORE)
    length = next((n for n, label in enumerate(labels[first:]) if label == IGNORE), len(labels) - first)
    return max(0, first + min(length, max(1, max_length // 4)) - max_length)


def _cut(text: Encoded, max_length: int, bos: int | None, drop: int | None = None) -> Encoded:
    """The text in at most `max_length` tokens, without the first `drop` of its prompt; BOS stays in front."""
    drop = _surplus(text, max_length) if drop is None else drop
    ids, labels = text.input_ids, text.labels
    if not drop and len(ids) <= max_length:
        return text
    front = 1 if ids[0] == bos else 0
    kept = slice(front + drop, max_length + drop)
    return replace(text, input_ids=ids[:front] + ids[kept], labels=labels[:front] + labels[kept], truncated=True)
