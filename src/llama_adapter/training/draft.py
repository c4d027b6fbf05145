"""A run before its base is loaded: its folder, its data, and the adapter that it will train."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PretrainedConfig, PreTrainedModel

from llama_adapter.base import load_tokenizer
from llama_adapter.conditions.config import ConditionConfig
from llama_adapter.conditions.perception import Perception
from llama_adapter.conditions.python_towers import PythonTower
from llama_adapter.core.config import AdapterConfig
from llama_adapter.core.model import add_adapter, resolve_layers
from llama_adapter.core.warm_start import prompts_from_text
from llama_adapter.data.limits import Limits
from llama_adapter.errors import ConfigError, LlamaAdapterError
from llama_adapter.formats.push import open_repository
from llama_adapter.training.agreement import check_agreed
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.edited import tell_edited
from llama_adapter.training.learner import Learner
from llama_adapter.training.optimizer import build_optimizer
from llama_adapter.training.perceive import condition_of, look, tower_of
from llama_adapter.training.prepare import Prepared, prepare
from llama_adapter.training.start import Start, adapter_of, check_written_alike, start_text

log = logging.getLogger(__name__)
_NAMED: "ContextVar[_Names | None]" = ContextVar("run that is logged of", default=None)


ALIKE = (
    "model", "precision", "base_precision", "load_in_4bit", "load_in_8bit", "micro_batch_size", "packing",
    "gradient_checkpointing", "compile", "tensor_parallel",
)  # fmt: skip
"""Settings of the base and of its forwards: alike for all experts of one run."""


def check_alike(recipes: Mapping[str, TrainConfig]) -> None:
    """Check that recipes can be trained together, by name.

    Raises:
        ConfigError: they differ in a setting of `ALIKE`.
    """
    for name, config in recipes.items():
        first = next(iter(recipes))
        for setting in ALIKE:
            mine, theirs = config.value(setting), recipes[first].value(setting)
            if mine != theirs:
                raise ConfigError(
                    f"{setting} is {mine!r} in {name} and {theirs!r} in {first}: it must be alike for all of one "
                    "run, so give it once, beside 'runs'."
                )


@dataclass(frozen=True)
class Draft:
    """A run when all that can be wrong with it has been looked at."""

    name: str
    config: TrainConfig
    start: Start | None
    folder: RunFolder
    data: Prepared
    condition: ConditionConfig | None
    adapter: AdapterConfig
    text: list[int] | None = None
    """Tokens that its prompts start from."""
    tower: PythonTower | None = None

    def perceive(self, accelerator: Accelerator) -> Perception | None:
        """What looks at the files of its data, where there is a condition."""
        if self.condition is None:
            return None
        return look(self.condition, self.config, self.data, accelerator, self.tower)

    def expert(self, model: PreTrainedModel, perception: Perception | None, is_main: bool) -> Learner:
        """Its parameters on the base, as they are without a checkpoint."""
        torch.manual_seed(self.config.seed)
        tensors = None if self.start is None else self.start.tensors
        adapter = add_adapter(model, self.adapter, self.name, state_dict=tensors)
        if self.text is not None:
            prompts_from_text(model, adapter, self.text)
        optimizer = build_optimizer(adapter, self.config)
        return Learner(
            self.config, self.folder, self.data, model, adapter, optimizer, perception=perception, is_main=is_main
        )


def read_drafts(
    settled: Mapping[str, tuple[TrainConfig, Start | None]],
    folders: Mapping[str, RunFolder],
    accelerator: Accelerator,
    base: PretrainedConfig,
) -> list[Draft]:
    """Lock and check the folders of all runs, then read the data of each.

    Raises:
        LlamaAdapterError: a folder holds something else, or data cannot be used.
    """
    for name, (config, _) in settled.items():
        if accelerator.is_main_process:
            with telling(name, settled):
                folders[name].lock()
                folders[name].check(config)
                if config.push_to_hub:
                    open_repository(config.push_to_hub)
    (times,) = broadcast_object_list([{name: folders[name].now(config) for name, (config, _) in settled.items()}])
    drafts = []
    tokenizer = load_tokenizer(next(config for config, _ in settled.values()).value("model"))
    limits = Limits.of(base)
    for name, (config, start) in settled.items():
        with telling(name, settled):
            data = prepare(config, tokenizer, limits, times.get(name))
            check_written_alike(start, data.raw)
            text = start_text(config, data.train[0], tokenizer, limits)
            check_agreed(config, data.digest, folders[name].finished_steps() if config.resume else 0, list(settled))
            if config.resume:
                folders[name].check_data(data.digest)
            if accelerator.is_main_process:
                folders[name].check_length(config, data.steps_per_epoch(config))
                tell_edited(folders[name], config)
            log.info("data: %s", ", ".join(f"{value} {key}" for key, value in data.report().items()))
            tower = tower_of(config, accelerator.device)
            condition = condition_of(config, data, tower)
            adapter = adapter_of(config, start, condition, data.raw)
            resolve_layers(adapter, base)  # again, with the condition's layers
            drafts.append(Draft(name, config, start, folders[name], data, condition, adapter, text, tower))
    return drafts


@contextmanager
def telling(name: str, runs: Collection[object]) -> Iterator[None]:
    """Of several runs say which one an error, or what is logged on the way, is about."""
    try:
        with naming(name, runs):
            yield
    except LlamaAdapterError as error:
        if len(runs) > 1:
            error.args = (f"{name}: {error}",)
        raise


@contextmanager
def naming(name: str, runs: Collection[object]) -> Iterator[None]:
    """The part of `telling` that is about what is logged: by whichever module, as most do not know of other runs."""
    names = _Names(name)
    named = _NAMED.set(names)
    loggers = [logging.getLogger("llama_adapter")] if len(runs) > 1 else []
    for logger in loggers:
        logger.handlers.insert(0, names)  # before those that write; root's come after all of ours
    try:
        yield
    finally:
        _NAMED.reset(named)
        for logger in loggers:
            logger.removeHandler(names)


class _Names(logging.Handler):
    """Writes nothing, and puts a run's name in front of what the handlers behind it write; of its own thread alone."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        if _NAMED.get() is self:
            record.msg, record.args = f"{self.run}: {record.getMessage()}", ()
