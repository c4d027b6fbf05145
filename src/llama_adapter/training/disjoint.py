"""Disjoint parameters (LLaMA-Adapter V2): records with a file train one group of the parameters, others the rest.

A micro-batch is all of one kind, so that a gradient reaches one group alone, whatever the parameters are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_adapter.core.routing import Adapter
from llama_adapter.data.encode import Encoded


def by_kind(examples: Sequence[Encoded]) -> list[list[Encoded]]:
    """Examples with a file and those without, each where there are any."""
    kinds = [[e for e in examples if e.media], [e for e in examples if not e.media]]
    return [kind for kind in kinds if kind]


@contextmanager
def training_only(adapter: Adapter, batch: Any) -> Iterator[None]:
    """Within the block, which takes forward and backward of a micro-batch, one group takes gradients.

    Of records with a file it is the condition and the gates of its layers, of others all the rest.
    """
    media = any(getattr(batch, "media", ()))  # a packed row has none
    perceiving = ("condition.", *(f"layers.{i}." for i in range(adapter.config.condition.layers)))
    frozen = [parameter for key, parameter in adapter.named_parameters() if key.startswith(perceiving) is not media]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
