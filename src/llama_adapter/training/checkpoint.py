"""The folder of a training run: what is in it, and how it survives a kill at any moment.

recipe.yaml                     every setting of the run
adapter_model.safetensors, adapter_config.json
                                the adapter with the best validation loss so far: this is what you use
last/                           the newest checkpoint: an adapter too, and
last/training_state.safetensors parameters, optimiser moments and step in one file, so that they never disagree
last/journal.0, last/journal.1  the same after every step, by turns; see `journal.py`
metrics.jsonl                   one line a step, one a validation
reference/                      the adapter that a DPO run goes on from and is held against
README.md                       the adapter's card, at the end
loss.png, gates.png, rewards.png  at the end
tensorboard/                    event files
.lock                           held by the run that writes here
"""

import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from llama_adapter.base import first_sentence
from llama_adapter.core.routing import Adapter
from llama_adapter.errors import NotWrittenError, TrainingError
from llama_adapter.files import append, is_full, is_leftover, whole_lines, write_atomically, writing
from llama_adapter.formats.card import CARD_FILE, is_unedited
from llama_adapter.formats.native import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from llama_adapter.training.config import TrainConfig, read_recipe
from llama_adapter.training.journal import JOURNAL_FILES, Journal, State
from llama_adapter.training.owner import LOCK_FILE, Owner

log = logging.getLogger(__name__)
STATE_FILE = "training_state.safetensors"
SETTINGS_FILE = "settings.json"
MAY_CHANGE = {
    "resume", "overwrite", "output_dir", "trackers", "eval_every", "save_every",
    "micro_batch_size", "gradient_checkpointing", "packing", "tensor_parallel", "feature_cache", "push_to_hub",
    "epochs", "max_steps",
}  # fmt: skip
"""Settings that a resumed run may have otherwise than before: they do not change what is learnt, or, the last two, make
the run longer (`RunFolder.check_length`). From where it stands a longer run goes on as if it had been so long from its
start: at the learning rate that this step has in the longer run's warm-up and cosine."""


@dataclass
class Progress:
    """How far a run is: finished optimiser steps, the best validation loss so far with its step, and where the next
    batch of streamed data begins."""

    step: int = 0
    best_val_loss: float = float("inf")
    best_step: int = 0
    position: dict[str, Any] | None = None


class Trained(NamedTuple):
    """What a checkpoint is of: the parts of a run that a resumed one needs."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    progress: Progress
    digest: str
    now: datetime

    def content(self) -> bytes:
        """All of it, in safetensors' format."""
        tensors = self.adapter.state_dict()
        for (key, _), parameter in zip(list(tensors.items()), self.adapter.parameters(), strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{key}"] = self.optimizer.state[parameter][moment]
        facts = {
            "progress": json.dumps(dataclasses.asdict(self.progress)),
            "digest": self.digest,
            "now": self.now.isoformat(),
        }
        return save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, facts)


