"""What is settled before a run: the adapter that it goes on from, and whether the packages that it needs are there."""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PretrainedConfig

from llama_adapter.base import empty_base, load_config
from llama_adapter.conditions.config import ConditionConfig, check_digest, is_python, unnamed
from llama_adapter.core.config import AdapterConfig, WrittenAs
from llama_adapter.core.families import shape_of
from llama_adapter.data import Encoded
from llama_adapter.data.limits import Limits
from llama_adapter.errors import ConfigError, MissingExtraError
from llama_adapter.formats.load import check_parts_fit, find_adapter, read_adapter
from llama_adapter.formats.native import check_base, names_another_base
from llama_adapter.formats.stored import Hints
from llama_adapter.settings import shown
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import DEFAULTS, IDLE, VISUAL, TrainConfig, idle_settings, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
FROM_CONDITION = {
    "tower": "tower", "tower_depths": "depths", "condition_width": "width", "condition_activation": "activation",
    "absent": "absent", "visual_blocks": "blocks", "visual_width": "block_width", "visual_heads": "block_heads",
    "condition_layers": "layers", "visual_len": "visual_len",
}  # fmt: skip
"""Settings of a recipe, and what they are called in an adapter's condition."""
SHARED = {setting.name for setting in fields(AdapterConfig)} & DEFAULTS.keys() - {"template", "condition"}
INHERITED = SHARED | FROM_CONDITION.keys() | {"model", "template", "condition"}
"""What a recipe takes over from the adapter that it goes on from."""


@dataclass(frozen=True)
class Start:
    """The adapter that a run goes on from."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]


def read_start(source: str, base: str | None = None) -> Start:
    """The adapter at `source`, of any format that `read_adapter` reads; the base only where one is named.

    Raises:
        AdapterError: there is none, it is damaged, or it is for another base.
    """
    found = read_adapter(find_adapter(source), Hints(None if base is None else shape_of(load_config(base))))
    for note in found.notes:
        log.warning("%s: %s", source, note)
    return Start(found.config, found.tensors)


def settle(config: TrainConfig) -> tuple[TrainConfig, Start | None]:
    """The recipe with the settings of the adapter in `init_from`, and that adapter; (recipe, None) without one.

    A run that is resumed has both in its own folder: `init_from` may be gone by then. One that was killed before its
    first checkpoint begins once more.

    Raises:
        AdapterError: there is no sound adapter.
        ConfigError: the recipe asks for another adapter than that, or would write over it.
    """
    if config.init_from is None:
        return config, None
    if config.resume and RunFolder(config.output_dir).has_checkpoint():
        recipe = Path(config.output_dir) / "recipe.yaml"
        named = {} if config.tower is None else {"tower": config.tower}
        before = load_recipe(str(recipe), named) if recipe.is_file() else config
        open_ones = [name for name in INHERITED if getattr(config, name) in (None, DEFAULTS[name])]
        return replace(config, **{name: getattr(before, name) for name in open_ones}), None
    source, output = Path(config.init_from).resolve(), Path(config.output_dir).resolve()
    if source.exists() and output in (source, *source.parents):
        raise ConfigError(
            f"init_from {config.init_from} lies in the output folder {config.output_dir}: choose another --output-dir, "
            "or go on with the same run by --resume and more --epochs."
        )
    start = read_start(config.init_from, config.model)
    found = settings_of(start.config)
    if is_python(found.get("tower")):  # code, which no adapter's file can ask for; `adapter_of` compares weights
        if not is_python(config.tower):
            raise ConfigError(f"{config.init_from}: {unnamed(found['tower'])}")
        found["tower"] = config.tower
    given = {name: getattr(config, name) for name in found if getattr(config, name) not in (None, DEFAULTS[name])}
    other = [f"{name} is {found[name]!r}, not {value!r}" for name, value in given.items() if value != found[name]]
    if other:
        raise ConfigError(
            f"The adapter in {config.init_from} has settings of its own ({', '.join(other)}): leave those out, or "
            "train anew without --init-from."
        )
    model = config.model or start.config.base_model_name_or_path
    if warning := names_another_base(start.config, model):
        log.warning("%s: %s", config.init_from, warning)
    settled = replace(config, **{**found, "model": model})
    idle = idle_settings({**vars(settled), "init_from": None})
    if idle:
        raise ConfigError("; ".join(idle.values()))
    return settled, start


def settings_of(adapter: AdapterConfig) -> dict[str, Any]:
    """The recipe's settings that an adapter has fixed for whoever trains it on."""
    found: dict[str, Any] = {name: getattr(adapter, name) for name in SHARED}
    if adapter.template is not None:
        found["template"] = None if adapter.template == "raw" else adapter.template
    found["condition"] = None
    condition = adapter.condition
    if isinstance(condition, ConditionConfig):
        idle = IDLE.get(condition.kind, VISUAL)
        found["condition"] = condition.kind
        found |= {name: getattr(condition, key) for name, key in FROM_CONDITION.items() if name not in idle}
    return found


