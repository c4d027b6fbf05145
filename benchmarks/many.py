"""Many experts in one run: `python -m benchmarks.many`, on the bundled base and its instructions.

Three questions. What does a step cost when its rows are of many experts (examples a second in all, against one expert
with the same batch, the same examples and micro-batches)? What, against a step of each expert alone, one after the
other? And what does one run of N experts on small data take against N runs of `llama-adapter train` one after the
other, start-up and loading of the base included?

    python -m benchmarks.many --shape 7b    # the first two, on random weights and examples of real lengths
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Budget, Contender
from benchmarks.lengths import draw
from benchmarks.shapes import SHAPES, build, share
from benchmarks.train import TOLERANCE
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.core.model import add_adapter
from llama_adapter.data import Encoded
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.learner import Learner
from llama_adapter.training.loop import Run
from llama_adapter.training.means import Share
from llama_adapter.training.optimizer import build_optimizer
from llama_adapter.training.packing import PackedRow
from llama_adapter.training.prepare import Prepared, prepare

RECORDS = Path(__file__).parents[1] / "src" / "llama_adapter" / "bundled" / "instructions.json"
BUNDLED = "bundled"
ONE, SINGLY, MANY, IN_TURN = "1 expert", "single steps", "one run", "one after the other"
LONG = 10**6
"""Steps of a run that no benchmark comes to the end of: the rate stays that of a warm-up."""


def cpu_seconds() -> float:
    """Of this process and its ended children, user and system."""
    return float(sum(os.times()[:4]))


class Clock:
    """Contenders whose CPU time is taken too: what else a shared machine does lengthens their turns, and not that."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def contender(self, name: str, step: Callable[[int], Any]) -> Contender:
        """One of that name."""
        taken = self.seconds[name] = []

        def timed(turn: int) -> None:
            before = cpu_seconds()
            step(turn)
            taken.append(cpu_seconds() - before)

        return Contender(name, timed)

    def ratios(self, slower: str, quicker: str, skipped: int) -> dict[str, float]:
        """How much more CPU time the one took, turn by turn."""
        pairs = zip(self.seconds[slower][skipped:], self.seconds[quicker][skipped:], strict=True)
        return harness.spread([one / other for one, other in pairs])


def settings(options: argparse.Namespace, **more: Any) -> TrainConfig:
    """A recipe as the bundled one, so small that runs are of start-up and steps."""
    values: dict[str, Any] = {
        "model": "bundled", "data": ("bundled",), "val_size": 8, "max_length": 256, "trackers": ("none",),
        "micro_batch_size": options.micro_batch, "adapter_layers": options.layers, "lr": 0.05, "precision": "fp32",
    }  # fmt: skip
    return TrainConfig(**{**values, **more})


def base_and_data(options: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, Prepared]:
    """The bundled base or a random one of a shape, and the bundled instructions or random ones of Alpaca's lengths."""
    if options.shape == BUNDLED:
        base = load_base(BUNDLED, device, "fp32")
    else:
        base = build(SHAPES[options.shape], device, harness.dtype_of(options.dtype, device))
    if options.lengths == BUNDLED:
        return base, prepare(settings(options), load_tokenizer(BUNDLED))
    examples = draw(options.turns * options.batch, min(base.config.vocab_size, len(load_tokenizer(BUNDLED))))
    longest = max(len(example.input_ids) for example in examples)
    return base, Prepared(examples, [], False, [], "", datetime.now(), longest=longest)


