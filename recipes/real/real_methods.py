"""The ways of fine-tuning that are compared on a real model: each prepares a base and says what it trains.

Every method gets the same base, batches, loss and schedule (`skill_trial.py`); only what is trainable differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import cat, nn
from transformers import PreTrainedModel

from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.core import routing
from llama_adapter.core.warm_start import prompts_from_text
from llama_adapter.core.zero_init import Prompts, project_prompts
from llama_adapter.data import Encoded
from llama_adapter.data.batches import micro_batches
from llama_adapter.training.packing import packed_rows

sys.path.append(str(Path(__file__).resolve().parents[1] / "base"))
from muon import Muon

EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHT_DECAY = 0.02


@dataclass(frozen=True)
class Options:
    """What a trial may change about its method.

    Attributes:
        adapter_len: K; also how many virtual tokens prefix tuning has.
        adapter_layers: L.
        gate_start: standard deviation of the gates' first values; 0 is the paper's zero-init.
        prompt_scale: factor on the prompts' first values.
        start: "normal" draws them from N(0, 1), "text" takes them from a training example's hidden states.
        gate_lr: factor on the gates' learning rate.
        gate_decay: whether gates decay.
        gate_per_layer: all heads of a layer share one gate.
        sink: one more place that a head may look at, of value 0, which makes the gate depend on the query: "zero" has a
            score of 0, "learnt" is the first prompt with its value held at 0; "" for none.
        norms: own norms beside the prompts (LLaMA-Adapter V2).
        scale: linears with a scale of their inputs beside them (V2).
        bias: linears with a bias beside them (V2).
        parts_lr: factor on the learning rate of norms, scales and biases.
        lora: rank of LoRA beside the prompts, on `targets`.
        lora_lr: factor on its learning rate.
        rank: of LoRA.
        targets: of LoRA.
        muon: prompts are trained by Muon, the rest by AdamW.
    """

    adapter_len: int = 10
    adapter_layers: int = 28
    gate_start: float = 0.0
    prompt_scale: float = 1.0
    start: str = "normal"
    gate_lr: float = 1.0
    gate_decay: bool = True
    gate_per_layer: bool = False
    sink: str = ""
    norms: bool = False
    scale: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    parts_lr: float = 1.0
    lora: int = 0
    lora_lr: float = 0.5
    rank: int = 3
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    muon: bool = False


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained.

    Attributes:
        model: what is called; PEFT wraps the base.
        groups: the optimisers' groups of parameters, each with the `factor` on the learning rate that it takes; those
            of a `tied` one stay equal to one another, those of a `muon` one are trained by Muon, all others by AdamW.
        batches: how a batch becomes micro-batches; packed where that is possible, as `llama-adapter train` does.
        answer: greedy answers to a skill's examples.
    """

    model: Any
    groups: list[dict[str, Any]]
    answer: Callable[[Sequence[Any]], list[str]]
    batches: Callable[..., Iterator[Any]] = micro_batches

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def optimizers(self, lr: float) -> list[torch.optim.Optimizer]:
        """AdamW as `llama-adapter train` has it, and Muon for what asks for it."""
        by_muon = [group for group in self.groups if group.get("muon")]
        others = [group for group in self.groups if not group.get("muon")]
        found: list[torch.optim.Optimizer] = []
        if others:
            found.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY))
        return [*found, Muon(by_muon, lr=lr, weight_decay=WEIGHT_DECAY)] if by_muon else found

    def tie(self) -> None:
        """Give the parameters of a tied group, each a layer's gates, the mean of their gradients."""
        for group in self.groups:
            for parameter in group["params"] if group.get("tied") else []:
                parameter.grad.fill_(parameter.grad.mean())


Method = Callable[[PreTrainedModel, Options, Any, Encoded], Prepared]
"""(base, options, tokenizer, a training example) -> what is trained."""


