"""The ways of fine-tuning that are compared: each prepares a loaded base and says what it trains.

Every method gets the same base, batches, loss and schedule (`trial.py`); only what is trainable differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.data.batches import micro_batches
from llama_adapter.training.packing import packed_rows

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: what is called; PEFT wraps the base.
        groups: AdamW's groups of parameters, each with the `factor` on the learning rate that it takes.
        batches: how a batch becomes micro-batches; packed where that is possible, as `llama-adapter train` does.
    """

    model: Any
    groups: list[dict[str, Any]]
    batches: Callable[..., Iterator[Any]] = micro_batches

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for group in self.groups for parameter in group["params"]]


@dataclass(frozen=True)
class Options:
    """What a trial may change about the zero-init adapter; the defaults are the recipe's.

    Attributes:
        adapter_len: K.
        adapter_layers: L.
        gate_start: standard deviation of the gates' first values; 0 is the paper's zero-init.
        prompt_scale: standard deviation of the prompts' first values.
        gate_lr: factor on the gates' learning rate.
        norms: own norms beside the prompts (LLaMA-Adapter V2).
        scale_bias: a scale and a bias of every linear beside them.
        lora: rank of LoRA on every linear beside them; 0 is none.
        rank: of LoRA alone.
    """

    adapter_len: int = 10
    adapter_layers: int = 8
    gate_start: float = 0.0
    prompt_scale: float = 1.0
    gate_lr: float = 1.0
    norms: bool = False
    scale_bias: bool = False
    lora: int = 0
    rank: int = 2


def zero_init(model: PreTrainedModel, options: Options) -> Prepared:
    """This project's adapter."""
    adapter = add_adapter(
        model,
        AdapterConfig(
            adapter_len=options.adapter_len, adapter_layers=options.adapter_layers, template="alpaca",
            norms=options.norms, linear_scale=LINEARS if options.scale_bias else (),
            linear_bias=LINEARS if options.scale_bias else (), lora_rank=options.lora,
            lora_targets=LINEARS if options.lora else (),
        ),
    )  # fmt: skip
    prompts = [layer.prompt for layer in adapter.layers.values()]
    gates = [layer.gate for layer in adapter.layers.values()]
    with torch.no_grad():
        for prompt in prompts:
            prompt.mul_(options.prompt_scale)
        for gate in gates:
            gate.normal_(0, options.gate_start)
    groups: list[dict[str, Any]] = [
        {"params": prompts, "factor": 1.0},
        {"params": gates, "factor": options.gate_lr},
    ]
    # V2's extra weights start at the base's values: they take a tenth of the prompts' rate, and do not decay to 0.
    for decay, lora in ({"weight_decay": 0.0}, False), ({}, True):
        extra = [p for k, part in adapter.modules.items() if k.startswith("lora.") == lora for p in part.parameters()]
        groups.append({"params": extra, "factor": 0.1, **decay})
    return Prepared(model, groups, packed_rows)


def lora(model: PreTrainedModel, options: Options) -> Prepared:
    """PEFT's LoRA on the query and value projections, its default for Llama."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=["q_proj", "v_proj"])
    return _trainable(get_peft_model(model, config))


def adaption_prompt(model: PreTrainedModel, options: Options) -> Prepared:
    """PEFT's version of this method: one scalar gate a layer, no tanh."""
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(
        adapter_len=options.adapter_len, adapter_layers=options.adapter_layers, task_type="CAUSAL_LM"
    )
    return _trainable(get_peft_model(model, config))


def full(model: PreTrainedModel, options: Options) -> Prepared:
    """Everything."""
    return _trainable(model)


METHODS: dict[str, Callable[[PreTrainedModel, Options], Prepared]] = {
    "zero-init": zero_init,
    "lora": lora,
    "adaption-prompt": adaption_prompt,
    "full": full,
}


def _trainable(model: Any) -> Prepared:
    return Prepared(model, [{"params": [p for p in model.parameters() if p.requires_grad], "factor": 1.0}])
