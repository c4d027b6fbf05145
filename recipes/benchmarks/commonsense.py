"""The eight commonsense test sets of LLM-Adapters: accuracy of a base with an adapter, by set and on average.

python recipes/benchmarks/commonsense.py --adapter runs/commonsense-7b --data dataset
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import asking

from llama_adapter.inference.writing import Prompt

CHOICES = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "social_i_qa": r"answer[1-5]",
    "hellaswag": r"ending[1-5]",
    "winogrande": r"option[12]",
    "ARC-Easy": r"answer[1-5]",
    "ARC-Challenge": r"answer[1-5]",
    "openbookqa": r"answer[1-5]",
}
"""Test set -> how its answers are named; an answer counts by the first one it mentions."""


def chosen(task: str, answer: str) -> str | None:
    """What an answer chooses, or None where it names no choice."""
    found = re.search(CHOICES[task], answer)
    return found and found.group()


def score(args: argparse.Namespace) -> None:
    """Ask every question of every set and print a table."""
    tasks = args.tasks or list(CHOICES)
    sets = {task: asking.read(args.data / task / "test.json")[: args.limit] for task in tasks}
    for task, rows in sets.items():
        if not all(isinstance(row, dict) and {"instruction", "answer"} <= row.keys() for row in rows):
            asking.fail(f"A record of {task} has no 'instruction' and 'answer', which the published files have.")
        if wrong := next((row for row in rows if not re.fullmatch(CHOICES[task], str(row["answer"]))), None):
            asking.fail(f"A record of {task} has the answer {wrong['answer']!r}, which none can be: {CHOICES[task]}.")
    session, adapter = asking.session_of(args.model, args.adapter)
    results = {}
    for task, rows in sets.items():
        prompts = [Prompt.of(row["instruction"], row.get("input", "")) for row in rows]
        texts = asking.answers(session, adapter, prompts, args.max_new_tokens, args.batch_size)
        hits = sum(chosen(task, text) == row["answer"] for row, text in zip(rows, texts, strict=True))
        results[task] = round(hits / len(rows), 4)
    print(json.dumps(results | {"average": round(sum(results.values()) / len(results), 4)}, indent=1))


def main() -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the base (default: the adapter's own)")
    parser.add_argument("--adapter", help="a run or adapter; without it the bare base is asked")
    parser.add_argument("--data", type=Path, required=True, help="folder with boolq/test.json and the others")
    parser.add_argument("--tasks", nargs="*", choices=list(CHOICES), help="only these sets")
    parser.add_argument("--limit", type=asking.number, help="only the first so many questions of each")
    parser.add_argument("--max-new-tokens", type=asking.number, default=32)
    parser.add_argument("--batch-size", type=asking.number, default=32)
    args = parser.parse_args()
    asking.main(lambda: score(args))


if __name__ == "__main__":
    main()
