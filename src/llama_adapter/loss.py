"""The loss of a micro-batch: cross-entropy on response tokens, in fp32, without logits that nobody needs."""

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llama_adapter.data import IGNORE
from llama_adapter.data.batches import MicroBatch


def response_loss(model: PreTrainedModel, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Summed cross-entropy of a micro-batch's response tokens, fp32."""
    return response_losses(model, batch, device).sum()


def response_losses(model: PreTrainedModel, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Summed cross-entropy of each row's response tokens, [B] fp32.

    The output head runs only on positions that predict a response token of some row.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORE).any(0).nonzero()[:, 0]
    targets, columns, batch = targets[:, columns].to(device), columns.to(device), batch.to(device)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=columns, use_cache=False
    ).logits
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(targets).sum(-1)
