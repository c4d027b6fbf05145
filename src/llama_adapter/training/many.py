"""Many experts in one run: a file of what they share and of what each has for its own.

    model: ./Llama-2-7b-hf        any setting of a recipe: of all runs that have none of their own
    micro_batch_size: 32
    runs:
      - output_dir: runs/alpaca   a recipe each, with a folder of its own
        data: alpaca.jsonl
      - output_dir: runs/poet
        data: poems.jsonl
        lr: 5.0e-3
        adapter_len: 20

The last part of its folder is a run's name, or what it says under `name`.
"""

import os
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_adapter.conditions.config import is_python
from llama_adapter.core.model import check_name
from llama_adapter.errors import AdapterError, ConfigError, TrainingError
from llama_adapter.settings import shown, unknown_keys
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import DEFAULTS, TrainConfig, overlaid
from llama_adapter.training.draft import check_alike
from llama_adapter.training.learner import TrainResult
from llama_adapter.training.loop import train_together
from llama_adapter.training.objective import REFERENCE
from llama_adapter.training.recipe_file import read_yaml

ONE_AT_A_TIME = {"wandb", "trackio"}
"""Trackers that follow one run of a process at a time."""
OF_FLAGS = ("resume", "overwrite")


@dataclass(frozen=True)
class Runs:
    """Recipes that are trained together.

    Attributes:
        recipes: by name.
        source: the file that they are from.

    Raises:
        ConfigError: there is none; they share a folder, or one's lies in another's; they differ in what must be alike;
            a name is malformed.
    """

    recipes: Mapping[str, TrainConfig]
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ConfigError("runs is empty: give at least one recipe.")
        for name in self.recipes:
            try:
                check_name(name)
            except AdapterError as error:
                raise ConfigError(f"{error} Give the run another name with 'name:'.") from None
            if name.endswith(f".{REFERENCE}") and name.removesuffix(f".{REFERENCE}") in self.recipes:
                raise ConfigError(
                    f"{name} is what the reference of {name.removesuffix(f'.{REFERENCE}')} is called: "
                    "give the run another name with 'name:'."
                )
        self._check_folders()
        # a base that is left out may be that of the adapter to go on from: `train_together` looks again
        check_alike({name: c for name, c in self.recipes.items() if c.model is not None or c.init_from is None})
        for name, config in self.recipes.items():
            if config.compile and len(self.recipes) > 1:
                raise ConfigError("compile knows one expert: leave it out, or train the runs one by one.")
            alone = sorted(ONE_AT_A_TIME.intersection(config.trackers))
            if alone and len(self.recipes) > 1:
                raise ConfigError(f"{name}: {alone[0]} follows one run at a time: take tensorboard or none.")

        piped = [name for name, config in self.recipes.items() if "-" in (*config.data, *config.val_data)]
        if len(piped) > 1:
            raise ConfigError(f"{' and '.join(piped)} both read standard input ('-'), which one can: give files.")

    def _check_folders(self) -> None:
        folders = {name: Path(os.path.realpath(os.path.expanduser(c.output_dir))) for name, c in self.recipes.items()}
        taken: dict[Path, str] = {}
        repositories: dict[str, str] = {}
        for name, folder in folders.items():
            if folder in taken:
                raise ConfigError(
                    f"{taken[folder]} and {name} share the folder {folder}: give each run one of its own."
                )
            taken[folder] = name
            pushed = self.recipes[name].push_to_hub
            if pushed and pushed in repositories:
                raise ConfigError(f"{repositories[pushed]} and {name} share push_to_hub {pushed}: give each its own.")
            repositories[pushed or ""] = name
        for name, folder in folders.items():
            for above in folder.parents:
                if above in taken:
                    raise ConfigError(f"The folder of {name} lies in that of {taken[above]}: put it beside {above}.")
        for name, config in self.recipes.items():
            begun = config.resume and RunFolder(config.output_dir).has_checkpoint()
            if config.init_from is None or begun:  # one that has begun has what it goes on from in its own folder
                continue
            source = Path(os.path.realpath(os.path.expanduser(config.init_from)))
            for other in (taken[above] for above in (source, *source.parents) if above in taken):
                if other != name:
                    raise ConfigError(
                        f"{name} goes on from {config.init_from}, which {other} writes in this run: train {other} "
                        f"first, and take it out of the runs or give {name} a copy."
                    )


