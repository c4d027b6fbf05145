"""What the base knows: recall of facts by completing plain statements, and perplexity on held-out prose.

A fact counts as recalled when greedy decoding completes a statement with exactly the answer and its
full stop.  That holds if and only if every one of those tokens is the most likely one given the
right tokens before it, so one forward pass per batch decides it and nothing need be generated.

    python recipes/base/recall.py src/llama_adapter/bundled/base
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from prose import heldout_passages
from world import Fact, World, load_world, render

IGNORED = -100


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def greedy_matches(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch: int = 64) -> list[bool]:
    """For each (prompt, completion): would greedy decoding of the prompt begin with the completion?"""
    device, results = next(model.parameters()).device, []
    for part in _batches(pairs, batch):
        rows = []
        for prompt, completion in part:
            start = tokenizer(prompt)["input_ids"]
            rows.append((start, tokenizer(prompt + completion)["input_ids"][len(start) :]))
        width = max(len(start) + len(rest) for start, rest in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        wanted = torch.full((len(rows), width), IGNORED)
        for number, (start, rest) in enumerate(rows):
            ids[number, : len(start) + len(rest)] = torch.tensor(start + rest)
            wanted[number, len(start) : len(start) + len(rest)] = torch.tensor(rest)
        guesses = model(input_ids=ids.to(device)).logits[:, :-1].argmax(-1).cpu()
        results += ((guesses == wanted[:, 1:]) | (wanted[:, 1:] == IGNORED)).all(-1).tolist()
    return results


def statement_pairs(world: World, fact: Fact, wordings: int) -> list[tuple[str, str]]:
    """Statements about the fact, cut before the answer."""
    pairs = []
    for wording in world[fact.family].completions()[:wordings]:
        text = render(wording, fact)
        ending = f" {fact.answer}."
        pairs.append((text.removesuffix(ending), ending))
    return pairs


def recall_by_family(model: Any, tokenizer: Any, world: World, wordings: int = 2) -> dict[str, float]:
    """Share of statements completed rightly, per family and over all facts (``all``)."""
    table: dict[str, float] = {}
    right = total = 0
    for name, family in world.items():
        pairs = [pair for fact in family.facts for pair in statement_pairs(world, fact, wordings)]
        hits = greedy_matches(model, tokenizer, pairs)
        table[name] = round(sum(hits) / len(hits), 4)
        right, total = right + sum(hits), total + len(hits)
    return table | {"all": round(right / total, 4)}


@torch.no_grad()
def prose_perplexity(model: Any, tokenizer: Any, length: int = 256, limit: int | None = None) -> float:
    """Perplexity per token on the ends of the books, which training never saw."""
    device, loss_sum, count = next(model.parameters()).device, 0.0, 0
    for passage in heldout_passages()[:limit]:
        ids = torch.tensor([tokenizer(passage, truncation=True, max_length=length)["input_ids"]], device=device)
        loss_sum += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return round(math.exp(loss_sum / count), 3)


def print_table(recall: dict[str, float]) -> None:
    """The recall table."""
    for name, share in recall.items():
        print(f"{name:<12}{100 * share:6.1f} %")


def main() -> None:
    """Measure a saved base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--wordings", type=int, default=2, help="statement wordings tried for every fact")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    print_table(recall_by_family(model, tokenizer, load_world(), arguments.wordings))
    print(f"perplexity on held-out prose {prose_perplexity(model, tokenizer)}")


if __name__ == "__main__":
    main()
