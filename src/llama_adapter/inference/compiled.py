"""torch.compile for a whole step of decoding.

A step of decoding is many small operations; on a GPU most of its time goes into starting them. Compiled, they are fused
and (there) replayed as one CUDA graph. The prompts of the adapters come into the graph ready, as inputs: another
adapter, another condition or other weights need no new compilation, only another batch or cache size does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from llama_adapter.core.compiler import BACKEND, compiler_errors

ROUND = 256
"""Cache sizes are multiples of it, so that answers of like lengths share a compilation."""

_forwards: "WeakKeyDictionary[nn.Module, Callable[..., Any]]" = WeakKeyDictionary()
_caches: "WeakKeyDictionary[nn.Module, tuple[tuple[int, int], StaticCache]]" = WeakKeyDictionary()


def static_cache(model: PreTrainedModel, rows: int, tokens: int) -> StaticCache:
    """An empty cache for so many rows of at least so many tokens; the last one again where it is of that size.

    Args:
        model: the base.
        rows: of the batch.
        tokens: prompt and answer together.
    """
    wanted = rows, -(-tokens // ROUND) * ROUND
    kept = _caches.get(model)
    if kept is not None and kept[0] == wanted:
        kept[1].reset()
        return kept[1]
    _caches.pop(model, None)  # before the next takes memory
    cache = StaticCache(config=model.config, max_cache_len=wanted[1])
    _caches[model] = wanted, cache
    return cache


@contextmanager
def compiled_steps(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the decoder's forwards of one token a row are compiled; prompts are read as ever.

    Raises:
        ModelError: there is nothing to compile with.
    """
    decoder = model.base_model
    before, plain, compiled = vars(decoder).get("forward"), decoder.forward, _compiled(decoder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        one = isinstance(ids, Tensor) and ids.shape[1] == 1
        return compiled(decoder, *args, **kwargs) if one else plain(*args, **kwargs)

    decoder.forward = forward
    try:
        with compiler_errors():
            yield
    finally:
        del decoder.forward
        if before is not None:  # quick steps
            decoder.forward = before


def _compiled(decoder: nn.Module) -> Callable[..., Any]:
    """The compiled forward, which takes the decoder as its first argument: holding it, it would keep it alive."""
    if decoder not in _forwards:
        _forwards[decoder] = torch.compile(type(decoder).forward, backend=BACKEND, mode=_mode(decoder))
    return _forwards[decoder]


def _mode(decoder: nn.Module) -> str:
    """CUDA graphs where there is CUDA."""
    return "reduce-overhead" if next(decoder.parameters()).device.type == "cuda" else "default"
