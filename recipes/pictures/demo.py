"""The demo's second half: an adapter that learns to answer about drawn pictures, and a page that shows whether it does.

    python recipes/pictures/demo.py

Test pictures show combinations, such as three red hearts, that no training picture shows.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import Row, summary, write_report
from rich.console import Console
from rich.table import Table

from llama_adapter.evaluation.scienceqa.answers import answer_questions, choose_letters
from llama_adapter.evaluation.scienceqa.questions import WORDS, Question, read_scienceqa
from llama_adapter.inference.session import Session, default_device, load_session
from llama_adapter.training.config import load_recipe
from llama_adapter.training.loop import train

HERE = Path(__file__).resolve().parent
WORK = Path("runs/pictures-demo")
SHOWN = 6


def main() -> None:
    """Draw, train, ask, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, help="stop the training early")
    parser.add_argument("--questions", type=int, default=1800, help="to train on, a tenth as many to ask (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama_adapter").setLevel(logging.INFO)
    began = time.perf_counter()
    questions = draw_questions(WORK / "questions", args.questions)
    overrides = {
        "data": [f"scienceqa:{questions}:train"],
        "val_data": [f"scienceqa:{questions}:val"],
        "output_dir": str(WORK / "adapter"),
        "overwrite": True,
    } | ({"max_steps": args.max_steps} if args.max_steps else {})
    result = train(load_recipe(str(HERE / "recipe.yaml"), overrides))
    session = load_session("bundled", {"pictures": str(result.output_dir)}, default_device(), "fp32")
    asked = [q for q in read_scienceqa(questions, "test") if q.image is not None]
    rows = ask(session, asked)
    show(rows)
    seen, blind = (share_chosen(session, each) for each in (asked, without_pictures(asked)))
    print(f"Of the choices the likeliest is right for {seen:.0%}, without the picture for {blind:.0%}.")
    write_report(rows, WORK / "report.html")
    print(f"pictures and answers side by side: {WORK / 'report.html'} ({time.perf_counter() - began:.0f} s)")


def draw_questions(folder: Path, count: int) -> Path:
    """A small question set, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    sizes = ["--train", str(count), "--val", str(max(8, count // 30)), "--test", str(max(16, count // 11))]
    command = [sys.executable, str(HERE / "questions.py"), "--scenes", "one", "--output", str(folder), *sizes]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def ask(session: Session, questions: Sequence[Question]) -> list[Row]:
    """What the bare base writes, the adapter, and the adapter without the picture."""
    blind = without_pictures(questions)
    base = answer_questions(session, None, blind, WORDS, 12, 32)
    seen, unseen = (answer_questions(session, "pictures", asked, WORDS, 12, 32) for asked in (questions, blind))
    return [
        Row(str(q.image), q.question, q.choices, q.answer or 0, base[q.pid], seen[q.pid], unseen[q.pid])
        for q in questions
    ]


def without_pictures(questions: Sequence[Question]) -> list[Question]:
    """The same questions, with nothing to look at."""
    return [replace(question, image=None) for question in questions]


def share_chosen(session: Session, questions: Sequence[Question]) -> float:
    """How often the choice that the adapter finds likeliest is right."""
    chosen = choose_letters(session, "pictures", questions, WORDS)
    return sum(chosen[question.pid] == question.answer for question in questions) / len(questions)


def show(rows: Sequence[Row]) -> None:
    """Some of them, and how many are right."""
    table = Table("question", "right", "base", "adapter", "without the picture", title="drawn pictures")
    by_question = {row.question: row for row in rows}
    for row in list(by_question.values())[:SHOWN]:
        table.add_row(row.question, row.options[row.answer], f"{row.base[:24]}...", row.adapter, row.blind)
    console = Console()
    console.print(table)
    console.print(f"Written, with no choices to go by. {summary(rows)}")


if __name__ == "__main__":
    main()
