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


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: what is called; PEFT wraps the base.
        groups: parameters with the factor on the learning rate that each group takes.
        batches: how a batch becomes micro-batches; packed where that is possible, as `llama-adapter train` does.
    """

    model: Any
    groups: list[tuple[list[nn.Parameter], float]]
    batches: Callable[..., Iterator[Any]] = micro_batches

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for parameters, _ in self.groups for parameter in parameters]


@dataclass(frozen=True)
class Options:
    """What a trial may change about the zero-init adapter; the defaults are the recipe's.

    Attributes:
        adapter_len: K.
        adapter_layers: L.
        gate_start: standard deviation of the gates' first values; 0 is the paper's zero-init.
        prompt_scale: standard deviation of the prompts' first values.
        gate_lr: factor on the gates' learning rate.
        train_norms: also train the base's RMSNorm weights (LLaMA-Adapter V2).
        train_biases: also train a new bias on every linear layer (LLaMA-Adapter V2).
        rank: of LoRA.
    """

    adapter_len: int = 10
    adapter_layers: int = 8
    gate_start: float = 0.0
    prompt_scale: float = 1.0
    gate_lr: float = 1.0
    train_norms: bool = False
    train_biases: bool = False
    rank: int = 2


def zero_init(model: PreTrainedModel, options: Options) -> Prepared:
    """This project's adapter."""
    biases = [_add_bias(m) for m in model.modules() if isinstance(m, nn.Linear)] if options.train_biases else []
    adapter = add_adapter(
        model, AdapterConfig(adapter_len=options.adapter_len, adapter_layers=options.adapter_layers, template="alpaca")
    )
    prompts = [layer.prompt for layer in adapter.layers.values()]
    gates = [layer.gate for layer in adapter.layers.values()]
    with torch.no_grad():
        for prompt in prompts:
            prompt.mul_(options.prompt_scale)
        for gate in gates:
            gate.normal_(0, options.gate_start)
    norms = [m.weight for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"] if options.train_norms else []
    extra = [*norms, *biases]
    for parameter in extra:
        parameter.requires_grad_(True)
    # V2's extra weights start at the base's values: they take a tenth of the prompts' rate.
    return Prepared(model, [(prompts, 1.0), (gates, options.gate_lr), (extra, 0.1)], packed_rows)


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
    return Prepared(model, [([p for p in model.parameters() if p.requires_grad], 1.0)])


def _add_bias(linear: nn.Linear) -> nn.Parameter:
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    return linear.bias
