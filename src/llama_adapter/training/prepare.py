"""From a recipe to encoded examples: read, parse, encode, split, digest. No model is needed."""

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from llama_adapter.data.batches import response_tokens, steps_per_epoch
from llama_adapter.data.encode import Encoded, encode_records, texts_of
from llama_adapter.data.examples import Example, Media
from llama_adapter.data.formats import parse_record
from llama_adapter.data.kinds import sources_of
from llama_adapter.data.limits import Limits
from llama_adapter.data.pairs import SHAPES, parse_pair
from llama_adapter.data.sources import Loaded, check_some_left, load_examples, log_findings, notes_of, reject
from llama_adapter.errors import ConfigError
from llama_adapter.settings import BUNDLED, BUNDLED_LR
from llama_adapter.training.config import STANDS_FOR, TrainConfig
from llama_adapter.training.feed import Feed, MemoryFeed, RecordEncoder, StreamFeed
from llama_adapter.training.streaming import digest_of, open_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
ENOUGH = 20
"""Validation examples from which a loss tells one step from another."""
FEW_STEPS = 50
"""A run of fewer steps is said to be short."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run learns from and is measured on.

    Attributes:
        train: encoded training examples; of streamed data the first ones, which stand for the others.
        val: encoded validation examples; may be empty.
        raw: whether all records are prompt-completion text, which takes no template.
        skipped: one sentence per record that was left out.
        digest: SHA-256 of all token ids, labels and names of files; a resumed run must have the same. Of streamed data
            it is that of the files' sizes and of blocks spread over them.
        now: what a chat template that writes the date was told; a resumed run tells it the same.
        notes: what the records hold and nobody reads, with counts.
        longest: no example has more tokens.
        streamed: the batches of streamed data; None where all is in memory.
    """

    train: list[Encoded]
    val: list[Encoded]
    raw: bool
    skipped: list[str]
    digest: str
    now: datetime
    notes: list[str] = field(default_factory=list)
    longest: int = 0
    streamed: StreamFeed | None = None

    def feed(self, config: TrainConfig) -> Feed:
        """The batches of the run, from its beginning."""
        return self.streamed or MemoryFeed(self.train, config.batch_size, config.seed)

    def steps_per_epoch(self, config: TrainConfig) -> int:
        """Optimiser steps in one pass over the data; of streamed data, whose end nobody knows, a tenth of the run's."""
        if self.streamed is not None:
            return -(-config.total_steps(1) // 10)
        return steps_per_epoch(len(self.train), config.batch_size)

    def media(self) -> list[Media]:
        """Every file that an example names, once."""
        return list(dict.fromkeys(media for example in (*self.train, *self.val) for media in example.media))

    def report(self) -> dict[str, int | float]:
        """Counts worth seeing before a run: examples, of which a preference pair is one, truncations, tokens."""
        texts = texts_of([*self.train, *self.val])
        lengths = [len(text.input_ids) for text in texts]
        streamed = {} if self.streamed is None else {"streamed_sources": len(self.streamed.stream.parts)}
        return streamed | {
            "train_examples" if self.streamed is None else "examples_looked_at": len(self.train),
            "val_examples": len(self.val),
            "skipped_records": len(self.skipped),
            "truncated_examples": sum(text.truncated for text in texts),
            "merged_examples": sum(text.merged for text in texts),
            "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "longest_tokens": max(lengths),
            "response_tokens": response_tokens(self.train) + response_tokens(self.val),
        }


def prepare(
    config: TrainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    limits: Limits | None = None,
    now: datetime | None = None,
) -> Prepared:
    """Read and encode the data that a recipe names.

    Args:
        config: the recipe.
        tokenizer: the base's.
        limits: what the base takes.
        now: what a chat template that writes the date is told (default: the clock).

    Raises:
        DataError: a file or a record cannot be used, or has a token that the base does not know.
        ConfigError: an example is longer than the base takes, or validation would leave nothing to train on.
    """
    now = now or datetime.now()
    max_length = _max_length(config, limits)
    skipped: list[str] = []
    if config.streaming:
        result = _streamed(config, tokenizer, limits, now, max_length, skipped)
        _check(result, config, max_length, limits, tokenizer)
        log_findings(skipped, result.notes)
        return result
    loaded, train = _encoded(config, config.data, max_length, tokenizer, now, skipped)
    notes = [*loaded.notes, *_unlike(loaded.examples, loaded.examples, "the others"), *_trained_on(config)]
    if config.val_data:
        held_out, val = _encoded(config, config.val_data, max_length, tokenizer, now, skipped)
        notes += _validation_notes(held_out, loaded.examples)
    else:
        train, val = _split(train, config.val_size, config.seed)
    result = Prepared(
        train=[text for texts in train for text in texts],
        val=[text for texts in val for text in texts],
        raw=all(example.raw for example in loaded.examples),
        skipped=skipped,
        digest=_digest([text for texts in (*train, *val) for text in texts]),
        now=now,
        notes=notes,
    )
    result = replace(result, longest=max(len(text.input_ids) for text in texts_of([*result.train, *result.val])))
    _check(result, config, max_length, limits, tokenizer)
    log_findings(skipped, notes)
    return result


def _streamed(
    config: TrainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    limits: Limits | None,
    now: datetime,
    max_length: int,
    skipped: list[str],
) -> Prepared:
    """Data that are read as they are needed, of which the first are looked at."""
    encoder = RecordEncoder(tokenizer, config.value("template"), max_length, now, limits, _parser(config))
    streamed, first = open_stream(config, encoder)
    notes, val = [*notes_of(first.examples), *_unlike(first.examples, first.examples, "the others")], first.val
    notes += _trained_on(config)
    skipped += first.skipped
    if config.val_data:
        held_out, records = _encoded(config, config.val_data, max_length, tokenizer, now, skipped)
        notes += _validation_notes(held_out, first.examples)
        val = [text for texts in records for text in texts]
    elif val:
        log.info("validation: the first %d examples, which are not trained on", len(val))
    return Prepared(
        first.seen, val, encoder.raw, skipped, digest_of(streamed, _digest(val)), now, notes, max_length, streamed
    )


def _check(
    data: Prepared, config: TrainConfig, max_length: int, limits: Limits | None, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise for what the base cannot take; say what is lost or has no effect."""
    report = data.report()
    if limits is not None:
        if limits.positions is not None and data.longest > limits.positions:
            most = "up to " if data.streamed else ""
            raise ConfigError(
                f"The longest example has {most}{data.longest} tokens and the base takes {limits.positions}: "
                f"pass --max-length {limits.positions}, which truncates it."
            )
        limits.check_ids((text.input_ids for text in texts_of([*data.train, *data.val])), tokenizer)
        if report["truncated_examples"] and max_length < config.value("max_length"):
            log.warning(
                "the base takes %d tokens: %d examples lose what is beyond", max_length, report["truncated_examples"]
            )
        if warning := limits.warning(tokenizer):
            log.warning(warning)
    if merged := report["merged_examples"]:
        log.warning(
            "%d of %d examples have a token that joins an answer's edge with its neighbour, as no generated answer "
            "can: begin answers without a blank, or pass another --template",
            merged, len(texts_of([*data.train, *data.val])),
        )  # fmt: skip
    if all(text.truncated for text in texts_of([*data.train, *data.val])):
        log.warning(
            "all examples are longer than %d tokens and lose their end, so that none shows where an answer ends: raise "
            "--max-length", max_length,
        )  # fmt: skip
    if config.max_steps is None and (steps := config.total_steps(data.steps_per_epoch(config))) < FEW_STEPS:
        log.warning(
            "%d steps (%d examples, %d a step, %g epochs) are few for gates that start at zero: lower --batch-size, "
            "raise --epochs, or give more records; see 'llama-adapter quickstart --help'",
            steps, len(data.train), config.batch_size, config.epochs,
        )  # fmt: skip
    if 0 < len(data.val) < ENOUGH:
        instead = " in place of --val-data" if config.val_data else ""
        log.warning(
            "the step whose adapter is kept is chosen by %d validation example%s, which is too few: --val-size 0%s "
            "keeps the last", len(data.val), "s" * (len(data.val) > 1), instead,
        )  # fmt: skip
    if config.value("model") == BUNDLED and config.lr is None and config.method == "sft":
        log.warning(
            "the bundled base of 3M parameters learns little at a rate of %.3g, which is for large ones: pass --lr %g",
            config.peak_lr, BUNDLED_LR,
        )  # fmt: skip
    if data.raw and config.template is not None:
        log.warning("prompt-completion records take no template: %s has no effect", config.template)


def _unlike(examples: Sequence[Example], trained: Sequence[Example], others: str) -> list[str]:
    """A sentence where some take a template and others do not: an adapter that is trained on both is asked with it."""
    raw = all(example.raw for example in trained)
    count = sum(example.raw != raw for example in examples)
    if not count:
        return []
    what = "take a template" if raw else "are a prompt and its completion, which take no template"
    return [f"{count:,} of {len(examples):,} records {what}, unlike {others}"]


def _validation_notes(held_out: Loaded, trained: Sequence[Example]) -> list[str]:
    unlike = _unlike(held_out.examples, trained, "what is trained on")
    return [f"validation: {note}" for note in (*held_out.notes, *unlike)]


def _trained_on(config: TrainConfig) -> list[str]:
    """A sentence for each source that validation shares with what is trained on: its loss shows no over-fitting."""
    trained = Counter(sources_of(config.data))
    if config.val_data:
        both = sorted(trained.keys() & set(sources_of(config.val_data)))
        return [f"validation: {name} is trained on too, and its loss will show no over-fitting" for name in both]
    twice = sorted(name for name, count in trained.items() if count > 1 and config.val_size != 0)
    return [f"{name} is named twice: what is held out of it for validation is trained on too" for name in twice]


def _max_length(config: TrainConfig, limits: Limits | None) -> int:
    """In tokens; a default that nobody typed is not above the base's context."""
    length: int = config.value("max_length")
    if config.max_length is None and limits is not None and limits.positions is not None:
        return min(length, limits.positions)
    return length


def _encoded(
    config: TrainConfig,
    sources: Sequence[str],
    max_length: int,
    tokenizer: "PreTrainedTokenizerBase",
    now: datetime,
    skipped: list[str],
) -> tuple[Loaded, list[list[Encoded]]]:
    """The records of `sources` and each one's texts; `skipped` gets a sentence for what was left out on the way."""
    options = {"scienceqa": {"style": config.scienceqa_style}}
    kinds = () if config.condition is None else (config.condition,)
    loaded = load_examples(sources, config.skip_bad_records, bool(kinds), options, _parser(config), kinds)
    rejected = loaded.skipped if config.skip_bad_records else None
    if config.method == "dpo":
        loaded = Loaded(_pairs_of(loaded.examples, rejected), loaded.skipped)
    records = encode_records(loaded.examples, config.value("template"), tokenizer, max_length, now, rejected)
    check_some_left(records, loaded.skipped)
    skipped += loaded.skipped
    return loaded, records


def _parser(config: TrainConfig) -> Callable[[object], Example]:
    return parse_pair if config.method == "dpo" else parse_record


def _pairs_of(examples: Sequence[Example], skipped: list[str] | None) -> list[Example]:
    """The examples with two answers: sources with a reader of their own have none."""
    for example in examples:
        if not example.rejected:
            reject(f"{example.origin}: it is no preference pair; those are: {SHAPES}", skipped)
    return [example for example in examples if example.rejected]


def _split(
    examples: list[list[Encoded]], given: float | None, seed: int
) -> tuple[list[list[Encoded]], list[list[Encoded]]]:
    import torch

    if given is None and len(examples) == 1:
        log.warning("the only record is trained on: there is no validation")
        return examples, []
    val_size = STANDS_FOR["val_size"] if given is None else given
    count = int(val_size) if val_size >= 1 else round(val_size * len(examples))
    if 0 < val_size < 1:
        count = max(count, 1)
    if count >= len(examples):
        raise ConfigError(
            f"val_size {val_size:g} takes {count} of {len(examples)} records and leaves none to train on: "
            "lower it, or pass --val-size 0 to go without validation."
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in order[:count]]


def _digest(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for example in texts_of(examples):
        digest.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        for media in example.media:
            digest.update(media if isinstance(media, bytes) else media.encode())
    return digest.hexdigest()
