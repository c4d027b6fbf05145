"""Exact match and response loss on an instruction set, per task family, for the bare base and adapters side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_adapter.data import Example, data_files, encode_all, parse_record, read_records, with_found_media
from llama_adapter.data.batches import micro_batches, response_tokens
from llama_adapter.errors import DataError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Prompt, Session
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
        return Prompt(self.example.messages[:-1], self.example.input, self.example.media)

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


def read_tasks(source: str) -> list[Task]:
    """Tasks from a data file or a folder of them, in any training format; a record's `family` key names its family.

    Raises:
        DataError: the file or a record cannot be used.
    """
    tasks = []
    for file in data_files(source):
        for number, record in read_records(file):
            try:
                example = with_found_media(parse_record(record), file)
            except DataError as error:
                raise DataError(f"{file}, record {number}: {error}.") from None
            family = record.get("family") if isinstance(record, dict) else None
            tasks.append(Task(example, str(family) if family else ALL))
    return tasks


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
        tasks: what is asked.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        progress: called with the number of tasks done since the last call.

    Returns:
        A score per family in order of first appearance, then one over all; and every answer in the order of `tasks`.
    """
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
    """What two answers are compared by: case, blanks and a final full stop do not count."""
    return " ".join(text.casefold().split()).rstrip(".")


def family_table(results: Mapping[str, Iterable[FamilyScore]]) -> list[dict[str, Any]]:
    """One row per family with the scores of every model, for a table or JSON."""
    rows: dict[str, dict[str, Any]] = {}
    for name, scores in results.items():
        for score in scores:
            row = rows.setdefault(score.family, {"family": score.family, "count": score.count})
            row[name] = {"exact_match": score.exact_match, "loss": score.loss}
    return list(rows.values())


def _loss(session: Session, adapter: str | None, tasks: Sequence[Task], batch_size: int) -> float:
    template = session.templates[adapter]
    examples = encode_all([task.example for task in tasks], template, session.tokenizer, 1 << 20)
    device, total = session.model.device, 0.0
    for batch in micro_batches(examples, batch_size):
        with session.using(adapter, batch.media):
            total += float(response_loss(session.model, batch, device))
    return total / max(1, response_tokens(examples))
