"""Adapters on a model: add, set, use, disable, remove.

Adapters live inside the attention modules they serve, as ordinary submodules; the model stays the ordinary
transformers model it was. Which adapter serves which row travels with every forward as a keyword argument, put there
by one hook on the decoder, and reaches the attention through transformers' own plumbing. Beside that hook the model
gets a `generate` that takes `adapter_names`. Nothing else is changed.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace as with_values

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.families import family_of, shape_of, text_config
from llama_adapter.core.registry import REGISTRY, Registry, active_of, find_registry, known, registry_of
from llama_adapter.core.routing import Adapter, Names
from llama_adapter.core.scope import Block
from llama_adapter.core.tensor_parallel import as_first, check_tensor_parallel
from llama_adapter.errors import AdapterError, ConfigError


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
        UnsupportedModelError: the family cannot be adapted, or a tensor-parallel base not in this way.
        ConfigError: more layers asked for than the base has.
        AdapterError: the name is taken or malformed, or the adapter to replace is in use.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel around the one that is meant
        model = model.get_base_model()
    config = config or AdapterConfig()
    family_of(model.config)
    check_tensor_parallel(model, config)
    layers = resolve_layers(config, model.config)
    check_name(name)
    registry = vars(model).get(REGISTRY) or Registry(model)
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
        for parameter in adapter.parameters():
            as_first(model, parameter.data)
        if not registry.attached:
            registry.attach()
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

    Early fusion leaves its own layers out.

    Raises:
        ConfigError: more layers than the base has.
    """
    num_layers = int(text_config(base).num_hidden_layers)
    early = (None if config.condition is None else config.condition.layers) or 0
    layers = max(1, num_layers - max(2, early)) if config.adapter_layers is None else config.adapter_layers
    if layers > num_layers:
        raise ConfigError(
            f"adapter_layers is {layers}, but the base has {num_layers} layers: choose 1 to {num_layers}."
        )
    if layers + early > num_layers:
        raise ConfigError(
            f"The first {early} layers for the condition and the top {layers} for the prompts overlap in a base of "
            f"{num_layers} layers: choose fewer."
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
    registry = registry_of(model)
    return Block(registry.scope, registry.request(names, condition))


def disable_adapter(model: nn.Module) -> Block:
    """Within the block, forwards of `model` are the bare base's; `use_adapter` with None."""
    return use_adapter(model, None)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, which serves all forwards that name none; None is the bare base.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    registry = registry_of(model)
    registry.active = None if name is None else known(registry, name).name


def get_adapter(model: nn.Module, name: str | None = None) -> Adapter:
    """The handle of adapter `name`, by default of the active one.

    Raises:
        AdapterError: there is none of that name, or none is active.
    """
    registry = registry_of(model)
    return known(registry, active_of(registry) if name is None else name)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, oldest first; empty for a model that was never adapted."""
    registry = find_registry(model)
    return [] if registry is None else list(registry.adapters)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter; None where the bare base answers."""
    registry = find_registry(model)
    return None if registry is None else registry.active


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off, by default the active one. After the last one the model is the base again.

    Afterwards no adapter is active if it was; what was trainable before the first adapter is so after the last.

    Raises:
        AdapterError: there is no adapter of that name, none is active, or it is in use.
    """
    registry = registry_of(model)
    with registry.lock:
        name = active_of(registry) if name is None else name
        known(registry, name)
        registry.place(name, None)
        if not registry.adapters:
            registry.detach()


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """The bare base of an adapted model as a model object of its own, on the same weights: no second copy of them.

    For whoever wants the policy before training beside the one that is trained:

        DPOTrainer(model, ref_model=reference_model(model), ...)

    Raises:
        AdapterError: the model was never adapted.
    """
    registry_of(model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    registry = registry_of(twin)
    registry.frozen = []  # they are the original's too, and stay as that wants them
    for name in list_adapters(twin):
        remove_adapter(twin, name)
    return twin.eval()
