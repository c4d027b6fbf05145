"""Encoded examples to packed rows: laid end to end, the tokens that they begin with alike taken once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from llama_adapter.data.encode import IGNORE, Encoded, texts_of
from llama_adapter.training.packed_attention import Sections, Segments, SharedBelow, joined

HEAD = 16
"""Examples that agree in so many first tokens are packed together: they were written in the same template."""
Section = tuple[int, Sequence[Encoded]]
"""An owner and examples of his that stand side by side in a row."""


@dataclass(frozen=True)
class PackedRow:
    """What one forward takes, T tokens and R predictions that carry loss.

    Under `SharedBelow` there are fewer `input_ids`: T is what its upper layers see.

    Attributes:
        input_ids: [1, T] int64, the shared prefix and then every example's own tokens.
        position_ids: [1, T] int64, restarting behind the prefix.
        predicting: [R] int64, positions whose next token carries loss.
        targets: [R] int64, those tokens.
        segments: where the examples lie.
        counts: how many of the predictions each example has, in their order.
        owners: whose the examples of each section are, a number.
        spans: tokens of each section, T in all.
        losses: predictions of each section, R in all.
    """

    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    segments: Segments | Sections | SharedBelow
    counts: tuple[int, ...]
    owners: tuple[int, ...] = (0,)
    spans: tuple[int, ...] = ()
    losses: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "PackedRow":
        """The same on `device`."""
        ids, positions, predicting, targets = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.predicting, self.targets)
        )
        return replace(
            self, input_ids=ids, position_ids=positions, predicting=predicting, targets=targets,
            segments=self.segments.to(device),
        )  # fmt: skip


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """How many first tokens can be taken once for all: alike, and none of them predicts a token that carries loss."""
    if len(examples) < 2:
        return 0
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(e.input_ids for e in examples), strict=False))
    first_learnt = min(next(i for i, label in enumerate(e.labels) if i and label != IGNORE) for e in examples)
    return min(sum(1 for _ in alike), first_learnt - 1)


def pack(examples: Sequence[Encoded]) -> PackedRow:
    """One row of these examples, all of one owner, behind what they begin with alike; a preference pair is two."""
    return pack_sections([[(0, examples)]])


def pack_sections(groups: Sequence[Sequence[Section]], shared_layers: int = 0) -> PackedRow:
    """One row of several owners' examples.

    Each section has a prefix of its own, as from the lowest adapted layer on another owner's tokens are others, though
    they begin alike. In the layers below that one they are the same, and sections of one group share theirs.

    Args:
        groups: sections that begin alike.
        shared_layers: so many of the lowest layers have nothing of any of the owners.
    """
    ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    owners, below, above, losses = [], [], [], []
    for sections in groups if shared_layers else [[section] for group in groups for section in group]:
        texts = [(owner, texts_of(examples)) for owner, examples in sections]
        flat = [text for _, some in texts for text in some]
        shared, first = shared_prefix(flat), len(ids)
        ids += flat[0].input_ids[:shared]
        positions += range(shared)
        below.append(Segments(shared, tuple(len(example.input_ids) - shared for example in flat)))
        for owner, examples in texts:
            prefix, before = shared_prefix(examples), len(targets)
            begin = prefix  # of a section the first example brings the prefix along
            for example in examples:
                places = [*range(first, first + shared), *range(len(ids), len(ids) + len(example.input_ids) - shared)]
                source += places[:begin]
                offset, begin = len(source) - prefix, 0
                source += places[prefix:]
                ids += example.input_ids[shared:]
                positions += range(shared, len(example.input_ids))
                learnt = len(targets)
                for position in range(prefix, len(example.labels) - 1):
                    if example.labels[position + 1] != IGNORE:
                        predicting.append(offset + position)
                        targets.append(example.labels[position + 1])
                counts.append(len(targets) - learnt)
            owners.append(owner)
            above.append(Segments(prefix, tuple(len(example.input_ids) - prefix for example in examples)))
            losses.append(len(targets) - before)
    segments: Segments | Sections | SharedBelow = joined(above)
    if len(ids) < len(source):
        segments = SharedBelow(joined(below), joined(above), torch.tensor(source), shared_layers)
    else:
        ids, positions = ([values[place] for place in source] for values in (ids, positions))
    return PackedRow(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(predicting, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        segments,
        tuple(counts),
        tuple(owners),
        tuple(section.tokens for section in above),
        tuple(losses),
    )


def packed_rows(
    examples: Sequence[Encoded],
    micro_batch_size: int,
    process: int = 0,
    processes: int = 1,
    owners: Sequence[int] | None = None,
    shared_layers: Sequence[int] | None = None,
) -> Iterator[PackedRow]:
    """This process's share of a global batch in rows of at most `micro_batch_size` examples.

    Examples that begin alike go together, and among them those of one owner, so that more can be shared; the sum of
    losses does not depend on it.

    Args:
        examples: the global batch.
        micro_batch_size: most examples of a row.
        process: this one,
        processes: of so many.
        counts: how many of the predictions each example has, in their order.
        owners: whose each example is, a number; by default all are 0's.
        shared_layers: how many of the lowest layers have nothing of each owner's; by default none.
    """
    pairs = zip(owners or [0] * len(examples), examples, strict=True)
    by_length = sorted(pairs, key=lambda pair: len(pair[1].input_ids), reverse=True)
    groups: dict[tuple[int, ...], dict[int, list[Encoded]]] = {}
    for owner, example in by_length[process::processes]:
        groups.setdefault(tuple(example.input_ids[:HEAD]), {}).setdefault(owner, []).append(example)
    lonely: dict[int, list[Encoded]] = {}
    for head in [head for head, group in groups.items() if sum(map(len, group.values())) < 2]:
        for owner, some in groups.pop(head).items():
            lonely.setdefault(owner, []).extend(some)
    sections = [sorted(group.items()) for group in (*groups.values(), lonely)]
    for row in _filled(sections, micro_batch_size):
        depths = [shared_layers[owner] for group in row for owner, _ in group] if shared_layers else [0]
        yield pack_sections(row, min(depths))


def _filled(groups: Sequence[Sequence[Section]], size: int) -> Iterator[list[list[Section]]]:
    """The same in rows of `size` examples; a section that does not fit goes on in the next."""
    row: list[list[Section]] = []
    room = size
    for group in groups:
        row.append([])
        for owner, examples in group:
            while examples:
                taken, examples = examples[:room], examples[room:]
                row[-1].append((owner, taken))
                room -= len(taken)
                if not room:
                    yield [some for some in row if some]
                    row, room = [[]], size
    if any(row):
        yield [some for some in row if some]
