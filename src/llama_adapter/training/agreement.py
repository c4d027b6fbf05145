"""Whether the processes of a run mean the same: each makes up the whole run by itself, and only gradients are shared.

Where their machines do not share the run's folder or the data, or were given other settings, one process would add its
gradients to those of other steps, and nobody would notice.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from llama_adapter.errors import TrainingError
from llama_adapter.training.config import TrainConfig

OWN = {
    "model", "data", "val_data", "output_dir", "init_from", "tower", "feature_cache", "trackers", "push_to_hub",
    "overwrite",
}  # fmt: skip
"""Settings that processes may have otherwise than each other: where things lie, and what the first one alone does."""


def check_agreed(config: TrainConfig, digest: str, finished: int, runs: Sequence[str] = ()) -> None:
    """Check that all processes have the same settings and data, and go on from the same step.

    Args:
        config: the recipe.
        digest: of the data.
        finished: how many steps are done.
        runs: the names of all that are trained together.

    Raises:
        TrainingError: they have not; raised in every process.
    """
    settings = {name: value for name, value in vars(config).items() if name not in OWN}
    all_facts = gather_object([{"runs": list(runs), "finished steps": finished, "data": digest[:16], **settings}])
    first = all_facts[0]
    for process, facts in enumerate(all_facts):
        if other := [_difference(name, first[name], facts[name]) for name in first if facts[name] != first[name]]:
            raise TrainingError(
                f"Process {process} of this run differs from process 0 in {', '.join(other)}: give all machines the "
                "same command and the same files, and an --output-dir that they share."
            )


def _difference(name: str, first: Any, found: Any) -> str:
    return f"{name} ({found!r}, not {first!r})"
