"""The demo: the bundled base, asked before and after an adapter is trained on the bundled instructions.

The questions are about facts that no instruction mentions: the base knows them from its pre-training, and what the
adapter teaches is to answer.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_adapter
from llama_adapter.evaluation.instructions import FamilyScore, Task, evaluate_instructions, read_tasks
from llama_adapter.files import writing
from llama_adapter.inference.session import default_device, load_session
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig, load_recipe
from llama_adapter.training.loop import train

HELD_OUT = Path(llama_adapter.__file__).parent / "bundled" / "heldout_facts.json"


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed.

    Attributes:
        output_dir: where the adapter, loss.png and gates.png are.
        seconds: how long it took.
        before: the bare base's score on all questions.
        after: the adapter's.
        answers: for every question its family, the question, the right answer, the base's and the adapter's.
    """

    output_dir: Path
    seconds: float
    before: FamilyScore
    after: FamilyScore
    answers: list[tuple[str, ...]]


def run_demo(output_dir: str, max_steps: int | None = None) -> DemoResult:
    """Ask, train, ask again; an older run in `output_dir` is replaced.

    Raises:
        AdapterError: the folder cannot be written.
        TrainingError: the folder holds other files.
    """
    began = time.perf_counter()
    overrides = {"output_dir": output_dir, "overwrite": True} | ({} if max_steps is None else {"max_steps": max_steps})
    config = load_recipe("bundled", overrides)
    check_writable(config)
    tasks = read_tasks(str(HELD_OUT))
    before, old = _ask(tasks, None)
    result = train(config)
    after, new = _ask(tasks, str(result.output_dir))
    answers = [
        (task.family, " ".join(filter(None, (task.prompt.messages[-1].content, task.prompt.input))), task.answer, *both)
        for task, *both in zip(tasks, old, new, strict=True)
    ]
    return DemoResult(result.output_dir, time.perf_counter() - began, before, after, answers)


def check_writable(config: TrainConfig) -> None:
    """Find out before the first minute has passed whether the last one will find a place for the adapter.

    Raises:
        AdapterError: the output folder cannot be written.
        TrainingError: it holds other files than a run's.
    """
    folder = RunFolder(config.output_dir)
    folder.check(config)
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.path):
            pass


def evenly(rows: Sequence[tuple[str, ...]], count: int = 10) -> list[tuple[str, ...]]:
    """`count` rows of as many different families, whose name stands first, without it."""
    by_family = {row[0]: row[1:] for row in rows}
    return list(by_family.values())[:: max(1, len(by_family) // count)][:count]


def _ask(tasks: Sequence[Task], adapter: str | None) -> tuple[FamilyScore, list[str]]:
    adapters = {} if adapter is None else {"demo": adapter}
    session = load_session("bundled", adapters, default_device(), "fp32", template="alpaca")
    scores, answers = evaluate_instructions(session, "demo" if adapters else None, tasks)
    return scores[-1], answers
