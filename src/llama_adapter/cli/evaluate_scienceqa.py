"""`llama-adapter evaluate scienceqa`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.cli import options
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import ConfigError

if TYPE_CHECKING:
    from llama_adapter.evaluation.scienceqa.questions import Question
    from llama_adapter.evaluation.scienceqa.scores import Predictions, Score

# Written out, so that building the parser does not import the evaluation; a test compares them with its tables.
RULES = ("official", "mm-cot", "letter", "words")
FALLBACKS = ("random", "wrong", "recorded")
EXAMPLES = """
llama-adapter evaluate scienceqa --data scienceqa --adapter runs/scienceqa-7b --save answers.json
llama-adapter evaluate scienceqa --data scienceqa --adapter runs/scienceqa-7b --by likelihood --split minival
llama-adapter evaluate scienceqa --data scienceqa --predictions results/gpt3.json
llama-adapter evaluate scienceqa --data scienceqa --predictions answers.jsonl --rule mm-cot --all-rows
llama-adapter evaluate scienceqa --data scienceqa --split minitest --predictions a.json --fallback wrong --json
"""
DESCRIPTION = """\
Score answers to ScienceQA, by category and beside the paper's table: a model's, or those in a --predictions file. That
is the result file of the dataset's own code, a JSON object {pid: text}, or JSON lines {"pid": ..., "text": ...}.

How an answer is read (--rule):
  official   "The answer is X.", once; does not see "(X)"
  mm-cot     "The answer is (X)", once
  letter     the letter alone, or in front as "X." or "(X)"
  words      the choice itself, but for case and a full stop
What an answer that cannot be read counts as (--fallback):
  recorded   the draw that a result file of the dataset's code holds; the default for such a file under official
  random     a draw among the question's choices, under mm-cot among five; the default for any other
  wrong      wrong"""


def add_parser(kinds: Any) -> None:
    """Add the benchmark to those of `evaluate`."""
    parser = add_command(kinds, "scienceqa", run, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--data", required=True, metavar="DIR",
        help="folder with problems.json and pid_splits.json, or with the hub mirror's parquet files",
    )  # fmt: skip
    parser.add_argument("--split", default="test", help="which split was answered (default: %(default)s)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="answers to score; no model is loaded")
    parser.add_argument("--rule", choices=RULES, help="default: official; for a model mm-cot or words in these styles")
    parser.add_argument("--fallback", choices=FALLBACKS, help="default: recorded where there is one, else random")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --fallback random (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of the split")
    parser.add_argument("--allow-missing", action="store_true", help="leave questions without a prediction out")
    answering = parser.add_argument_group("answering with a model")
    answering.add_argument("--style", default="paper", help="paper, words, or QCM-A and its kin (default: %(default)s)")
    answering.add_argument(
        "--by", choices=("decoding", "likelihood"), default="decoding", help="default: %(default)s"
    )  # fmt: skip
    answering.add_argument("--blind", action="store_true", help="show the model no pictures")
    answering.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions answered at once")
    answering.add_argument("--save", type=Path, metavar="FILE", help="write the answers there as JSON")
    options.add_session_options(parser, max_new_tokens=32, sampling=False)
    parser.add_argument("--all-rows", action="store_true", help="show every row of the paper's table")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the score as JSON")


def run(args: argparse.Namespace) -> None:
    """Score the answers and print the table."""
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if args.predictions is not None and (args.adapter or args.model):
        raise ConfigError("--predictions are answers already: leave --adapter and --model out, or --predictions.")
    if args.predictions is None and not (args.adapter or args.model):
        raise ConfigError(
            "Nobody answers: pass --adapter FOLDER (or --model NAME for a bare base), or --predictions FILE."
        )
    if len(args.adapter) > 1:
        raise ConfigError(f"evaluate scienceqa takes one --adapter, not {len(args.adapter)}.")
    from llama_adapter.evaluation.scienceqa.questions import PAPER, WORDS, parse_style, read_scienceqa
    from llama_adapter.evaluation.scienceqa.scores import PAPER_ROWS, SHOWN_ROWS, as_table, read_predictions, score

    parse_style(args.style)
    if args.predictions is not None:
        # The whole split, as a file that answers all of it is no mistake under --limit.
        questions = read_scienceqa(args.data, args.split, images=False)
        predictions = read_predictions(args.predictions, questions)
        rule = args.rule or "official"
    else:
        questions = read_scienceqa(args.data, args.split, images=_looks(args), limit=args.limit)
        predictions = _answers(args, questions)
        rule = args.rule or {PAPER: "mm-cot", WORDS: "words"}.get(args.style, "official")
    recorded = predictions.recorded is not None and rule == "official"
    fallback = args.fallback or ("recorded" if recorded else "random")
    result = score(questions[: args.limit], predictions, rule, fallback, args.seed, args.allow_missing)
    for note in _notes(result, args.split):
        print(note, file=sys.stderr)
    if args.as_json:
        print(json.dumps({"split": args.split, **asdict(result)}))
    else:
        _print(result, as_table(result, tuple(PAPER_ROWS) if args.all_rows else SHOWN_ROWS))


def _looks(args: argparse.Namespace) -> bool:
    """Whether pictures are needed: a bare base, and an adapter trained on text alone, see none."""
    from llama_adapter.formats.native import read_config

    folders = options.name_adapters(args.adapter).values()
    return not args.blind and any(read_config(folder).condition is not None for folder in folders)


def _answers(args: argparse.Namespace, questions: Sequence["Question"]) -> "Predictions":
    """What the model answers."""
    from tqdm.auto import tqdm

    from llama_adapter.evaluation.scienceqa.answers import answer_questions, choose_letters
    from llama_adapter.evaluation.scienceqa.questions import render_target
    from llama_adapter.evaluation.scienceqa.scores import Predictions
    from llama_adapter.files import write_atomically

    session = options.open_session(args)
    adapter = session.adapters[0] if session.adapters else None
    asked = [replace(question, image=None) for question in questions] if args.blind else questions
    with tqdm(total=len(asked), unit="question", file=sys.stderr) as bar:
        if args.by == "decoding":
            texts = answer_questions(
                session, adapter, asked, args.style, args.max_new_tokens, args.batch_size, bar.update
            )
        else:
            letters = choose_letters(session, adapter, asked, args.style, bar.update)
            texts = {q.pid: render_target(replace(q, answer=letters[q.pid]), args.style) for q in asked}
    if args.save is not None:
        write_atomically(args.save, json.dumps(texts, indent=0, ensure_ascii=False).encode())
    return Predictions(texts)


def _notes(result: "Score", split: str) -> list[str]:
    """What keeps the figures from being read as they stand."""
    from llama_adapter.evaluation.scienceqa.scores import TEST_QUESTIONS

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


def _print(result: "Score", rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "trained", box=None, padding=(0, 1, 0, 0))
    for name in result.counts:
        table.add_column(name, justify="right")
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