def load_runs(path: str, resume: bool = False, overwrite: bool = False) -> Runs:
    """The runs of a file.

    Args:
        path: of a YAML file, see the head of this module.
        resume: go on with the runs whose folders hold one; the others begin.
        overwrite: delete those that there are first.

    Raises:
        ConfigError: it cannot be read; an unknown key, a value that breaks its rule, see also `Runs`.
        TrainingError: nothing is there to resume.
    """
    values = read_yaml(path)
    if "runs" not in values:
        raise ConfigError(f"{path} has no 'runs': list the recipes there, or train it alone with llama-adapter train.")
    runs, shared = values.pop("runs"), values
    if not isinstance(runs, list) or not runs:
        raise ConfigError(f"{path}: runs is {shown(runs)}; it must be a list of recipes, at least one.")
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: pass one of them.")
    for name in ("output_dir", "name"):
        if name in shared:
            raise ConfigError(f"{path}: {name} is each run's own: give it there, not beside 'runs'.")
    _check_keys(f"{path}, beside 'runs'", shared, [key for key in DEFAULTS if key != "output_dir"])
    recipes: dict[str, TrainConfig] = {}
    for number, own in enumerate(runs, start=1):
        name, config = _recipe(f"{path}, run {number}{_called(own)}", shared, own)
        if name in recipes:
            raise ConfigError(f"{path}: two runs have the name '{name}': tell them apart with 'name:'.")
        begun = resume and RunFolder(config.output_dir).holds_run()
        recipes[name] = replace(config, resume=begun, overwrite=overwrite)
    if resume and not any(config.resume for config in recipes.values()):
        raise TrainingError(f"No run of {path} has begun: leave --resume out to start them.")
    return Runs(recipes, path)


def _recipe(source: str, shared: Mapping[str, Any], own: object) -> tuple[str, TrainConfig]:
    """Name and recipe of one entry."""
    if not isinstance(own, dict):
        raise ConfigError(f"{source} is {shown(own)}; it must be 'key: value' lines.")
    _check_keys(source, own, ("name", *DEFAULTS))
    own = dict(own)
    name = own.pop("name", None)
    for flag in OF_FLAGS:
        if flag in own or flag in shared:
            raise ConfigError(f"{source}: {flag} is a flag of train-many, for all runs: leave it out.")
    if not own.get("output_dir"):
        raise ConfigError(f"{source} has no output_dir: give it a folder of its own.")
    config = overlaid(shared, own, source)
    if is_python(config.tower):
        raise ConfigError(
            f"{source}: {config.tower} is code, which a file may not start: train it alone with llama-adapter train "
            "--tower, or all from Python."
        )
    return str(Path(config.output_dir).name if name is None else name), config


def _called(own: object) -> str:
    """What a run goes by, for people, where its entry says so."""
    said = own.get("name") or own.get("output_dir") if isinstance(own, dict) else None
    return f" ({shown(Path(said).name)[1:-1]})" if isinstance(said, str) else ""


def _check_keys(source: str, values: Mapping[Any, Any], known: Collection[str]) -> None:
    """Check the keys before their values: one that is mistyped is not said to be missing.

    Raises:
        ConfigError: naming those that are unknown.
    """
    offered = [key for key in known if key not in OF_FLAGS]
    if wrong := unknown_keys([key for key in values if key not in OF_FLAGS], offered):
        raise ConfigError("; ".join(f"{source}: {sentence}" for sentence in wrong))


def train_many(runs: Runs) -> dict[str, TrainResult]:
    """Train all of them in one run; each ends as it would alone, to rounding.

    Raises:
        LlamaAdapterError: as `llama_adapter.train`.
        TrainingError: a loss was not finite: that run has stopped at its last checkpoint, the others have ended.
    """
    again = None
    if runs.source is not None:
        again = f"llama-adapter train-many {shlex.quote(runs.source)} --resume"
    return train_together(runs.recipes, again)
