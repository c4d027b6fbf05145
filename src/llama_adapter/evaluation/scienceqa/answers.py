"""Answering ScienceQA with a model: greedy decoding, or the likelihood of each letter."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from llama_adapter.data import encode_all
from llama_adapter.data.batches import collate
from llama_adapter.evaluation.scienceqa.questions import PAPER, Question, question_example, question_prompt
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Prompt, Session
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
        prompts = [Prompt.of(question_prompt(q, style), media=_seen(session, adapter, q)) for q in batch]
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
        as_answered = [replace(question, answer=index) for index in range(len(question.choices))]
        examples = [question_example(q, style) for q in as_answered]
        encoded = encode_all(examples, session.templates[adapter], session.tokenizer, 1 << 20)
        with session.using(adapter, [_seen(session, adapter, question)] * len(encoded)):
            losses = response_losses(session.model, collate(encoded), session.model.device)
        chosen[question.pid] = int(losses.argmin())
        progress(1)
    return chosen


def _seen(session: Session, adapter: str | None, question: Question) -> tuple[str | bytes, ...]:
    """The picture, where the question has one and the adapter can look at it."""
    return question.media if adapter in session.perceptions else ()
