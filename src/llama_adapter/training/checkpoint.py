"""The folder of a training run: what is in it, and how it survives a kill at any moment.

recipe.yaml                     every setting of the run
adapter_model.safetensors, adapter_config.json
                                the adapter with the best validation loss so far: this is what you use
last/                           the newest checkpoint: an adapter too, and
last/training_state.safetensors parameters, optimiser moments and step in one file, so that they never disagree
metrics.jsonl                   one line a step, one a validation
README.md                       the adapter's card, at the end
loss.png, gates.png             at the end
tensorboard/                    event files
"""

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from llama_adapter.core.routing import Adapter
from llama_adapter.errors import TrainingError
from llama_adapter.files import write_atomically, writing
from llama_adapter.formats.card import CARD_FILE, is_unedited
from llama_adapter.formats.native import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from llama_adapter.training.config import TrainConfig, read_recipe

STATE_FILE = "training_state.safetensors"
MAY_CHANGE = {
    "resume", "overwrite", "output_dir", "trackers", "eval_every", "save_every",
    "micro_batch_size", "gradient_checkpointing", "packing", "feature_cache", "push_to_hub",
    "epochs", "max_steps",
}  # fmt: skip
"""Settings that a resumed run may have otherwise than before: they do not change what is learnt, or, the last two, make
the run longer (`RunFolder.check_length`). From where it stands a longer run goes on as if it had been so long from its
start: at the learning rate that this step has in the longer run's warm-up and cosine."""


@dataclass
class Progress:
    """How far a run is: finished optimiser steps, and the best validation loss so far with its step."""

    step: int = 0
    best_val_loss: float = float("inf")
    best_step: int = 0


