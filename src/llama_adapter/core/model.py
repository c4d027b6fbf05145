"""Adapters on a model: add, set, use, disable, remove.

Adapters live inside the attention modules they serve, as ordinary submodules; the model stays the ordinary
transformers model it was. Which adapter serves which row travels with every forward as a keyword argument, put there
by one hook on the decoder, and reaches the attention through transformers' own plumbing. Beside that hook the model
gets a `generate` that takes `adapter_names`, which transformers' refuses. Nothing else is changed.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as with_values
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.core.attention import EAGER, NAMES, ROUTING, SLOT, wrap_attention
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import attention_modules, family_of, shape_of, text_config
from llama_adapter.core.routing import Adapter, AdapterSlot, Names, Routing, module_key
from llama_adapter.core.scope import Block, Request, Scope
from llama_adapter.core.zero_init import ZeroInitAdapter
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.settings import unknown_name

CONDITIONS = "zero_init_conditions"
"""Name under which a decoder holds the conditions of its adapters."""
_REGISTRY = "_llama_adapters"
_UNSAID = object()


class _Adapters:
    """What one adapted model knows: its adapters, the active one, and how to become the base again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.scope = Scope()
        self.lock = threading.Lock()  # of add and remove
        self.attention = attention_modules(model)
        if any(hasattr(module, SLOT) for module in self.attention):
            raise AdapterError(
                "The model was adapted through another object that shares its layers: use the one that add_adapter got."
            )
        self.frozen = [parameter for parameter in _base_parameters(model) if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        family = family_of(model.config)
        for module in self.attention:
            module.add_module(SLOT, AdapterSlot(family.project))
        model.base_model.add_module(CONDITIONS, nn.ModuleDict())
        model.base_model.register_forward_pre_hook(_Router(self), with_kwargs=True)
        if hasattr(type(model), "generate"):
            model.generate = _Generate(model)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())

    def detach(self) -> None:
        """Take every trace off the model."""
        decoder = self.model.base_model
        for key in [key for key, hook in decoder._forward_pre_hooks.items() if isinstance(hook, _Router)]:
            del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]
        delattr(decoder, CONDITIONS)
        for module in self.attention:
            delattr(module, SLOT)
            if module.config._attn_implementation == EAGER:
                module.config._attn_implementation = "eager"
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        if isinstance(vars(self.model).get("generate"), _Generate):
            del self.model.generate
        delattr(self.model, _REGISTRY)

    def request(self, names: Any, condition: Tensor | None = None) -> Request:
        """What `names` and `condition` ask for; where nothing is said, what the block around asks for, else the active.

        Raises:
            AdapterError: an unknown name, a condition that does not fit, or see `Scope.current`.
        """
        if names is _UNSAID:
            return self.scope.current() or Request(None if self.active is None else self.adapters[self.active])
        if names is None or isinstance(names, str):
            adapters: Any = None if names is None else _known(self, names)
            chosen = [adapters]
        else:
            chosen = [None if name is None else _known(self, name) for name in names]
            adapters = tuple(chosen)
        if condition is None:
            return Request(adapters)
        return Request(adapters, _fitting(condition, [adapter for adapter in chosen if adapter is not None]))

    def build(self, name: str, config: AdapterConfig) -> Adapter:
        """New parameters for the top layers, and the condition that `config` asks for; the model is not touched."""
        text = text_config(self.model.config)
        layers = {}
        for module in self.attention[-(config.adapter_layers or 0) :]:
            # Drawn on the CPU, so that a seed starts alike on every device.
            layer = ZeroInitAdapter(
                config.adapter_len, text.hidden_size, text.num_attention_heads, config.gate_activation
            )
            layers[int(module.layer_idx)] = layer.to(device_of(module))
        condition = None
        if config.condition is not None:
            condition = config.condition.build(text.hidden_size, config.adapter_len).to(device_of(self.attention[0]))
        return Adapter(name, config, layers, condition)

    def place(self, name: str, adapter: Adapter | None) -> None:
        """Put an adapter's modules where the one of that name has its own; None leaves none there.

        Raises:
            AdapterError: a block that is open, or a generation that runs, uses the old one.
        """
        old = self.adapters.get(name)
        if old is not None:
            if any(block.request.uses(old) for block in self.scope.blocks):
                raise AdapterError(
                    f"Adapter '{name}' is in use, by a use_adapter block or a generation: remove it after."
                )
            old.removed = True  # first: a forward that runs ends with an error instead of meeting half of it
        layers, condition = ({}, None) if adapter is None else (adapter.layers, adapter.condition)
        for module in self.attention:
            _put(getattr(module, SLOT), name, layers.get(int(module.layer_idx)))
        _put(getattr(self.model.base_model, CONDITIONS), name, condition)
        if adapter is not None:
            self.adapters[name] = adapter
        elif old is not None:
            del self.adapters[name]
            self.active = None if self.active == name else self.active


