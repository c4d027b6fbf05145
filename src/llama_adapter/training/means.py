"""What a step, or a validation, of several experts comes to: the sums of each, over what its own examples count."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llama_adapter.data import Encoded
from llama_adapter.data.batches import MicroBatch
from llama_adapter.training.learner import Learner
from llama_adapter.training.packing import PackedRow

Share = tuple[Learner, Sequence[Encoded]]
"""An expert and examples of its own."""
Figures = tuple[dict[str, float], float]
"""The values of an expert's objective in a step, and the norm of its gradient."""


class Means:
    """Sums of experts' objectives over micro-batches, each divided by what its global batch counts.

    Attributes:
        totals: fp32, the values of each expert's objective, one expert behind the other.
    """

    def __init__(self, shares: Sequence[Share], device: torch.device) -> None:
        self.shares, self.names = shares, [expert.objective.names for expert, _ in shares]
        self.first = [0, *accumulate(len(names) for names in self.names)]
        counts = [float(max(1, expert.objective.count(some))) for expert, some in shares]
        self.counts = torch.tensor(counts, device=device)
        self.totals = torch.zeros(self.first[-1], device=device)

    def add(self, batch: MicroBatch | PackedRow, sums: Tensor) -> Tensor:
        """Add what `Run._sums` gave; what comes back has the gradient of its losses."""
        owner, owners = batch.owners[0], batch.owners
        places: Sequence[int] = [self.first[number] for number in owners]
        if not self.shares[owner][0].mixes:
            owners, places = (owner,) * len(sums), range(self.first[owner], self.first[owner + 1])
        values = sums / self.counts[torch.tensor(owners, device=sums.device)]
        self.totals.index_add_(0, torch.tensor(places, device=sums.device), values.detach())
        return values.sum()

    def named(self, values: Sequence[float]) -> list[dict[str, float]]:
        """`totals` by the objectives' names."""
        return [
            dict(zip(names, values[first:], strict=False)) for names, first in zip(self.names, self.first, strict=False)
        ]
