"""Encoded examples to tensors: the order of a run, micro-batches of like lengths, padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.data.encode import IGNORE, Encoded, texts_of
from llama_adapter.data.examples import Media


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes; rows padded on the right to the longest.

    Attributes:
        input_ids: [B, T] int64; padding repeats token 0 and is masked.
        attention_mask: [B, T] int64, 1 on real tokens.
        labels: [B, T] int64, aligned with `input_ids`, -100 where no loss is wanted.
        media: the files of each row.
        owners: whose each row is, a number.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    media: tuple[tuple[Media, ...], ...] = ()
    owners: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`."""
        ids, mask, labels = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.attention_mask, self.labels)
        )
        return MicroBatch(ids, mask, labels, self.media, self.owners)


def collate(examples: Sequence[Encoded], owners: Sequence[int] | None = None) -> MicroBatch:
    """Pad examples to their longest; a preference pair is two rows. By default all of them are owner 0's."""
    owners = [owner for owner, e in zip(owners or [0] * len(examples), examples, strict=True) for _ in texts_of([e])]
    examples = texts_of(examples)
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return MicroBatch(
        padded([example.input_ids for example in examples], 0),
        padded([[1] * len(example.input_ids) for example in examples], 0),
        padded([example.labels for example in examples], IGNORE),
        tuple(example.media for example in examples),
        tuple(owners),
    )


def response_tokens(examples: Sequence[Encoded]) -> int:
    """How many next-token predictions carry loss (the first token of a row is predicted by none)."""
    return sum(label != IGNORE for text in texts_of(examples) for label in text.labels[1:])


def global_batch(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the examples of optimiser step `step` (from 0): a function of its arguments alone.

    Every epoch is a permutation of its own, so a resumed run needs no state but its step.
    The last batch of an epoch holds what is left.
    """
    per_epoch = steps_per_epoch(count, batch_size)
    epoch, within = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    return order[within * batch_size : (within + 1) * batch_size].tolist()


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimiser steps in one pass over `count` examples."""
    return -(-count // batch_size)


def micro_batches(
    examples: Sequence[Encoded],
    micro_batch_size: int,
    process: int = 0,
    processes: int = 1,
    owners: Sequence[int] | None = None,
) -> Iterator[MicroBatch]:
    """This process's share of a global batch, longest first, in micro-batches of like lengths.

    Sorting keeps padding low; the sum of losses over all micro-batches does not depend on it.

    Args:
        examples: the global batch.
        micro_batch_size: most rows of a micro-batch.
        process: this one,
        processes: of so many.
        owners: whose each example is, a number; by default all are 0's.
    """
    pairs = zip(owners or [0] * len(examples), examples, strict=True)
    by_length = sorted(pairs, key=lambda pair: len(pair[1].input_ids), reverse=True)
    share = by_length[process::processes]
    for start in range(0, len(share), micro_batch_size):
        rows = share[start : start + micro_batch_size]
        yield collate([example for _, example in rows], [owner for owner, _ in rows])
