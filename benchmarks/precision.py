"""Memory of a base's weights and loss on it, by precision: `python -m benchmarks.precision --model FOLDER`.

Every row is a run of `train` with the same data, order and seed; only the base's weights differ.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import BenchmarkError, gibibytes
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.inference.session import default_device
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.loop import train

ROWS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8, torchao": {"base_precision": "int8"},
    "8 bit, bitsandbytes": {"load_in_8bit": True},
    "4 bit, bitsandbytes": {"load_in_4bit": True},
}
"""The first is what the others are compared with; those that say no precision have it from `--precision`."""


def stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that one of a package's own kind is made of, bitsandbytes' scales among them."""
    state = getattr(tensor, "quant_state", None)
    for beside in (*(vars(state).values() if state is not None else ()), getattr(tensor, "SCB", None)):
        if isinstance(beside, torch.Tensor):
            yield beside
        elif hasattr(beside, "absmax"):  # of scales that are rounded themselves
            yield beside.absmax
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor


def weight_bytes(model: torch.nn.Module) -> int:
    """What a model's weights take, each storage once."""
    sizes = {}
    for parameter in model.parameters():
        for tensor in stored(parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def measure(name: str, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """One row: bytes of the weights, peak memory of the run on a GPU, and losses before and after."""
    assert config.model is not None
    model = load_base(config.model, device, config.precision, config.quantization)
    size = weight_bytes(model)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    result = train(config)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "name": name,
        "weight_bytes": size,
        "peak_bytes": peak,
        "loss_before": result.base_val_loss,
        "loss_after": result.best_val_loss,
    }


def as_folder(model: str, folder: Path) -> str:
    """A base that can be rounded: itself, or a GGUF file's weights unpacked into a folder."""
    if not model.lower().endswith(".gguf"):
        return model
    load_base(model, torch.device("cpu"), "fp32").save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def show(rows: Sequence[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> str:
    """The table."""
    about = harness.machine(device)
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    title = (
        f"{Path(options.model).name}, {options.steps} steps of {options.batch_size} on {where}, "
        f"torch {about['torch']}: response loss on {options.val_size} held-out examples"
    )
    first, body = rows[0], []
    for row in rows:
        changes = [row[key] - first[key] for key in ("loss_before", "loss_after")]
        losses = [f"{row['loss_before']:.4f}", f"{changes[0]:+.4f}", f"{row['loss_after']:.4f}", f"{changes[1]:+.4f}"]
        body.append([row["name"], f"{row['weight_bytes'] / 2**20:,.0f}", gibibytes(row["peak_bytes"]), *losses])
    head = ["base", "weights MiB", "peak GiB", "bare", "change", "trained", "change"]
    return harness.table(title, head, body)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="bundled", help="folder, GGUF file or hub name of the base")
    parser.add_argument("--data", default="bundled", help="records to train on and to measure")
    parser.add_argument("--template", default="alpaca", choices=["alpaca", "chat"], help="how they are written")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of every row")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a step")
    parser.add_argument("--val-size", type=int, default=64, help="examples held out")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="of rows without one")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which precisions")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, report."""
    options, device, rows = parse(arguments), default_device(), []
    with tempfile.TemporaryDirectory() as temporary:
        try:
            base = as_folder(options.model, Path(temporary) / "base")
            for name in options.rows:
                values: dict[str, Any] = {"precision": options.precision, **ROWS[name]}
                config = TrainConfig(
                    model=base, data=(options.data,), template=options.template, max_steps=options.steps,
                    batch_size=options.batch_size, val_size=options.val_size, lr=options.lr, max_length=256,
                    output_dir=str(Path(temporary) / "run"), overwrite=True, trackers=("none",), **values,
                )  # fmt: skip
                rows.append(measure(name, config, device))
                print(rows[-1], file=sys.stderr, flush=True)
        except LlamaAdapterError as error:
            raise BenchmarkError(str(error)) from None
    described = {key: value for key, value in vars(options).items() if key != "json"}
    content = {"machine": harness.machine(device), "options": described, "rows": rows}
    harness.write_section(options.json, "precision", content)
    print(show(rows, options, device))


if __name__ == "__main__":
    harness.run(main)
