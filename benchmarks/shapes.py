"""Models to measure: random weights in known shapes, adapters with open gates, and PEFT's made equal to ours.

Weights are random and never zero, because some kernels are quicker on zeros. Gates are open, because at a closed gate
the prompt's gradient is zero whatever the code does. Copies of a base share its weights: four 7B models fit on one GPU.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llama_adapter import AdapterConfig, add_adapter, compiler
from llama_adapter.core.model import Adapter

GATES = (0.5, -0.375, 0.25, -0.625)
"""act(g) of the adapted layers, in turn; exact in bf16."""


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions, and the adapter that goes with it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    adapter_layers: int
    adapter_len: int = 10

    def config(self) -> LlamaConfig:
        """transformers' configuration."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )


SHAPES = {
    "smoke": Shape(32, 64, 3, 4, 97, 2, 4),
    "tiny": Shape(256, 688, 8, 4, 4096, 6),
    "small": Shape(768, 2048, 12, 12, 32000, 10),
    "250m": Shape(1024, 2816, 20, 16, 3072, 18),
    "7b": Shape(4096, 11008, 32, 32, 32000, 30),
}
"""`smoke` is for tests; `250m` is 1 GB in fp32, with the bundled tokenizer's vocabulary, so that embedding and head are
as small a share of it as LLaMA-7B's; `7b` is LLaMA-7B's shape with the paper's adapter."""


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A frozen base with random weights, made where it will be used."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(shape.config(), dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def share(base: PreTrainedModel) -> PreTrainedModel:
    """Another model object on the same weights."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def with_ours(base: PreTrainedModel, shape: Shape, like: Adapter | None = None) -> tuple[PreTrainedModel, Adapter]:
    """A copy with our adapter, gates open: in each layer atanh of one of `GATES` on every head, or equal to `like`."""
    model = share(base)
    return model, with_gates_open(model, shape, like)


def with_gates_open(model: PreTrainedModel, shape: Shape, like: Adapter | None = None) -> Adapter:
    """Our adapter, added to the model itself; see `with_ours`."""
    adapter = add_adapter(model, AdapterConfig(adapter_len=shape.adapter_len, adapter_layers=shape.adapter_layers))
    if like is None:
        open_gates(adapter, model.dtype)
    else:
        adapter.load_state_dict(like.state_dict())
    return adapter


@torch.no_grad()
def open_gates(adapter: Adapter, dtype: torch.dtype) -> None:
    """Open every gate, and round the prompts to what PEFT can hold on a base of `dtype`."""
    for number, layer in enumerate(adapter.layers.values()):
        layer.gate.fill_(torch.atanh(torch.tensor(GATES[number % len(GATES)])).item())
        layer.prompt.copy_(layer.prompt.to(dtype))


def with_adaption_prompt(base: PreTrainedModel, shape: Shape, adapter: Adapter) -> Any:
    """A copy with PEFT's adaption prompt, equal to `adapter`: PEFT's gate is one number a layer, without tanh."""
    from peft import AdaptionPromptConfig

    config = AdaptionPromptConfig(
        adapter_len=shape.adapter_len, adapter_layers=shape.adapter_layers, task_type="CAUSAL_LM"
    )
    model = _peft(share(base), config)
    with torch.no_grad():
        for module, layer in zip(adapted_attentions(model), adapter.layers.values(), strict=True):
            module.adaption_prompt.copy_(layer.prompt)
            module.adaption_gate.fill_(layer.strength()[0].item())
    return model


def with_lora(base: PreTrainedModel, rank: int) -> Any:
    """A copy with PEFT's LoRA on the query and value projections, its default for Llama; neither factor is zero."""
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return _peft(share(base), config)


def _peft(model: PreTrainedModel, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what PEFT itself calls
        return get_peft_model(model, config).eval()


def compile_layers(model: nn.Module) -> None:
    """torch.compile on whole decoder layers, for token counts that change."""
    torch._dynamo.config.recompile_limit = 128  # one code object serves all layers, each a variant of its own
    for layer in (module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"):
        layer.compile(dynamic=True, backend=compiler.BACKEND)


def adapted_attentions(model: nn.Module) -> list[Any]:
    """PEFT's wrapped attention modules, lowest layer first."""
    return [module for module in model.modules() if type(module).__name__ == "AdaptedAttention"]


def our_gradients(adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """(d prompt, d act(g)) of each layer; the second summed over heads, which PEFT's scalar gate sums too."""
    found = []
    for layer in adapter.layers.values():
        slope = 1 - layer.gate.detach().tanh() ** 2
        found.append((_gradient(layer.prompt), (_gradient(layer.gate) / slope).sum().view(1)))
    return found


def peft_gradients(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The same of PEFT's adaption prompt."""
    return [(_gradient(m.adaption_prompt)[0], _gradient(m.adaption_gate)) for m in adapted_attentions(model)]


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().float().clone()