def _put(holder: nn.Module, name: str, module: nn.Module | None) -> None:
    """Let `holder` have this module for an adapter, in place of what it had."""
    if module is not None:
        holder.add_module(module_key(name), module)
    elif module_key(name) in holder._modules:
        delattr(holder, module_key(name))


class _Router:
    """Forward pre-hook of the decoder: say which adapter serves which row."""

    def __init__(self, registry: _Adapters) -> None:
        self.registry = registry

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if ROUTING in kwargs else self._route(args, kwargs)

    @torch.compiler.disable  # it looks at the call stack
    def _route(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wrap_attention(self.registry.attention[0].config)
        kwargs = dict(kwargs)
        routing = _routing(self.registry.request(kwargs.pop(NAMES, _UNSAID)), _batch_of(args, kwargs))
        return args, kwargs if routing is None else {**kwargs, ROUTING: routing}


class _Generate:
    """An adapted model's `generate`: transformers' own, with `adapter_names` for all rows or one per prompt.

    What the prompts are projected to is kept until the call ends. Under beam search and `num_return_sequences` each
    name serves all rows that come of its prompt.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, *args: Any, adapter_names: Names = _UNSAID, **kwargs: Any) -> Any:  # type: ignore[assignment]
        registry: _Adapters = getattr(self.model, _REGISTRY)
        asked = registry.request(adapter_names)
        with Block(registry.scope, with_values(asked, repeats=True, prompts={})):
            return type(self.model).generate(self.model, *args, **kwargs)


def _routing(request: Request, batch: Tensor) -> Routing | None:
    """A request for a batch of so many rows; None where all of them are on the bare base.

    Raises:
        AdapterError: names or conditions are not as many as the batch's rows.
    """
    condition = request.condition
    if condition is not None:
        condition = condition.repeat_interleave(_times("conditions", len(condition), batch, request.repeats), 0)
    if not isinstance(request.adapters, tuple):
        return None if request.adapters is None else Routing((request.adapters,), None, condition, request.prompts)
    times = _times("names", len(request.adapters), batch, request.repeats)
    distinct = tuple(dict.fromkeys(request.adapters))
    if distinct == (None,):
        return None
    if len(distinct) == 1:
        return Routing(distinct, None, condition, request.prompts)
    rows = torch.tensor([distinct.index(adapter) for adapter in request.adapters], device=batch.device)
    return Routing(distinct, rows.repeat_interleave(times), condition, request.prompts)


def _times(what: str, count: int, batch: Tensor, repeats: bool) -> int:
    """How often each row of a request comes in a batch."""
    if count == len(batch):
        return 1
    if repeats and count and len(batch) % count == 0:
        return len(batch) // count
    raise AdapterError(
        f"Got {count} {what} for a batch of {len(batch)} rows: give one per row. Only model.generate repeats "
        "them, for beams and returned sequences."
    )


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor among a decoder's arguments that tells how many rows there are, and where."""
    for tensor in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args):
        if isinstance(tensor, Tensor):
            return tensor
    return torch.empty(0)


