"""The loss of a micro-batch: cross-entropy on response tokens, in fp32, without logits that nobody needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llama_adapter.core.attention import ROUTING, SEGMENTS, wrap_attention
from llama_adapter.core.families import attention_modules, text_config
from llama_adapter.core.routing import Adapter, Routing
from llama_adapter.data import IGNORE
from llama_adapter.data.batches import MicroBatch
from llama_adapter.training.packing import PackedRow


def response_loss(model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device) -> torch.Tensor:
    """Summed cross-entropy of a micro-batch's response tokens, fp32."""
    if isinstance(batch, PackedRow):
        return packed_loss(model, batch.to(device))
    return response_losses(model, batch, device).sum()


def owners_losses(
    model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device, adapters: Sequence[Adapter]
) -> torch.Tensor:
    """Summed cross-entropy for each of `batch.owners`, fp32; owner i's rows, or sections, are served by `adapters[i]`.

    No adapter gets a gradient from another's row.
    """
    wrap_attention(attention_modules(model)[0].config)
    if isinstance(batch, PackedRow):
        return packed_losses(model, batch.to(device), **{ROUTING: routing_of(batch, adapters, device)})
    return response_losses(model, batch, device, **{ROUTING: routing_of(batch, adapters, device)})


def routing_of(batch: MicroBatch | PackedRow, adapters: Sequence[Adapter], device: torch.device) -> Routing:
    """Which adapter serves which row of a batch, or which tokens of a packed row."""
    numbers = list(dict.fromkeys(batch.owners))
    if len(numbers) == 1:
        return Routing((adapters[numbers[0]],))
    if isinstance(batch, PackedRow):
        return Routing(tuple(adapters[owner] for owner in batch.owners), spans=batch.spans)
    rows = torch.tensor([numbers.index(owner) for owner in batch.owners], device=device)
    return Routing(tuple(adapters[number] for number in numbers), rows)


def packed_loss(model: PreTrainedModel, row: PackedRow) -> torch.Tensor:
    """Summed cross-entropy of a packed row's response tokens, fp32; see `packed_logits`."""
    return packed_losses(model, row).sum()


def packed_losses(model: PreTrainedModel, row: PackedRow, **options: Any) -> torch.Tensor:
    """Summed cross-entropy of each section's response tokens, [sections] fp32; see `packed_logits`."""
    logits = packed_logits(model, row, **options)
    losses = cross_entropy(logits.flatten(0, 1), row.targets, reduction="none")
    return torch.stack([section.sum() for section in losses.split(row.losses)])


def packed_logits(model: PreTrainedModel, row: PackedRow, **options: Any) -> torch.Tensor:
    """Logits [1, R, vocabulary], fp32, of a packed row.

    The output head runs on the R positions that predict a response token and on no other. `model` must have an
    adapter, active or not: its attention is what keeps the examples apart. `options` go to it.
    """
    logits = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        # A mask of four dimensions is taken as it is, which saves building one of T x T. Ours is not read; being
        # empty, it fits no attention that would read it: one that knows no segments fails instead of mixing examples.
        attention_mask=row.input_ids.new_ones(1, 1, 0, 0, dtype=torch.bool),
        logits_to_keep=row.predicting,
        use_cache=False,
        **{SEGMENTS: row.segments},
        **options,
    ).logits
    return logits.float()


def why_not_packed(model: PreTrainedModel, longest: int) -> str | None:
    """The reason why examples of up to `longest` tokens cannot be packed on this model, or None where they can."""
    name = model.config._attn_implementation
    if name != "sdpa":
        return f"packing needs sdpa attention, and this base uses {name}"
    window = getattr(text_config(model.config), "sliding_window", None)
    if window and window < longest:
        return f"examples of {longest} tokens are longer than the base's sliding window of {window}"
    return None


def response_losses(model: PreTrainedModel, batch: MicroBatch, device: torch.device, **options: Any) -> torch.Tensor:
    """Summed cross-entropy of each row's response tokens, [B] fp32; `options` go to the model."""
    logits, targets = response_logits(model, batch, device, **options)
    return row_losses(logits, targets)


def row_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of each row, [B], from what `response_logits` gives."""
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(targets).sum(-1)


def response_logits(
    model: PreTrainedModel, batch: MicroBatch, device: torch.device, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, R, vocabulary], fp32, and the labels [B, R] that they predict; `options` go to the model.

    The output head runs only on the R positions that predict a response token of some row; the labels of other rows
    are `IGNORE` there.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORE).any(0).nonzero()[:, 0]
    targets, columns, batch = targets[:, columns].to(device), columns.to(device), batch.to(device)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=columns,
        use_cache=False,
        **options,
    ).logits
    return logits.float(), targets
