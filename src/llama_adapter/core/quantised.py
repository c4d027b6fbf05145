"""Bases whose linears are rounded: which they are, and whether a gradient passes them, as training prompts needs.

Prompts become keys and values through the layer as a whole, never through its `weight`, so nothing else here knows how
a linear is stored.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from llama_adapter.errors import ModelError

CLOSE = 0.1
"""How far a gradient may be from the slope of what the layer computes; kernels round on the way back too."""


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers loaded this base with weights that are not plain floating point."""
    return bool(getattr(model, "is_quantized", False))


def check_backward(model: PreTrainedModel) -> None:
    """Check that gradients pass each kind of linear that a quantised base has; of another nothing is asked.

    A layer without gradients, as some kernels for inference are, would leave prompts untrained in silence. The layer is
    asked first without gradients, as a validation does: some change their weights' layout then.

    Raises:
        ModelError: naming a layer that gives none, or a wrong one.
    """
    if not is_quantised(model):
        return
    seen = set()
    for name, module in model.base_model.named_modules():
        kind = (type(module), type(getattr(module, "weight", None)))
        if hasattr(module, "in_features") and kind not in seen:
            seen.add(kind)
            if not _gradient_is_right(module, model):
                raise ModelError(
                    f"{name}, a {type(module).__name__} on {model.device.type}, gives no gradient or a wrong one, so "
                    "prompts would not learn: train on a base that is quantised otherwise, or in bf16."
                )


def _gradient_is_right(module: nn.Module, model: PreTrainedModel) -> bool:
    """Hold the gradient of one output's sum along a direction against the outputs at both ends of it."""
    made = torch.Generator().manual_seed(0)
    size = int(module.in_features)  # type: ignore[arg-type]
    x, way, weights = (torch.randn(8, n, generator=made) for n in (size, size, int(module.out_features)))  # type: ignore[arg-type]
    x, way, weights = (tensor.to(model.device, model.dtype) for tensor in (x, way, weights))
    with torch.no_grad():
        ends = (module(x + way) - module(x - way)).float()
    point = x.detach().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad((module(point) * weights).float().sum(), point)
    except (RuntimeError, NotImplementedError):
        return False
    expected = (ends * weights.float()).sum(-1)  # [8], exactly linear: the bias falls out
    found = 2 * (gradient.float() * way.float()).sum(-1)
    return bool((found - expected).norm() <= CLOSE * expected.norm())  # false where either is nan
