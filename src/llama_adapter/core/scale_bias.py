"""What LLaMA-Adapter V2 (arXiv:2304.15010) trains beside prompts: norms, scales and biases of the linears, and LoRA.

    linear      y = (W + f B A)(s * x) + b      s = 1, b = 0, B = 0 at the start: W x, bit for bit; f = alpha / r
    norm        the model's own formula with weights of the adapter's, which start as the model's

s [in], b [out] are the authors' scale and bias; a bias that the linear has of its own stays. A [r, in] and B [out, r]
are LoRA's, which the authors use without a factor (f = 1) and beside b alone. Norms are all of the decoder's but those
of queries and keys. All of it is on text: prompts become keys and values through the model's own W, as in the
authors' code.

Rows of one batch may be served by different adapters: whatever an adapter lacks is 1, 0 or the model's own there.
Parameters are fp32 on any base, products in the dtype of x. Shape letters: B rows, T tokens, A adapters in a batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, pad

from llama_adapter.core.fixed_dtype import FixedDtype


class Part(FixedDtype):
    """Parameters of one adapter for one module of the base: its own `nn.Parameter`s, fp32."""

    def adapter_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained and saved, by name."""
        yield from self.named_parameters()


class OwnNorm(Part):
    """Weights of a norm, started from the base's."""

    def __init__(self, home: nn.Module) -> None:
        super().__init__()
        offloaded = getattr(getattr(home, "_hf_hook", None), "weights_map", None) or {}  # accelerate's, of what is away
        for name, parameter in home.named_parameters(recurse=False):
            weight = offloaded[name] if parameter.is_meta and name in offloaded else parameter.detach()
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight  # of a base in parts
            self.register_parameter(name, nn.Parameter(weight.to(torch.float32, copy=True)))


class OwnModule(Part):
    """A whole module, such as a classifier: a copy of the base's to start from."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.to(torch.float32).requires_grad_(True)

    def adapter_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own parameters, by its names."""
        yield from self.module.named_parameters()


class ScaleBias(Part):
    """`scale` [in] = 1 and `bias` [out] = 0 of a linear, or one of them."""

    def __init__(self, sizes: tuple[int, int], scale: bool, bias: bool) -> None:
        super().__init__()
        if scale:
            self.scale = nn.Parameter(torch.ones(sizes[0], dtype=torch.float32))
        if bias:
            self.bias = nn.Parameter(torch.zeros(sizes[1], dtype=torch.float32))


class LowRank(Part):
    """LoRA: `A` [r, in], uniform as Kaiming has it for a linear, and `B` [out, r] = 0."""

    def __init__(self, sizes: tuple[int, int], rank: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.A = nn.Parameter(torch.empty(rank, sizes[0], dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(sizes[1], rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


def scaled(x: Tensor, parts: Sequence[Any], rows: Tensor | None) -> Tensor:
    """s * x.

    Args:
        x: [B, T, in], or [B x T, in] in the order of the rows.
        parts: what each of A adapters has here; an object without `scale` has s = 1.
        rows: [B], which of them serves each row; None where one serves them all.
    """
    scale = _per_row([getattr(part, "scale", None) for part in parts], 1.0, x, rows)
    return x if scale is None else (x * scale).to(x.dtype)


def biased(y: Tensor, parts: Sequence[Any], rows: Tensor | None) -> Tensor:
    """y + b; arguments as of `scaled`."""
    bias = _per_row([getattr(part, "bias", None) for part in parts], 0.0, y, rows)
    return y if bias is None else (y + bias).to(y.dtype)


def with_low_rank(y: Tensor, x: Tensor, parts: Sequence[LowRank | None], rows: Tensor | None) -> Tensor:
    """y + f B A x; arguments as of `scaled`. Shorter ranks are padded with zeros."""
    present = [part for part in parts if part is not None]
    if not present:
        return y
    if rows is None:
        a, b = (matrix.to(x.device, x.dtype) for matrix in (present[0].A, present[0].B * present[0].factor))
        return y + linear(linear(x, a), b).to(y)
    longest = max(len(part.A) for part in present)
    none_a, none_b = (
        present[0].A.new_zeros(longest, present[0].A.shape[1]),
        present[0].B.new_zeros(len(present[0].B), longest),
    )
    every_a = torch.stack([none_a if p is None else pad(p.A, (0, 0, 0, longest - len(p.A))) for p in parts])
    every_b = torch.stack([none_b if p is None else pad(p.B * p.factor, (0, longest - len(p.A))) for p in parts])
    rows = rows.to(x.device)
    a, b = (every.to(x.device, x.dtype)[rows] for every in (every_a, every_b))  # [B, r, in], [B, out, r]
    by_row = x.reshape(len(rows), -1, x.shape[-1])
    return y + (by_row @ a.mT @ b.mT).reshape(y.shape).to(y)


def normed(home: nn.Module, x: Tensor, y: Tensor, parts: Sequence[OwnNorm | None], rows: Tensor | None) -> Tensor:
    """What the norm `home` gives for x with the weights of each row's adapter; y, its own, where there are none."""
    for number, part in enumerate(parts):
        if part is None:
            continue
        if rows is None:
            return _with_weights(home, x, part).to(y)
        chosen = (spread(rows, x) == number).nonzero()[:, 0]
        y = y.index_copy(0, chosen.to(y.device), _with_weights(home, x[chosen], part).to(y))
    return y


def replaced(x: Tensor, y: Tensor, parts: Sequence[OwnModule | None], rows: Tensor | None) -> Tensor:
    """What each row's adapter's own module gives for x; y, the base's, where there is none."""
    for number, part in enumerate(parts):
        if part is None:
            continue
        if rows is None:
            return part.module(x.float()).to(y.dtype)
        chosen = (spread(rows, x) == number).nonzero()[:, 0]
        y = y.index_copy(0, chosen, part.module(x[chosen].float()).to(y.dtype))
    return y


def _with_weights(home: nn.Module, x: Tensor, part: OwnNorm) -> Tensor:
    """The forward of a norm's class, on a twin of the object that has other weights: threads may share the object."""
    twin: Any = object.__new__(type(home))  # `copy` asks the class, and FSDP2's makes an object of another
    vars(twin).update(vars(home))
    own: dict[str, Any] = {name: parameter.to(x.device) for name, parameter in part.named_parameters()}
    if isinstance(home, nn.LayerNorm | nn.RMSNorm):  # kernels that want one dtype; others multiply by fp32 and round
        own = {name: weight.to(getattr(home, name).dtype) for name, weight in own.items()}
    twin._parameters = {**home._parameters, **own}
    return type(home).forward(twin, x)


def _per_row(values: Sequence[Tensor | None], neutral: float, x: Tensor, rows: Tensor | None) -> Tensor | None:
    """A vector per adapter as one that fits x: [size] where one serves all rows, else [B, 1, size] or [B x T, size]."""
    first = next((value for value in values if value is not None), None)
    if first is None:
        return None
    if rows is None:
        return first.to(x.device)
    none = torch.full_like(first, neutral)
    every = torch.stack([none if value is None else value for value in values]).to(x.device)
    found = every[spread(rows, x)]
    return found[:, None] if x.dim() == 3 else found


def spread(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` [B] for x [B, ...] or, where layers lay rows end to end, for its B x T tokens."""
    return rows.to(x.device).repeat_interleave(len(x) // len(rows))