def zero_init(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """This project's adapter."""
    adapter = add_adapter(
        model,
        AdapterConfig(
            adapter_len=options.adapter_len, adapter_layers=options.adapter_layers, template="chat",
            norms=options.norms, linear_scale=options.scale, linear_bias=options.bias,
            lora_rank=options.lora, lora_targets=options.targets if options.lora else (),
        ),
    )  # fmt: skip
    layers = list(adapter.layers.values())
    if options.start == "text":
        prompts_from_text(model, adapter, example.input_ids)
    with torch.no_grad():
        for layer in layers:
            layer.prompt.mul_(options.prompt_scale)
            layer.gate.normal_(0, options.gate_start)
    _add_sink(options.sink)
    lora_parts, parts = (
        [p for key, part in adapter.modules.items() if key.startswith("lora.") == wanted for p in part.parameters()]
        for wanted in (True, False)
    )
    groups: list[dict[str, Any]] = [
        {"params": [layer.prompt for layer in layers], "factor": 1.0, "muon": options.muon},
        {
            "params": [layer.gate for layer in layers], "factor": options.gate_lr, "tied": options.gate_per_layer,
            **({} if options.gate_decay else {"weight_decay": 0.0}),
        },
        {"params": parts, "factor": options.parts_lr, "weight_decay": 0.0},
        {"params": lora_parts, "factor": options.lora_lr},
    ]  # fmt: skip
    return Prepared(model, [group for group in groups if group["params"]], _by_session(model), packed_rows)


def _add_sink(sink: str) -> None:
    """From here on, for the whole process: what the second softmax reads has this sink."""

    def with_sink(*args: Any, **kwargs: Any) -> Prompts:
        prompts = project_prompts(*args, **kwargs)
        if sink == "learnt":
            return prompts._replace(value=cat([0 * prompts.value[..., :1, :], prompts.value[..., 1:, :]], -2))
        key, value = (cat([0 * x[..., :1, :], x], -2) for x in (prompts.key, prompts.value))
        return Prompts(key, value, prompts.bias)

    routing.project_prompts = with_sink if sink else project_prompts  # type: ignore[assignment]


def _packing(model: PreTrainedModel) -> None:
    """An adapter that is never active: its attention keeps packed examples apart under any other method."""
    add_adapter(model, AdapterConfig(adapter_len=1, adapter_layers=1), "unused", activate=False)


def _peft(model: PreTrainedModel, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config)


def lora(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """PEFT's LoRA, packed like ours."""
    from peft import LoraConfig

    _packing(model)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=list(options.targets))
    return _trainable(_peft(model, config), _by_session(model), packed_rows)


def ia3(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """PEFT's IA3, packed like ours."""
    from peft import IA3Config

    _packing(model)
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return _trainable(_peft(model, config), _by_session(model), packed_rows)


def adaption_prompt(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """PEFT's version of this method: one scalar gate a layer, no tanh."""
    from peft import AdaptionPromptConfig

    config = AdaptionPromptConfig(
        adapter_len=options.adapter_len, adapter_layers=options.adapter_layers, task_type="CAUSAL_LM"
    )
    wrapped = _peft(model, config)
    return _trainable(wrapped, _by_generate(wrapped))


def prefix(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """PEFT's prefix tuning."""
    from peft import PrefixTuningConfig

    wrapped = _peft(model, PrefixTuningConfig(num_virtual_tokens=options.adapter_len, task_type="CAUSAL_LM"))
    return _trainable(wrapped, _by_generate(wrapped))


def full(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """Everything, packed like ours."""
    _packing(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("unused" not in name)
    return _trainable(model, _by_session(model), packed_rows)


def bare(model: PreTrainedModel, options: Options, tokenizer: Any, example: Encoded) -> Prepared:
    """The base as it is, for trials of no steps."""
    _packing(model)
    return Prepared(model, [], _by_session(model), packed_rows)


METHODS: dict[str, Method] = {
    "zero-init": zero_init,
    "lora": lora,
    "adaption-prompt": adaption_prompt,
    "prefix": prefix,
    "ia3": ia3,
    "full": full,
    "bare": bare,
}


def _trainable(model: Any, answer: Any, batches: Any = micro_batches) -> Prepared:
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "unused" not in n]
    return Prepared(model, [{"params": trained, "factor": 1.0}], answer, batches)


def _by_session(model: PreTrainedModel) -> Any:
    from skill_trial import answers_by_session

    return lambda examples: answers_by_session(model, examples)


def _by_generate(model: Any) -> Any:
    from skill_trial import answers_by_generate

    return lambda examples: answers_by_generate(model, examples)
