"""What a run minimises: sums over a micro-batch, divided by a number that the global batch tells.

`Responses` is the cross-entropy of answers, per response token. `Preferences` is DPO (arXiv:2305.18290), per pair:

    reward = beta * (log p(answer | prompt) - log p_reference(answer | prompt))        p of all its tokens
    loss   = -log sigmoid(reward of the chosen answer - reward of the rejected one)

The policy is the base with the adapter. The reference is what the run starts from: the bare base, or the adapter that
the run goes on from. It reads the same texts on the same weights, in a forward of its own that keeps no activations.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from llama_adapter.core.model import add_adapter, use_adapter
from llama_adapter.core.routing import Adapter
from llama_adapter.data.batches import MicroBatch, response_tokens
from llama_adapter.data.encode import Encoded
from llama_adapter.formats.load import load_adapter
from llama_adapter.formats.native import save_adapter
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loss import packed_logits, response_loss, response_losses
from llama_adapter.training.packing import PackedRow
from llama_adapter.training.start import Start

REFERENCE = "reference"
"""Behind the name of a DPO run's adapter, on the model, that of the adapter which it goes on from."""


class Objective(Protocol):
    """What the loop asks of it."""

    names: tuple[str, ...]
    """What the sums are called once they are divided; the first is the loss."""
    unit: str
    """What the loss is, on a plot."""

    def count(self, examples: Sequence[Encoded]) -> int:
        """What a sum over these examples is divided by."""

    def sums(self, model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device) -> torch.Tensor:
        """Sums over a micro-batch, fp32, one for each of `names`; the first has a gradient."""


def objective_of(
    config: TrainConfig,
    model: PreTrainedModel,
    adapter: Adapter,
    start: Start | None,
    folder: RunFolder,
    is_main: bool = True,
) -> Objective:
    """What a recipe minimises.

    The adapter that a DPO run goes on from is its reference: a frozen twin of it on the model, kept in the run's folder
    for when it is resumed.

    Raises:
        AdapterError: the folder's reference is gone or damaged, or cannot be written.
    """
    if config.method == "sft":
        return Responses()
    if config.init_from is None:
        return Preferences(config.value("beta"), adapter.name)
    name = f"{adapter.name}.{REFERENCE}"
    if start is None:
        load_adapter(model, folder.reference, name)
    else:
        twin = add_adapter(model, start.config, name, activate=False, state_dict=start.tensors)
        for parameter in twin.parameters():
            parameter.requires_grad_(False)
        if is_main:
            save_adapter(model, folder.reference, name)
    return Preferences(config.value("beta"), adapter.name, name)


class Responses:
    """Cross-entropy of response tokens."""

    names: tuple[str, ...] = ("loss",)
    unit = "loss per response token (nats)"

    def count(self, examples: Sequence[Encoded]) -> int:
        """Response tokens."""
        return response_tokens(examples)

    def sums(self, model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device) -> torch.Tensor:
        """[1]."""
        return response_loss(model, batch, device)[None]


class Preferences:
    """DPO with TRL's `sigmoid` loss and its names for what is logged.

    Args:
        beta: how near to the reference the policy stays.
        policy: name of the adapter that learns.
        reference: name of the adapter that it is held against; None is the bare base.
    """

    names: tuple[str, ...] = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    unit = "loss per pair (log 2 at the reference)"

    def __init__(self, beta: float, policy: str, reference: str | None = None) -> None:
        self.beta, self.policy, self.reference = beta, policy, reference

    def count(self, examples: Sequence[Encoded]) -> int:
        """Pairs."""
        return len(examples)

    def sums(self, model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device) -> torch.Tensor:
        """[5], of a batch whose texts are chosen and rejected in turns."""
        policy, reference = self.log_probabilities(model, batch, device)
        rewards = self.beta * (policy - reference)
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        margins = chosen - rejected
        loss = -logsigmoid(margins).sum()
        seen = torch.stack([chosen, rejected, (margins > 0).to(margins), margins]).detach().sum(1)
        return torch.cat([loss[None], seen])

    def log_probabilities(
        self, model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every text's answer, [N] fp32, under the policy and, without gradient, the reference."""
        with torch.no_grad(), use_adapter(model, self.reference):
            reference = -text_losses(model, batch, device)
        with use_adapter(model, self.policy):
            return -text_losses(model, batch, device), reference


def text_losses(model: PreTrainedModel, batch: MicroBatch | PackedRow, device: torch.device) -> torch.Tensor:
    """Summed cross-entropy of each text's response tokens, [N] fp32."""
    if not isinstance(batch, PackedRow):
        return response_losses(model, batch, device)
    row = batch.to(device)
    losses = cross_entropy(packed_logits(model, row)[0], row.targets, reduction="none")
    return torch.stack([own.sum() for own in losses.split(row.counts)])
