"""From what the caller chose to what the attention is told: which adapter serves which row, under which condition."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_adapter.core.zero_init import Choice, with_zero_init
from llama_adapter.errors import AdapterError, UnsupportedModelError

Names = str | None | Sequence[str | None]
"""An adapter's name, None for the bare base, or a list with one of these per row of the batch."""

EAGER = "llama_adapter_eager"
"""Attention name of adapted models whose own is "eager", which transformers keeps out of its registry."""


@dataclass
class Use:
    """What serves the forwards of a model.

    Attributes:
        names: one name or None for all rows, or a tuple with one per row.
        condition: [B, 1, hidden] or [B, K, hidden], added to the prompts of each row; None adds nothing.
    """

    names: Names
    condition: Tensor | None = None
    _made: tuple[int, torch.device, Choice | None] | None = field(default=None, repr=False)

    def choice(self, batch: Tensor) -> Choice | None:
        """The `Choice` for a batch of so many rows; None where all of them are on the bare base.

        The same object at every step of a generation, so that what is computed from it can be kept.

        Raises:
            AdapterError: names or conditions are not as many as the batch's rows.
        """
        made = self._made
        if made is None or made[0] != len(batch) or made[1] != batch.device:
            self._made = made = (len(batch), batch.device, self._make(batch))
        return made[2]

    def _make(self, batch: Tensor) -> Choice | None:
        if self.condition is not None:
            self._check_count("conditions", len(self.condition), batch)
        if self.names is None or isinstance(self.names, str):
            return None if self.names is None else Choice((self.names,), None, self.condition)
        self._check_count("names", len(self.names), batch)
        distinct = tuple(dict.fromkeys(self.names))
        if distinct == (None,):
            return None
        if len(distinct) == 1:
            return Choice(distinct, None, self.condition)
        rows = torch.tensor([distinct.index(name) for name in self.names], device=batch.device)
        return Choice(distinct, rows, self.condition)

    def _check_count(self, what: str, count: int, batch: Tensor) -> None:
        if count != len(batch):
            one = what.removesuffix("s")
            raise AdapterError(
                f"use_adapter got {count} {what} for a batch of {len(batch)} rows: give one per row. "
                f"Under beam search or num_return_sequences, repeat each {one} as often as its row is."
            )


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor among a decoder's arguments that tells how many rows there are, and where."""
    for tensor in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args):
        if isinstance(tensor, Tensor):
            return tensor
    return torch.empty(0)


def route_attention(config: Any) -> None:
    """Make sure that the attention function `config` names adds the gated term.

    Functions in transformers' registry are wrapped under their own name, which leaves the configuration, the mask
    and code that looks for a stock name as they are; modules without adapters pass straight through. Only "eager"
    is not in the registry (each model file has its own), so such a model gets a name of ours. Done before every
    forward, because `set_attn_implementation` may have been called meanwhile; a dictionary look-up then.
    """
    name = config._attn_implementation
    if name == "eager":
        AttentionInterface.register(EAGER, with_zero_init(_eager_attention))
        AttentionMaskInterface.register(EAGER, eager_mask)
        config._attn_implementation = EAGER
    elif name != EAGER:
        stock: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        if not hasattr(stock, "wraps"):
            AttentionInterface.register(name, with_zero_init(stock))


def _eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The eager function of the model file that `module` comes from."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention: load the base with sdpa.")
    return function(module, *args, **kwargs)
