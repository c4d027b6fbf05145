"""Many adapters in one batch: what it costs to decode with 1, 8 or 64 experts side by side.

    python -m benchmarks.adapters --shape tiny --json benchmarks/results/cpu.json

Before anything is timed, rows of a mixed batch must get what they get when their adapter serves the whole batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, shapes
from benchmarks.decode import TOLERANCE, generate
from benchmarks.harness import BenchmarkError, Contender, Setting
from benchmarks.lengths import random_prompts
from llama_adapter import AdapterConfig, add_adapter, use_adapter
from llama_adapter.inference.choice import Row
from llama_adapter.inference.engine import Engine

CHANGING = "another batch every step"
CHECKED = 3
"""Adapters whose rows are compared with a batch of their own."""


def names_of(rows: int, distinct: int) -> list[str]:
    """Whose row is whose when `distinct` adapters take turns."""
    return [f"expert-{row % distinct}" for row in range(rows)]


def adapted(setting: Setting, count: int) -> Any:
    """A base with `count` different adapters, all gates open."""
    shape = setting.shape
    model = shapes.build(shape, setting.device, setting.dtype, setting.options.seed)
    config = AdapterConfig(adapter_len=shape.adapter_len, adapter_layers=shape.adapter_layers)
    for number in range(count):
        shapes.open_gates(add_adapter(model, config, f"expert-{number}"), setting.dtype)
    return model


@torch.no_grad()
def check_parity(model: Any, ids: Tensor, distinct: int, dtype: torch.dtype) -> float:
    """How far a mixed batch's logits are from those of batches with one adapter, as a share of their size.

    Raises:
        BenchmarkError: further than `TOLERANCE`, or adapters differ so little that this shows nothing.
    """
    names = names_of(len(ids), distinct)
    with use_adapter(model, names):
        mixed = model(input_ids=ids).logits.float()
    worst, apart = 0.0, float("inf")
    for row in range(min(CHECKED, distinct, len(ids))):
        with use_adapter(model, names[row]):
            alone = model(input_ids=ids).logits.float()
        worst = max(worst, float((mixed[row] - alone[row]).norm() / alone[row].norm()))
        if distinct > 1 and len(ids) > 1:
            other = (row + 1) % len(ids)
            apart = min(apart, float((mixed[other] - alone[other]).norm() / alone[other].norm()))
    if not worst <= TOLERANCE[dtype]:
        raise BenchmarkError(
            f"With {distinct} adapters in a batch, logits differ by {worst:.2g} of their size from what each adapter "
            f"gives alone, where {TOLERANCE[dtype]:g} is allowed: nothing was timed."
        )
    if not apart > 2 * worst:
        raise BenchmarkError(f"The adapters differ by {apart:.2g} only, so equality would show nothing.")
    return worst


@torch.no_grad()
def changing_batch(engine: Engine, prompts: Tensor, names: Sequence[str | None], new_tokens: int) -> None:
    """Decode while every step has another batch, as in continuous batching: each row under another adapter."""
    rows = [Row(prompt, name, max_new_tokens=new_tokens) for prompt, name in zip(prompts.tolist(), names, strict=True)]
    with engine.batch() as batch:
        batch.join(batch.admit(rows))
        for _ in range(new_tokens - 1):
            batch.choose()
            slots = [member.slot for member in batch.members]
            for member, slot in zip(batch.members, slots[1:] + slots[:1], strict=True):
                member.slot = slot
            batch.route()
            batch.advance()


def title_of(distinct: int) -> str:
    """A row's title."""
    return "bare base" if distinct == 0 else f"{distinct} adapter{'s' if distinct > 1 else ''}"


def show(found: Sequence[dict[str, Any]], setting: Setting, parity: float) -> str:
    """The table."""
    options = setting.options
    rows = [
        [
            row["name"], row["failure"] or harness.with_range(row["tokens_per_second"]),
            harness.with_range(row["time_against_one"], "{:.3f}"), str(len(row["seconds"])),
            harness.gibibytes(row["peak_bytes"]),
        ]
        for row in found
    ]  # fmt: skip
    title = (
        f"Adapters in one batch, {setting.line()}: {options.rows} rows, {options.prompt_tokens} prompt tokens and "
        f"{options.new_tokens} new ones, median (quartiles)"
    )
    head = ["adapters in the batch", "tokens/s", "time against 1 adapter", "turns", "peak GiB"]
    return harness.table(title, head, rows) + f"\nMixed and separate batches agree to {parity:.1g}.\n"


def against(timings: Mapping[str, harness.Timing], name: str) -> dict[str, float] | None:
    """How many times as long a row took as one adapter did, in batches that change or in those that do not."""
    one = timings.get(f"{title_of(1)}, {CHANGING}" if CHANGING in name else title_of(1))
    return harness.ratios(timings[name], one) if one else None


def parse(arguments: Sequence[str] | None) -> Any:
    """The options."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="decoded together")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64], help="distinct ones in a batch")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of every row")
    parser.add_argument("--new-tokens", type=int, default=64, help="of every row")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, report."""
    setting = Setting.of(parse(arguments))
    options = setting.options
    # More adapters than rows would be 64 in name only; the single adapter is what all others are measured against.
    counts = sorted({1, *options.adapters})
    if counts[-1] > options.rows:
        raise BenchmarkError(f"--adapters {counts[-1]} needs as many --rows, which is {options.rows}.")
    model = adapted(setting, counts[-1])
    prompts = random_prompts(options.rows, options.prompt_tokens, setting.shape.vocab, setting.device, options.seed)
    parity = max(check_parity(model, prompts[:, :16], count, setting.dtype) for count in counts)
    engine = Engine(model)
    engine, count = Engine(model), options.new_tokens
    choices: dict[str, Any] = {title_of(0): [None] * options.rows}
    choices |= {title_of(distinct): names_of(options.rows, distinct) for distinct in counts}
    turn_takers = [
        Contender(name, lambda _, names=choices[name]: generate(engine, prompts, count, names))
        for name in setting.chosen(list(choices))
    ]
    turn_takers += [
        Contender(f"{name}, {CHANGING}", lambda _, names=choices[name]: changing_batch(engine, prompts, names, count))
        for name in (title_of(1), title_of(counts[-1]))
    ]
    timings = harness.interleave(turn_takers, options.turns, options.warmup, setting.device, setting.budget)
    tokens = options.rows * options.new_tokens
    rows = [
        {
            "name": name,
            "failure": timing.failure,
            "tokens_per_second": harness.spread([tokens / s for s in timing.seconds]) if timing.seconds else None,
            "time_against_one": against(timings, name),
            "seconds": timing.seconds,
            "peak_bytes": timing.peak_bytes,
        }
        for name, timing in timings.items()
    ]
    setting.report("adapters", {"parity": parity, "rows": rows})
    print(show(rows, setting, parity))


if __name__ == "__main__":
    harness.run(main)
