"""What an adapted model knows: its adapters, the active one, who asks for which, and how to become the base again.

One hook on the decoder says with every forward which adapter serves which row; a `generate` of ours takes
`adapter_names`, which transformers' refuses. `model.py` has the functions that people call.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.core.attention import EAGER, NAMES, ROUTING, SLOT, wrap_attention
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import attention_modules, family_of, is_encoder, text_config
from llama_adapter.core.parts import decoder_and_layers, place_parts, set_callers, wanted_parts
from llama_adapter.core.routing import Adapter, AdapterSlot, Names, PartsSlot, Routing
from llama_adapter.core.scope import Block, Request, Scope
from llama_adapter.core.tensor_parallel import heads_here
from llama_adapter.core.zero_init import ZeroInitAdapter
from llama_adapter.errors import AdapterError
from llama_adapter.settings import unknown_name

CONDITIONS = "zero_init_conditions"
"""Name under which a decoder holds the conditions of its adapters."""
REGISTRY = "_llama_adapters"
"""Name under which a model holds its `Registry`."""
_UNSAID = object()


class Registry:
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
        self.decoder, self.layers = decoder_and_layers(model)
        # An encoder's head is outside of it, and may be an adapter's own: the whole model knows who serves which row.
        self.routed = {self.decoder, model} if is_encoder(model.config) else {self.decoder}
        self.frozen: list[nn.Parameter] = []
        self.attached = False

    def attach(self) -> None:
        """Freeze the base and put in place what serves adapters."""
        self.frozen = [parameter for parameter in _base_parameters(self.model) if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        family, heads = family_of(self.model.config), heads_here(self.model)
        for module in self.attention:
            module.add_module(SLOT, AdapterSlot(family.project, heads))
        self.model.base_model.add_module(CONDITIONS, PartsSlot())
        for module in self.routed:
            module.register_forward_pre_hook(Router(self), with_kwargs=True)
        if hasattr(type(self.model), "generate"):
            self.model.generate = _Generate(self.model, vars(self.model).get("generate"))
        setattr(self.model, REGISTRY, self)
        self.attached = True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())

    def detach(self) -> None:
        """Take every trace off the model."""
        for module in self.routed:
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, Router)]:
                del hooks[key], module._forward_pre_hooks_with_kwargs[key]
        delattr(self.model.base_model, CONDITIONS)
        for module in self.attention:
            delattr(module, SLOT)
            if module.config._attn_implementation == EAGER:
                module.config._attn_implementation = "eager"
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        ours = vars(self.model).get("generate")
        if isinstance(ours, _Generate):
            del self.model.generate
            if ours.before is not None:
                self.model.generate = ours.before
        delattr(self.model, REGISTRY)

    def request(self, names: Names, condition: Tensor | None = None) -> Request:
        """What `names` and `condition` ask for.

        Raises:
            AdapterError: an unknown name, or a condition that does not fit.
        """
        if names is None or isinstance(names, str):
            adapters: Any = None if names is None else known(self, names)
            chosen = [adapters]
        else:
            chosen = [None if name is None else known(self, name) for name in names]
            adapters = tuple(chosen)
        if condition is None:
            return Request(adapters)
        return Request(adapters, _fitting(condition, [adapter for adapter in chosen if adapter is not None]))

    def of_call(self, names: Any) -> Request:
        """What a call is served by: what it says, else what the block around it says, else the active adapter.

        Raises:
            AdapterError: as `request`; see `Scope.current`; or names inside a block whose condition they would drop.
        """
        if names is _UNSAID:
            return self.scope.current() or self.request(self.active)
        around = None
        with contextlib.suppress(AdapterError):  # a block that cannot be seen from here has no say either
            around = self.scope.current()
        if around is not None and around.condition is not None:
            raise AdapterError("adapter_names inside a use_adapter block with a condition: name them in the block.")
        return self.request(names)

    def build(self, name: str, config: AdapterConfig) -> Adapter:
        """New parameters for the top layers, and the condition that `config` asks for; the model is not touched."""
        text = text_config(self.model.config)
        layers: dict[int, ZeroInitAdapter] = {}
        early = (None if config.condition is None else config.condition.layers) or 0
        top = len(self.attention) - (config.adapter_layers or 0)
        for module in (*self.attention[:early], *self.attention[top:]):
            # Drawn on the CPU, so that a seed starts alike on every device.
            layer = ZeroInitAdapter(
                config.adapter_len if len(layers) >= early else 0,
                text.hidden_size,
                text.num_attention_heads,
                config.gate_activation,
                config.gate_scale,
            )
            layers[int(module.layer_idx)] = layer.to(device_of(module))
        condition = None
        if config.condition is not None:
            condition = config.condition.build(text.hidden_size, config.adapter_len).to(device_of(self.attention[0]))
        wanted = wanted_parts(config, self.model)
        if wanted and any(layer._compiled_call_impl is not None for layer in self.layers):
            raise AdapterError(
                "The model's layers are compiled, and would not see norms, scales, biases or LoRA: leave --compile out."
            )
        modules = {prefix: part.make().to(device_of(part.home)) for prefix, part in wanted.items()}
        homes = {prefix: part.home for prefix, part in wanted.items()}
        return Adapter(name, config, layers, condition, modules, homes)

    def place(self, name: str, adapter: Adapter | None) -> None:
        """Put an adapter's modules where the one of that name has its own; None leaves none there.

        Raises:
            AdapterError: a block that is open, or a generation that runs, uses the old one.
        """
        old = self.adapters.get(name)
        if old is not None:
            if self.scope.uses(old):
                raise AdapterError(
                    f"Adapter '{name}' is in use, by a use_adapter block or a generation: remove it after."
                )
            old.removed = True  # first: a forward that runs ends with an error instead of meeting half of it
        layers, condition = ({}, None) if adapter is None else (adapter.layers, adapter.condition)
        for module in self.attention:
            getattr(module, SLOT).put(name, layers.get(int(module.layer_idx)))
        getattr(self.model.base_model, CONDITIONS).put(name, condition)
        others = [other for other in (*self.adapters.values(), adapter) if other is not old and other is not None]
        place_parts(name, old, adapter)
        set_callers((*self.routed, *self.layers), any(other.modules for other in others))
        if adapter is not None:
            self.adapters[name] = adapter
        elif old is not None:
            del self.adapters[name]
            self.active = None if self.active == name else self.active


class Router:
    """Forward pre-hook of the decoder: say which adapter serves which row."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        return None if ROUTING in kwargs else self._route(args, kwargs, last=module is self.registry.decoder)

    @torch.compiler.disable  # it looks at the call stack
    def _route(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], last: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wrap_attention(self.registry.attention[0].config)
        kwargs = dict(kwargs)
        routing = _routing(self.registry.of_call(kwargs.pop(NAMES, _UNSAID)), _batch_of(args, kwargs))
        if routing is None and not last:  # said here, as the decoder's own hook would take the active adapter
            routing = Routing((None,))
        return args, kwargs if routing is None else {**kwargs, ROUTING: routing}


