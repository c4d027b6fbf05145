"""`llama-adapter evaluate scienceqa`."""

import argparse
from typing import Any

from llama_adapter.cli import options
from llama_adapter.cli.parser import add_command
from llama_adapter.errors import ConfigError

# Written out, so that building the parser does not import the evaluation; a test compares them with its tables.
_RULES = ("official", "mm-cot", "letter", "words")
_FALLBACKS = ("random", "wrong", "recorded")
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
    parser.add_argument(
        "--predictions", type=options.path_of, metavar="FILE", help="answers to score; no model is loaded"
    )
    parser.add_argument("--rule", choices=_RULES, help="default: official; for a model mm-cot or words in these styles")
    parser.add_argument("--fallback", choices=_FALLBACKS, help="default: recorded where there is one, else random")
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
    options.add_skip_bad_records(answering)
    answering.add_argument("--save", type=options.path_of, metavar="FILE", help="write the answers there as JSON")
    options.add_session_options(parser, max_new_tokens=32, sampling=False)
    parser.add_argument("--all-rows", action="store_true", help="show every row of the paper's table")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the score as JSON")


def run(args: argparse.Namespace) -> None:
    """Score the answers and print the table."""
    options.at_least_one(args, "limit", "batch_size", "max_new_tokens")
    if args.predictions is not None and (args.adapter or args.model):
        raise ConfigError("--predictions are answers already: leave --adapter and --model out, or --predictions.")
    if args.predictions is None and not (args.adapter or args.model):
        raise ConfigError(
            "Nobody answers: pass --adapter FOLDER (or --model NAME for a bare base), or --predictions FILE."
        )
    if len(args.adapter) > 1:
        raise ConfigError(f"evaluate scienceqa takes one --adapter, not {len(args.adapter)}.")
    from llama_adapter.evaluation.scienceqa.report import print_report, score_file, score_model

    skipped: list[str] | None = [] if args.skip_bad_records else None
    common = args.data, args.split, args.limit, args.rule, args.fallback, args.seed
    if args.predictions is not None:
        result = score_file(args.predictions, *common, args.allow_missing)
    else:
        planned = options.plan(args)
        # A bare base, and an adapter trained on text alone, see no pictures.
        looks = any(found.config.condition is not None for found in planned.readings.values()) and not args.blind
        result = score_model(
            planned, lambda planned: options.load(planned, args), *common, pictures=looks,
            style=args.style,
            likelihood=args.by == "likelihood", max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
            save=args.save, skipped=skipped,
        )  # fmt: skip
    options.report_skipped(skipped or ())
    print_report(result, args.split, args.all_rows, args.as_json)
