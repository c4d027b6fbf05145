"""Zero-init attention: the whole method of LLaMA-Adapter (arXiv:2303.16199, section 3.2). Read this file first.

Layer l of the top L layers of a frozen model owns a prompt P and one gate g per attention head.
Its attention, for text queries q = RoPE(Wq x), keys Kt and values Vt, becomes

    text    = softmax(s q Kt' + causal) Vt         the model's own attention, untouched
    adapter = softmax(s q (Wk P)') (Wv P)          no rotation, no norm of P, a softmax of its own
    out     = Wo (text + act(g) * adapter)         g = 0 at the start: the base's output, bit for bit

`act` is tanh (the authors' training code) or the identity (their first release, PEFT, LitGPT); `s` is the
model's own score scale. Keys and values of the prompt come from the model's own frozen projections. A condition, such
as a picture (section 3.3), is one vector per example that is added to P in every adapted layer.

Shape letters: B rows, T tokens, H query heads, K = adapter_len, D = head_dim, A distinct adapters in a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from llama_adapter.core.fixed_dtype import FixedDtype
from llama_adapter.core.packed_attention import SEGMENTS, Segments, attend
from llama_adapter.core.prompt_cache import Place, PromptCache

SLOT = "zero_init"
"""Name under which an attention module holds its `AdapterSlot`."""
CHOICE = "adapter_choice"
"""Name of the keyword argument that carries a `Choice` from the model's forward to its attention."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "identity": lambda gate: gate}

Projection = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""(attention module, prompt [K, hidden]) -> keys and values [kv heads, K, D]; `families.py` has one per layout."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Which adapter serves which row of a batch, and under which condition; equal to itself alone.

    `names` are the distinct adapters (None: the bare base) and `rows` [B] indexes into them; `rows` is None when one
    adapter serves every row. `condition` [B, 1, hidden] or [B, K, hidden] is added to each row's prompts. `prepared`
    has what `AdapterSlot.prompts` gave for layers by their index, where nothing is to be learnt.
    """

    names: tuple[str | None, ...]
    rows: Tensor | None = None
    condition: Tensor | None = None
    prepared: Mapping[int, "Prompts"] = field(default_factory=dict)


class ZeroInitAdapter(FixedDtype):
    """One layer's learnable parameters: `prompt` [K, hidden] ~ N(0, 1) and `gate` [H] = 0, always fp32.

    On a half-precision model too: small updates would be lost in bf16.
    """

    def __init__(self, adapter_len: int, hidden_size: int, num_heads: int, gate_activation: str) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(adapter_len, hidden_size, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))
        self.gate_activation = gate_activation
        self.kept: PromptCache[Prompts] = PromptCache()

    def strength(self) -> Tensor:
        """act(g) [H]: how much of the prompt's attention each head lets in."""
        return ACTIVATIONS[self.gate_activation](self.gate)


class Prompts(NamedTuple):
    """What the second softmax reads: keys and gated values [B, H, K, D], and None or a bias [B, 1, 1, K] on scores."""

    key: Tensor
    value: Tensor
    bias: Tensor | None


