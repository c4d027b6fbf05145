"""A whole step of decoding as one graph, by torch.compile.

A step is many small operations; on a GPU most of its time goes into starting them. Compiled, they are fused and (there)
replayed as one CUDA graph. The prompts of the adapters come into the graph ready, as inputs: another adapter, another
condition or other weights need no new compilation, only another batch or cache size does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from llama_adapter import compiler
from llama_adapter.core.attention import ROUTING
from llama_adapter.core.model import list_adapters
from llama_adapter.core.routing import Routing

ROUND = 256
"""Cache sizes are multiples of it, so that answers of like lengths share a compilation."""


class CompiledSteps:
    """One-token steps of a model as one graph, on a cache of fixed size; prompts come in as inputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._made: tuple[tuple[int, int], StaticCache] | None = None
        self._forward: Callable[..., Any] | None = None

    def cache(self, rows: int, tokens: int) -> StaticCache:
        """An empty cache for so many rows of at least so many tokens; the last one again where it is of that size."""
        wanted = rows, -(-tokens // ROUND) * ROUND
        if self._made is not None and self._made[0] == wanted:
            self._made[1].reset()
            return self._made[1]
        self._made = None  # before the next takes memory
        self._made = wanted, StaticCache(config=self.model.config, max_cache_len=wanted[1])
        return self._made[1]

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any, routing: Routing) -> Tensor:
        """Logits [B, vocabulary] behind `ids` [B, 1] at `positions` [B, 1].

        Raises:
            ModelError: there is nothing to compile with.
        """
        if self._forward is None:
            self._forward = torch.compile(type(self.model).forward, backend=compiler.BACKEND, mode=_mode(self.model))
        inputs = self.model.prepare_inputs_for_generation(
            ids, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        if list_adapters(self.model):
            inputs[ROUTING] = routing
        with compiler.compiler_errors():
            return self._forward(self.model, **inputs).logits[:, -1].clone()


def _mode(decoder: nn.Module) -> str:
    """CUDA graphs where there is CUDA."""
    return "reduce-overhead" if next(decoder.parameters()).device.type == "cuda" else "default"
