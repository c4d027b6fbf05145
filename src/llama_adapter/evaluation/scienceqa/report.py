"""From ScienceQA's files and somebody's answers to the score, what to know about it, and the printed table."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter.evaluation.scienceqa.questions import PAPER, WORDS, parse_style, question_target, read_scienceqa
from llama_adapter.evaluation.scienceqa.scores import (
    PAPER_ROWS,
    SHOWN_ROWS,
    TEST_QUESTIONS,
    Predictions,
    ScienceQAScore,
    paper_table,
    read_predictions,
    score,
)
from llama_adapter.files import write_atomically
from llama_adapter.progress import progress_bar

if TYPE_CHECKING:
    from llama_adapter.inference.session import Session, SessionPlan


def score_file(
    file: str | Path,
    data: str | Path,
    split: str = "test",
    limit: int | None = None,
    rule: str | None = None,
    fallback: str | None = None,
    seed: int = 0,
    allow_missing: bool = False,
) -> ScienceQAScore:
    """Score answers that are written already; see `read_predictions`, `read_scienceqa` and `score`.

    `rule` is by default the official one; `fallback` the recorded draws where there are any of that rule, else random.
    """
    # The whole split, as a file that answers all of it is no mistake under a limit.
    questions = read_scienceqa(data, split, images=False)
    predictions = read_predictions(file, questions)
    rule = rule or "official"
    recorded = predictions.recorded is not None and rule == "official"
    fallback = fallback or ("recorded" if recorded else "random")
    return score(questions[:limit], predictions, rule, fallback, seed, allow_missing)


def score_model(
    planned: "SessionPlan",
    load: Callable[["SessionPlan"], "Session"],
    data: str | Path,
    split: str = "test",
    limit: int | None = None,
    rule: str | None = None,
    fallback: str | None = None,
    seed: int = 0,
    *,
    pictures: bool = True,
    style: str = PAPER,
    likelihood: bool = False,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    save: Path | None = None,
    skipped: list[str] | None = None,
) -> ScienceQAScore:
    """Let a session's first adapter (or its bare base) answer, and score that.

    Args:
        planned: the model, whose files are checked.
        load: reads its weights; called once every question is known to fit.
        data: see `read_scienceqa`, also for `split` and `limit`.
        split: which questions are asked.
        limit: only the first of them.
        rule: see `score`; by default the one that fits the style. Also for `seed`.
        fallback: by default "random".
        seed: of its draws.
        pictures: whether they are shown, and must be there.
        style: how the questions are written, as in training.
        likelihood: take the choice whose answer is likeliest, instead of decoding.
        max_new_tokens: longest answer when decoding.
        batch_size: questions answered at once when decoding.
        save: where the answers are written, as JSON {pid: text}.
        skipped: see `askable`; such questions are left out of the score.

    Raises:
        LlamaAdapterError: whatever reading, loading or scoring stops at.
    """
    from llama_adapter.evaluation.scienceqa.answers import answer_questions, askable, choose_letters

    parse_style(style)
    questions = read_scienceqa(data, split, images=pictures, limit=limit)
    adapter = next(iter(planned.folders), None)
    questions = askable(questions, planned.writer, adapter, style, likelihood, skipped)
    session = load(planned)
    asked = questions if pictures else [replace(question, image=None) for question in questions]
    with progress_bar(len(asked), "question") as bar:
        if likelihood:
            letters = choose_letters(session, adapter, asked, style, bar.update)
            texts = {q.pid: question_target(replace(q, answer=letters[q.pid]), style) for q in asked}
        else:
            texts = answer_questions(session, adapter, asked, style, max_new_tokens, batch_size, bar.update)
    if save is not None:
        write_atomically(save, json.dumps(texts, indent=0, ensure_ascii=False).encode())
    rule = rule or {PAPER: "mm-cot", WORDS: "words"}.get(style, "official")
    return score(questions, Predictions(texts), rule, fallback or "random", seed)


def print_report(result: ScienceQAScore, split: str, every_row: bool = False, as_json: bool = False) -> None:
    """The table, or JSON, to stdout; to stderr what keeps the figures from being read as they stand."""
    for note in _notes(result, split):
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({"split": split, **asdict(result)}))
    else:
        _print_table(result, every_row)


def _notes(result: ScienceQAScore, split: str) -> list[str]:
    notes = []
    if result.missing:
        notes.append(f"{result.missing} questions have no prediction and are left out.")
    if 2 * result.unparseable > result.count:
        notes.append(f"Rule '{result.rule}' parses few of these answers; another --rule may fit them.")
    unknown = [name for name, count in result.counts.items() if count is None]
    if unknown:
        notes.append(f"No {', '.join(unknown)}: the data do not give every question's subject and grade.")
    if split != "test" or result.count != TEST_QUESTIONS:
        notes.append(f"The paper's rows are of {TEST_QUESTIONS} questions of test, yours of {result.count} of {split}.")
    return notes


def _print_table(result: ScienceQAScore, every_row: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "trained", box=None, padding=(0, 1, 0, 0))
    for name in result.counts:
        table.add_column(name, justify="right")
    rows = paper_table(result, tuple(PAPER_ROWS) if every_row else SHOWN_ROWS)
    ours, *paper = ([row["model"], row["parameters"], *(_cell(row[n], ".2f") for n in result.counts)] for row in rows)
    table.add_row(*ours, style="bold")
    table.add_row("of questions", "", *(_cell(count, "d") for count in result.counts.values()))
    for cells in paper:
        table.add_row(*cells)
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    console.print(
        f"{result.right} of {result.count} right by rule '{result.rule}'; answers that could not be parsed: "
        f"{result.unparseable} (fallback '{result.fallback}').",
        soft_wrap=True,
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
