"""Synthetic examples as long as real ones: what is timed depends on lengths, not on what the tokens say.

`alpaca_lengths.npz` has figures only, one per example of a random subset of Alpaca: tokens in all, tokens of the
prompt, and whether there is an input. All examples of a kind begin with the same template, as the real ones do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_adapter.data import IGNORE, Encoded

FILE = Path(__file__).with_name("alpaca_lengths.npz")
PREFIX = {False: 29, True: 39}
"""Tokens of the Alpaca template in front of the instruction, without and with an input."""
RESERVED = 3
"""Ids below are padding, beginning and end in every shape: never drawn."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of real examples: `total` and `prompt` [N], and `has_input` [N]."""

    total: np.ndarray
    prompt: np.ndarray
    has_input: np.ndarray

    @staticmethod
    def read(file: Path = FILE) -> "Lengths":
        """The figures in `file`."""
        with np.load(file) as figures:
            return Lengths(figures["total"], figures["prompt"], figures["has_input"])


def draw(count: int, vocab_size: int, seed: int = 0, max_length: int = 512) -> list[Encoded]:
    """`count` examples with lengths drawn from the real ones.

    Args:
        count: how many.
        vocab_size: ids are drawn below it.
        seed: of lengths and ids; the templates are the same under every seed.
        max_length: what is longer loses its end, but always keeps one token of the response.
    """
    lengths, generator = Lengths.read(), np.random.default_rng(seed)
    templates = {
        kind: np.random.default_rng(size).integers(RESERVED, vocab_size, size).tolist() for kind, size in PREFIX.items()
    }
    examples = []
    for index in generator.integers(0, len(lengths.total), count):
        total = min(int(lengths.total[index]), max_length)
        prompt = min(int(lengths.prompt[index]), total - 1)
        template = templates[bool(lengths.has_input[index])][: prompt - 1]
        own = generator.integers(RESERVED, vocab_size, total - len(template)).tolist()
        ids = template + own
        examples.append(Encoded(ids, [IGNORE] * prompt + ids[prompt:], False))
    return examples


def global_batches(count: int, batch_size: int, vocab_size: int, seed: int = 0) -> list[list[Encoded]]:
    """`count` global batches, no example twice."""
    examples = draw(count * batch_size, vocab_size, seed)
    return [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]


def random_prompts(rows: int, tokens: int, vocab_size: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Prompts of one length for generation, [rows, tokens] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(RESERVED, vocab_size, (rows, tokens), generator=generator).to(device)


def real_tokens(batches: Sequence[Sequence[Encoded]]) -> Iterator[int]:
    """Tokens of each global batch, without padding."""
    for batch in batches:
        yield sum(len(example.input_ids) for example in batch)
