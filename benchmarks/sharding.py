"""A sharded base (FSDP2): what a process holds, by their number; and what sharding costs a step where nobody shares.

    python -m benchmarks.sharding --shape 250m --memory 1 2 4
    python -m benchmarks.sharding --shape 7b

Memory: a random base is written to a temporary folder in bf16, and `llama-adapter`'s own training runs on it for some
steps in fp32, on the CPU, launched with `recipes/fsdp.yaml`; one process has the base whole. Each process tells what it
holds at most while it loads and while it trains.

Steps: a base on one device, whole and sharded over this one process, in turns. Training itself refuses one process, as
there is nobody to share with: this measures what bringing layers together costs where they need not travel.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from benchmarks import harness, memory, shapes, train
from benchmarks.batching import share_of_loss
from benchmarks.harness import BenchmarkError, Contender, Setting
from benchmarks.lengths import global_batches
from benchmarks.methods import Method
from llama_adapter.training import loop
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.packing import packed_rows

WHOLE, SHARDED = "whole base", "sharded, one process"
RECIPE = Path(__file__).parents[1] / "recipes" / "fsdp.yaml"
MIB = 2**20


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A group of processes that is this one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Shard a Llama over the processes there are, in the groups of transformers' plan for it."""
    mesh = init_device_mesh(model.device.type, (distributed.get_world_size(),))
    for part in (*model.model.layers, model.model.embed_tokens):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def methods(setting: Setting) -> list[Method]:
    """The same adapter on the same weights, whole and sharded."""
    base = shapes.build(setting.shape, setting.device, setting.dtype, setting.options.seed)
    model, adapter = shapes.with_ours(base, setting.shape)
    parted = shard(shapes.share(base))
    twin = shapes.with_gates_open(parted, setting.shape, adapter)
    size = setting.options.micro_batch
    return [
        Method(WHOLE, model, packed_rows, share_of_loss, size, lambda: shapes.our_gradients(adapter)),
        Method(SHARDED, parted, packed_rows, share_of_loss, size, lambda: shapes.our_gradients(twin)),
    ]


def check_parity(rows: Sequence[Method], setting: Setting, batch: Sequence[Any]) -> dict[str, float]:
    """How far the sharded base's loss and gradients are from the whole one's.

    Raises:
        BenchmarkError: further than rounding takes them.
    """
    found = []
    for row in rows:
        loss = float(row.accumulate(batch, setting.device))
        found.append((loss, *train.flat(row.gradients() if row.gradients else [])))
    parity = train.apart(found[1], found[0])
    train.refuse_differences({SHARDED: parity}, setting.dtype, WHOLE)
    return parity


def steps(setting: Setting) -> dict[str, Any]:
    """Examples a second of both, and how much longer the sharded one takes."""
    options = setting.options
    batches = global_batches(max(options.turns, options.warmup), options.batch_size, setting.shape.vocab, options.seed)
    with alone(setting.device):
        rows = methods(setting)
        parity = check_parity(rows, setting, batches[0][: options.micro_batch])
        contenders = [
            Contender(row.name, lambda turn, row=row: row.step(batches[turn], setting.device)) for row in rows
        ]
        timings = harness.interleave(contenders, options.turns, options.warmup, setting.device, setting.budget)
    found = [
        {
            "name": row.name,
            "examples_per_second": harness.spread([options.batch_size / s for s in timings[row.name].seconds]),
            "time_against_whole": harness.ratios(timings[row.name], timings[WHOLE]),
            "seconds": timings[row.name].seconds,
        }
        for row in rows
    ]
    return {"parity": parity, "rows": found}


def show_steps(found: dict[str, Any], setting: Setting) -> str:
    """The table."""
    title = f"A step of {setting.options.batch_size} examples, {setting.line()}; median (quartiles)"
    body = [
        [row["name"], harness.with_range(row["examples_per_second"]),
         harness.with_range(row["time_against_whole"], "{:.2f}"), str(len(row["seconds"]))]
        for row in found["rows"]
    ]  # fmt: skip
    last = f"Losses and gradients agree to {max(found['parity'].values()):.1g} at open gates.\n"
    return harness.table(title, ["base", "examples/s", "time against whole", "turns"], body) + "\n" + last


