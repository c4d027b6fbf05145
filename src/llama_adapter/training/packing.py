"""Encoded examples to packed rows: laid end to end, the tokens that they begin with alike taken once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from llama_adapter.data.encode import IGNORE, Encoded, texts_of
from llama_adapter.training.packed_attention import Segments

HEAD = 16
"""Examples that agree in so many first tokens are packed together: they were written in the same template."""


@dataclass(frozen=True)
class PackedRow:
    """What one forward takes, T tokens and R predictions that carry loss.

    Attributes:
        input_ids: [1, T] int64, the shared prefix and then every example's own tokens.
        position_ids: [1, T] int64, restarting behind the prefix.
        predicting: [R] int64, positions whose next token carries loss.
        targets: [R] int64, those tokens.
        segments: where the examples lie.
        counts: how many of the predictions each example has, in their order.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    segments: Segments
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> "PackedRow":
        """The same on `device`."""
        ids, positions, predicting, targets = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.predicting, self.targets)
        )
        return PackedRow(ids, positions, predicting, targets, self.segments.to(device), self.counts)


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """How many first tokens can be taken once for all: alike, and none of them predicts a token that carries loss."""
    if len(examples) < 2:
        return 0
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(e.input_ids for e in examples), strict=False))
    first_learnt = min(next(i for i, label in enumerate(e.labels) if i and label != IGNORE) for e in examples)
    return min(sum(1 for _ in alike), first_learnt - 1)


def pack(examples: Sequence[Encoded]) -> PackedRow:
    """One row of these examples; a preference pair is two of them."""
    examples = texts_of(examples)
    prefix = shared_prefix(examples)
    ids, positions = list(examples[0].input_ids[:prefix]), list(range(prefix))
    predicting: list[int] = []
    targets: list[int] = []
    counts = []
    for example in examples:
        offset, before = len(ids) - prefix, len(targets)
        for position in range(prefix, len(example.labels) - 1):
            if example.labels[position + 1] != IGNORE:
                predicting.append(offset + position)
                targets.append(example.labels[position + 1])
        counts.append(len(targets) - before)
        ids += example.input_ids[prefix:]
        positions += range(prefix, len(example.input_ids))
    return PackedRow(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(predicting, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        Segments(prefix, tuple(len(example.input_ids) - prefix for example in examples)),
        tuple(counts),
    )


def packed_rows(
    examples: Sequence[Encoded], micro_batch_size: int, process: int = 0, processes: int = 1
) -> Iterator[PackedRow]:
    """This process's share of a global batch in rows of at most `micro_batch_size` examples.

    Examples that begin alike go together, so that more can be shared; the sum of losses does not depend on it.
    """
    by_length = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
    groups: dict[tuple[int, ...], list[Encoded]] = {}
    for example in by_length[process::processes]:
        groups.setdefault(tuple(example.input_ids[:HEAD]), []).append(example)
    lonely = [example for group in groups.values() if len(group) < 2 for example in group]
    for group in (*(group for group in groups.values() if len(group) > 1), lonely):
        for start in range(0, len(group), micro_batch_size):
            yield pack(group[start : start + micro_batch_size])
