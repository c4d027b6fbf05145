"""What a run perceives: the condition that its recipe asks for, and the features of the files that its data name."""

import logging
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from llama_adapter.conditions.config import ConditionConfig, is_python
from llama_adapter.conditions.perception import Perception, condition_config
from llama_adapter.conditions.python_towers import PythonTower, load_python_tower
from llama_adapter.conditions.towers import CPU
from llama_adapter.errors import ConfigError
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.prepare import Prepared

log = logging.getLogger(__name__)


def tower_of(config: TrainConfig, device: torch.device = CPU) -> PythonTower | None:
    """The tower that Python code makes, where a recipe names one; its code runs here.

    Raises:
        ConfigError, ModelError: see `llama_adapter.conditions.python_towers.load_python_tower`.
    """
    if config.condition is None or not is_python(config.tower):
        return None
    return load_python_tower(config.value("tower"), config.condition, device)


def condition_of(config: TrainConfig, data: Prepared, tower: PythonTower | None = None) -> ConditionConfig | None:
    """The condition that a recipe asks for; of towers other than `tower_of`'s only the configuration is read.

    Raises:
        ConfigError: there is a condition and nothing in the data to perceive, or no early fusion for `disjoint`.
        LlamaAdapterError: see `llama_adapter.conditions.perception.condition_config`.
    """
    files = data.media()
    if config.disjoint and not config.condition_layers:
        raise ConfigError(
            "disjoint needs early fusion, where pictures have gates of their own: pass --condition-layers N."
        )
    if config.condition is None:
        if files:
            log.warning("%d files in the data are not looked at: pass --condition image", len(files))
        return None
    if not files:
        raise ConfigError(
            f"condition is {config.condition}, and no record names a file: give data with 'image' keys, or leave "
            "--condition out."
        )
    return condition_config(
        config.condition,
        config.value("tower") if tower is None else tower,
        config.tower_depths,
        width=config.value("condition_width"),
        activation=config.value("condition_activation"),
        absent=config.value("absent"),
        blocks=config.value("visual_blocks"),
        block_width=config.value("visual_width"),
        block_heads=config.value("visual_heads"),
        layers=config.condition_layers,
        visual_len=config.visual_len,
    )


def look(
    condition: ConditionConfig,
    config: TrainConfig,
    data: Prepared,
    accelerator: Accelerator,
    tower: PythonTower | None = None,
) -> Perception:
    """Load the tower, or take the one of `tower_of`, and compute the features of every file that the data name.

    Raises:
        ModelError: the tower is damaged.
        DataError: a file is damaged or of another kind.
    """
    named = [] if tower is None else [tower]
    perception = Perception(condition, accelerator.device, config.feature_cache, towers=named)
    # With a feature cache the first process fills it for all; without, each of them needs features of its own.
    with accelerator.main_process_first() if config.feature_cache else nullcontext():
        perception.prepare(data.media())
    return perception
