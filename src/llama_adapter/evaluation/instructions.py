"""Exact match and response loss on an instruction set, per task family, for the bare base and adapters side by side."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama_adapter.conditions.config import Kind
from llama_adapter.data import Example, load_examples, log_findings
from llama_adapter.data.batches import micro_batches, response_tokens
from llama_adapter.data.chat_templates import without_thought
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Session
from llama_adapter.inference.writing import Prompt, Writer, usable
from llama_adapter.training.loss import response_loss

ALL = "all"
"""Name of the row that sums up every family."""


@dataclass(frozen=True)
class Task:
    """One instruction with its right answer; `family` groups tasks of a kind."""

    example: Example
    family: str

    @property
    def prompt(self) -> Prompt:
        """What the model is asked."""
        return Prompt.before(self.example)

    @property
    def answer(self) -> str:
        """What it should say."""
        return self.example.messages[-1].content


@dataclass(frozen=True)
class FamilyScore:
    """What one model reached on one family.

    Attributes:
        family: its name, or "all".
        count: number of tasks.
        exact_match: share of answers that equal the right one but for case, blanks and a final full stop.
        loss: cross-entropy per response token (end token included), in nats.
    """

    family: str
    count: int
    exact_match: float
    loss: float


def read_tasks(
    source: str, skipped: list[str] | None = None, kinds: Collection[Kind] = (), limit: int | None = None
) -> list[Task]:
    """Tasks from any source that training takes; a record's `family` key names its family.

    Args:
        source: see `load_examples`.
        skipped: takes a sentence for each record that cannot be used; without it the first one is an error.
        kinds: see `load_examples`.
        limit: only so many records, the first.

    Raises:
        DataError: the source or a record cannot be used, or none is left.
    """
    loaded = load_examples([source], skipped is not None, kinds=kinds, limit=limit)
    log_findings((), loaded.notes)
    if skipped is not None:
        skipped += loaded.skipped
    return [Task(example, example.family or ALL) for example in loaded.examples]


def fitting_tasks(
    tasks: Sequence[Task], writer: Writer, adapters: Sequence[str | None], skipped: list[str] | None = None
) -> list[Task]:
    """The tasks that each of `adapters` can be asked and measured on; no weights are needed.

    Args:
        tasks: as read.
        writer: of the session.
        adapters: who will be asked; None is the bare base.
        skipped: takes a sentence for each task that cannot be asked; without it the first one is an error.

    Raises:
        DataError: a task, named by its record, is longer than the base's context or cannot be written, or none is left.
    """

    def check(task: Task) -> None:
        for adapter in adapters:
            writer.prompt(task.prompt, adapter)
            writer.example(task.example, adapter)

    return usable(tasks, check, skipped)


@torch.no_grad()
def evaluate_instructions(
    session: Session,
    adapter: str | None,
    tasks: Sequence[Task],
    max_new_tokens: int = 32,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[list[FamilyScore], list[str]]:
    """FamilyScore one adapter (None: the bare base) by greedy decoding and by the loss of the right answers.

    Args:
        session: the loaded base with its adapters.
        adapter: which of them answers.
        tasks: what is asked; the bare base is asked without files, at which it cannot look.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        progress: called with the number of tasks done since the last call.

    Returns:
        A score per family in order of first appearance, then one over all; and every answer in the order of `tasks`.
    """
    if adapter is None:  # it looks at nothing
        tasks = [replace(task, example=replace(task.example, media=())) for task in tasks]
    greedy = GenerateConfig(max_new_tokens=max_new_tokens, temperature=0)
    answers: list[str] = []
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        answers += [answer.text for answer in session.answer([task.prompt for task in batch], adapter, greedy)]
        progress(len(batch))
    right = [normalise(task.answer) == normalise(text) for task, text in zip(tasks, answers, strict=True)]
    families = list(dict.fromkeys(task.family for task in tasks))
    rows: dict[str, list[int]] = {f: [i for i, task in enumerate(tasks) if task.family == f] for f in families}
    rows[ALL] = list(range(len(tasks)))
    scores = []
    for family, members in rows.items():
        loss = _loss(session, adapter, [tasks[i] for i in members], batch_size)
        scores.append(FamilyScore(family, len(members), sum(right[i] for i in members) / len(members), loss))
    return scores, answers


def normalise(text: str) -> str:
    """What two answers are compared by: case, blanks, a final full stop and a thought before them do not count."""
    return " ".join(without_thought(text).casefold().split()).rstrip(".")


def family_table(results: Mapping[str, Iterable[FamilyScore]]) -> list[dict[str, Any]]:
    """One row per family with the scores of every model, for a table or JSON."""
    rows: dict[str, dict[str, Any]] = {}
    for name, scores in results.items():
        for score in scores:
            row = rows.setdefault(score.family, {"family": score.family, "count": score.count})
            row[name] = {"exact_match": score.exact_match, "loss": score.loss}
    return list(rows.values())


def _loss(session: Session, adapter: str | None, tasks: Sequence[Task], batch_size: int) -> float:
    examples = [session.writer.example(task.example, adapter) for task in tasks]
    device, total = session.model.device, 0.0
    for batch in micro_batches(examples, batch_size):
        with session.using(adapter, batch.media):
            total += float(response_loss(session.model, batch, device))
    return total / max(1, response_tokens(examples))