class RunFolder:
    """Reads and writes one run's folder, of so many that are trained together."""

    def __init__(self, path: str | Path, together: int = 1) -> None:
        self.path = Path(os.path.expanduser(path))
        self.last = self.path / "last"
        self.reference = self.path / "reference"
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.journal = Journal(self.last, together)
        self.owner = Owner(self.path)
        self._warned = False

    def lock(self) -> None:
        """Keep other runs from the folder, where it is there and holds a run or nothing, until `release`.

        Raises:
            TrainingError: another run has it.
            AdapterError: it cannot be written.
        """
        with writing(self.path):
            ours = self.path.is_dir() and (not self._content() or self.holds_run())
        if ours:
            self.owner.take()

    def release(self) -> None:
        """Let other runs have the folder."""
        self.owner.lock.release()

    def check(self, config: TrainConfig) -> None:
        """Check that a run with these settings may write here; nothing is changed yet.

        Raises:
            TrainingError: the folder holds another run or other files, or none to resume, or is resumed with settings
                that would change what is learnt.
            AdapterError: it cannot be looked into.
        """
        with writing(self.path):  # a name too long, or a folder that may not be searched
            is_file = self.path.exists() and not self.path.is_dir()
            content = self._content() if self.path.is_dir() else []
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

    def _content(self) -> list[Path]:
        """What lies there, but for what a kill has left of a write, and the lock."""
        return [path for path in self.path.iterdir() if path.name != LOCK_FILE and not is_leftover(path)]

    def holds_run(self) -> bool:
        """Whether the recipe there is one that `claim` wrote: somebody's own recipe.yaml makes no folder a run's."""
        try:
            lines = self.recipe.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return False
        return {"resume: false", "overwrite: false"} <= set(lines)

    def has_checkpoint(self) -> bool:
        """Whether a resumed run finds a step done; one that does not begins once more.

        Raises:
            TrainingError: the checkpoint is damaged.
        """
        return self.finished_steps() > 0

    def check_length(self, config: TrainConfig, steps_per_epoch: int) -> None:
        """Check that a resumed run does not become shorter.

        Raises:
            TrainingError: it does.
        """
        if not config.resume:
            return
        written = read_recipe(str(self.recipe), {}).total_steps(steps_per_epoch)  # the user may have changed it
        before = max(written, self.finished_steps())
        if config.total_steps(steps_per_epoch) < before:
            raise TrainingError(
                f"The run in {self.path} has {before} steps and cannot be resumed with "
                f"{config.total_steps(steps_per_epoch)}: it may become longer, not shorter."
            )

    def reserve(self, config: TrainConfig) -> None:
        """Make the folder and take it; nothing that is there is changed yet.

        Raises:
            TrainingError: another run has taken it since `check`.
            AdapterError: it cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.owner.take()
        self.check(config)

    def claim(self, config: TrainConfig) -> None:
        """Begin in a folder that is reserved: with `overwrite` clear the old run away, and write the recipe.

        Called when everything that can fail before the first step has been tried, so that a mistyped data file costs
        nobody an old run.

        Raises:
            AdapterError: the folder cannot be written, or the old run not cleared away.
        """
        if config.overwrite:
            self._clear()
        with writing(self.path):
            for folder in (self.path, self.last):
                for path in filter(is_leftover, folder.iterdir() if folder.is_dir() else ()):
                    path.unlink()
            values = dataclasses.asdict(dataclasses.replace(config, resume=False, overwrite=False))
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            write_atomically(self.recipe, yaml.safe_dump(plain, sort_keys=False).encode())
        self.owner.claim()

    def _clear(self) -> None:
        """Delete the run; its recipe last, so that what a kill leaves of it is still known for a run."""
        with writing(self.path):  # a state of the old run that stayed would be gone on with as if it were the new one's
            for folder in (self.path / name for name in ("last", "tensorboard", "reference")):
                if folder.is_symlink():
                    folder.unlink()
                elif folder.exists():
                    shutil.rmtree(folder)
            card = self.path / CARD_FILE
            if card.is_file() and is_unedited(card.read_text(encoding="utf-8", errors="replace")):
                card.unlink()
            pictures = ("loss.png", "gates.png", "rewards.png")
            for name in (WEIGHTS_FILE, CONFIG_FILE, "metrics.jsonl", SETTINGS_FILE, *pictures, "recipe.yaml"):
                (self.path / name).unlink(missing_ok=True)

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
        state = self._newest() if config.resume else None
        try:
            return datetime.now() if state is None else datetime.fromisoformat(state.facts["now"])
        except (KeyError, ValueError):
            return datetime.now()  # of a damaged one `restore` tells

    def save_checkpoint(self, model: nn.Module, run: Trained) -> None:
        """Write `last/`: everything a resumed run needs, in one atomic file, and the adapter beside it.

        Raises:
            AdapterError: the disk is full or forbidden; the checkpoint before this one is kept.
        """
        save_adapter(model, self.last, run.adapter.name)
        with writing(self.last):  # behind the adapter: a kill between them costs a step, and no old adapter stays
            write_atomically(self.last / STATE_FILE, run.content())

    def save_step(self, run: Trained) -> None:
        """Write the state of a run into its journal, unless that takes too much of its time, which is said once.

        Raises:
            AdapterError: the disk is full or forbidden; the state before this one is kept.
        """
        if not self.journal.is_due():
            if not self._warned:
                log.info(
                    "saving takes %.2f s: it is not done after every step, and a kill costs up to %.0f s of work; "
                    "--save-every 1 saves every step",
                    self.journal.cost, self.journal.period,
                )  # fmt: skip
            self._warned = True
            return
        with writing(self.last):
            self.last.mkdir(parents=True, exist_ok=True)
            self.journal.write(run.content)

    def check_data(self, digest: str) -> None:
        """Check that the newest state, where there is one, is of a run on this data.

        Raises:
            TrainingError: the checkpoint is damaged, or the data has changed since.
        """
        state = self._newest()
        if state is not None and state.facts.get("digest") != digest:
            raise TrainingError(
                f"The data has changed since {state.source} was written: a resumed run would not be the same. Put the "
                "old data back, or start again with --overwrite."
            )

    def restore(self, adapter: Adapter, optimizer: torch.optim.AdamW) -> Progress:
        """Put the newest state back; a run without one starts at step 0.

        Raises:
            TrainingError: the checkpoint is damaged.
        """
        state = self._newest()
        if state is None:
            self.metrics.unlink(missing_ok=True)
            return Progress()
        try:
            progress = Progress(**json.loads(state.facts["progress"]))
            adapter.load_state_dict(dict(state.tensors))
            for key, parameter in zip(adapter.state_dict(), adapter.parameters(), strict=True):
                moments = {
                    name: state.tensors[f"{name}.{key}"].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{state.source} is damaged ({error}): start again with --overwrite.") from None
        if progress.step and state.source.name in JOURNAL_FILES:
            log.info("going on from the journal, after step %d", progress.step)
        self._cut_metrics(progress.step)
        return progress

    def finished_steps(self) -> int:
        """How many steps a resumed run need not do again.

        Raises:
            TrainingError: the checkpoint is damaged.
        """
        state = self._newest()
        return 0 if state is None else state.step

    def _newest(self) -> State | None:
        """The newest whole state: the checkpoint's or the journal's; None where no step was finished."""
        found, path = self.journal.newest(), self.last / STATE_FILE
        if not path.exists():
            return found
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                checkpoint = State(file.metadata() or {}, tensors, path)
            return checkpoint if found is None or checkpoint.step >= found.step else found
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if found is None:
                raise TrainingError(
                    f"The checkpoint {path} is damaged ({error}): start again with --overwrite."
                ) from None
            return found

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with writing(self.path):
            append(self.metrics, (json.dumps(values) + "\n").encode())

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a line cut short by a kill is left out."""
        return whole_lines(self.metrics)

    def _cut_metrics(self, step: int) -> None:
        if self.metrics.exists():
            kept = [json.dumps(line) + "\n" for line in self.history() if line["step"] <= step]
            write_atomically(self.metrics, "".join(kept).encode())


@contextmanager
def resumable(again: str) -> Iterator[None]:
    """Where the disk is full within the block, or another process of the run is lost, say how to go on: `again`."""
    try:
        yield
    except NotWrittenError as error:
        raise NotWrittenError(f"{error} Go on with: {again}") from None
    except OSError as error:  # a tracker's
        if not is_full(error):
            raise
        raise NotWrittenError(
            f"{error.filename or 'A file of a tracker'} cannot be written ({error.strerror}): free space. "
            f"Go on with: {again}"
        ) from None
    except RuntimeError as error:
        if not is_lost(error):
            raise
        lost = first_sentence(error)[:200].rstrip(".")
        raise TrainingError(f"Another process of this run was lost ({lost}). Go on with: {again}") from None


def is_lost(error: RuntimeError) -> bool:
    """Whether it is what the processes that are left raise when one of them dies."""
    lost = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    return lost or re.search("gloo|Connection (closed|reset)|Broken pipe", str(error)) is not None
