"""FP8 products for the frozen base, opt-in, for training: meant for GPUs that compute in it faster than in bf16.

A frozen linear layer y = x W' + b needs two products, y itself and, on the way back, dx = dy W; no gradient of W.
Both run on operands of eight bits (e4m3: four of exponent, three of mantissa) with one scale per row:

    y  [M, N] = x  [M, K] . W  [N, K]'     x  scaled per token, W per output channel, contracted over K
    dx [M, K] = dy [M, N] . W' [K, N]'     dy scaled per token, W' per input channel, contracted over N

A scale may not vary along the contracted dimension, and the tensor cores want both operands with that dimension
innermost. So W is kept twice, as two bytes of it instead of the two of bf16: memory stays what it was.

Scaling per token makes what a token gets independent of the tokens beside it, so packing and padding change nothing
here either. Prompts become keys and values through the same layers as text does, and so in FP8 too.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.core.families import attention_modules, text_config
from llama_adapter.core.fixed_dtype import FixedDtype
from llama_adapter.core.parts import PartsHook
from llama_adapter.errors import ModelError

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
"""For gradients too: e5m2 buys range with a bit of mantissa, and a scale per row already sees to the range."""
MULTIPLE = 16
"""The tensor cores take sizes that are multiples of it."""
CAPABILITY = (8, 9)
"""The first CUDA architecture that computes in FP8: Ada; then Hopper (9, 0) and Blackwell."""


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3, each row under a scale of its own: rows = values * scales, nearly.

    Scales are powers of two: dividing by one rounds nothing, so bf16 is as good as fp32 for it.

    Args:
        rows: [M, K], bf16 or fp32.

    Returns:
        values [M, K], e4m3 and contiguous, and scales [M, 1], fp32. What is not finite becomes nan.
    """
    largest = rows.abs().amax(-1, keepdim=True).float()
    # The least scale is far below any gradient's and a normal number. It is written here because torch.compile takes
    # numbers of a module for inputs.
    scales = (largest / torch.finfo(FP8).max).clamp(min=2.0**-120).log2().ceil().exp2()
    return (rows / scales.to(rows.dtype)).to(FP8).contiguous(), scales


def product(rows: Tensor, weight: Tensor, weight_scales: Tensor, fast: bool) -> Tensor:
    """`rows` times the transpose of a quantised weight, both in FP8.

    Args:
        rows: [M, K], bf16 or fp32; quantised here.
        weight: [N, K], e4m3.
        weight_scales: [1, N], fp32.
        fast: let the tensor cores add up in less than fp32, which is good enough forward and not for gradients.

    Returns:
        [M, N] in the dtype of `rows`.
    """
    values, scales = quantise(rows)
    if rows.device.type == "cuda":
        made = torch._scaled_mm(
            values, weight.t(), scales, weight_scales, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    else:  # torch's own FP8 product on a CPU knows row scales in new releases only; this is the same arithmetic
        made = values.float() @ weight.float().t() * scales * weight_scales
    return made.to(rows.dtype)


class _Product(torch.autograd.Function):
    """`product`, with a gradient for the rows alone. No activation is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, scales: Tensor, transposed: Tensor, transposed_scales: Tensor
    ) -> Tensor:
        ctx.save_for_backward(transposed, transposed_scales)
        return product(rows, weight, scales, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        transposed, scales = ctx.saved_tensors
        return product(gradient, transposed, scales, fast=False), None, None, None, None


class Fp8Linear(FixedDtype):
    """A frozen nn.Linear whose products run in FP8.

    It has no `weight`: whatever reads one would take quantised numbers for real ones. Its dtypes are fixed, as numbers
    that were cast without their scales would be others.
    """

    scales: Tensor
    transposed_scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        values, scales = quantise(weight)
        transposed, transposed_scales = quantise(weight.t())
        self.values = nn.Parameter(values, requires_grad=False)  # [N, K]
        self.transposed = nn.Parameter(transposed, requires_grad=False)  # [K, N]
        self.register_buffer("scales", scales.view(1, -1))
        self.register_buffer("transposed_scales", transposed_scales.view(1, -1))
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """`states` [..., K] -> [..., N], in their dtype."""
        rows = states.reshape(-1, self.in_features)
        made = _Product.apply(rows, self.values, self.scales, self.transposed, self.transposed_scales)
        made = made.view(*states.shape[:-1], self.out_features)
        return made if self.bias is None else made + self.bias.to(made.dtype)

    def extra_repr(self) -> str:
        """Sizes, for whoever prints the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def require_fp8(device: torch.device, config: PretrainedConfig) -> None:
    """Check, before weights are read, that a base of this configuration can be computed in FP8 on `device`.

    Raises:
        ModelError: it is a device without FP8, or a base without nn.Linear or quantised already.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("--base-precision fp8 needs a base in bf16 or fp32, and this one is quantised: leave it out.")
    if text_config(config).model_type == "gpt2":
        raise ModelError("--base-precision fp8 needs a base made of nn.Linear, and gpt2 has Conv1D: leave it out.")
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "an AMD GPU" if device.type == "cuda" else device.type
        raise ModelError(f"--base-precision fp8 needs an NVIDIA GPU or a CPU, and this is {kind}: leave it out.")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ModelError(
            f"--base-precision fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: leave it out."
        )


def quantise_base(model: PreTrainedModel) -> int:
    """Replace the linear layers of a base's attention and feed-forward by `Fp8Linear`s, in place, one by one.

    Output head, embeddings, norms, adapters and their conditions stay as they are, and so do layers with a size that is
    no multiple of 16 and experts that are no nn.Linear. Before `add_adapter` is the better moment: of a base that was
    trainable until then, adapters keep the original weights, to hand them back.

    Args:
        model: a base of a supported family in bf16 or fp32, with adapters or without.

    Returns:
        How many were replaced.

    Raises:
        UnsupportedModelError: its family cannot be adapted.
        ModelError: see `require_fp8`; or its dtype is another one, it has no such layer, or adapters' parts on them.
    """
    require_fp8(model.device, model.config)
    if model.device.type == "cpu":
        log.warning("FP8 brings no speed on a CPU, it only computes what a GPU would: leave --base-precision out")
    if model.dtype not in (torch.bfloat16, torch.float32):
        name = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"An FP8 base is made of bf16 or fp32 weights, and these are {name}: load it with another dtype."
        )
    if any(isinstance(hook, PartsHook) for module in model.modules() for hook in module._forward_hooks.values()):
        raise ModelError("An adapter has norms, scales, biases or LoRA on this base: quantise it before add_adapter.")
    names, replaced = {module: name for name, module in model.named_modules()}, 0
    for attention in attention_modules(model):
        layer = model.get_submodule(names[attention].rpartition(".")[0])
        for name, module in list(layer.named_modules()):
            # Exactly this class: 4-bit layers and others that derive from it hold something else in `weight`.
            if type(module) is nn.Linear and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0:
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, Fp8Linear(module))
                replaced += 1
    if not replaced:
        raise ModelError(
            f"This {type(model).__name__} has no nn.Linear in its layers with sizes that are multiples of {MULTIPLE}, "
            "which FP8 needs: leave --base-precision out."
        )
    return replaced
