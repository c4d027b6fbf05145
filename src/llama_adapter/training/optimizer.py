"""The optimiser of a recipe, and its learning rate from step to step."""

import math
from typing import Any

import torch

from llama_adapter.core.routing import Adapter
from llama_adapter.training.config import TrainConfig


def build_optimizer(adapter: Adapter, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over an adapter's parameters; a group's `factor` is what its rate is to that of prompts and gates.

    Norms, scales and biases do not decay, as in the authors' code: a scale of 0 is no default to go back to.
    """
    prompts = [parameter for layer in adapter.layers.values() for parameter in layer.parameters()]
    lora = [p for prefix, part in adapter.modules.items() if prefix.startswith("lora.") for p in part.parameters()]
    fixed = [p for prefix, part in adapter.modules.items() if not prefix.startswith("lora.") for p in part.parameters()]
    factor = 1.0 if config.parts_lr is None else config.parts_lr / config.peak_lr
    groups: list[dict[str, Any]] = [
        {"params": prompts, "factor": 1.0},
        {"params": lora, "factor": factor},
        {"params": fixed, "factor": factor, "weight_decay": 0.0},
    ]
    if adapter.condition is not None:
        factor = 1.0 if config.condition_lr is None else config.condition_lr / config.peak_lr
        groups.append({"params": list(adapter.condition.parameters()), "factor": factor})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to the peak, then half a cosine down towards `min_lr`.

    The warm-up takes the share warmup_epochs / epochs of the run (2 of 5 epochs in the paper's recipe). The cosine is
    at `min_lr` one step after the end: every step trains, the last one and an only one too.
    """
    warmup = total * config.value("warmup_epochs") / config.epochs
    if step + 1 < warmup:
        return config.peak_lr * (step + 1) / warmup
    done = (step + 1 - warmup) / (total + 1 - warmup)
    return config.min_lr + (config.peak_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