def recipe(base: str, output_dir: str, options: argparse.Namespace) -> TrainConfig:
    """Some steps of training with the settings of a base that is too large."""
    return TrainConfig(
        model=base, data=("bundled",), val_size=0, max_steps=options.steps, batch_size=4, micro_batch_size=1,
        max_length=256, precision="fp32", gradient_checkpointing=True, trackers=("none",), output_dir=output_dir,
        adapter_layers=shapes.SHAPES[options.shape].adapter_layers,
    )  # fmt: skip


def train_watched(folder: Path, options: argparse.Namespace) -> None:
    """Train as one of the processes, and write what it held."""
    found: dict[str, Any] = {}
    load = loop.load_base

    def loading(*arguments: Any) -> PreTrainedModel:
        found["before"] = memory.held()
        with memory.watched() as most:
            model = load(*arguments)
        found["loading"], found["loaded"] = most, memory.held()
        parts = (value.to_local() if isinstance(value, DTensor) else value for value in model.parameters())
        found["weights"] = sum(part.nbytes for part in parts) / MIB
        return model

    config = recipe(str(folder / "base"), str(folder / "run"), options)
    with mock.patch.object(loop, "load_base", loading), memory.watched() as most:
        loop.train(config)
    found["training"] = most
    (folder / f"process-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def launch(folder: Path, processes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each of so many processes held.

    Raises:
        BenchmarkError: their run failed.
    """
    launcher = ["accelerate.commands.launch", "--config_file", str(RECIPE), "--num_processes", str(processes),
                "--main_process_port", "0", "-m"] if processes > 1 else []  # fmt: skip
    command = [sys.executable, "-m", *launcher, "benchmarks.sharding", "--watched", str(folder)]
    command += ["--shape", options.shape, "--steps", str(options.steps)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BenchmarkError(f"Training on {processes} processes failed: {done.stderr.strip().splitlines()[-1]}")
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("process-*.json"))]
    if len(found) != processes:
        raise BenchmarkError(f"{len(found)} of {processes} processes told what they held.")
    return found


def held_by_processes(options: argparse.Namespace) -> dict[str, Any]:
    """What the process that held most held, by the number of processes."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        numbers = memory.write_base(Path(temporary) / "base", options.shape, torch.bfloat16)
        for processes in options.memory:
            folder = Path(temporary) / str(processes)
            folder.mkdir()
            (folder / "base").symlink_to(Path(temporary) / "base")
            each = launch(folder, processes, options)
            rows.append({"processes": processes, **max(each, key=lambda one: one["training"]["private"])})
    return {"parameters": numbers, "rows": rows}


def show_memory(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The table."""
    title = (
        f"MB of the process that holds most; a base of {found['parameters'] / 1e6:.0f}M parameters, bf16 on disk, "
        f"fp32 in memory; {options.steps} steps, {harness.cpu_name()}"
    )
    most = ["at most while loading", "at most in training", "with mapped files"]
    head = ["processes", "its weights", "before loading", *most]
    body = [
        [str(row["processes"]), *(f"{value:,.0f}" for value in (
            row["weights"], row["before"]["private"], row["loading"]["private"], row["training"]["private"],
            row["training"]["resident"]))]
        for row in found["rows"]
    ]  # fmt: skip
    return harness.table(title, head, body)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="examples of an optimiser step")
    parser.add_argument("--micro-batch", type=int, default=16, help="examples of a forward")
    parser.add_argument(
        "--memory",
        type=int,
        nargs="+",
        metavar="N",
        help="measure the memory of 1, or of N processes, on the CPU instead",
    )
    parser.add_argument("--steps", type=int, default=3, help="of the runs whose memory is measured")
    parser.add_argument("--watched", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, report."""
    options = parse(arguments)
    if options.watched:
        train_watched(options.watched, options)
        return
    if options.memory:
        options.device = "cpu"
        setting, found = Setting.of(options), held_by_processes(options)
        setting.report("memory of a sharded base", found)
        print(show_memory(found, options))
        return
    setting = Setting.of(options)
    timed = steps(setting)
    setting.report("sharding", timed)
    print(show_steps(timed, setting))


if __name__ == "__main__":
    harness.run(main)
