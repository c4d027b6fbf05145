"""One adapter in training: its recipe, folder, data, parameters and optimiser, and how far it is.

A run (`loop.py`) trains one of them or many on one base; whatever is one expert's own is here.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.base import first_sentence
from llama_adapter.conditions.perception import Perception
from llama_adapter.core.routing import Adapter
from llama_adapter.data import Encoded
from llama_adapter.errors import AdapterError, LlamaAdapterError, TrainingError
from llama_adapter.formats.native import save_adapter
from llama_adapter.formats.push import push_adapter
from llama_adapter.progress import SECONDS
from llama_adapter.training.card import write_run_card
from llama_adapter.training.checkpoint import Progress, RunFolder, Trained
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.feed import Feed
from llama_adapter.training.objective import Objective, Responses
from llama_adapter.training.optimizer import learning_rate
from llama_adapter.training.plots import plot_gates, plot_loss, plot_rewards
from llama_adapter.training.prepare import Prepared
from llama_adapter.training.start import chosen_trackers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `base_val_loss` is the validation loss before the first step: the bare base's, or that of the
    adapter in `init_from`."""

    output_dir: Path
    steps: int
    train_loss: float | None
    base_val_loss: float | None
    best_val_loss: float | None
    best_step: int


@dataclass(eq=False)
class Learner:
    """One adapter in training.

    Attributes:
        config: its recipe.
        folder: where it is written.
        data: what it learns from and is measured on.
        model: the base that it is on.
        adapter: its parameters.
        optimizer: over them.
        objective: what it minimises.
        perception: reads the files of its examples, where there is a condition.
        is_main: whether this process writes.
        progress: how far it is.
        feed: the batches of its steps.
        trackers: what its figures go to beside metrics.jsonl.
        failure: why it stopped before its end; the others of a run go on.
        said: when it last had a line of its own among many.
    """

    config: TrainConfig
    folder: RunFolder
    data: Prepared
    model: PreTrainedModel
    adapter: Adapter
    optimizer: torch.optim.AdamW
    objective: Objective = field(default_factory=Responses)
    perception: Perception | None = None
    is_main: bool = True
    progress: Progress = field(default_factory=Progress)
    trackers: list[Any] = field(default_factory=list)
    failure: LlamaAdapterError | None = None
    said: float = field(default_factory=time.monotonic)
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        self.feed = self.data.feed(self.config)

    @property
    def name(self) -> str:
        """Its adapter's on the model."""
        return self.adapter.name

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.data.steps_per_epoch(self.config)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.total_steps(self.per_epoch)

    @property
    def learns(self) -> bool:
        """Whether it has steps left."""
        return self.progress.step < self.total and self.failure is None

    @property
    def shared_layers(self) -> int:
        """How many of the base's lowest layers have nothing of the adapter's."""
        return 0 if self.adapter.modules else min(self.adapter.layers)

    def restore(self) -> None:
        """Go on from the newest checkpoint, where the recipe says so.

        Raises:
            TrainingError: it is damaged.
        """
        if self.config.resume:
            self.progress = self.folder.restore(self.adapter, self.optimizer)
        self.feed.seek(self.progress.position)

    def start_trackers(self) -> None:
        """Open what the recipe logs to.

        Raises:
            TrainingError: one of them cannot start.
        """
        if not self.is_main:
            return
        names, start = chosen_trackers(self.config), self.progress.step
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": str(self.folder.path), "purge_step": start or None}
        }
        try:
            self.trackers = [LOGGER_TYPE_TO_CLASS[name]("tensorboard", **options.get(name, {})) for name in names]
            for tracker in self.trackers:
                tracker.start()
        except Exception as error:  # each tracker has its own kinds, for no login as for no network
            raise TrainingError(
                f"The trackers ({', '.join(names)}) cannot start: {first_sentence(error)} Set them up, or go on with "
                f"--resume --output-dir {self.folder.path} --trackers none."
            ) from None

    def batch(self) -> list[Encoded]:
        """The examples of its next step; asked for once a step.

        Raises:
            DataError: streamed data cannot be read.
        """
        return self.feed.batch(self.progress.step)

    @property
    def mixes(self) -> bool:
        """Whether its rows may stand beside others' in a forward: texts whose answers it learns may."""
        return self.perception is None and isinstance(self.objective, Responses)

    @property
    def lr(self) -> float:
        """The learning rate of its next step."""
        return learning_rate(self.config, self.progress.step, self.total)

    def gradients(self) -> list[Tensor]:
        """Of its parameters; zeros where nothing has reached one, as in a process whose share of a batch was empty."""
        for parameter in self.adapter.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.adapter.parameters() if parameter.grad is not None]

    def clip(self) -> Tensor:
        """Clip the gradient's norm where the recipe says so; the norm before."""
        limit = self.config.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), limit)

    def update(self, loss: float, norm: float) -> None:
        """Take the step whose gradient is there.

        Raises:
            TrainingError: loss or norm is not finite; nothing has moved then.
        """
        lr = self.lr
        if not math.isfinite(norm) or not math.isfinite(loss):
            kept = f"the checkpoint in {self.folder.last} is kept" if self.folder.last.exists() else "no checkpoint yet"
            raise TrainingError(
                f"Loss {loss} and gradient norm {norm} at step {self.progress.step + 1} are not finite; "
                f"{kept}. Lower --lr (it is {lr:.3g}), or set --max-grad-norm 1."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimizer.step()
        self.progress.step, self.progress.position = self.progress.step + 1, self.feed.position

    def is_due(self, every: int) -> bool:
        """Whether what is done after so many steps, and after the last, is to be done now."""
        return self.progress.step % every == 0 or self.progress.step == self.total

    def validated(self, values: Mapping[str, float]) -> None:
        """Note what its objective is on validation data, and keep the adapter where its loss is the best so far."""
        loss = values["loss"]
        self.log(**{f"val_{name}": value for name, value in values.items()})
        if loss < self.progress.best_val_loss:
            self.progress.best_val_loss, self.progress.best_step = loss, self.progress.step
            if self.is_main:
                save_adapter(self.model, self.folder.path, self.name)

    def has_news(self) -> bool:
        """Whether enough time has passed since its last line for another; asked, it counts as said."""
        now = time.monotonic()
        news = now - self.said >= SECONDS
        self.said = now if news else self.said
        return news

    def save(self, whole: bool) -> None:
        """Write a checkpoint, or else the step's state alone."""
        state = Trained(self.adapter, self.optimizer, self.progress, self.data.digest, self.data.now)
        if self.is_main and whole:
            self.folder.save_checkpoint(self.model, state)
        elif self.is_main:
            self.folder.save_step(state)

    def log(self, **values: float) -> None:
        """One line of metrics.jsonl, and the trackers."""
        step = self.progress.step
        if self.is_main:
            self.folder.log({"step": step, "epoch": self.feed.epoch(step), **values})
            for tracker in self.trackers:
                tracker.log(values, step=step)

    def finish(self) -> TrainResult:
        """Write the pictures and the card, and sum the run up."""
        for tracker in self.trackers:
            tracker.finish()
        history = self.folder.history() if self.is_main else []
        if self.is_main:
            if not self.data.val:
                save_adapter(self.model, self.folder.path, self.name)
            plot_loss(history, self.folder.path / "loss.png", self.objective.unit)
            if self.config.method == "dpo":
                plot_rewards(history, self.folder.path / "rewards.png")
            gates = {i: layer.strength().tolist() for i, layer in self.adapter.layers.items()}
            if gates:
                plot_gates(gates, self.folder.path / "gates.png")
        result = self._result(history)
        if self.is_main:
            write_run_card(self.config, asdict(result), self.feed.summary(), len(self.data.val))
        return result

    def _result(self, history: Sequence[dict[str, Any]]) -> TrainResult:
        losses = [line["loss"] for line in history if "loss" in line]
        val_losses = [line["val_loss"] for line in history if "val_loss" in line]
        return TrainResult(
            output_dir=self.folder.path,
            steps=self.progress.step,
            train_loss=losses[-1] if losses else None,
            base_val_loss=val_losses[0] if val_losses else None,
            best_val_loss=min(val_losses, default=None),
            best_step=self.progress.best_step,
        )

    def push(self) -> None:
        """Push the adapter where the recipe says so.

        Raises:
            AdapterError: it could not be; the run is kept.
        """
        repository = self.config.push_to_hub
        if not repository or not self.is_main:
            return
        try:
            log.info("pushed: %s", push_adapter(self.folder.path, repository))
        except AdapterError as error:
            again = f"llama-adapter push {self.folder.path} {repository}"
            raise AdapterError(f"{error} The run is finished and kept; try again: {again}") from None
