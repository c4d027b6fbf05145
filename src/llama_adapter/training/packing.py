"""Encoded examples to packed rows: laid end to end, the tokens that they begin with alike taken once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from llama_adapter.data.encode import IGNORE, Encoded
from llama_adapter.training.packed_attention import Sections, Segments

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
        owners: whose the examples of each section are, a number.
        spans: tokens of each section, T in all.
        losses: predictions of each section, R in all.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    segments: Segments | Sections
    owners: tuple[int, ...] = (0,)
    spans: tuple[int, ...] = ()
    losses: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "PackedRow":
        """The same on `device`."""
        ids, positions, predicting, targets = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.predicting, self.targets)
        )
        return PackedRow(
            ids, positions, predicting, targets, self.segments.to(device), self.owners, self.spans, self.losses
        )


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """How many first tokens can be taken once for all: alike, and none of them predicts a token that carries loss."""
    if len(examples) < 2:
        return 0
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(e.input_ids for e in examples), strict=False))
    first_learnt = min(next(i for i, label in enumerate(e.labels) if i and label != IGNORE) for e in examples)
    return min(sum(1 for _ in alike), first_learnt - 1)


def pack(examples: Sequence[Encoded]) -> PackedRow:
    """One row of these examples, all of one owner, behind what they begin with alike."""
    return pack_sections([(0, examples)])


def pack_sections(sections: Sequence[tuple[int, Sequence[Encoded]]]) -> PackedRow:
    """One row of several owners' examples.

    Each section, an owner and some of his examples, has a prefix of its own: from the lowest adapted layer on another
    owner's tokens are others, though they begin alike.
    """
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    segments, losses = [], []
    for _, examples in sections:
        before, prefix = len(targets), shared_prefix(examples)
        ids += examples[0].input_ids[:prefix]
        positions += range(prefix)
        for example in examples:
            offset = len(ids) - prefix
            for position in range(prefix, len(example.labels) - 1):
                if example.labels[position + 1] != IGNORE:
                    predicting.append(offset + position)
                    targets.append(example.labels[position + 1])
            ids += example.input_ids[prefix:]
            positions += range(prefix, len(example.input_ids))
        segments.append(Segments(prefix, tuple(len(example.input_ids) - prefix for example in examples)))
        losses.append(len(targets) - before)
    return PackedRow(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(predicting, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        segments[0] if len(segments) == 1 else Sections(tuple(segments)),
        tuple(owner for owner, _ in sections),
        tuple(section.tokens for section in segments),
        tuple(losses),
    )


def packed_rows(
    examples: Sequence[Encoded],
    micro_batch_size: int,
    process: int = 0,
    processes: int = 1,
    owners: Sequence[int] | None = None,
) -> Iterator[PackedRow]:
    """This process's share of a global batch in rows of at most `micro_batch_size` examples.

    Examples of one owner that begin alike go together, so that more can be shared and a row has few owners; the sum of
    losses does not depend on it.

    Args:
        examples: the global batch.
        micro_batch_size: most examples of a row.
        process: this one,
        processes: of so many.
        owners: whose each example is, a number; by default all are 0's.
    """
    pairs = zip(owners or [0] * len(examples), examples, strict=True)
    by_length = sorted(pairs, key=lambda pair: len(pair[1].input_ids), reverse=True)
    groups: dict[int, dict[tuple[int, ...], list[Encoded]]] = {}
    for owner, example in by_length[process::processes]:
        groups.setdefault(owner, {}).setdefault(tuple(example.input_ids[:HEAD]), []).append(example)
    sections = []
    for owner, alike in sorted(groups.items()):
        sections += [(owner, group) for group in alike.values() if len(group) > 1]
        lonely = [example for group in alike.values() if len(group) < 2 for example in group]
        sections += [(owner, lonely)] if lonely else []
    for row in _filled(sections, micro_batch_size):
        yield pack_sections(row)


def _filled(
    sections: Sequence[tuple[int, Sequence[Encoded]]], size: int
) -> Iterator[list[tuple[int, Sequence[Encoded]]]]:
    """The same in rows of `size` examples; a section that does not fit goes on in the next."""
    row: list[tuple[int, Sequence[Encoded]]] = []
    room = size
    for owner, group in sections:
        while group:
            taken, group = group[:room], group[room:]
            row.append((owner, taken))
            room -= len(taken)
            if not room:
                yield row
                row, room = [], size
    if row:
        yield row