class RunFolder:
    """Reads and writes one run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        self.last = self.path / "last"
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"

    def check(self, config: TrainConfig) -> None:
        """Check that a run with these settings may write here; nothing is changed yet.

        Raises:
            TrainingError: the folder holds another run or other files, or none to resume, or is resumed with settings
                that would change what is learnt.
            AdapterError: it cannot be looked into.
        """
        with writing(self.path):  # a name too long, or a folder that may not be searched
            is_file = self.path.exists() and not self.path.is_dir()
            content = list(self.path.iterdir()) if self.path.is_dir() else []
        if is_file:
            raise TrainingError(f"{self.path} is a file: choose another --output-dir.")
        if content and not self.holds_run():
            raise TrainingError(
                f"{self.path} holds other files ({content[0].name}, ...) and no run: choose another --output-dir."
            )
        if content and not config.resume and not config.overwrite:
            raise TrainingError(
                f"{self.path} already holds a run: pass --resume to go on with it, --overwrite to delete it, "
                "or another --output-dir."
            )
        if config.resume and not content:
            raise TrainingError(
                f"{self.path} holds no run to resume: check --output-dir, or leave --resume out to start one there."
            )
        if config.resume:
            self._check_same(config)

    def holds_run(self) -> bool:
        """Whether the recipe there is one that `claim` wrote: somebody's own recipe.yaml makes no folder a run's."""
        try:
            lines = self.recipe.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return False
        return {"resume: false", "overwrite: false"} <= set(lines)

    def check_length(self, config: TrainConfig, steps_per_epoch: int) -> None:
        """Check that a resumed run does not become shorter.

        Raises:
            TrainingError: it does.
        """
        if not config.resume:
            return
        before = read_recipe(str(self.recipe), {}).total_steps(steps_per_epoch)
        if config.total_steps(steps_per_epoch) < before:
            raise TrainingError(
                f"The run in {self.path} has {before} steps and cannot be resumed with "
                f"{config.total_steps(steps_per_epoch)}: it may become longer, not shorter."
            )

    def claim(self, config: TrainConfig) -> None:
        """Begin: with `overwrite` clear the old run away, and write the recipe.

        Called when everything that can fail before the first step has been tried, so that a mistyped data file costs
        nobody an old run.

        Raises:
            AdapterError: the folder cannot be written.
        """
        if config.overwrite:
            self._clear()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            values = dataclasses.asdict(dataclasses.replace(config, resume=False, overwrite=False))
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            write_atomically(self.recipe, yaml.safe_dump(plain, sort_keys=False).encode())

    def _clear(self) -> None:
        for name in ("last", "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (WEIGHTS_FILE, CONFIG_FILE, "metrics.jsonl", "loss.png", "gates.png", "recipe.yaml"):
            (self.path / name).unlink(missing_ok=True)
        card = self.path / CARD_FILE
        if card.is_file() and is_unedited(card.read_text(encoding="utf-8", errors="replace")):
            card.unlink()

    def _check_same(self, config: TrainConfig) -> None:
        before = read_recipe(str(self.recipe), {})
        changed = [
            f"{f.name} {config.value(f.name)!r} (was {before.value(f.name)!r})"
            for f in dataclasses.fields(config)
            if f.name not in MAY_CHANGE
            and getattr(config, f.name) != getattr(before, f.name)  # a default and what it stands for are the same
            and config.value(f.name) != before.value(f.name)
        ]
        if changed:
            raise TrainingError(
                f"The run in {self.path} cannot be resumed with other settings: {', '.join(changed)}. "
                f"Resume it with: llama-adapter train {shlex.quote(str(self.recipe))} --resume"
            )

    def now(self, config: TrainConfig) -> datetime:
        """What chat templates are told of the time: that of the run which this one goes on with, else the clock's."""
        if config.resume:
            try:
                with safe_open(self.last / STATE_FILE, "pt") as file:
                    return datetime.fromisoformat(file.metadata()["now"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                pass  # no checkpoint yet; of a damaged one `restore` tells
        return datetime.now()

    def save_checkpoint(
        self,
        model: nn.Module,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        digest: str,
        now: datetime,
    ) -> None:
        """Write `last/`: everything a resumed run needs, in one atomic file, and the adapter beside it.

        Raises:
            AdapterError: the disk is full or forbidden; the checkpoint before this one is kept.
        """
        tensors = adapter.state_dict()
        for (key, _), parameter in zip(list(tensors.items()), adapter.parameters(), strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{key}"] = optimizer.state[parameter][moment]
        metadata = {
            "progress": json.dumps(dataclasses.asdict(progress)),
            "digest": digest,
            "now": now.isoformat(),
        }
        with writing(self.last):
            self.last.mkdir(parents=True, exist_ok=True)
            content = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            write_atomically(self.last / STATE_FILE, save(content, metadata))
        save_adapter(model, self.last, adapter.name)

    def restore(self, adapter: Adapter, optimizer: torch.optim.AdamW, digest: str) -> Progress:
        """Put the newest checkpoint back; a run without one starts at step 0.

        Raises:
            TrainingError: the checkpoint is damaged, or the data has changed since.
        """
        path = self.last / STATE_FILE
        if not path.exists():
            self.metrics.unlink(missing_ok=True)
            return Progress()
        try:
            with safe_open(path, "pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            progress = Progress(**json.loads(metadata["progress"]))
            adapter.load_state_dict(tensors)
            for key, parameter in zip(adapter.state_dict(), adapter.parameters(), strict=True):
                moments = {name: tensors[f"{name}.{key}"].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"The checkpoint {path} is damaged ({error}): start again with --overwrite.") from None
        if metadata.get("digest") != digest:
            raise TrainingError(f"The data has changed since {path} was written: a resumed run would not be the same.")
        self._cut_metrics(progress.step)
        return progress

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with writing(self.path), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a line cut short by a kill is left out."""
        return read_metrics(self.metrics)

    def _cut_metrics(self, step: int) -> None:
        if self.metrics.exists():
            kept = [json.dumps(line) + "\n" for line in self.history() if line["step"] <= step]
            write_atomically(self.metrics, "".join(kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the write that a kill cut short; it is the last one
    return lines
