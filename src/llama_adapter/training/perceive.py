"""What a run perceives: the condition that its recipe asks for, and the features of the files that its data name."""

import logging
from contextlib import nullcontext

from accelerate import Accelerator

from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.perception import Perception, condition_config
from llama_adapter.errors import ConfigError
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.prepare import Prepared

log = logging.getLogger(__name__)


def condition_of(config: TrainConfig, data: Prepared) -> ConditionConfig | None:
    """The condition that a recipe asks for; only the tower's configuration is read.

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
        config.value("tower"),
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


def look(condition: ConditionConfig, config: TrainConfig, data: Prepared, accelerator: Accelerator) -> Perception:
    """Load the tower and compute the features of every file that the data name.

    Raises:
        ModelError: the tower is damaged.
        DataError: a file is damaged or of another kind.
    """
    perception = Perception(condition, accelerator.device, config.feature_cache)
    # With a feature cache the first process fills it for all; without, each of them needs features of its own.
    with accelerator.main_process_first() if config.feature_cache else nullcontext():
        perception.prepare(data.media())
    return perception
