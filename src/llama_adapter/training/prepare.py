"""From a recipe to encoded examples: read, parse, encode, split, digest. No model is needed."""

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_adapter.data.batches import response_tokens
from llama_adapter.data.encode import Encoded, encode_all
from llama_adapter.data.formats import Media
from llama_adapter.data.sources import Loaded, load_examples
from llama_adapter.errors import ConfigError
from llama_adapter.training.config import STANDS_FOR, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything a run learns from and is measured on.

    Attributes:
        train: encoded training examples.
        val: encoded validation examples; may be empty.
        raw: whether all records are prompt-completion text, which takes no template.
        skipped: one sentence per record that was left out.
        digest: SHA-256 of all token ids, labels and names of files; a resumed run must have the same.
    """

    train: list[Encoded]
    val: list[Encoded]
    raw: bool
    skipped: list[str]
    digest: str

    def media(self) -> list[Media]:
        """Every file that an example names, once."""
        return list(dict.fromkeys(media for example in (*self.train, *self.val) for media in example.media))

    def report(self) -> dict[str, int | float]:
        """Counts worth seeing before a run: examples, truncations, tokens."""
        lengths = [len(example.input_ids) for example in (*self.train, *self.val)]
        return {
            "train_examples": len(self.train),
            "val_examples": len(self.val),
            "skipped_records": len(self.skipped),
            "truncated_examples": sum(example.truncated for example in (*self.train, *self.val)),
            "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "longest_tokens": max(lengths),
            "response_tokens": response_tokens(self.train) + response_tokens(self.val),
        }


def prepare(config: TrainConfig, tokenizer: "PreTrainedTokenizerBase", max_positions: int | None = None) -> Prepared:
    """Read and encode the data that a recipe names.

    Args:
        config: the recipe.
        tokenizer: the base's.
        max_positions: how many tokens the base takes, where it says so.

    Raises:
        DataError: a file or a record cannot be used.
        ConfigError: an example is longer than the base takes, or validation would leave nothing to train on.
    """
    loaded, template, max_length = _load(config, config.data), config.value("template"), config.value("max_length")
    if config.max_length is None and max_positions is not None:
        max_length = min(max_length, max_positions)
    train = encode_all(loaded.examples, template, tokenizer, max_length)
    skipped = list(loaded.skipped)
    if config.val_data:
        held_out = _load(config, config.val_data)
        val = encode_all(held_out.examples, template, tokenizer, max_length)
        skipped += held_out.skipped
    else:
        train, val = _split(train, config.val_size, config.seed)
    longest = max(len(example.input_ids) for example in (*train, *val))
    if max_positions is not None and longest > max_positions:
        raise ConfigError(
            f"The longest example has {longest} tokens and the base takes {max_positions}: "
            f"pass --max-length {max_positions}, which truncates it."
        )
    cut = sum(example.truncated for example in (*train, *val))
    if cut and max_length < config.value("max_length"):
        log.warning("the base takes %d tokens: %d examples lose what is beyond", max_length, cut)
    raw = all(example.raw for example in loaded.examples)
    if raw and config.template is not None:
        log.warning("prompt-completion records take no template: %s has no effect", config.template)
    return Prepared(train, val, raw, skipped, _digest((*train, *val)))


def _load(config: TrainConfig, sources: Sequence[str]) -> Loaded:
    options = {"scienceqa": {"style": config.scienceqa_style}}
    return load_examples(sources, config.skip_bad_records, config.condition is not None, options)


def _split(examples: list[Encoded], given: float | None, seed: int) -> tuple[list[Encoded], list[Encoded]]:
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
    for example in examples:
        digest.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        for media in example.media:
            digest.update(media if isinstance(media, bytes) else media.encode())
    return digest.hexdigest()