def check_start(start: Start | None, config: TrainConfig, base: PretrainedConfig) -> None:
    """Refuse an adapter that was made for another base.

    Raises:
        AdapterError: naming what differs.
    """
    if start is not None:
        check_base(start.config, shape_of(base), config.init_from)
        if start.config.has_parts:
            check_parts_fit(start.config, start.tensors, empty_base(base), config.init_from)


def start_text(
    config: TrainConfig, example: Encoded, tokenizer: "PreTrainedTokenizerBase", limits: Limits
) -> list[int] | None:
    """The tokens that prompts start from; None where they are drawn.

    Args:
        config: the recipe.
        example: the first training example.
        tokenizer: the base's.
        limits: what the base takes.

    Raises:
        ConfigError: they are fewer than the prompts, or more than the base takes.
        DataError: the base does not know one.
    """
    text, needed = config.prompt_init_text, config.value("adapter_len")
    if text is None:
        return None
    ids: list[int] = example.input_ids if text == "data" else tokenizer(text)["input_ids"]
    if len(ids) < needed:
        what = "first training example" if text == "data" else f"prompt_init_text {shown(text)}"
        raise ConfigError(
            f"The {what} has {len(ids)} tokens, fewer than adapter_len {needed}, the prompts that start from it: give "
            "a longer text, or lower --adapter-len."
        )
    if limits.positions is not None and len(ids) > limits.positions:
        raise ConfigError(
            f"prompt_init_text {shown(text)} has {len(ids)} tokens and the base takes {limits.positions}: shorten it."
        )
    limits.check_ids([ids], tokenizer)
    return ids


def check_written_alike(start: Start | None, raw: bool) -> None:
    """Refuse data that are written in another way than those that the adapter was trained on.

    Raises:
        ConfigError: text without a template for an adapter that asks with one, or the other way round.
    """
    template = None if start is None else start.config.template
    if template is not None and (template == "raw") != raw:
        has = "prompt-completion records, without a template" if template == "raw" else f"the template {template}"
        what = "have a 'prompt', which takes none: call it 'instruction'" if raw else "take a template"
        raise ConfigError(
            f"The adapter was trained on {has}, and these records {what}, or train anew without --init-from."
        )


def adapter_of(config: TrainConfig, start: Start | None, condition: ConditionConfig | None, raw: bool) -> AdapterConfig:
    """The adapter that a run trains: the recipe's, or the one that it goes on from, asked as the data are written.

    Raises:
        AdapterError: the tower that Python code makes has other weights than the one that it goes on from.
    """
    template: WrittenAs = "raw" if raw else config.value("template")
    if start is not None:
        before = start.config.condition
        if isinstance(before, ConditionConfig) and condition is not None and is_python(condition.tower):
            check_digest(before, condition.tower, condition.tower_digest)
            before = replace(before, tower=condition.tower)
        return replace(start.config, condition=before, template=template, base_model_name_or_path=config.value("model"))
    return replace(config.adapter_config(), condition=condition, template=template)


def check_extras(config: TrainConfig) -> None:
    """Check that the packages are installed that a recipe names outright.

    Raises:
        MissingExtraError: one is not; the message has the command that installs it.
    """
    for tracker in config.trackers:
        if tracker != "none" and not is_installed(tracker):
            raise MissingExtraError(tracker, None if tracker == "tensorboard" else tracker, f"--trackers {tracker}")
    if config.condition == "audio":
        for package in ("soundfile", "soxr"):
            if not is_installed(package):
                raise MissingExtraError(package, "audio", "--condition audio")


def chosen_trackers(config: TrainConfig) -> list[str]:
    """What a run logs to beside metrics.jsonl: by default TensorBoard, where it is installed."""
    if not config.trackers:
        return ["tensorboard"] if is_installed("tensorboard") else []
    return [name for name in config.trackers if name != "none"]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of that name, such as the one that wandb writes, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
