"""Zero-init attention: the whole method of LLaMA-Adapter (arXiv:2303.16199, section 3.2). Read this file first.

Layer l of the top L layers of a frozen model owns a prompt P and one gate g per attention head.
Its attention, for text queries q = RoPE(Wq x), keys Kt and values Vt, becomes

    text    = softmax(s q Kt' + causal) Vt         the model's own attention, untouched
    adapter = softmax(s q (Wk P)') (Wv P)          no rotation, no norm of P, a softmax of its own
    out     = Wo (text + act(g) * adapter)         g = 0 at the start: the base's output, bit for bit

`act` is tanh (the authors' training code) or the identity (their first release, PEFT, LitGPT); `s` is the
model's own score scale, and Wk, Wv are its own frozen projections, key norm included where there is one. A condition,
such as a picture (section 3.3), is one vector per example that is added to P in every adapted layer. In early fusion
(LLaMA-Adapter V2) it is the whole prompt of the first layers instead, which own a gate only.

Everything is computed from the parameters at every forward; nothing is remembered here.

Shape letters: B rows, T tokens, H query heads, K = adapter_len, D = head_dim.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llama_adapter.core.fixed_dtype import FixedDtype

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "identity": lambda gate: gate}

Projection = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""(attention module, prompt [..., K, hidden]) -> keys and values [..., kv heads, K, D]; see `families.py`."""


class ZeroInitAdapter(FixedDtype):
    """One layer's learnable parameters: `prompt` [K, hidden] ~ N(0, 1) and `gate` [H] = 0, always fp32.

    On a half-precision model too: small updates would be lost in bf16. With `adapter_len` 0 there is only the gate.
    LLaMA-Adapter V2 has one number more, the authors' `new_gate`: `gate_scale` [1] = 1, which multiplies act(g).
    """

    gate_scale: nn.Parameter | None

    def __init__(
        self, adapter_len: int, hidden_size: int, num_heads: int, gate_activation: str, gate_scale: bool = False
    ) -> None:
        super().__init__()
        prompt = torch.randn(adapter_len, hidden_size, dtype=torch.float32)
        if adapter_len:
            self.prompt = nn.Parameter(prompt)
        else:
            self.register_buffer("prompt", prompt, persistent=False)
        self.gate = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))
        self.gate_scale = nn.Parameter(torch.ones(1, dtype=torch.float32)) if gate_scale else None
        self.gate_activation = gate_activation

    def adapter_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained and saved, by name."""
        yield from self.named_parameters()

    def strength(self) -> Tensor:
        """act(g) [H]: how much of the prompt's attention each head lets in."""
        opened = GATE_ACTIVATIONS[self.gate_activation](self.gate)
        return opened if self.gate_scale is None else self.gate_scale * opened


class Prompts(NamedTuple):
    """What the second softmax reads: keys and gated values [B, H, K, D], and None or a bias [B, 1, 1, K] on scores."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


def project_prompts(
    attention: nn.Module, projection: Projection, prompt: Tensor, strength: Tensor, dtype: torch.dtype
) -> Prompts:
    """Keys Wk P and gated values act(g) * Wv P, which is act(g) * softmax(...) (Wv P) computed where it is small.

    Args:
        attention: the attention module whose projections are used.
        projection: how it projects.
        prompt: P, [B, K, hidden].
        strength: act(g), [B, H]; 0 for a row on the bare base, which adds exactly 0.
        dtype: of the queries that will read them.
    """
    key, value = projection(attention, prompt.to(dtype))  # [B, kv heads, K, D]
    group = strength.shape[-1] // key.shape[-3]
    key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)  # [B, H, K, D]
    gated = value * strength[..., None, None]  # product in fp32, as the gates are
    return Prompts(key.to(dtype), gated.to(dtype))


def second_softmax(query: Tensor, prompts: Prompts, scaling: float, softcap: float | None = None) -> Tensor:
    """act(g) * softmax(s q (Wk P)') (Wv P), over the prompts alone.

    Args:
        query: q, [B, H, T, D].
        prompts: what `project_prompts` gave.
        scaling: s.
        softcap: bound of the scores, c tanh(score / c), in models whose own attention has one (Gemma 2).

    Returns:
        [B, H, T, D] in the query's dtype.
    """
    key, value, bias = prompts
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)  # [B, H, T, K]
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value