class AdapterSlot(nn.Module):
    """The adapters of one attention module, and the second softmax that reads them."""

    def __init__(self, projection: Projection, projection_modules: tuple[str, ...]) -> None:
        super().__init__()
        self._projection = projection
        self._projection_modules = projection_modules

    def get(self, name: str | None) -> ZeroInitAdapter | None:
        """The adapter called `name`, or None where this layer has none of that name."""
        return None if name is None else self._modules.get(module_key(name))  # type: ignore[return-value]

    def read(
        self, attention: nn.Module, query: Tensor, choice: Choice, scaling: float, softcap: float | None
    ) -> Tensor | None:
        """act(g) * softmax(s q (Wk P)') (Wv P) for `query` [B, H, T, D].

        Returns:
            [B, T, H, D] in the query's dtype, or None when none of the chosen adapters has this layer.
        """
        wanted = (attention, choice, query.shape[0], query.dtype)
        if choice.prepared:
            layer: Any = attention.layer_idx  # not looked at without need: it would have every layer compiled anew
            prompts = choice.prepared.get(layer)
        else:
            prompts = self.prompts(*wanted)
        if prompts is not None and prompts.key.dtype != query.dtype:  # under autocast
            prompts = self.prompts(*wanted)
        return None if prompts is None else second_softmax(query, prompts, scaling, softcap).transpose(1, 2)

    def prompts(self, attention: nn.Module, choice: Choice, batch: int, dtype: torch.dtype) -> Prompts | None:
        """What a batch of so many rows reads; None when none of the chosen adapters has this layer."""
        adapters = [self.get(name) for name in choice.names]
        if not any(adapters):
            return None
        if choice.condition is not None:
            return self._project(attention, choice, dtype)
        named = zip(choice.names, adapters, strict=True)
        each = [None if adapter is None else self._of(attention, name, adapter, dtype) for name, adapter in named]
        return of_batch(choice.rows, batch, side_by_side(each))

    def _of(self, attention: nn.Module, name: str | None, adapter: ZeroInitAdapter, dtype: torch.dtype) -> Prompts:
        """One adapter's [1, H, K, D]; kept with it, whoever is beside it in a batch."""
        found = adapter.kept.find(dtype)
        if found is None:
            alone = Choice((name,))
            found = self._project(attention, alone, dtype)
            adapter.kept.keep(dtype, found, self.places(attention, alone))
        return found

    def places(self, attention: nn.Module, choice: Choice) -> list[Place]:
        """Where the parameters are held that prompts are computed from."""
        adapters: list[Place] = [(self, module_key(name)) for name in choice.names if name is not None]
        return adapters + [(attention, name) for name in self._projection_modules]

    def _project(self, attention: nn.Module, choice: Choice, dtype: torch.dtype) -> Prompts:
        """Keys and gated values [A, H, K, D] of the prompts, and -inf [A, 1, 1, K] past the end of shorter ones.

        Under a condition every row has prompts of its own, and A is B.
        """
        prompt, strength, bias = self._stack([self.get(name) for name in choice.names], dtype)
        if choice.condition is not None:
            if choice.rows is not None:
                prompt, strength, bias = of_rows(choice.rows, prompt, strength, bias)
            prompt = prompt + choice.condition.to(prompt)
        key, value = self._projection(attention, prompt.to(dtype))  # [A, kv heads, K, D]
        group = strength.shape[1] // key.shape[-3]
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
        gated = value * strength[:, :, None, None]  # product in fp32, as the gates are
        return Prompts(key.to(dtype), gated.to(dtype), bias)

    def _stack(
        self, adapters: list[ZeroInitAdapter | None], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prompts [A, K, hidden], act(g) [A, H] and the bias; the bare base has strength 0, which adds exactly 0."""
        first = next(adapter for adapter in adapters if adapter is not None)
        no_prompt, no_strength = first.prompt.new_zeros(0, first.prompt.shape[1]), torch.zeros_like(first.gate)
        prompts = [no_prompt if adapter is None else adapter.prompt for adapter in adapters]
        strength = torch.stack([no_strength if adapter is None else adapter.strength() for adapter in adapters])
        padded = torch.stack([longer(prompt, max(map(len, prompts))) for prompt in prompts])
        return padded, strength, past_the_end(list(map(len, prompts)), padded.to(dtype))


def side_by_side(each: Sequence[Prompts | None]) -> Prompts:
    """Prompts [1, H, K, D] of several adapters as [A, H, longest K, D]; where there are none, values are 0."""
    first = next(prompts for prompts in each if prompts is not None)
    if len(each) == 1:
        return first
    none = first.key[:, :, :0]
    keys = [none if prompts is None else prompts.key for prompts in each]
    values = [none if prompts is None else prompts.value for prompts in each]
    lengths = [key.shape[-2] for key in keys]
    key, value = (torch.cat([longer(part, max(lengths)) for part in parts]) for parts in (keys, values))
    return Prompts(key, value, past_the_end(lengths, key))


def longer(states: Tensor, length: int) -> Tensor:
    """[..., K, size] with zeros up to `length` in place of K."""
    missing = length - states.shape[-2]
    return pad(states, (0, 0, 0, missing)) if missing else states


def past_the_end(lengths: Sequence[int], like: Tensor) -> Tensor | None:
    """-inf [A, 1, 1, longest] where an adapter has no prompt; None where all are as long, or have none at all."""
    longest = max(lengths)
    if all(length in (0, longest) for length in lengths):
        return None
    bias = like.new_zeros(len(lengths), 1, 1, longest)
    for row, length in zip(bias, lengths, strict=True):
        row[..., length or longest :] = float("-inf")
    return bias


def of_rows(rows: Tensor, *tensors: Tensor | None) -> list[Any]:
    """Each row's own slice of tensors that have one slice per adapter."""
    return [None if tensor is None else tensor[rows.to(tensor.device)] for tensor in tensors]


def of_batch(rows: Tensor | None, batch: int, prompts: Prompts) -> Prompts:
    """The prompts of every row of a batch; where one adapter serves them all, no memory is taken."""
    if rows is not None:
        return Prompts(*of_rows(rows, *prompts))
    key, value, bias = prompts
    of_all = (batch, -1, -1, -1)
    return Prompts(key.expand(of_all), value.expand(of_all), None if bias is None else bias.expand(of_all))


def second_softmax(query: Tensor, prompts: Prompts, scaling: float, softcap: float | None) -> Tensor:
    """softmax(s q K') V over the prompts alone, [B, H, T, D]."""
    key, value, bias = prompts
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap)  # [B, H, T, K]
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


def module_key(name: str) -> str:
    """Submodule name of adapter `name`: PyTorch allows no dot in it, adapter names allow no colon."""
    return "adapter_" + name.replace(".", ":")


def with_zero_init(text_attention: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a transformers attention function so that adapted modules add their gated term.

    The result has the signature of transformers' attention interface: (module, query [B, H, T, D], key, value,
    attention_mask, scaling=, softcap=, ...) -> (output [B, T, H, D], weights). A module without adapters gets
    exactly what `text_attention` returns.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        choice: Choice | None = kwargs.pop(CHOICE, None)
        segments: Segments | None = kwargs.pop(SEGMENTS, None)
        if segments is None:
            text, weights = text_attention(module, query, key, value, attention_mask, **kwargs)
        else:
            text, weights = attend(segments, text_attention, module, query, key, value, **kwargs), None
        slot: AdapterSlot | None = getattr(module, SLOT, None)
        if slot is None or choice is None:
            return text, weights
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        adapter = slot.read(module, query, choice, scaling, kwargs.get("softcap"))
        return text if adapter is None else text + adapter, weights

    attention.wraps = text_attention  # type: ignore[attr-defined]
    return attention
