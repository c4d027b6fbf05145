"""An attention layer that adds each token's adapter: the slots of vLLM's LoRA manager, holding prompts.

A prompt's keys and values are what the model's own attention makes of it, without the rotation: the attention module
runs on the prompt as if it were text, but its rotation is the identity and the layer that would attend takes down what
it gets. So key norms of any name, clipping, fused and quantised projections and the rank's own shard need no table.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.lora.layers import BaseLayerWithLoRA

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.serving.vllm_plugin import gated  # noqa: F401  (registers the operator)


class AttentionWithPrompts(BaseLayerWithLoRA):
    """text attention + act(g) x attention to the prompts of the token's slot, for this rank's heads.

    Args:
        base_layer: vLLM's attention layer, which gets rotated queries.
        parent: the attention module that it is a child of.
        name: what it is called there.
        rotary_width: how many numbers of a head transformers' own modules rotate; None where there are none.
        slots: how many adapters fit on the device.
        prompts: the most that an adapter has a layer.
        dtype: of queries, keys and values.
    """

    def __init__(
        self, base_layer: nn.Module, parent: nn.Module, name: str, rotary_width: int | None,
        slots: int, prompts: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        attention: Any = base_layer
        self.base_layer = attention
        object.__setattr__(self, "parent", parent)  # a reference, no submodule: it would be a cycle
        self.attention_name, self.rotary_width = name, rotary_width
        heads, key_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        device = next(parent.parameters()).device
        self.prompt_key = torch.zeros(slots, key_heads, prompts, size, dtype=dtype, device=device)
        self.prompt_value = torch.zeros(slots, heads, prompts, size, dtype=dtype, device=device)
        self.prompt_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.prompt_scale = float(attention.impl.scale)
        self.prompt_softcap = float(getattr(attention.impl, "logits_soft_cap", None) or 0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See vLLM's `Attention`."""
        text = self.base_layer(query, key, value, *args, **kwargs)
        gated_term = torch.ops.llama_adapter.gated_prompts(
            query, self.prompt_key, self.prompt_value, self.prompt_lengths, self.prompt_slots,
            self.prompt_scale, self.prompt_softcap,
        )  # fmt: skip
        return text + gated_term.view_as(text)

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Read each token's slot where LoRA's kernels read it: one buffer for the life of the engine."""
        super().set_mapping(punica_wrapper)
        self.prompt_slots = punica_wrapper._token_lora_indices
        self.prompt_slots.fill_(-1)

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.prompt_lengths[index] = 0
        self.prompt_value[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put keys [N, K, D] and gated values [H, K, D] into a slot."""
        self.reset_lora(index)
        length = lora_a.shape[1]
        self.prompt_key[index, :, :length].copy_(lora_a, non_blocking=True)
        self.prompt_value[index, :, :length].copy_(lora_b, non_blocking=True)
        self.prompt_lengths[index] = length

    @torch.inference_mode()
    def project(self, prompt: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, K, D] and gated values [H, K, D] of a prompt [K, hidden] with act(g) [all heads], on the CPU."""
        attention = self.base_layer
        heads, key_heads = attention.num_heads, attention.num_kv_heads
        key, value = (states.view(len(prompt), key_heads, -1) for states in self.keys_and_values(prompt))
        first = get_tensor_model_parallel_rank() * heads
        strength = strength[first : first + heads].to(value.device)
        by_head = value.transpose(0, 1).repeat_interleave(heads // key_heads, 0) * strength[:, None, None]
        return key.transpose(0, 1).to(self.prompt_key).cpu(), by_head.to(self.prompt_value).cpu()

    @torch.inference_mode()
    def check(self, hidden_size: int) -> None:
        """Make sure that `keys_and_values` are not rotated.

        Raises:
            UnsupportedModelError: they depend on the position, or the module cannot be run on prompts.
        """
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(2, hidden_size, generator=generator)
        here, there = self.keys_and_values(states), self.keys_and_values(states, position=11)
        size = self.base_layer.num_kv_heads * self.base_layer.head_size
        alike = all(torch.allclose(found, other) for found, other in zip(here, there, strict=True))
        if not alike or any(found.numel() != len(states) * size for found in here):
            raise UnsupportedModelError(
                f"The keys of {type(self.parent).__name__} cannot be had without their rotation in this vLLM."
            )

    def keys_and_values(self, states: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """What the attention layer would get for inputs [K, hidden], not rotated: keys and values, each [K, N x D].

        Raises:
            UnsupportedModelError: the attention module wants arguments that nobody knows here.
        """
        states = states.to(self.prompt_key)
        arguments = {}
        batched = any(kind.__module__.startswith("transformers.") for kind in type(self.parent).__mro__)
        given: dict[str, Any] = {"hidden_states": states[None] if batched else states, "attention_mask": None}
        given["positions"] = torch.full((len(states),), position, device=states.device)
        if self.rotary_width is not None:
            identity = states.new_ones(1, len(states), self.rotary_width)
            given["position_embeddings"] = (identity, torch.zeros_like(identity))
        for name, parameter in inspect.signature(self.parent.forward).parameters.items():
            if name in given:
                arguments[name] = given[name]
            elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                raise UnsupportedModelError(f"{type(self.parent).__name__} wants '{name}', which prompts have none of.")
        with _only_projecting(self.parent, self.attention_name):
            try:
                self.parent(**arguments)
            except _Seen as seen:
                return seen.key, seen.value
        raise UnsupportedModelError(f"{type(self.parent).__name__} does not call its attention layer.")


class _Seen(Exception):
    """Carries keys and values out of an attention module, so that what comes after its attention is not run."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


class _TakeDown(nn.Module):
    """Stands where the attention layer was."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Seen(key, value)


class _NoRotation(nn.Module):
    """Stands where vLLM's rotation was."""

    def forward(self, positions: Any, query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return query, key


@contextmanager
def _only_projecting(parent: Any, attention_name: str) -> Iterator[None]:
    """An attention module without rotation and without LoRA, which prompts do not take part in."""
    before = dict(parent._modules)
    for name, child in before.items():
        if isinstance(child, BaseLayerWithLoRA):
            parent._modules[name] = child.base_layer
    if "rotary_emb" in before:
        parent._modules["rotary_emb"] = _NoRotation()
    parent._modules[attention_name] = _TakeDown()
    try:
        yield
    finally:
        parent._modules.update(before)
