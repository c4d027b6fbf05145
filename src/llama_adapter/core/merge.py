"""Folding an adapter into its base, as far as mathematics allows: norms, scales, biases and LoRA, not prompts."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llama_adapter.core.families import text_config
from llama_adapter.core.model import get_adapter, list_adapters, remove_adapter
from llama_adapter.core.parts import decoder_and_layers, sizes_of
from llama_adapter.core.quantised import is_quantised
from llama_adapter.core.registry import registry_of
from llama_adapter.core.routing import Adapter
from llama_adapter.errors import AdapterError

BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias")
"""Fields of transformers' configurations that give a base's linears biases."""


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, name: str | None = None) -> None:
    """Fold an adapter, by default the active one, into the base, which then answers like it, and take it off.

    W becomes (W + f B A) diag(s), biases are added, norms replaced; computed in fp64 and rounded to the base's dtype.
    Where the base's linears had no biases, its configuration is switched to have them, so that `save_pretrained` and
    `from_pretrained` keep them; linears beside them get biases of 0 where the switch is for all.

    Raises:
        AdapterError: it has prompts, whose share depends on the query, or is in use, or not alone on the model; or the
            weights are quantised, or the family has no place for its biases. Nothing is changed then.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    adapter = get_adapter(model, name)
    _check(model, adapter)
    switches, new = _biases(model, adapter)
    registry = registry_of(model)
    for path in new:
        home: Any = model.get_submodule(path)
        home.bias = nn.Parameter(home.weight.new_zeros(sizes_of(home)[1]), requires_grad=False)
        if any(home.weight is parameter for parameter in registry.frozen):
            registry.frozen.append(home.bias)  # trainable again, as its weight, after the removal
    for switch in switches:
        setattr(text_config(model.config), switch, True)
    for home in dict.fromkeys(adapter.homes.values()):
        _fold(
            home,
            {prefix.partition(".")[0]: adapter.modules[prefix] for prefix, h in adapter.homes.items() if h is home},
        )
    remove_adapter(model, adapter.name)


def _fold(home: Any, parts: Mapping[str, Any]) -> None:
    """Let a module of the base be what it is with these parts, by kind."""
    if "norms" in parts:
        for name, parameter in parts["norms"].named_parameters():
            getattr(home, name).copy_(parameter)
        return
    weight = home.weight.t() if isinstance(home, Conv1D) else home.weight  # [out, in], the same memory
    made = weight.double()
    if "lora" in parts:
        made = made + parts["lora"].factor * parts["lora"].B.double() @ parts["lora"].A.double()
    linear: Any = parts.get("linears")
    if hasattr(linear, "scale"):
        made = made * linear.scale.double()
    weight.copy_(made)
    if hasattr(linear, "bias"):
        home.bias.copy_(home.bias.double() + linear.bias.double())


def _check(model: PreTrainedModel, adapter: Adapter) -> None:
    if adapter.layers:
        raise AdapterError(
            f"Adapter '{adapter.name}' has prompts, which cannot be merged: what they add depends on every query, and "
            "no weight does that. Serve it as an adapter, or train one with adapter_layers 0."
        )
    if list_adapters(model) != [adapter.name]:
        raise AdapterError(f"Merging '{adapter.name}' would change the base of other adapters: remove those first.")
    if registry_of(model).scope.uses(adapter):
        raise AdapterError(f"Adapter '{adapter.name}' is in use: merge it after.")
    for prefix, home in adapter.homes.items():
        plain = type(home) in (nn.Linear, Conv1D) or prefix.startswith("norms.")
        if not plain or is_quantised(model) or not home.weight.is_floating_point() or home.weight.is_meta:  # type: ignore[operator]
            raise AdapterError(
                f"{prefix} cannot be merged into {type(home).__name__}: load the base in bf16 or fp32, all in memory."
            )


def _biases(model: PreTrainedModel, adapter: Adapter) -> tuple[tuple[str, ...], set[str]]:
    """The switches that give a base the biases this adapter has, and the linears that then have one.

    Raises:
        AdapterError: no switch of the family's does.
    """
    names = {module: name for name, module in model.named_modules()}
    biased = [p for p, part in adapter.modules.items() if p.startswith("linears.") and hasattr(part, "bias")]
    wanted = {names[adapter.homes[prefix]] for prefix in biased}
    has = set(_with_bias(model))
    if wanted <= has:
        return (), set()
    there = [switch for switch in BIAS_SWITCHES if getattr(text_config(model.config), switch, None) is False]
    for count in range(1, len(there) + 1):
        for switches in itertools.combinations(there, count):
            config = copy.deepcopy(model.config)
            for switch in switches:
                setattr(text_config(config), switch, True)
            with torch.device("meta"):
                would_have = set(_with_bias(type(model)(config)))
            if wanted | has <= would_have:
                return switches, would_have - has
    example = min(wanted - has)
    raise AdapterError(
        f"The bias of {example} cannot be merged: a {type(model).__name__} has no place for it and would be read back "
        "without. Serve the adapter as it is, or train one without linear_bias."
    )


def _with_bias(model: PreTrainedModel) -> Iterator[str]:
    """Linears of the decoder's layers with a bias."""
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder_and_layers(model)[1]:
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D) and module.bias is not None:
                yield names[module]
