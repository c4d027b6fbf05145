"""torch.compile: the layers of a base in training, and what to say where there is nothing to compile with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from llama_adapter.core.families import attention_modules
from llama_adapter.errors import ModelError

BACKEND = "inductor"


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer, in place and for any number of tokens; the work is done at the first forward.

    Attention over packed examples stays as it is: it would be compiled anew for every batch.
    """
    attention = {id(module) for module in attention_modules(model)}
    for layer in model.modules():
        if any(id(module) in attention for module in layer.children()):
            layer.compile(dynamic=True, backend=BACKEND)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Say in one sentence that there is nothing to compile with.

    Raises:
        ModelError: so.
    """
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise ModelError(
            f"--compile found no way to compile ({type(error.inner_exception).__name__}): install a C++ compiler, on a "
            "GPU Triton, or leave the flag out."
        ) from None
