"""A GPU that is not there: numbers stay on the CPU, but every tensor has a device that is tracked and enforced.

Inside `StandInGpu()`, "cuda" may be asked for as on a machine that has it. Whoever mixes devices where CUDA would
refuse it gets CUDA's error, and results are real ones, to be compared with those of the CPU. torch's fake tensors have
no numbers, and on builds without CUDA they cannot be indexed.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
"""Operators that take tensors of both devices."""
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip
"""Operators that take indices on the CPU too."""


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether its memory is the stand-in's."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "on_gpu", False)


def put(value: Any, gpu: bool = True) -> Any:
    """Have all tensors of a result lie there."""
    for tensor in tree_flatten(value)[0]:
        if isinstance(tensor, torch.Tensor):
            with torch._C.DisableTorchFunction():
                tensor.untyped_storage().on_gpu = gpu
    return value


class _Tracked(TorchDispatchMode):
    """Where results lie, and what may not meet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        places = [on_gpu(tensor) for tensor in tensors]
        if any(places) and not all(places) and func not in MOVES:
            strangers = [t for t, there in zip(tensors, places, strict=True) if not there and t.dim()]
            if strangers and not (func in INDEXED and places[0]):
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} got cuda:0 and cpu")
        made = func(*args, **kwargs)
        if func is aten.copy_.default:
            return made
        return put(made) if any(places) else made


class _Asked(TorchFunctionMode):
    """Takes "cuda" for what it is on a machine without it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__") and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name in ("cuda", "cpu") and isinstance(args[0], torch.Tensor):
            func, name, args, kwargs = torch.Tensor.to, "to", (args[0], GPU if name == "cuda" else "cpu"), {}
        asked: list[bool] = []

        def told(value: Any) -> Any:
            if isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")):
                asked.append(torch.device(value).type == "cuda")
                return torch.device("cpu")
            return value

        if func is torch.device or name in ("__get__", "__set__", "_parse_to"):
            return func(*args, **kwargs)
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        args, kwargs = tree_map(told, args), tree_map(told, kwargs)
        if name == "to":
            other = next((value for value in (*args[1:], kwargs.get("other")) if isinstance(value, torch.Tensor)), None)
            here, there = on_gpu(args[0]), asked[-1] if asked else on_gpu(args[0])
            there = on_gpu(other) if other is not None else there
            made = func(*args, **kwargs)
            return made if here == there else put(made.clone(), there)
        made = func(*args, **kwargs)
        if asked and name not in ("type", "Generator"):
            return put(made, asked[-1])
        return put(made) if name == "new_tensor" and on_gpu(given[0]) else made


class StandInGpu:
    """Everything within the block is on a machine with a GPU."""

    def __enter__(self) -> "StandInGpu":
        plain = torch._C.TensorBase.device

        def device(tensor: torch.Tensor) -> torch.device:
            with torch._C.DisableTorchFunction():
                return GPU if getattr(tensor.untyped_storage(), "on_gpu", False) else plain.__get__(tensor)

        torch.Tensor.device = property(device)  # type: ignore[assignment, misc]
        torch.Tensor.is_cuda = property(on_gpu)  # type: ignore[assignment, misc]
        self._modes = [_Tracked(), _Asked()]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        del torch.Tensor.device, torch.Tensor.is_cuda
