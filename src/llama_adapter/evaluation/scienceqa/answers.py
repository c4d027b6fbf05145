"""Answering ScienceQA with a model: greedy decoding, or the likelihood of each letter."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from llama_adapter.data import Example
from llama_adapter.data.batches import collate
from llama_adapter.evaluation.scienceqa.questions import PAPER, Question, question_example, question_prompt
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Session
from llama_adapter.inference.writing import Prompt, Writer, usable
from llama_adapter.training.loss import response_losses


def answer_questions(
    session: Session,
    adapter: str | None,
    questions: Sequence[Question],
    style: str = PAPER,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, str]:
    """What the model writes, greedily, for each question: pid -> text.

    Args:
        session: the loaded base with its adapters.
        adapter: which of them answers; None is the bare base. One without a condition does not see pictures.
        questions: what is asked; their answers are not looked at.
        style: how they are written, as in training.
        max_new_tokens: longest answer; styles with lecture or solution need some hundred.
        batch_size: questions answered at once.
        progress: called with the number of questions answered since the last call.
    """
    greedy = GenerateConfig(max_new_tokens=max_new_tokens, temperature=0)
    texts: dict[str, str] = {}
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        prompts = [replace(_asked(q, style), media=_seen(session, adapter, q)) for q in batch]
        answers = session.answer(prompts, adapter, greedy)
        texts |= {question.pid: answer.text for question, answer in zip(batch, answers, strict=True)}
        progress(len(batch))
    return texts


@torch.no_grad()
def choose_letters(
    session: Session,
    adapter: str | None,
    questions: Sequence[Question],
    style: str = PAPER,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, int]:
    """The choice whose answer the model finds likeliest, for each question: pid -> index. Arguments as above.

    Every choice is written out as an answer of the style; all of them are equally long but for the letter.
    """
    chosen: dict[str, int] = {}
    for question in questions:
        encoded = [session.writer.example(example, adapter) for example in _answered(question, style)]
        with session.using(adapter, [_seen(session, adapter, question)] * len(encoded)):
            losses = response_losses(session.model, collate(encoded), session.model.device)
        chosen[question.pid] = int(losses.argmin())
        progress(1)
    return chosen


def askable(
    questions: Sequence[Question],
    writer: Writer,
    adapter: str | None,
    style: str = PAPER,
    likelihood: bool = False,
    skipped: list[str] | None = None,
) -> list[Question]:
    """The questions that can be asked, which needs no weights.

    Args:
        questions: see `answer_questions`, also for `adapter` and `style`.
        writer: of the session.
        likelihood: they are asked as in `choose_letters`.
        skipped: takes a sentence for each question that cannot be asked; without it the first one is an error.

    Raises:
        DataError: a question, named by its pid, is too long for the base or cannot be written, or none is left.
    """

    def check(question: Question) -> None:
        if likelihood:
            for example in _answered(question, style):
                writer.example(example, adapter)
        else:
            writer.prompt(_asked(question, style), adapter)

    return usable(questions, check, skipped)


def _asked(question: Question, style: str) -> Prompt:
    return replace(Prompt.of(question_prompt(question, style)), origin=f"question {question.pid}")


def _answered(question: Question, style: str) -> list[Example]:
    """The question with each of its choices as its answer."""
    as_answered = [replace(question, answer=index) for index in range(len(question.choices))]
    return [replace(question_example(q, style), origin=f"question {question.pid}") for q in as_answered]


def _seen(session: Session, adapter: str | None, question: Question) -> tuple[str | bytes, ...]:
    """The picture, where the question has one and the adapter can look at it."""
    return question.media if adapter in session.perceptions else ()
