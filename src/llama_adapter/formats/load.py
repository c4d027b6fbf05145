"""An adapter of any format onto a model: found here or on the hub, recognised, checked, loaded."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.core.config import AdapterConfig, GateActivation
from llama_adapter.core.families import shape_of
from llama_adapter.core.model import active_adapter, add_adapter
from llama_adapter.core.parts import part_shapes
from llama_adapter.core.routing import Adapter
from llama_adapter.errors import AdapterError, ConfigError
from llama_adapter.formats.foreign import read_foreign
from llama_adapter.formats.hub import download, hub_name
from llama_adapter.formats.native import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_base,
    names_another_base,
    read_config,
    read_facts,
    read_tensors,
    tensor_shapes,
)
from llama_adapter.formats.stored import NOTHING_SAID, Hints, Reading

log = logging.getLogger(__name__)
HUB_FILES = [CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"]


def load_adapter(
    model: PreTrainedModel,
    source: str | os.PathLike[str],
    name: str = "default",
    *,
    activate: bool = False,
    replace: bool = False,
    trainable: bool = False,
    revision: str | None = None,
    gate_activation: GateActivation | None = None,
    adapter_len: int | None = None,
    block_heads: int | None = None,
) -> Adapter:
    """Read an adapter onto `model`.

    Args:
        model: a base of the shape the adapter was made for.
        source: a folder that `save_adapter` wrote, another program's adapter (see `read_adapter`), or where there is
            neither, a hub repository "owner/name[@revision]".
        name: what the adapter is called on this model.
        activate: whether it becomes the active one; it does in any case where none is active.
        replace: take the place of an adapter of that name, which stays if the new one cannot be read or added.
        trainable: whether its parameters take gradients.
        revision: branch, tag or commit of a hub repository.
        gate_activation: how the gates of an authors' V1 file are meant, which it does not say.
        adapter_len: how many prompts a layer has, where an authors' V1 file is not of the usual 10.
        block_heads: attention heads in an authors' V2 projector, where they are not the usual 16.

    Raises:
        AdapterError: no adapter there, damaged or foreign files, one made for a base of another shape, or a name
            that is taken.
        UnsupportedModelError: the family cannot be adapted.
    """
    folder = find_adapter(source, revision)
    found = read_adapter(folder, Hints(shape_of(model.config), None, gate_activation, adapter_len, block_heads), model)
    if warning := names_another_base(found.config, model.config.name_or_path):
        log.warning("%s: %s", source, warning)
    adapter = place_adapter(model, found, name, source, activate=activate, replace=replace)
    for parameter in adapter.parameters():
        parameter.requires_grad_(trainable)
    return adapter


def place_adapter(
    model: PreTrainedModel, found: Reading, name: str, source: object, activate: bool = False, replace: bool = False
) -> Adapter:
    """Put an adapter that was read onto a base, frozen; see `load_adapter` for the arguments.

    Raises:
        AdapterError: the name is taken.
        UnsupportedModelError: the family cannot be adapted.
    """
    for note in found.notes:
        log.warning("%s: %s", source, note)
    activate = activate or active_adapter(model) is None
    adapter = add_adapter(model, found.config, name, activate=activate, replace=replace, state_dict=found.tensors)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    return adapter


def read_adapter(
    source: str | os.PathLike[str],
    hints: Hints = NOTHING_SAID,
    model: PreTrainedModel | None = None,
) -> Reading:
    """An adapter of any format: ours, the authors' (V1, V2, chat65b, ImageBind), PEFT's or LitGPT's, told by content.

    Args:
        source: a folder or a file.
        hints: what a source may leave open, and the base that it has to fit.
        model: that base, with weights or without, where norms, biases, scales and LoRA are to fit too.

    Raises:
        AdapterError: no adapter there, damaged or foreign files, one for a base of another shape, or one that leaves
            open what `hints` do not say either.
        ModelError: it is a base in Meta's layout.
    """
    found = read_foreign(source, hints)
    if found is None:
        config = read_config(source)
        if hints.base_shape is not None:  # before the tensors are read
            check_base(config, hints.base_shape, source)
        tensors = read_tensors(source, config, model)
        found = Reading("llama-adapter", config, tensors, len(tensors), facts=read_facts(source))
    else:
        if hints.base_shape is not None:
            check_base(found.config, hints.base_shape, source)
        if model is not None:
            check_parts_fit(found.config, found.tensors, model, source)
    if hints.gate_activation not in (None, found.config.gate_activation):
        raise AdapterError(
            f"The gates in {source} ({found.kind}) are used with {found.config.gate_activation}, not with "
            f"{hints.gate_activation}: leave the gate activation out."
        )
    return found


def check_parts_fit(
    config: AdapterConfig, tensors: Mapping[str, Tensor], model: PreTrainedModel, source: object
) -> None:
    """Refuse an adapter whose norms, scales, biases or LoRA are not of the sizes of a base, weights or not.

    Raises:
        AdapterError: naming the first that differs.
    """
    try:
        wanted = tensor_shapes(config) | part_shapes(config, model)
    except ConfigError as error:
        raise AdapterError(f"{source}: {error}") from None
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = next((key for key in sorted(wanted.keys() | shapes) if wanted.get(key) != shapes.get(key)), None)
    if wrong is not None:
        raise AdapterError(
            f"{source} does not fit this base: {wrong} is {shapes.get(wrong, 'missing')}, and should be "
            f"{wanted.get(wrong, 'no part of it')}."
        )


def find_adapter(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where an adapter lies; where `source` is no path here but "owner/name", its files come from the hub.

    "owner/name@revision" is a revision too.

    Raises:
        AdapterError: the hub has no such repository or revision, or cannot be reached; or two revisions are given.
    """
    path = Path(os.path.expanduser(source))
    found = hub_name(source) if isinstance(source, str) and not os.path.lexists(path) else None
    if found is None:
        return path
    if revision is not None and found[1] not in (None, revision):
        raise AdapterError(f"{source} names a revision, and revision is '{revision}': give one.")
    folder = download(found[0], revision or found[1], HUB_FILES)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{source} has no {CONFIG_FILE}: give a repository that push_adapter wrote.")
    return folder
