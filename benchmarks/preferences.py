"""DPO's memory: `llama-adapter train --method dpo` beside TRL's `DPOTrainer`, the same adapter on the same random base.

    python -m benchmarks.preferences --shape 250m
    python -m benchmarks.preferences --shape 250m --gradient-checkpointing

Each row is a process of its own on the CPU, which loads a base (bf16 on disk, fp32 in memory), takes some steps over
the same pairs of texts and tells what it held at most. TRL's usual reference is a second model; the last row gives it
ours on the same weights. That loss and gradients of both are alike is a test (tests/test_preferences.py).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import harness, memory, shapes
from benchmarks.harness import BenchmarkError, Setting
from llama_adapter import AdapterConfig, add_adapter
from llama_adapter.base import load_tokenizer
from llama_adapter.core.model import reference_model
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loop import train

OURS, SECOND, SAME = "ours", "TRL, a second model as reference", "TRL, reference_model"
WORDS = ["sun", "moon", "cat", "dog", "tree", "lake", "bird", "fish", "river", "stone", "cloud", "leaf"]


def write_pairs(file: Path, count: int, words: int) -> None:
    """Pairs of answers of so many words each to prompts of as many."""
    numbers = random.Random(0)

    def text() -> str:
        return " ".join(numbers.choices(WORDS, k=words))

    records = [{"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"} for _ in range(count)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def ours(folder: Path, options: argparse.Namespace) -> None:
    """The command line's training."""
    train(TrainConfig(
        method="dpo", model=str(folder / "base"), data=(str(folder / "pairs.jsonl"),), val_size=0,
        output_dir=str(folder / "run"), max_steps=options.steps, batch_size=options.pairs,
        micro_batch_size=options.pairs, precision="fp32", trackers=("none",),
        adapter_layers=shapes.SHAPES[options.shape].adapter_layers,
        gradient_checkpointing=options.gradient_checkpointing,
    ))  # fmt: skip


def load(folder: Path) -> PreTrainedModel:
    """The base, as TRL's users load it."""
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def with_a_second_model(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The base once more."""
    return load(folder)


def on_the_same_weights(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Ours."""
    return reference_model(model)


def theirs(
    folder: Path, options: argparse.Namespace, reference: Callable[[Path, PreTrainedModel], PreTrainedModel]
) -> None:
    """TRL's trainer with our adapter."""
    import datasets
    import trl

    model = load(folder)
    layers = shapes.SHAPES[options.shape].adapter_layers
    add_adapter(model, AdapterConfig(adapter_len=10, adapter_layers=layers))
    arguments = trl.DPOConfig(
        output_dir=str(folder / "run"), max_steps=options.steps, per_device_train_batch_size=options.pairs,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=options.gradient_checkpointing, max_length=512,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trl.DPOTrainer(
        model, ref_model=reference(folder, model), args=arguments, train_dataset=datasets.Dataset.from_list(records),
        processing_class=load_tokenizer("bundled"),
    ).train()  # fmt: skip


ROWS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    OURS: ours,
    SECOND: lambda folder, options: theirs(folder, options, with_a_second_model),
    SAME: lambda folder, options: theirs(folder, options, on_the_same_weights),
}


def run_watched(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Train as that row does, and print what it held."""
    import datasets  # noqa: F401
    import trl  # noqa: F401  so that what importing takes is in nobody's way

    before = memory.held()
    with memory.watched() as most:
        ROWS[name](folder, options)
    print(json.dumps({"before": before, "most": most}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What each row held.

    Raises:
        BenchmarkError: one failed, or TRL is not installed.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        numbers = memory.write_base(folder / "base", options.shape, torch.bfloat16)
        write_pairs(folder / "pairs.jsonl", options.steps * options.pairs, options.words)
        for name in [name for name in ROWS if not options.only or any(text in name for text in options.only)]:
            command = [sys.executable, "-m", "benchmarks.preferences", "--watched", name, str(folder), *given(options)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise BenchmarkError(f"'{name}' failed: {done.stderr.strip().splitlines()[-1]}")
            found = json.loads(done.stdout.splitlines()[-1])
            added = found["most"]["private"] - found["before"]["private"]
            rows.append({"name": name, "added": added, "of_the_base": added / (numbers * 4 / 2**20), **found})
    return {"parameters": numbers, "rows": rows}


def given(options: argparse.Namespace) -> list[str]:
    """What a row's process is told."""
    told = [f"--shape={options.shape}", f"--steps={options.steps}", f"--pairs={options.pairs}"]
    return told + ["--gradient-checkpointing"] * options.gradient_checkpointing


def show(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The table."""
    title = (
        f"DPO on {found['parameters'] / 1e6:.0f}M parameters in fp32, {found['parameters'] * 4 / 2**20:,.0f} MB; "
        f"{options.pairs} pairs a forward, texts of {2 * options.words} words"
        f"{', gradient checkpointing' if options.gradient_checkpointing else ''}; {harness.cpu_name()}"
    )
    body = [
        [row["name"], f"{row['before']['private']:,.0f}", f"{row['most']['private']:,.0f}", f"{row['added']:,.0f}",
         f"{row['of_the_base']:.2f}", f"{row['added'] / found['rows'][0]['added']:.2f}"]
        for row in found["rows"]
    ]  # fmt: skip
    head = ["row", "MB before", "MB at most", "MB for it", "in bases", "against the first"]
    return harness.table(title, head, body)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2, help="of a step and a forward")
    parser.add_argument("--words", type=int, default=24, help="of a prompt and of an answer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as TRL does by default")
    parser.add_argument("--watched", nargs=2, metavar=("ROW", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, report."""
    options = parse(arguments)
    if options.watched:
        run_watched(options.watched[0], Path(options.watched[1]), options)
        return
    options.device = "cpu"
    setting, found = Setting.of(options), measure(options)
    setting.report("preferences", found)
    print(show(found, options))


if __name__ == "__main__":
    harness.run(main)
