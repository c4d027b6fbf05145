"""Adapters on a model: add, use, save, load, remove.

Adapters live inside the attention modules they serve, as ordinary submodules; the model stays the ordinary
transformers model it was. Which adapter serves which row travels with every forward as a keyword argument, put there
by one hook on the decoder, and reaches the attention through transformers' own plumbing. Nothing else is changed.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_adapter.attention import (
    CHOICE,
    SLOT,
    AdapterSlot,
    Choice,
    ZeroInitAdapter,
    module_key,
    with_zero_init,
)
from llama_adapter.config import AdapterConfig, unknown_name
from llama_adapter.errors import AdapterError, ConfigError, UnsupportedModelError
from llama_adapter.families import attention_modules, family_of, shape_of, text_config

Names = str | None | Sequence[str | None]
"""An adapter's name, None for the bare base, or a list with one of these per row of the batch."""

EAGER = "llama_adapter_eager"
"""Attention name of adapted models whose own is "eager", which transformers keeps out of its registry."""

_REGISTRY = "_llama_adapters"
_override: ContextVar[Mapping[int, Names]] = ContextVar("llama_adapter_override")


@dataclass(frozen=True)
class Adapter:
    """Handle of one adapter on one model.

    Attributes:
        name: what `use_adapter` calls it.
        config: its configuration, with `adapter_layers` and `base_shape` filled in.
        layers: the base's layer index -> the parameters there, lowest layer first.
    """

    name: str
    config: AdapterConfig
    layers: Mapping[int, ZeroInitAdapter]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its trainable parameters: prompt and gate of every layer."""
        for layer in self.layers.values():
            yield from layer.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """`layers.{i}.prompt` [K, hidden] and `layers.{i}.gate` [heads] for each adapted layer i, fp32."""
        return {
            f"layers.{i}.{key}": tensor
            for i, layer in self.layers.items()
            for key, tensor in (("prompt", layer.prompt.detach()), ("gate", layer.gate.detach()))
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave. Keys and shapes must be right already (`storage.py` checks files)."""
        with torch.no_grad():
            for key, mine in self.state_dict().items():
                mine.copy_(tensors[key])

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained: L x (K x hidden + heads)."""
        return sum(parameter.numel() for parameter in self.parameters())


class _Adapters:
    """What one adapted model knows: its adapters, the active one, and how to become the base again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.attention = attention_modules(model)
        if any(hasattr(module, SLOT) for module in self.attention):
            raise AdapterError(
                "The model was adapted through another object that shares its layers: use the one that add_adapter got."
            )
        self.frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        family = family_of(model.config)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for module in self.attention:
            module.add_module(SLOT, AdapterSlot(family.project, family.modules))
        self.hook = model.base_model.register_forward_pre_hook(self.attach_choice, with_kwargs=True)

    def detach(self) -> None:
        """Take every trace off the model."""
        self.hook.remove()
        for module in self.attention:
            delattr(module, SLOT)
            if module.config._attn_implementation == EAGER:
                module.config._attn_implementation = "eager"
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        delattr(self.model, _REGISTRY)

    def attach_choice(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the decoder: say which adapter serves which row."""
        _route_attention(self.attention[0].config)
        if CHOICE in kwargs:
            return None
        choice = self.choose(_override.get({}).get(id(self), self.active), _batch(args, kwargs))
        return None if choice is None else (args, {**kwargs, CHOICE: choice})

    def choose(self, names: Names, batch: Tensor) -> Choice | None:
        """The `Choice` for a batch; None where all rows are on the bare base."""
        if names is None or isinstance(names, str):
            return None if names is None else Choice((names,))
        if len(names) != len(batch):
            raise AdapterError(
                f"use_adapter got {len(names)} names for a batch of {len(batch)} rows: give one name per row. "
                "Under beam search or num_return_sequences, repeat each name as often as its row is."
            )
        distinct = tuple(dict.fromkeys(names))
        if distinct == (None,):
            return None
        if len(distinct) == 1:
            return Choice(distinct)
        return Choice(distinct, torch.tensor([distinct.index(name) for name in names], device=batch.device))


def add_adapter(model: PreTrainedModel, config: AdapterConfig | None = None, name: str = "default") -> Adapter:
    """Freeze the base and give its top layers a new adapter, which becomes the active one.

    A new adapter changes nothing: its gates are 0, the logits equal the base's bit for bit. Its prompts are drawn
    from N(0, 1) with torch's global random state; they stay fp32 whatever the base's dtype.

    Args:
        model: any supported transformers model, see `llama_adapter.families.FAMILIES`.
        config: defaults to `AdapterConfig()`.
        name: letters, digits, '.', '_', '-'.

    Raises:
        UnsupportedModelError: the family cannot be adapted.
        ConfigError: more layers asked for than the base has.
        AdapterError: the name is taken or malformed.
    """
    config = config or AdapterConfig()
    family_of(model.config)
    num_layers = int(text_config(model.config).num_hidden_layers)
    layers = config.adapter_layers or max(1, num_layers - 2)
    if layers > num_layers:
        raise ConfigError(
            f"adapter_layers is {layers}, but the base has {num_layers} layers: choose 1 to {num_layers}."
        )
    check_name(name)
    registry = getattr(model, _REGISTRY, None) or _Adapters(model)
    if name in registry.adapters:
        raise AdapterError(f"The model already has an adapter '{name}': remove it first or choose another name.")
    shape = shape_of(model.config)
    config = replace(config, adapter_layers=layers, base_shape=shape)
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=model.config.name_or_path or None)
    adapter = Adapter(name, config, _create(registry.attention[-layers:], config, module_key(name)))
    registry.adapters[name] = adapter
    registry.active = name
    setattr(model, _REGISTRY, registry)
    return adapter


def check_name(name: str) -> None:
    """Refuse a name that could not be told from others in files and addresses.

    Raises:
        AdapterError: it has other characters than letters, digits, '.', '_', '-'.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise AdapterError(f"Adapter name {name!r} is malformed: use letters, digits, '.', '_' and '-' only.")


def resolve_layers(config: AdapterConfig, base: PretrainedConfig) -> int:
    """L for a base: `config.adapter_layers`, or where that is None all layers but the lowest two.

    Raises:
        ConfigError: more layers than the base has.
    """
    num_layers = int(text_config(base).num_hidden_layers)
    layers = config.adapter_layers or max(1, num_layers - 2)
    if layers > num_layers:
        raise ConfigError(
            f"adapter_layers is {layers}, but the base has {num_layers} layers: choose 1 to {num_layers}."
        )
    return layers


@contextlib.contextmanager
def use_adapter(model: nn.Module, names: Names) -> Iterator[None]:
    """Within the block, forwards of `model` use this adapter instead of the active one.

    Args:
        model: a model with adapters.
        names: one name, None for the bare base, or a list with a name or None for every row of the batch.

    The choice belongs to the thread or task that made it: a thread started inside the block does not see it, so
    put the `with` inside that thread.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    registry = _registry(model)
    names = names if names is None or isinstance(names, str) else tuple(names)
    for name in {names} if names is None or isinstance(names, str) else set(names):
        if name is not None:
            _known(registry, name)
    token = _override.set({**_override.get({}), id(registry): names})
    try:
        yield
    finally:
        _override.reset(token)


def get_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """The handle of adapter `name`, by default of the active one.

    Raises:
        AdapterError: there is none of that name, or none is active.
    """
    registry = _registry(model)
    name = registry.active if name is None else name
    if name is None:
        raise AdapterError(f"No adapter is active: name one of {', '.join(registry.adapters)}.")
    return _known(registry, name)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, oldest first; empty for a model that was never adapted."""
    registry = _find(model)
    return [] if registry is None else list(registry.adapters)


def remove_adapter(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off. After the last one the model is the base again, trainable where it was.

    If it was the active one, no adapter is active afterwards.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    registry = _registry(model)
    _known(registry, name)
    for module in registry.attention:
        slot: AdapterSlot = getattr(module, SLOT)
        if slot.get(name) is not None:
            delattr(slot, module_key(name))
    del registry.adapters[name]
    if registry.active == name:
        registry.active = None
    if not registry.adapters:
        registry.detach()


def _create(modules: Sequence[Any], config: AdapterConfig, key: str) -> dict[int, ZeroInitAdapter]:
    text = text_config(modules[0].config)
    layers = {}
    for module in modules:
        # Drawn on the CPU, so that a seed starts alike on every device.
        layer = ZeroInitAdapter(config.adapter_len, text.hidden_size, text.num_attention_heads, config.gate_activation)
        layer.to(next(module.parameters()).device)
        getattr(module, SLOT).add_module(key, layer)
        layers[int(module.layer_idx)] = layer
    return layers


def _find(model: nn.Module) -> _Adapters | None:
    """The registry of a model, also through wrappers such as DDP or torch.compile."""
    return next((getattr(m, _REGISTRY) for m in model.modules() if hasattr(m, _REGISTRY)), None)


def _registry(model: nn.Module) -> _Adapters:
    registry = _find(model)
    if registry is None:
        raise AdapterError("The model has no adapter: call add_adapter or load_adapter first.")
    return registry


def _known(registry: _Adapters, name: str) -> Adapter:
    if name not in registry.adapters:
        raise AdapterError(f"The model has an {unknown_name('adapter', name, registry.adapters)}")
    return registry.adapters[name]


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
    return next((tensor for tensor in candidates if isinstance(tensor, Tensor)), torch.empty(0))


def _route_attention(config: Any) -> None:
    """Make sure that the attention function `config` names adds the gated term.

    Functions in transformers' registry are wrapped under their own name, which leaves the configuration, the mask
    and code that looks for a stock name as they are; modules without adapters pass straight through. Only "eager"
    is not in the registry (each model file has its own), so such a model gets a name of ours. Done before every
    forward, because `set_attn_implementation` may have been called meanwhile; a dictionary look-up then.
    """
    name = config._attn_implementation
    if name == "eager":
        AttentionInterface.register(EAGER, with_zero_init(_eager_attention))
        AttentionMaskInterface.register(EAGER, eager_mask)
        config._attn_implementation = EAGER
    elif name != EAGER:
        stock: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        if not hasattr(stock, "wraps"):
            AttentionInterface.register(name, with_zero_init(stock))


def _eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The eager function of the model file that `module` comes from."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention: load the base with sdpa.")
    return function(module, *args, **kwargs)
