"""Where norms, scales, biases and LoRA sit on a model, and how a forward comes by them; `scale_bias` has what they do.

Each part is a submodule of the module of the base that it belongs to. Hooks are on a model only while an adapter with
parts is: those modules' own, which apply what the current routing asks for, and those of the decoder and its layers,
which say what it is.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llama_adapter.core.attention import ROUTING, SLOT
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.current import current_routing, enter, leave, under
from llama_adapter.core.families import attention_modules, is_encoder
from llama_adapter.core.routing import Adapter, PartsSlot, Routing
from llama_adapter.core.scale_bias import (
    LowRank,
    OwnModule,
    OwnNorm,
    Part,
    ScaleBias,
    biased,
    normed,
    replaced,
    scaled,
    with_low_rank,
)
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.settings import unknown_name

KINDS = ("norms", "linears", "lora", "modules_to_save")
"""The first words of parts' names, `{kind}.{path of the module in the decoder}.{parameter}`."""
PARTS_SLOT = "llama_adapter_"
"""With a kind behind it, the name under which a module of the base holds its `PartsSlot`."""
INNER = (SLOT, PARTS_SLOT, "experts", "base_layer", "lora_")
"""First letters of modules that have linears which are not meant: experts see some tokens of any row."""


class Wanted(NamedTuple):
    """A part that a configuration asks for: on which module, how it is made, and the shapes of its parameters."""

    home: nn.Module
    make: Callable[[], Part]
    shapes: dict[str, tuple[int, ...]]


def wanted_parts(config: AdapterConfig, model: PreTrainedModel) -> dict[str, Wanted]:
    """`norms.{path}`, `linears.{path}` and `lora.{path}` that `config` asks for on a model, weights or not.

    Raises:
        ConfigError: a name that no linear of its layers has, or norms where none has weights.
        UnsupportedModelError: its family cannot be adapted.
    """
    if not config.has_parts:
        return {}
    found: dict[str, Wanted] = {}
    decoder, layers = decoder_and_layers(model)
    if config.norms:
        for path, home in _norms(decoder, attention_modules(model)):
            shapes = {name: tuple(parameter.shape) for name, parameter in home.named_parameters(recurse=False)}
            found[f"norms.{path}"] = Wanted(home, partial(OwnNorm, home), shapes)
        if not found:
            raise ConfigError("norms is true, and this base has none with weights: leave it out.")
    if config.modules_to_save and not is_encoder(model.config):
        raise ConfigError("modules_to_save is for encoders: leave it out, or use PEFT's beside prompts.")
    for name in config.modules_to_save:
        path, home = _module_called(model, name)
        found[f"modules_to_save.{path}"] = Wanted(home, partial(_own_module, home), _shapes_of(home))
    linears = dict(_linears(decoder, layers))
    names = {path.rpartition(".")[2] for path in linears}
    for field in ("linear_scale", "linear_bias", "lora_targets"):
        for name in getattr(config, field):
            if name not in names:
                raise ConfigError(f"{field}: {unknown_name('linear', name, sorted(names))}")
    rank = config.lora_rank
    factor = 1.0 if config.lora_alpha is None else config.lora_alpha / rank
    for path, home in linears.items():
        name, sizes = path.rpartition(".")[2], sizes_of(home)
        asked = {"scale": name in config.linear_scale, "bias": name in config.linear_bias}
        if any(asked.values()):
            shapes = {key: (size,) for key, size in zip(asked, sizes, strict=True) if asked[key]}
            found[f"linears.{path}"] = Wanted(home, partial(ScaleBias, sizes, **asked), shapes)
        if name in config.lora_targets:
            shapes = {"A": (rank, sizes[0]), "B": (sizes[1], rank)}
            found[f"lora.{path}"] = Wanted(home, partial(LowRank, sizes, rank, factor), shapes)
    return found


def _module_called(model: PreTrainedModel, name: str) -> tuple[str, nn.Module]:
    """The one module whose path is or ends with `name`, checked to be one that an adapter can have its own of.

    Raises:
        ConfigError: none, several, or one that layers are in, whose parts a forward does not call as one, or that
            keeps more than parameters.
    """
    modules = {path: module for path, module in model.named_modules() if path and "llama_adapter" not in path}
    paths = [path for path in modules if path == name or path.endswith(f".{name}")]
    if len(paths) != 1:
        hint = (
            unknown_name("module", name, [p for p, _ in model.named_children()]) if not paths else f"it is {paths[:3]}"
        )
        raise ConfigError(f"modules_to_save: {hint}")
    home = modules[paths[0]]
    if isinstance(home, nn.Sequential | nn.ModuleList) or set(attention_modules(model)) & set(home.modules()):
        raise ConfigError(f"modules_to_save: '{name}' has layers in it: name a head, or the parts of it.")
    if any(True for _ in home.buffers()) or not any(True for _ in home.parameters()):
        raise ConfigError(f"modules_to_save: '{name}' has buffers, which are not saved, or no parameters.")
    return paths[0], home


