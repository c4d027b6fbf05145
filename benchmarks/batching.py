"""Ways to turn a global batch into forwards, and the loss of each: the levers that `train.py` pulls one at a time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from llama_adapter.core.attention import SEGMENTS
from llama_adapter.data import IGNORE, Encoded
from llama_adapter.data.batches import MicroBatch, collate
from llama_adapter.training.loss import response_loss
from llama_adapter.training.packed_attention import Segments
from llama_adapter.training.packing import PackedRow, pack

LONGEST = 512
"""What the authors' code pads every example to."""


def unshared_rows(examples: Sequence[Encoded], micro_batch_size: int) -> Iterator[PackedRow]:
    """Packed rows in which every example keeps a beginning of its own."""
    by_length = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
    for start in range(0, len(by_length), micro_batch_size):
        yield end_to_end(by_length[start : start + micro_batch_size])


def end_to_end(examples: Sequence[Encoded]) -> PackedRow:
    """One row of these examples, nothing shared."""
    rows = [pack([example]) for example in examples]
    lengths = [row.input_ids.shape[1] for row in rows]
    starts = [0, *accumulate(lengths)]
    return PackedRow(
        torch.cat([row.input_ids for row in rows], 1),
        torch.cat([row.position_ids for row in rows], 1),
        torch.cat([row.predicting + start for row, start in zip(rows, starts, strict=False)]),
        torch.cat([row.targets for row in rows]),
        Segments(0, tuple(lengths)),
        tuple(len(row.targets) for row in rows),
        spans=(sum(lengths),),
        losses=(sum(len(row.targets) for row in rows),),
    )


def in_order(examples: Sequence[Encoded], micro_batch_size: int) -> Iterator[MicroBatch]:
    """Examples as they come, each micro-batch padded to its longest."""
    for start in range(0, len(examples), micro_batch_size):
        yield collate(examples[start : start + micro_batch_size])


def regroup(batches: Sequence[Sequence[Encoded]], micro_batch_size: int, seed: int = 0) -> list[list[Encoded]]:
    """The same examples in as many global batches, made of micro-batches of like lengths from all of them.

    Padding all but vanishes, and every global batch still has short and long examples: it takes one micro-batch, at
    random, from each section of the lengths. `in_order` takes a batch apart again.
    """
    pool = sorted((e for batch in batches for e in batch), key=lambda e: len(e.input_ids), reverse=True)
    whole, rest = divmod(len(batches[0]), micro_batch_size)
    generator, start = np.random.default_rng(seed), 0
    arranged: list[list[Encoded]] = [[] for _ in batches]
    for size in [micro_batch_size] * whole + [rest] * (rest > 0):
        for batch, place in zip(arranged, generator.permutation(len(batches)), strict=True):
            batch += pool[start + place * size : start + (place + 1) * size]
        start += size * len(batches)
    return arranged


def padded_to_longest(examples: Sequence[Encoded], micro_batch_size: int) -> Iterator[MicroBatch]:
    """Examples as they come, padded to `LONGEST`."""
    for batch in in_order(examples, micro_batch_size):
        missing = (0, LONGEST - batch.input_ids.shape[1])
        yield MicroBatch(
            pad(batch.input_ids, missing), pad(batch.attention_mask, missing), pad(batch.labels, missing, value=IGNORE)
        )


def share_of_loss(model: Any, batch: MicroBatch | PackedRow, tokens: int, device: torch.device) -> Tensor:
    """This project's loss, as its training loop takes it: the output head on response tokens only."""
    return response_loss(model, batch, device) / tokens


def stock_loss(model: Any, batch: MicroBatch, tokens: int, device: torch.device) -> Tensor:
    """transformers' own loss, as its Trainer takes it: logits of every token, divided by the global batch's tokens."""
    batch = batch.to(device)
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        num_items_in_batch=tokens,
        use_cache=False,
    ).loss


def full_head_loss(model: Any, row: PackedRow, tokens: int, device: torch.device) -> Tensor:
    """The loss of a packed row with logits of every token: what the response-only head saves."""
    row = row.to(device)
    labels = torch.full_like(row.input_ids[0], IGNORE)
    labels[row.predicting] = row.targets
    logits = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=row.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),  # not read, as in `packed_loss`
        use_cache=False,
        **{SEGMENTS: row.segments},
    ).logits
    return cross_entropy(logits[0].float(), labels, ignore_index=IGNORE, reduction="sum") / tokens