def run_of(count: int, options: argparse.Namespace, data: Prepared, base: PreTrainedModel) -> Run:
    """A run of so many experts, on a model of its own that shares the base's weights."""
    model, learners = share(base), []
    for number in range(count):
        config = settings(options, seed=number, batch_size=options.batch // count, max_steps=LONG, output_dir="unused")
        torch.manual_seed(number)
        adapter = add_adapter(model, config.adapter_config(), f"e{number}")
        for layer in adapter.layers.values():
            torch.nn.init.normal_(layer.gate, std=0.1)
        learners.append(Learner(config, RunFolder("unused"), data, model, adapter, build_optimizer(adapter, config)))
    return Run(learners, Accelerator(cpu=base.device.type == "cpu"), model)


def single_runs(run: Run) -> list[Run]:
    """A run of each of its experts alone."""
    return [Run([expert], run.accelerator, run.model) for expert in run.experts]


def shares_of(run: Run, examples: Sequence[Encoded]) -> list[Share]:
    """Every expert with its part of the examples."""
    return [(expert, examples[place :: len(run.experts)]) for place, expert in enumerate(run.experts)]


def step(run: Run, examples: Sequence[Encoded]) -> None:
    """One optimiser step of every expert, each on its part of the examples."""
    run._step(shares_of(run, examples), False)


def step_singly(run: Run, singles: Sequence[Run], examples: Sequence[Encoded]) -> None:
    """The same, one expert after the other."""
    for single, own in zip(singles, shares_of(run, examples), strict=True):
        single._step([own], False)


def computed_tokens(run: Run, examples: Sequence[Encoded]) -> int:
    """Tokens of its forwards in one step, copies of what examples begin with among them."""
    batches = run._batches(shares_of(run, examples), run.shared.micro_batch_size)
    return sum(sum(b.spans) if isinstance(b, PackedRow) else b.input_ids.numel() for b, _ in batches)


def check_parity(run: Run, singles: Sequence[Run], examples: Sequence[Encoded]) -> float:
    """How far the experts' gradients in one step are from those of a step each, as a share of their size, at most.

    Raises:
        BenchmarkError: further than rounding takes them.
    """
    shares = shares_of(run, examples)
    together, apart = [], []
    run._gradients(shares, False)
    for expert, _ in shares:
        together.append(torch.cat([gradient.flatten() for gradient in expert.gradients()]))
    for single, own in zip(singles, shares, strict=True):
        single._gradients([own], False)
        apart.append(torch.cat([gradient.flatten() for gradient in own[0].gradients()]))
    furthest = max(float((one - two).norm() / two.norm()) for one, two in zip(together, apart, strict=True))
    allowed = TOLERANCE[run.model.dtype][1]
    if not furthest <= allowed:
        raise BenchmarkError(
            f"A step of {len(shares)} experts does not compute what a step of each does: gradients differ by "
            f"{furthest:.2g} of their size, where {allowed:g} is allowed; nothing was timed."
        )
    return furthest


def steps(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Examples a second in all, by the number of experts; of several also one after the other."""
    budget = Budget(options.budget)
    base, data = base_and_data(options, device)
    endless = itertools.cycle(data.train)
    batches = [list(itertools.islice(endless, options.batch)) for _ in range(options.turns)]
    clock, contenders, parity, tokens = Clock(), [], dict[str, float](), dict[str, int]()
    for count in (1, *options.experts):
        run = run_of(count, options, data, base)
        name = ONE if count == 1 else f"{count} experts"
        tokens[name] = sum(computed_tokens(run, batch) for batch in batches)
        contenders.append(clock.contender(name, lambda turn, run=run: step(run, batches[turn % len(batches)])))
        if count > 1:
            singles = single_runs(run)
            tokens[f"{count} {SINGLY}"] = sum(
                computed_tokens(single, own)
                for batch in batches
                for single, (_, own) in zip(singles, shares_of(run, batch), strict=True)
            )
            parity[name] = check_parity(run, singles, batches[0])
            contenders.append(clock.contender(
                f"{count} {SINGLY}",
                lambda turn, run=run, singles=singles: step_singly(run, singles, batches[turn % len(batches)]),
            ))  # fmt: skip
    timings = harness.interleave(contenders, options.turns, options.warmup, device, budget)
    names = [contender.name for contender in contenders]
    return [
        {**row_of(name, timings, clock, options), "gradients_apart": parity.get(name),
         "tokens_of_one": round(tokens[name] / tokens[ONE], 3)}
        for name in names
    ]  # fmt: skip


def row_of(name: str, timings: dict[str, harness.Timing], clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """A contender's figures."""
    count, alone = name.split()[0], f"{name.split()[0]} {SINGLY}"
    single = harness.ratios(timings[alone], timings[name]) if alone in timings else None
    return {
        "name": name, "each": options.batch // int(count), "peak_bytes": timings[name].peak_bytes,
        "examples_s": harness.spread([options.batch / seconds for seconds in timings[name].seconds]),
        "against_one": harness.ratios(timings[ONE], timings[name]),
        "cpu_against_one": clock.ratios(ONE, name, options.warmup), "against_single_steps": single,
    }  # fmt: skip


def write_recipes(folder: Path, count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Recipes for small data sets of unlike records, each with a folder of its own."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    entries = []
    for number in range(count):
        data = folder / f"{number}.json"
        own = records[number * options.records : (number + 1) * options.records]
        data.write_text(json.dumps(own), encoding="utf-8")
        entries.append({
            "output_dir": str(folder / f"run-{number}"), "data": [str(data)], "seed": number, "epochs": options.epochs,
            "batch_size": 8, "lr": 0.05, "val_size": 8, "max_length": 256, "adapter_layers": options.layers,
        })  # fmt: skip
    return entries


def command(*words: str) -> None:
    """Run a command of this package as anybody would."""
    done = subprocess.run([sys.executable, "-m", "llama_adapter", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(done.stderr.strip().splitlines()[-1])


def whole_runs(count: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of one run of so many experts, and of as many single ones."""
    shared = {
        "model": "bundled", "precision": "fp32", "micro_batch_size": options.micro_batch, "trackers": ["none"],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        entries = write_recipes(folder, count, options)
        (folder / "runs.yaml").write_text(yaml.safe_dump({**shared, "runs": entries}))
        for number, entry in enumerate(entries):
            (folder / f"{number}.yaml").write_text(yaml.safe_dump({**shared, **entry}))

        def in_turn(turn: int) -> None:
            for number in range(count):
                command("train", str(folder / f"{number}.yaml"), "--overwrite")

        clock = Clock()
        contenders = [
            clock.contender(MANY, lambda turn: command("train-many", str(folder / "runs.yaml"), "--overwrite")),
            clock.contender(IN_TURN, in_turn),
        ]
        timings = harness.interleave(contenders, options.whole_turns, 0, device, Budget(None))
    return {
        "experts": count,
        "seconds": {name: harness.spread(timing.seconds) for name, timing in timings.items()},
        "faster_by": harness.ratios(timings[IN_TURN], timings[MANY]),
        "cpu_seconds": {name: harness.spread(seconds) for name, seconds in clock.seconds.items()},
        "cpu_faster_by": clock.ratios(IN_TURN, MANY, 0),
    }


def show(rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Both tables."""
    about = harness.machine(harness.device_of(options.device))
    where = (
        f"{options.shape} base, {options.layers} adapted layers, "
        f"{about.get('gpu') or f'{harness.cpu_name()}, {torch.get_num_threads()} threads'}"
    )
    tables = []
    if rows:
        title = (
            f"A step of {options.batch} examples ({options.lengths}), {options.micro_batch} a forward; {where}; "
            "median (quartiles)"
        )
        body = [
            [row["name"], str(row["each"]), harness.with_range(row["examples_s"]),
             harness.with_range(row["against_one"], "{:.2f}"), harness.with_range(row["cpu_against_one"], "{:.2f}"),
             harness.with_range(row["against_single_steps"], "{:.2f}"), f"{row['tokens_of_one']:.2f}"]
            for row in rows
        ]  # fmt: skip
        head = ["in a step", "batch of each", "examples/s in all", "against one", "in CPU time", "against single steps",
                "tokens computed"]  # fmt: skip
        tables.append(harness.table(title, head, body))
        if apart := [row["gradients_apart"] for row in rows if row["gradients_apart"] is not None]:
            tables.append(f"Gradients of one step and of single ones agree to {max(apart):.1g}.\n")
    if runs:
        title = f"Whole runs of {options.records} records, {options.epochs:g} epochs, batches of 8; {where}"
        body = [
            [str(run["experts"]), *(harness.with_range(run["seconds"][name]) for name in (MANY, IN_TURN)),
             harness.with_range(run["faster_by"], "{:.2f}"),
             harness.with_range(run["cpu_faster_by"], "{:.2f}"), str(run["seconds"][MANY]["n"])]
            for run in runs
        ]  # fmt: skip
        head = ["experts", f"{MANY}, s", f"{IN_TURN}, s", "faster by", "in CPU time", "turns"]
        tables.append(harness.table(title, head, body))
    return "\n".join(tables)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=[BUNDLED, *SHAPES], default=BUNDLED, help="of the base; others are random")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", *harness.DTYPES],
        default="auto",
        help="of random bases; auto: bf16 on cuda, else fp32",
    )
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 32], help="of the runs whose steps are timed")
    parser.add_argument(
        "--lengths", choices=["bundled", "alpaca"], default="bundled",
        help="examples of the steps: the bundled instructions, which are short, or random tokens as long as Alpaca's",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=256, help="examples of a step, over all experts")
    parser.add_argument("--micro-batch", type=int, default=32, help="examples of a forward")
    parser.add_argument("--layers", type=int, help="adapted layers (default: the bundled base's 8, or the shape's)")
    parser.add_argument(
        "--whole",
        type=int,
        nargs="*",
        help="experts of the whole runs that are timed (default: 8; none with a --shape)",
    )
    parser.add_argument("--records", type=int, default=72, help="of each expert's data in whole runs")
    parser.add_argument("--epochs", type=float, default=5.0, help="of whole runs")
    parser.add_argument("--turns", type=int, default=10, help="measured steps of every contender")
    parser.add_argument("--whole-turns", type=int, default=3, help="measured whole runs of every contender")
    parser.add_argument("--warmup", type=int, default=1, help="steps before, not measured")
    parser.add_argument("--budget", type=float, help="seconds for the steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    bundled = options.shape == BUNDLED
    if options.whole and not bundled:
        raise BenchmarkError("Whole runs are of the bundled base: leave --shape or --whole out.")
    if options.whole is None:
        options.whole = [8] if bundled else []
    options.lengths = options.lengths if bundled else "alpaca"
    options.layers = options.layers or (8 if bundled else SHAPES[options.shape].adapter_layers)
    uneven = [count for count in options.experts if options.batch % count]
    if uneven:
        raise BenchmarkError(f"--batch {options.batch} cannot be shared by {uneven[0]} experts: take a multiple.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, report."""
    options = parse(arguments)
    device = harness.device_of(options.device)
    rows = steps(options, device) if options.experts else []
    runs = [whole_runs(count, options, device) for count in options.whole]
    described = {key: value for key, value in vars(options).items() if key != "json"}
    content = {"machine": harness.machine(device), "options": described}
    for section, found in ((f"steps, {options.lengths}", rows), ("whole runs", runs)):
        if found:
            harness.write_section(options.json, section, {**content, "rows": found})
    print(show(rows, runs, options))


if __name__ == "__main__":
    harness.run(main)
