"""Every way to train that `train.py` times: what is called, on which batches, with which loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.batching import (
    full_head_loss,
    in_order,
    padded_to_longest,
    regroup,
    share_of_loss,
    stock_loss,
    unshared_rows,
)
from benchmarks.harness import BenchmarkError, Setting
from llama_adapter.compiler import compile_layers
from llama_adapter.data import Encoded
from llama_adapter.data.batches import micro_batches, response_tokens
from llama_adapter.errors import ModelError
from llama_adapter.training.fp8 import quantise_base
from llama_adapter.training.packing import packed_rows

OURS = "ours, packed"
OURS_PADDED = "ours, padded, like lengths"
OURS_FP8 = "ours, packed, fp8"
OURS_COMPILED_FP8 = "ours, packed, compiled, fp8"
PEFT_LIKE = "PEFT, like lengths"
PEFT_BEST = "PEFT, grouped by length"
PEFT_COMPILED = "PEFT, grouped by length, compiled"
SHIPPED_MICRO_BATCH = 8
"""transformers' default per device, which is how PEFT's examples run."""

Gradients = list[tuple[Tensor, Tensor]]
Batches = Sequence[Sequence[Encoded]]


@dataclass
class Method:
    """One way to train.

    Attributes:
        name: its row's title.
        model: what is called.
        batches: (examples, micro-batch size) -> what each forward takes.
        loss: (model, one of these, response tokens of the global batch, device) -> its share of the mean loss.
        micro_batch: examples a forward.
        gradients: of prompts and gates; None for LoRA, which has none.
        regrouped: takes its global batches from `regroup`: the same examples, met in another order.
        optional: may fail without stopping the others.
        exact: computes what the other rows do, up to rounding in their dtype; FP8 rounds more.
    """

    name: str
    model: Any
    batches: Callable[[Sequence[Encoded], int], Iterator[Any]]
    loss: Callable[[Any, Any, int, torch.device], Tensor]
    micro_batch: int
    gradients: Callable[[], Gradients] | None = None
    regrouped: bool = False
    optional: bool = False
    exact: bool = True
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        # A rate of 0 would do the same work; a small one keeps the losses finite and the values moving.
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-5)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def arrange(self, batches: Batches) -> Batches:
        """The global batches that this row trains on."""
        return regroup(batches, self.micro_batch) if self.regrouped else batches

    def accumulate(self, examples: Sequence[Encoded], device: torch.device) -> Tensor:
        """Gradients of the mean loss over the response tokens of a global batch, left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens, total = response_tokens(examples), torch.zeros((), device=device)
        for batch in self.batches(examples, self.micro_batch):
            loss = self.loss(self.model, batch, tokens, device)
            loss.backward()
            total += loss.detach().float()
        return total

    def step(self, examples: Sequence[Encoded], device: torch.device) -> float:
        """One optimiser step; the loss is read, as a training loop does."""
        total = self.accumulate(examples, device)
        self.optimizer.step()
        return float(total)

    def computed_tokens(self, examples: Sequence[Encoded]) -> int:
        """Tokens that go through the base, padding included."""
        return sum(batch.input_ids.numel() for batch in self.batches(examples, self.micro_batch))


def methods(setting: Setting) -> list[Method]:
    """Every row, all on the same weights and with equal adapters."""
    options, shape = setting.options, setting.shape
    base = shapes.build(shape, setting.device, setting.dtype, options.seed)
    model, adapter = shapes.with_ours(base, shape)
    peft = shapes.with_adaption_prompt(base, shape, adapter)
    lora = shapes.with_lora(base, options.lora_rank)
    packed, padded, grouped = options.packed_micro_batch, options.padded_micro_batch, options.grouped_micro_batch

    def ours() -> Gradients:
        return shapes.our_gradients(adapter)

    def theirs() -> Gradients:
        return shapes.peft_gradients(peft)

    rows = [
        Method(OURS, model, packed_rows, share_of_loss, packed, ours),
        Method("ours, packed, no prefix sharing", model, unshared_rows, share_of_loss, packed, ours),
        Method("ours, packed, head on every token", model, packed_rows, full_head_loss, packed, ours),
        Method("ours, packing alone", model, unshared_rows, full_head_loss, packed, ours),
        Method(OURS_PADDED, model, micro_batches, share_of_loss, padded, ours),
        Method("PEFT, as shipped", peft, in_order, stock_loss, SHIPPED_MICRO_BATCH, theirs),
        Method(PEFT_LIKE, peft, micro_batches, stock_loss, padded, theirs),
        Method(PEFT_BEST, peft, in_order, stock_loss, grouped, theirs, regrouped=True),
        Method(f"{PEFT_BEST}, response head", peft, in_order, share_of_loss, grouped, theirs, regrouped=True),
        Method("PEFT, padded to 512", peft, padded_to_longest, stock_loss, SHIPPED_MICRO_BATCH, theirs),
        Method("LoRA, grouped by length", lora, in_order, stock_loss, grouped, regrouped=True),
    ]
    if options.compile:
        rows += compiled(setting, base, adapter)
    if options.fp8:
        rows += in_fp8(setting, base, adapter)
    return rows


def compiled(setting: Setting, base: Any, adapter: Any) -> list[Method]:
    """torch.compile on copies: whole layers where shapes allow it, feed-forward and norms in packed rows."""
    model, own = shapes.with_ours(base, setting.shape, adapter)
    peft = shapes.with_adaption_prompt(base, setting.shape, adapter)
    compile_layers(model)
    shapes.compile_layers(peft)
    packed, grouped = setting.options.packed_micro_batch, setting.options.grouped_micro_batch
    return [
        Method("ours, packed, compiled", model, packed_rows, share_of_loss, packed,
               lambda: shapes.our_gradients(own), optional=True),
        Method(PEFT_COMPILED, peft, in_order, stock_loss, grouped,
               lambda: shapes.peft_gradients(peft), regrouped=True, optional=True),
    ]  # fmt: skip


def in_fp8(setting: Setting, base: Any, adapter: Any) -> list[Method]:
    """Ours on a copy of the base whose linear layers are computed in FP8, and the same compiled.

    Raises:
        BenchmarkError: this device has no FP8.
    """
    copied = shapes.share(base)
    try:
        quantise_base(copied)
    except ModelError as error:
        raise BenchmarkError(str(error)) from None
    rows = []
    for name, to_compile in ((OURS_FP8, False), (OURS_COMPILED_FP8, True)):
        if to_compile and not setting.options.compile:
            continue
        model, own = shapes.with_ours(copied, setting.shape, adapter)
        if to_compile:
            compile_layers(model)
        rows.append(Method(name, model, packed_rows, share_of_loss, setting.options.packed_micro_batch,
                           lambda own=own: shapes.our_gradients(own), optional=to_compile, exact=False))  # fmt: skip
    return rows