def _base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters but those of PEFT's layers, such as LoRA's, which go on learning beside an adapter."""
    tuned = {
        id(parameter)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())
        if isinstance(part := getattr(module, name, None), nn.Module)
        for parameter in part.parameters()
    }
    return (parameter for parameter in model.parameters() if id(parameter) not in tuned)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, which for an offloaded one is not where its weights are."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig | None = None,
    name: str = "default",
    *,
    activate: bool = True,
    replace: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Freeze the base and give its top layers a new adapter, which becomes the active one.

    A new adapter changes nothing: its gates are 0, the logits equal the base's bit for bit. Its prompts are drawn
    from N(0, 1) with torch's global random state; they stay fp32 whatever the base's dtype. On a model with PEFT's
    layers those are left as they are: a LoRA that was trainable learns beside the adapter.

    Args:
        model: any supported transformers model, see `llama_adapter.core.families.FAMILIES`, or a PeftModel of one.
        config: defaults to `AdapterConfig()`.
        name: letters, digits, '.', '_', '-'.
        activate: whether it becomes the active one.
        replace: take the place of an adapter of that name; what serves at any moment is the old one or the new one.
        state_dict: parameters to start from, as `Adapter.state_dict` gives them; nothing is drawn then.

    Raises:
        UnsupportedModelError: the family cannot be adapted.
        ConfigError: more layers asked for than the base has.
        AdapterError: the name is taken or malformed, or the adapter to replace is in use.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel around the one that is meant
        model = model.get_base_model()
    config = config or AdapterConfig()
    family_of(model.config)
    layers = resolve_layers(config, model.config)
    check_name(name)
    registry = vars(model).get(_REGISTRY) or _Adapters(model)
    with registry.lock:
        if name in registry.adapters and not replace:
            raise AdapterError(
                f"The model already has an adapter '{name}': remove it first, pass replace=True or choose another name."
            )
        source = config.base_model_name_or_path or model.config.name_or_path or None
        shape = shape_of(model.config)
        config = with_values(config, adapter_layers=layers, base_shape=shape, base_model_name_or_path=source)
        if state_dict is None:
            adapter = registry.build(name, config)
        else:
            with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten: the caller's state stays
                adapter = registry.build(name, config)
            adapter.load_state_dict(state_dict)
        setattr(model, _REGISTRY, registry)
        registry.place(name, adapter)
        if activate:
            registry.active = name
        return adapter


def check_name(name: str) -> None:
    """Refuse a name that could not be told from others in files and addresses.

    Raises:
        AdapterError: it has other characters than letters, digits, '.', '_', '-'.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
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


def use_adapter(model: nn.Module, names: Names, condition: Tensor | None = None) -> Block:
    """Within the block, forwards of `model` use this adapter instead of the active one.

        with use_adapter(model, "alpaca"):
            model.generate(**inputs)

    Args:
        model: a model with adapters.
        names: one name, None for the bare base, or a list with a name or None for every row of the batch.
        condition: [B, hidden] or [B, K, hidden], added to the prompts of every adapted layer, a row each; what
            `get_adapter(model, name).condition` makes of a picture's features. Rows on the bare base ignore theirs.

    The block is for calls that are made inside it: by the function that has the `with`, or by what it calls. Threads
    that it starts are not inside; a forward there raises an error as long as a block is open, and wants its own block
    or `adapter_names`. An adapter that a block uses cannot be removed.

    Raises:
        AdapterError: the model has no adapter of that name, or the condition does not fit its prompts.
    """
    registry = _registry(model)
    return Block(registry.scope, registry.request(names, condition))


def disable_adapter(model: nn.Module) -> Block:
    """Within the block, forwards of `model` are the bare base's; `use_adapter` with None."""
    return use_adapter(model, None)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, which serves all forwards that name none; None is the bare base.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    registry = _registry(model)
    registry.active = None if name is None else _known(registry, name).name


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
    return _known(registry, _active(registry) if name is None else name)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, oldest first; empty for a model that was never adapted."""
    registry = _find(model)
    return [] if registry is None else list(registry.adapters)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter; None where the bare base answers."""
    registry = _find(model)
    return None if registry is None else registry.active


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off, by default the active one. After the last one the model is the base again.

    Afterwards no adapter is active if it was; what was trainable before the first adapter is so after the last.

    Raises:
        AdapterError: there is no adapter of that name, none is active, or it is in use.
    """
    registry = _registry(model)
    with registry.lock:
        name = _active(registry) if name is None else name
        _known(registry, name)
        registry.place(name, None)
        if not registry.adapters:
            registry.detach()


def _find(model: nn.Module) -> _Adapters | None:
    """The registry of a model, also through wrappers such as DDP, PEFT or torch.compile."""
    return next((vars(m)[_REGISTRY] for m in model.modules() if _REGISTRY in vars(m)), None)


def _registry(model: nn.Module) -> _Adapters:
    registry = _find(model)
    if registry is None:
        raise AdapterError("The model has no adapter: call add_adapter or load_adapter first.")
    return registry


def _active(registry: _Adapters) -> str:
    if registry.active is None:
        raise AdapterError(f"No adapter is active: name one of {', '.join(registry.adapters)}.")
    return registry.active


def _known(registry: _Adapters, name: str) -> Adapter:
    adapter = registry.adapters.get(name)
    if adapter is None:
        raise AdapterError(f"The model has an {unknown_name('adapter', name, registry.adapters)}")
    return adapter
