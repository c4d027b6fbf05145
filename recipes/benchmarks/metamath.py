"""MetaMathQA to training records, and GSM8K's score of what was trained, as PEFT's method comparison has them.

python recipes/benchmarks/metamath.py prepare --out data/metamath.jsonl
python recipes/benchmarks/metamath.py score --adapter runs/metamath-3b
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import islice
from pathlib import Path

import asking

from llama_adapter.data.examples import Message
from llama_adapter.files import write_atomically
from llama_adapter.inference.writing import Prompt

QUESTION = "Question: {query} Think step by step.\nAnswer:"
"""The comparison's own prompt."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def record(query: str, response: str) -> dict[str, str]:
    """One training record without a template."""
    return {"prompt": QUESTION.format(query=query), "completion": " " + response.strip()}


def last_number(text: str) -> float | None:
    """The number an answer ends with; GSM8K's references have it behind '####'."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def right(reference: str, answer: str) -> bool:
    """Whether an answer ends with the reference's number."""
    return last_number(answer) is not None and last_number(answer) == last_number(reference)


def prepare(args: argparse.Namespace) -> None:
    """Write the training file."""
    rows = asking.read(args.source) if args.source else asking.hub("meta-math/MetaMathQA", "train")
    try:
        lines = [json.dumps(record(row["query"], row["response"])) for row in rows]
    except (KeyError, TypeError, AttributeError):
        asking.fail("A record has no texts 'query' and 'response', which MetaMathQA's have: give its own file.")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, ("\n".join(lines) + "\n").encode())
    print(f"wrote {len(lines):,} records to {args.out}")


def score(args: argparse.Namespace) -> None:
    """Ask every question and count."""
    rows = asking.read(args.source) if args.source else asking.hub("openai/gsm8k", "test", config="main")
    rows = list(islice(rows, args.limit))
    if not all(isinstance(row, dict) and {"question", "answer"} <= row.keys() for row in rows):
        asking.fail("A record has no 'question' and 'answer', which GSM8K's have: give its own test file.")
    session, adapter = asking.session_of(args.model, args.adapter)
    prompts = [Prompt((Message("user", QUESTION.format(query=row["question"])),), raw=True) for row in rows]
    texts = asking.answers(session, adapter, prompts, args.max_new_tokens, args.batch_size)
    hits = sum(right(row["answer"], text) for row, text in zip(rows, texts, strict=True))
    print(json.dumps({"task": "gsm8k", "questions": len(rows), "accuracy": round(hits / len(rows), 4)}))


def main() -> None:
    """The two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("prepare", help="write MetaMathQA as training records")
    making.add_argument("--source", type=Path, help="MetaMathQA's JSON file (default: from the hub)")
    making.add_argument("--out", type=Path, default=Path("data/metamath.jsonl"))
    making.set_defaults(run=prepare)
    scoring = commands.add_parser("score", help="accuracy on GSM8K's test questions")
    scoring.add_argument("--model", help="the base (default: the adapter's own)")
    scoring.add_argument("--adapter", help="a run or adapter; without it the bare base is asked")
    scoring.add_argument("--source", type=Path, help="GSM8K's test file (default: from the hub)")
    scoring.add_argument("--limit", type=int, help="only the first so many questions")
    scoring.add_argument("--max-new-tokens", type=int, default=300)
    scoring.add_argument("--batch-size", type=int, default=50)
    scoring.set_defaults(run=score)
    args = parser.parse_args()
    asking.main(lambda: args.run(args))


if __name__ == "__main__":
    main()
