"""What both public benchmarks need: records, answers of a base with an adapter, one sentence for a mistake."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from llama_adapter import load_session
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import Session, default_device
from llama_adapter.inference.writing import Prompt


def fail(sentence: str) -> NoReturn:
    """Say it, and end as every wrong input does."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def main(run: Callable[[], None]) -> None:
    """Run a command; what it refuses is one sentence."""
    try:
        run()
    except LlamaAdapterError as error:
        fail(str(error))


def number(text: str) -> int:
    """A count of at least one.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above zero")
    return int(text)


def read(path: Path) -> list[Any]:
    """The records of a JSON or JSONL file."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        # Not splitlines(): texts may hold U+2028 and other characters that it takes for line ends
        found = json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(f"{path} cannot be read ({error}): give a JSON list or one JSON object a line.")
    if not found:
        fail(f"{path} has no records: give the file that the benchmark publishes.")
    return found


def hub(name: str, split: str, *, config: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a data set on the hub."""
    try:
        import datasets
    except ImportError:
        fail("Reading from the hub needs datasets: pip install 'llama-adapter[datasets]', or give --source FILE.")
    try:
        yield from datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises its own kinds
        fail(f"{name} cannot be fetched ({str(error).splitlines()[0]}): give --source FILE.")


def session_of(model: str | None, adapter: str | None) -> tuple[Session, str | None]:
    """The base with the adapter, and the adapter's name in it."""
    if model is None and adapter is None:
        fail("Neither --model nor --adapter is given: name the base, the adapter, or both.")
    return load_session(model, {} if adapter is None else {"adapter": adapter}, default_device()), adapter and "adapter"


def answers(
    session: Session, adapter: str | None, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers, long prompts together with long ones."""
    config, texts = GenerateConfig(max_new_tokens=max_new_tokens, temperature=0), [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].messages[-1].content))
    for first in tqdm(range(0, len(order), batch_size), unit="batch"):
        part = order[first : first + batch_size]
        for i, answer in zip(part, session.answer([prompts[i] for i in part], adapter, config), strict=True):
            texts[i] = answer.text
    return texts