def _shapes_of(home: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters, without those of adapters."""
    return {key: tuple(p.shape) for key, p in home.named_parameters() if PARTS_SLOT not in key}


def _own_module(home: nn.Module) -> OwnModule:
    """A part that is a copy of a module as the base has it, without what adapters put there."""
    module = copy.deepcopy(home)
    for part in module.modules():
        for table in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in table.items() if isinstance(hook, PartsHook)]:
                del table[key]
        for name in [name for name in part._modules if name.startswith(PARTS_SLOT)]:
            delattr(part, name)
    return OwnModule(module)


def part_shapes(config: AdapterConfig, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `config` asks for beside prompts, gates and a condition.

    Raises:
        ConfigError: see `wanted_parts`.
    """
    parts = wanted_parts(config, model).items()
    return {f"{prefix}.{key}": shape for prefix, wanted in parts for key, shape in wanted.shapes.items()}


def decoder_and_layers(model: PreTrainedModel) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The innermost model that runs all attention modules, and its layers, lowest first."""
    attention = attention_modules(model)
    decoder = decoder_of(model, attention)
    names = {module: name for name, module in decoder.named_modules()}
    return decoder, [decoder.get_submodule(_layer_of(names[module])) for module in attention]


def _layer_of(path: str) -> str:
    """The path of the layer that a module is in: up to the last number."""
    words = path.split(".")
    last = max(place for place, word in enumerate(words) if word.isdecimal())
    return ".".join(words[: last + 1])


def decoder_of(model: PreTrainedModel, attention: Sequence[nn.Module]) -> PreTrainedModel:
    """The innermost model that runs all of these modules: in one that reads pictures, its language model."""
    wanted, found = set(attention), model.base_model
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and wanted <= set(module.modules()):
            found = module
    return found


def sizes_of(linear: Any) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear of any kind."""
    if isinstance(linear, Conv1D):
        return int(linear.weight.shape[0]), int(linear.weight.shape[1])
    return int(linear.in_features), int(linear.out_features)


def _norms(decoder: nn.Module, attention: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Norms with weights; those inside attention are of queries and keys, and prompts go through them too."""
    inside = {part for module in attention for part in module.modules()}
    for path, module in decoder.named_modules():
        ours = any(word.startswith((SLOT, PARTS_SLOT)) for word in path.split("."))  # a condition's norms
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and module not in inside and not ours:
            yield path, module


def _linears(decoder: nn.Module, layers: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Linears of the decoder's layers."""
    names = {module: name for name, module in decoder.named_modules()}
    for layer in layers:
        for path, module in layer.named_modules():
            inner = any(word.startswith(INNER) for word in path.split("."))
            if not inner and (isinstance(module, Conv1D) or hasattr(module, "in_features")):
                yield f"{names[layer]}.{path}", module


def place_parts(name: str, old: Adapter | None, new: Adapter | None) -> None:
    """Put an adapter's parts on their modules, in place of the old one's; modules that have none left lose all."""
    for prefix, home in ({} if old is None else old.homes).items():
        kind = PARTS_SLOT + prefix.partition(".")[0]
        slot = getattr(home, kind)
        slot.put(name, None)
        if not slot._modules:
            delattr(home, kind)
    for prefix, home in ({} if new is None else new.homes).items():
        kind = PARTS_SLOT + prefix.partition(".")[0]
        if not hasattr(home, kind):
            home.add_module(kind, PartsSlot())
        getattr(home, kind).put(name, new.modules[prefix])  # type: ignore[union-attr]
    for home in {*([] if old is None else old.homes.values()), *([] if new is None else new.homes.values())}:
        _set_hooks(home)


def _set_hooks(home: Any) -> None:
    """The hooks that a module needs for the slots it has; those that are there stay, as forwards may be running."""
    has = {kind: hasattr(home, PARTS_SLOT + kind) for kind in KINDS}
    _keep_hook(home, NormHook, has["norms"])
    _keep_hook(home, ScaleHook, has["linears"])
    _keep_hook(home, LinearHook, has["linears"] or has["lora"])
    _keep_hook(home, ModuleHook, has["modules_to_save"])


def set_callers(callers: Sequence[nn.Module], needed: bool) -> None:
    """Let the decoder and its layers say which routing they run under, or no longer."""
    for module in callers:
        _keep_hook(module, EnterHook, needed)
        _keep_hook(module, LeaveHook, needed)
        recompute = vars(module).get("_gradient_checkpointing_func")
        if not needed and isinstance(recompute, Recompute):
            module._gradient_checkpointing_func = recompute.func  # type: ignore[assignment]


def _keep_hook(module: Any, kind: Any, needed: bool) -> None:
    """Let a module have one hook of this class, or none."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    found = [key for table in tables for key, hook in table.items() if isinstance(hook, kind)]
    if needed and not found:
        if kind in (EnterHook, ScaleHook):
            module.register_forward_pre_hook(kind(), with_kwargs=kind is EnterHook)
        else:
            module.register_forward_hook(kind(), always_call=kind is LeaveHook)
    for key in () if needed else found:
        for table in (*tables, module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
            table.pop(key, None)


class PartsHook:
    """A hook of ours; a forward that no adapter with parts serves is the same without it."""


class EnterHook(PartsHook):
    """Forward pre-hook of the decoder and its layers: the routing they were called with is the current one."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        routing: Routing | None = kwargs.get(ROUTING)
        if routing is not None:
            routing.refuse_removed()
        # transformers recomputes a layer's activations by its `forward`, past its hooks.
        recompute = vars(module).get("_gradient_checkpointing_func")
        if recompute is not None and not isinstance(recompute, Recompute):
            module._gradient_checkpointing_func = Recompute(recompute)
        enter(module, routing)


class LeaveHook(PartsHook):
    """Forward hook of the decoder and its layers, also after an exception: the current routing is that before."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: Any, output: Any) -> None:
        """See `torch.nn.Module.register_forward_hook`."""
        routing = current_routing()
        leave(module)
        if routing is not None and output is not None:
            routing.refuse_removed()


class Recompute:
    """A checkpointing function of transformers' whose layers find, when they are computed anew, the same routing."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `torch.utils.checkpoint.checkpoint`."""
        routing = current_routing()

        def again(*inner: Any, **named: Any) -> Any:
            with under(routing):
                return forward(*inner, **named)

        return self.func(again, *args, **kwargs)


class Here(NamedTuple):
    """Each adapter's part at a module, and which of them serves each row, or span of a packed row."""

    parts: list[Any]
    rows: Tensor | None
    spans: tuple[int, ...] | None

    def apply(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`function` of `scale_bias` on these [B, T, ...], or [B x T, ...], and what serves them."""
        if self.spans is None:
            return function(*tensors, self.parts, self.rows)
        pieces = zip(self.parts, *(tensor.split(self.spans, -2) for tensor in tensors), strict=True)
        return torch.cat([function(*piece, [part], None) for part, *piece in pieces], -2)


def _parts_here(module: nn.Module, kind: str, x: Tensor) -> Here | None:
    """What the current routing has at a module; None where there is nothing."""
    routing, slot = current_routing(), getattr(module, PARTS_SLOT + kind, None)
    if routing is None or slot is None:
        return None
    parts = [slot.get(adapter) for adapter in routing.adapters]
    routing.refuse_removed()
    if not any(part is not None for part in parts):
        return None
    rows, spans = routing.rows, routing.spans
    if (rows is not None and len(x) % len(rows)) or (spans is not None and x.shape[-2] != sum(spans)):
        count = f"{len(rows)} rows" if rows is not None else f"{sum(spans or ())} tokens"
        raise AdapterError(
            f"{type(module).__name__} got {x.shape[-2 if rows is None else 0]} inputs for {count}, so nobody knows "
            "whose they are: use one adapter for the whole batch."
        )
    return Here(parts, rows, spans)


class ScaleHook(PartsHook):
    """Forward pre-hook of a linear."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        found = _parts_here(module, "linears", args[0])
        return None if found is None else (found.apply(scaled, args[0]), *args[1:])


class LinearHook(PartsHook):
    """Forward hook of a linear: bias and LoRA."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """See `torch.nn.Module.register_forward_hook`."""
        found = _parts_here(module, "lora", args[0])
        if found is not None:
            output = found.apply(with_low_rank, output, args[0])
        found = _parts_here(module, "linears", args[0])
        return output if found is None else found.apply(biased, output)


class NormHook(PartsHook):
    """Forward hook of a norm."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """See `torch.nn.Module.register_forward_hook`."""
        found = _parts_here(module, "norms", args[0])
        return output if found is None else found.apply(partial(normed, module), args[0], output)


class ModuleHook(PartsHook):
    """Forward hook of a module that adapters have copies of their own of."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """See `torch.nn.Module.register_forward_hook`."""
        if len(args) != 1 or not isinstance(output, Tensor):
            raise AdapterError(
                f"{type(module).__name__} takes more than one tensor, so it cannot be in modules_to_save."
            )
        found = _parts_here(module, "modules_to_save", args[0])
        return output if found is None else found.apply(replaced, args[0], output)
