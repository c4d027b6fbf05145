"""Settings that were changed in a run's own recipe between its start and a resume: `RunFolder.check` compares with that
file, and cannot see them."""

import dataclasses
import json
import logging
from typing import Any

from llama_adapter.errors import TrainingError
from llama_adapter.files import write_atomically, writing
from llama_adapter.settings import shown
from llama_adapter.training.checkpoint import MAY_CHANGE, SETTINGS_FILE, RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.start import FROM_CONDITION, SHARED

log = logging.getLogger(__name__)
MAY_MOVE = {"data", "val_data", "init_from"}
"""Paths that may have moved: a state knows its data by their content, and a run that has begun has its start itself."""
OF_ADAPTER = (SHARED | FROM_CONDITION.keys() | {"condition", "method"}) - {"tower"}
"""Settings of the adapter that is in a state, which cannot become another."""


def remember(folder: RunFolder, config: TrainConfig) -> None:
    """Note the settings of a run that begins or goes on, beside its recipe, which its owner may edit.

    Raises:
        AdapterError: the folder cannot be written.
    """
    with writing(folder.path):
        write_atomically(folder.path / SETTINGS_FILE, json.dumps(_settings(config), indent=1).encode())


def tell_edited(folder: RunFolder, config: TrainConfig) -> None:
    """Say which settings a resumed run has otherwise than it had in the steps that are done; they are followed.

    Raises:
        TrainingError: they would make another adapter.
    """
    done = folder.finished_steps() if config.resume else 0
    try:
        before = json.loads((folder.path / SETTINGS_FILE).read_bytes()) if done else {}
    except (OSError, ValueError):  # of a run that is older than this file
        return
    changed = {
        name: f"{name} is {shown(value)} and was {shown(before[name])} until step {done}"
        for name, value in _settings(config).items()
        if name in before and before[name] != value
    }
    if fixed := [sentence for name, sentence in changed.items() if name in OF_ADAPTER]:
        raise TrainingError(
            f"{folder.recipe} was edited: {', '.join(fixed)}, which is another adapter: put the old value back, or "
            "start again with --overwrite."
        )
    if changed:
        log.warning(
            "%s was edited: %s; the run goes on with the new, and ends otherwise than one that had it from its start",
            folder.recipe, ", ".join(changed.values()),
        )  # fmt: skip


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What decides what is learnt, as JSON gives it back."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in MAY_CHANGE | MAY_MOVE]
    settings: dict[str, Any] = json.loads(json.dumps({name: config.value(name) for name in names}, default=str))
    return settings
