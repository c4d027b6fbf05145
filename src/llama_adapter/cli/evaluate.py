"""`llama-adapter evaluate instructions`."""

import argparse
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_adapter.cli import evaluate_scienceqa, options, output
from llama_adapter.cli.parser import Parser, add_command
from llama_adapter.progress import progress_bar

if TYPE_CHECKING:
    from llama_adapter.evaluation.instructions import FamilyScore

log = logging.getLogger(__name__)

EXAMPLES = """
llama-adapter evaluate instructions --data heldout.json --adapter runs/first
llama-adapter evaluate instructions --data heldout.json -a zero=runs/a -a random=runs/b --plot scores.png
llama-adapter evaluate instructions --data heldout.json --adapter runs/first --json > scores.json
"""


def add_parser(commands: Any) -> None:
    """Add the command and what it can measure."""
    description = "Measure a base and its adapters. Other benchmarks: python -m llama_adapter.evaluation --help"
    parser: Parser = commands.add_parser("evaluate", help="Measure a base and its adapters", description=description)
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True, parser_class=Parser)
    text = "Exact match and response loss per task family. The bare base and every --adapter stand side by side."
    instructions = add_command(kinds, "instructions", run, text, EXAMPLES)
    instructions.add_argument(
        "--data", required=True, nargs="+", help="records in any training format; 'family' groups them"
    )
    instructions.add_argument("--no-base", action="store_true", help="leave the bare base out")
    instructions.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    instructions.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts answered at once")
    options.add_skip_bad_records(instructions)
    instructions.add_argument("--plot", type=options.path_of, metavar="PNG", help="write a bar chart there")
    instructions.add_argument("--json", dest="as_json", action="store_true", help="print the scores as JSON")
    options.add_session_options(instructions, max_new_tokens=32, sampling=False)
    evaluate_scienceqa.add_parser(kinds)


def run(args: argparse.Namespace) -> None:
    """FamilyScore every model and print the table."""
    options.at_least_one(args, "batch_size", "max_new_tokens", "limit")
    from llama_adapter.evaluation.instructions import evaluate_instructions, family_table, fitting_tasks, read_tasks
    from llama_adapter.inference.writing import asked_otherwise

    skipped: list[str] | None = [] if args.skip_bad_records else None
    planned = options.plan(args)
    kinds = options.kinds_of(planned)
    tasks = [task for source in args.data for task in read_tasks(source, skipped, kinds, args.limit)][: args.limit]
    models = [*([] if args.no_base and planned.folders else [None]), *planned.folders]
    tasks = fitting_tasks(tasks, planned.writer, models, skipped)
    options.report_skipped(skipped or ())
    for name in planned.folders:
        if warning := asked_otherwise([task.prompt for task in tasks], planned.writer, name):
            log.warning(warning)
    session = options.load(planned, args)
    results: dict[str, list[FamilyScore]] = {}
    with progress_bar(len(models) * len(tasks), "answer") as bar:
        for model in models:
            scores, _ = evaluate_instructions(
                session, model, tasks, args.max_new_tokens, args.batch_size, progress=bar.update
            )
            results[model or "base"] = scores
    if args.plot is not None:
        from llama_adapter.training.plots import plot_scores

        values = {name: {s.family: s.exact_match for s in scores} for name, scores in results.items()}
        plot_scores(values, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.as_json:
        output.print_json({name: [asdict(score) for score in scores] for name, scores in results.items()})
    else:
        _print(family_table(results), list(results))


def _print(rows: list[dict[str, Any]], names: list[str]) -> None:
    from rich.table import Table

    table = Table("family", "tasks", *(f"{name}: {what}" for name in names for what in ("exact", "loss")))
    for row in rows:
        cells = [cell for n in names for cell in (f"{row[n]['exact_match']:.1%}", f"{row[n]['loss']:.3f}")]
        table.add_row(row["family"], str(row["count"]), *cells, style="bold" if row["family"] == "all" else None)
    output.console().print(table)
