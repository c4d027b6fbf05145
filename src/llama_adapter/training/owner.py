"""Whose a run's folder is: one run at a time writes it, and a run that its launcher starts again knows its own."""

import dataclasses
import json
import os
import platform
from pathlib import Path

from llama_adapter.errors import TrainingError
from llama_adapter.files import Lock, writing
from llama_adapter.training.config import TrainConfig

LOCK_FILE = ".lock"


class Owner:
    """The lock of a run's folder; it dies with the process that holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = Lock(folder / LOCK_FILE)

    def take(self) -> None:
        """Take the folder, which must be there.

        Raises:
            TrainingError: another run has it.
            AdapterError: it cannot be written.
        """
        with writing(self.folder):
            taken = self.lock.take()
        before = self._note()
        if not taken:
            who = f"process {before['pid']} on {before['host']}" if "pid" in before else "another process"
            raise TrainingError(
                f"{self.folder} is in use: {who} trains there. Wait for it, end it, or choose another --output-dir."
            )
        self._write(before.get("launch", ""))

    def claim(self) -> None:
        """Say that the run in the folder is this launch's."""
        self._write(launch())

    def is_this_launch(self) -> bool:
        """Whether the run in the folder was begun by the launcher that this process stands under."""
        here, noted = launch(), self._note().get("launch", "")
        if os.environ.get("GROUP_RANK", "0") != "0":  # the note has the number of the launcher on the first machine
            here, noted = (text.rpartition(" ")[0] for text in (here, noted))
        return here != "" and noted == here

    def _write(self, launched: str) -> None:
        note = {"pid": str(os.getpid()), "host": platform.node(), "launch": launched}
        self.lock.note(json.dumps(note))

    def _note(self) -> dict[str, str]:
        try:
            note = json.loads(self.lock.read())
        except ValueError:
            return {}
        return note if isinstance(note, dict) else {}


def launch() -> str:
    """What tells one torchrun from others, and is the same when it starts its processes again; empty without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return "" if name is None else f"{name} {os.getppid()}"


def restarted(config: TrainConfig) -> TrainConfig:
    """The recipe, going on with the run in its folder where a launcher has started the processes again.

    `torchrun --max-restarts` repeats the command as it was, which has no --resume. Only a run that the same launch has
    begun is gone on with: one that was there before still needs --resume or --overwrite.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    if not again or config.resume or not Owner(Path(os.path.expanduser(config.output_dir))).is_this_launch():
        return config
    return dataclasses.replace(config, resume=True, overwrite=False)
