"""What a finished run says of itself on its adapter's card."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llama_adapter import __version__
from llama_adapter.formats.card import card_text, public_name, write_card
from llama_adapter.formats.hub import hub_name
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.settings import BUNDLED
from llama_adapter.training.config import TrainConfig

SHOWN_ELSEWHERE = {"model", "data", "val_data", "lr", "base_lr", "batch_size", "tower"}
OF_THE_MACHINE = {
    "output_dir", "resume", "overwrite", "trackers", "feature_cache", "push_to_hub", "save_every", "eval_every",
}  # fmt: skip
"""Settings that no reader of a card needs; some are paths, which are nobody's business."""


def write_run_card(config: TrainConfig, result: Mapping[str, Any], learnt_from: str, val_examples: int) -> None:
    """Write the card of a run's adapter into its folder; an edited one is kept.

    Args:
        config: the run's.
        result: the fields of its `TrainResult`.
        learnt_from: how many examples that were, in a few words.
        val_examples: how many it was measured on.

    Raises:
        AdapterError: the folder cannot be written.
    """
    sources = [*config.data, *config.val_data]
    names = ", ".join(_data_name(source) for source in sources)
    rows: dict[str, object] = {
        "data": f"{names}: {learnt_from}, {val_examples:,} to validate",
        "training": f"{result['steps']:,} steps of {config.batch_size} examples, learning rate {config.peak_lr:g}",
    }
    before, best = result["base_val_loss"], result["best_val_loss"]
    if best is not None:
        rows["validation loss"] = f"{best:.4f} at step {result['best_step']}, {before:.4f} before training"
    others = {field.name: field.default for field in fields(config)}
    if config.max_steps is not None:  # which takes the place of the epochs that the recipe has
        del others["epochs"]
    changed = [
        f"{name} {_shown(getattr(config, name))}"
        for name, default in others.items()
        if name not in SHOWN_ELSEWHERE | OF_THE_MACHINE and getattr(config, name) != default
    ]
    rows["other settings"] = ", ".join(changed) or "the defaults"
    rows["made with"] = f"llama-adapter {__version__}"
    on_hub = tuple(name for source in sources if (name := _hub_data(source)))
    folder = result["output_dir"]
    write_card(folder, card_text(describe_adapter(folder), rows, tuple(dict.fromkeys(on_hub))))


def _shown(value: object) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(public_name(item) if isinstance(item, str) and os.sep in item else _plain(item) for item in values)


def _plain(value: object) -> str:
    """The value as somebody writes it: 2 records, where the setting also takes a share, are not 2.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _data_name(source: str) -> str:
    if source == BUNDLED:
        return "the instructions that come with llama-adapter"
    kind, colon, rest = source.partition(":")
    return f"{kind}:{public_name(rest)}" if colon and os.sep in rest else public_name(source)


def _hub_data(source: str) -> str | None:
    """The name of data on the hub, of "owner/name" or "owner/name:split"."""
    found = None if os.path.lexists(source) or source.endswith((".json", ".jsonl")) else hub_name(source.split(":")[0])
    return None if found is None else found[0]
