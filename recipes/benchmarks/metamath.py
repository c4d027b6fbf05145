"""MetaMathQA to training records, and GSM8K's score of what was trained, as PEFT's method comparison has them.

python recipes/benchmarks/metamath.py prepare --out data/metamath.jsonl
python recipes/benchmarks/metamath.py score --adapter runs/metamath-3b
"""

from __future__ import annotations

import argparse
import json
import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

import asking

from llama_adapter.data.examples import Message
from llama_adapter.files import write_atomically
from llama_adapter.inference.writing import Prompt

QUESTION = "Question: {query} Think step by step.\nAnswer:"
"""The comparison's own prompt."""
FINAL = re.compile(r"The (?:final )?answer is:?|####")
"""What the final answer stands behind, in MetaMathQA and in GSM8K's references."""
NUMBER = re.compile(r"-?\$?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?: ?/ ?([0-9]+))?")


def record(query: str, response: str) -> dict[str, str]:
    """One training record without a template."""
    return {"prompt": QUESTION.format(query=query), "completion": " " + response.strip()}


def final_number(text: str) -> Fraction | None:
    """The one number, maybe a fraction, behind the last "The answer is" on its line; None where there is none.

    As in the comparison, a number elsewhere does not count, nor does what the model goes on to write below it.
    """
    *before, last = FINAL.split(text)
    found = list(NUMBER.finditer(last.strip().partition("\n")[0].replace("\\$", "$"))) if before else []
    if len(found) != 1:
        return None
    (number,) = found
    above, below = Fraction(number[1].replace(",", "")), int(number[2] or 1)
    return None if below == 0 else above / below * (-1 if number[0].startswith("-") else 1)


def right(reference: str, answer: str) -> bool:
    """Whether an answer's final number is the reference's."""
    return final_number(answer) is not None and final_number(answer) == final_number(reference)


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
    if wrong := next((row for row in rows if final_number(str(row["answer"])) is None), None):
        asking.fail(f"The answer {str(wrong['answer'])[-60:]!r} has no number behind '####', which GSM8K's have.")
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
    scoring.add_argument("--limit", type=asking.number, help="only the first so many questions")
    scoring.add_argument("--max-new-tokens", type=asking.number, default=300)
    scoring.add_argument("--batch-size", type=asking.number, default=50)
    scoring.set_defaults(run=score)
    args = parser.parse_args()
    asking.main(lambda: args.run(args))


if __name__ == "__main__":
    main()