class _Generate:
    """An adapted model's `generate`: transformers' own, with `adapter_names` for all rows or one per prompt.

    What the prompts are projected to is kept until the call ends. Under beam search and `num_return_sequences` each
    name serves all rows that come of its prompt.
    """

    def __init__(self, model: PreTrainedModel, before: Any) -> None:
        self.model, self.before = model, before  # somebody's own `generate` on this object, where there was one

    def __call__(self, *args: Any, adapter_names: Names = _UNSAID, **kwargs: Any) -> Any:  # type: ignore[assignment]
        registry = registry_of(self.model)
        asked = registry.of_call(adapter_names)
        given = [kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
        inputs = next((len(tensor) for tensor in given if isinstance(tensor, Tensor)), None)
        with Block(registry.scope, replace(asked, generation=True, inputs=inputs, batch=None, prompts={})):
            if self.before is not None:
                return self.before(*args, **kwargs)
            return type(self.model).generate(self.model, *args, **kwargs)


def _routing(request: Request, batch: Tensor) -> Routing | None:
    """A request for a batch of so many rows; None where all of them are on the bare base.

    Raises:
        AdapterError: names or conditions are not as many as the batch's rows.
    """
    condition = request.condition
    if condition is not None:
        condition = condition.repeat_interleave(_times("conditions", len(condition), batch, request), 0)
    if not isinstance(request.adapters, tuple):
        return None if request.adapters is None else Routing((request.adapters,), None, condition, request.prompts)
    times = _times("names", len(request.adapters), batch, request)
    distinct = tuple(dict.fromkeys(request.adapters))
    if distinct == (None,):
        return None
    if len(distinct) == 1:
        return Routing(distinct, None, condition, request.prompts)
    rows = torch.tensor([distinct.index(adapter) for adapter in request.adapters], device=batch.device)
    return Routing(distinct, rows.repeat_interleave(times), condition, request.prompts)


def _times(what: str, count: int, batch: Tensor, request: Request) -> int:
    """How often each row of a request comes in a batch."""
    rows = len(batch)
    known = count in (rows, request.inputs)  # else two names for four prompts would pass for beams
    if request.generation and count and known and rows % count == 0 and request.batch in (None, rows):
        request.batch = rows  # a forward of another size, such as a processor's, might mean its rows otherwise
        return rows // count
    if count != rows or request.generation:
        raise AdapterError(
            f"Got {count} {what} for a batch of {rows} rows: give one per row. Only model.generate repeats "
            "them, for beams and returned sequences."
        )
    return 1


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor among a decoder's arguments that tells how many rows there are, and where."""
    for tensor in (*(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values")), *args):
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


def _fitting(condition: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The condition as [B, 1 or K, hidden], checked against the prompts that it is added to."""
    condition = condition[:, None] if condition.dim() == 2 else condition
    for adapter in adapters:
        if not adapter.layers:
            raise AdapterError(f"Adapter '{adapter.name}' has no prompts that a condition could be added to.")
        hidden = (adapter.config.base_shape or {})["hidden_size"]
        lengths = {1, adapter.config.adapter_len}
        fits = condition.dim() == 3 and condition.shape[2] == hidden
        if not fits or not (adapter.early_fusion or condition.shape[1] in lengths):
            raise AdapterError(
                f"A condition of shape {list(condition.shape)} does not fit adapter '{adapter.name}': it must be "
                f"[rows, {hidden}] or [rows, {adapter.config.adapter_len}, {hidden}]."
            )
    return condition


def find_registry(model: nn.Module) -> Registry | None:
    """The registry of a model, also through wrappers such as DDP, PEFT or torch.compile.

    Raises:
        AdapterError: several parts of it were adapted, such as the two towers of CLIP.
    """
    if REGISTRY in vars(model):
        return vars(model)[REGISTRY]
    found = {path: vars(module)[REGISTRY] for path, module in model.named_modules() if REGISTRY in vars(module)}
    if len(found) > 1:
        raise AdapterError(
            f"Several parts of this model have adapters: pass the one that is meant, of {', '.join(found)}."
        )
    return next(iter(found.values()), None)


def registry_of(model: nn.Module) -> Registry:
    """The registry of a model.

    Raises:
        AdapterError: it was never adapted.
    """
    registry = find_registry(model)
    if registry is None:
        raise AdapterError("The model has no adapter: call add_adapter or load_adapter first.")
    return registry


def active_of(registry: Registry) -> str:
    """The active adapter's name.

    Raises:
        AdapterError: none is active.
    """
    if registry.active is None:
        raise AdapterError(f"No adapter is active: name one of {', '.join(registry.adapters)}.")
    return registry.active


def known(registry: Registry, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        AdapterError: there is none; the message has the nearest name, or all of them.
    """
    adapter = registry.adapters.get(name)
    if adapter is None:
        raise AdapterError(f"The model has an {unknown_name('adapter', name, registry.adapters)}")
    return adapter


def in_use(model: nn.Module, adapters: Iterable[Adapter]) -> contextlib.AbstractContextManager[None]:
    """Within the block these adapters cannot be removed from their model."""
    registry = find_registry(model)
    return contextlib.nullcontext() if registry is None else registry.scope.holding(tuple(adapters))
