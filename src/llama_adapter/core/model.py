"""Adapters on a model: add, use, save, load, remove.

Adapters live inside the attention modules they serve, as ordinary submodules; the model stays the ordinary
transformers model it was. Which adapter serves which row travels with every forward as a keyword argument, put there
by one hook on the decoder, and reaches the attention through transformers' own plumbing. Nothing else is changed.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.conditions.modules import Condition
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import attention_modules, family_of, shape_of, text_config
from llama_adapter.core.prompt_cache import Place, PromptCache
from llama_adapter.core.routing import EAGER, Names, Use, batch_of, route_attention
from llama_adapter.core.zero_init import CHOICE, SLOT, AdapterSlot, Choice, Prompts, ZeroInitAdapter, module_key
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.settings import unknown_name

CONDITIONS = "zero_init_conditions"
"""Name under which a decoder holds the conditions of its adapters."""

_REGISTRY = "_llama_adapters"
_override: ContextVar[Mapping[int, Use]] = ContextVar("llama_adapter_override")


@dataclass(frozen=True)
class Adapter:
    """Handle of one adapter on one model.

    Attributes:
        name: what `use_adapter` calls it.
        config: its configuration, with `adapter_layers` and `base_shape` filled in.
        layers: the base's layer index -> the parameters there, lowest layer first.
        condition: what turns features of a picture into a condition, where the configuration asks for one.
    """

    name: str
    config: AdapterConfig
    layers: Mapping[int, ZeroInitAdapter]
    condition: Condition | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`layers.{i}.prompt` [K, hidden] and `layers.{i}.gate` [heads] of each adapted layer i, then `condition.*`."""
        for i, layer in self.layers.items():
            yield from ((f"layers.{i}.{key}", parameter) for key, parameter in layer.named_parameters())
        if self.condition is not None:
            yield from ((f"condition.{key}", parameter) for key, parameter in self.condition.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its trainable parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """Its parameters by the names of `named_parameters`, fp32."""
        return {key: parameter.detach() for key, parameter in self.named_parameters()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave. Keys and shapes must be right already (`storage.py` checks files)."""
        with torch.no_grad():
            for key, mine in self.state_dict().items():
                mine.copy_(tensors[key])

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained: L x (K x hidden + heads), and the condition's."""
        return sum(parameter.numel() for parameter in self.parameters())


class _Adapters:
    """What one adapted model knows: its adapters, the active one, and how to become the base again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.standing = Use(None)
        self.kept: PromptCache[Choice] = PromptCache()
        self.attention = attention_modules(model)
        if any(hasattr(module, SLOT) for module in self.attention):
            raise AdapterError(
                "The model was adapted through another object that shares its layers: use the one that add_adapter got."
            )
        self.frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        family = family_of(model.config)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.slots = [AdapterSlot(family.project, family.modules) for _ in self.attention]
        for module, slot in zip(self.attention, self.slots, strict=True):
            module.add_module(SLOT, slot)
        model.base_model.add_module(CONDITIONS, nn.ModuleDict())
        self.hook = model.base_model.register_forward_pre_hook(self.attach_choice, with_kwargs=True)

    def detach(self) -> None:
        """Take every trace off the model."""
        self.hook.remove()
        delattr(self.model.base_model, CONDITIONS)
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
        route_attention(self.attention[0].config)
        if CHOICE in kwargs:
            return None
        use = _override.get({}).get(id(self))
        if use is None:
            if self.standing.names != self.active:
                self.standing = Use(self.active)
            use = self.standing
        batch = batch_of(args, kwargs)
        choice = use.choice(batch)
        if choice is None:
            return None
        if not torch.is_grad_enabled() and kwargs.get("use_cache") is not False:
            choice = self.prepared(choice, len(batch))
        return args, {**kwargs, CHOICE: choice}

    def prepared(self, choice: Choice, batch: int) -> Choice:
        """The choice with what each adapted layer reads, computed once for as long as nothing changes."""
        wanted = (choice, batch, self.model.dtype)
        kept = self.kept.find(wanted)
        if kept is not None:
            return kept
        found: dict[int, Prompts] = {}
        places: list[Place] = []
        for module, slot in zip(self.attention, self.slots, strict=True):
            prompts = slot.prompts(module, choice, batch, self.model.dtype)
            places += slot.places(module, choice)
            if prompts is not None:
                found[module.layer_idx] = prompts
        tensors = [tensor for tensor in (choice.condition, choice.rows) if tensor is not None]
        return self.kept.keep(wanted, replace(choice, prepared=found), places, tensors)

    def add(self, name: str, config: AdapterConfig) -> Adapter:
        """Give the top layers new parameters, and the decoder the condition that `config` asks for."""
        text = text_config(self.model.config)
        layers = {}
        for module in self.attention[-(config.adapter_layers or 0) :]:
            # Drawn on the CPU, so that a seed starts alike on every device.
            layer = ZeroInitAdapter(
                config.adapter_len, text.hidden_size, text.num_attention_heads, config.gate_activation
            )
            layer.to(next(module.parameters()).device)
            getattr(module, SLOT).add_module(module_key(name), layer)
            layers[int(module.layer_idx)] = layer
        condition = None
        if config.condition is not None:
            condition = config.condition.build(text.hidden_size, config.adapter_len)  # type: ignore[assignment]
            condition.to(next(self.attention[0].parameters()).device)
            getattr(self.model.base_model, CONDITIONS)[module_key(name)] = condition
        self.adapters[name] = Adapter(name, config, layers, condition)
        self.active = name
        return self.adapters[name]

    def remove(self, name: str) -> None:
        """Take an adapter's parameters off."""
        for module in self.attention:
            slot: AdapterSlot = getattr(module, SLOT)
            if slot.get(name) is not None:
                delattr(slot, module_key(name))
        if self.adapters[name].condition is not None:
            del getattr(self.model.base_model, CONDITIONS)[module_key(name)]
        del self.adapters[name]
        if self.active == name:
            self.active = None


def add_adapter(model: PreTrainedModel, config: AdapterConfig | None = None, name: str = "default") -> Adapter:
    """Freeze the base and give its top layers a new adapter, which becomes the active one.

    A new adapter changes nothing: its gates are 0, the logits equal the base's bit for bit. Its prompts are drawn
    from N(0, 1) with torch's global random state; they stay fp32 whatever the base's dtype.

    Args:
        model: any supported transformers model, see `llama_adapter.core.families.FAMILIES`.
        config: defaults to `AdapterConfig()`.
        name: letters, digits, '.', '_', '-'.

    Raises:
        UnsupportedModelError: the family cannot be adapted.
        ConfigError: more layers asked for than the base has.
        AdapterError: the name is taken or malformed.
    """
    config = config or AdapterConfig()
    family_of(model.config)
    layers = resolve_layers(config, model.config)
    check_name(name)
    registry = getattr(model, _REGISTRY, None) or _Adapters(model)
    if name in registry.adapters:
        raise AdapterError(f"The model already has an adapter '{name}': remove it first or choose another name.")
    config = replace(config, adapter_layers=layers, base_shape=shape_of(model.config))
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=model.config.name_or_path or None)
    setattr(model, _REGISTRY, registry)
    return registry.add(name, config)


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
def use_adapter(model: nn.Module, names: Names, condition: Tensor | None = None) -> Iterator[None]:
    """Within the block, forwards of `model` use this adapter instead of the active one.

    Args:
        model: a model with adapters.
        names: one name, None for the bare base, or a list with a name or None for every row of the batch.
        condition: [B, hidden] or [B, K, hidden], added to the prompts of every adapted layer, a row each; what
            `get_adapter(model, name).condition` makes of a picture's features. Rows on the bare base ignore theirs.

    The choice belongs to the thread or task that made it: a thread started inside the block does not see it, so
    put the `with` inside that thread.

    Raises:
        AdapterError: the model has no adapter of that name, or the condition does not fit its prompts.
    """
    registry = _registry(model)
    names = names if names is None or isinstance(names, str) else tuple(names)
    chosen = [_known(registry, n) for n in ({names} if names is None or isinstance(names, str) else {*names}) if n]
    use = Use(names, None if condition is None else _fitting(condition, chosen))
    token = _override.set({**_override.get({}), id(registry): use})
    try:
        yield
    finally:
        _override.reset(token)


def _fitting(condition: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The condition as [B, 1 or K, hidden], checked against the prompts that it is added to."""
    condition = condition[:, None] if condition.dim() == 2 else condition
    for adapter in adapters:
        hidden = (adapter.config.base_shape or {})["hidden_size"]
        lengths = {1, adapter.config.adapter_len}
        if condition.dim() != 3 or condition.shape[2] != hidden or condition.shape[1] not in lengths:
            raise AdapterError(
                f"A condition of shape {list(condition.shape)} does not fit adapter '{adapter.name}': it must be "
                f"[rows, {hidden}] or [rows, {adapter.config.adapter_len}, {hidden}]."
            )
    return condition


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


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make adapter `name` the active one, or with None the bare base.

    Raises:
        AdapterError: there is no adapter of that name.
    """
    registry = _registry(model)
    registry.active = None if name is None else _known(registry, name).name


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
    registry.remove(name)
    if not registry.adapters:
        registry.detach()


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
