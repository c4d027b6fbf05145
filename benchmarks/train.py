"""Training speed: one optimiser step (forward, backward, AdamW) on the same examples, by every way there is.

    python -m benchmarks.train --shape tiny --json benchmarks/results/cpu.json

Before anything is timed, loss and gradients of every zero-init row must be equal at open gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks import harness
from benchmarks.batching import unshared_rows
from benchmarks.harness import BenchmarkError, Contender, Setting
from benchmarks.lengths import global_batches, real_tokens
from benchmarks.methods import OURS, OURS_PADDED, PEFT_BEST, PEFT_LIKE, Batches, Gradients, Method, methods
from llama_adapter.data import Encoded
from llama_adapter.data.batches import response_tokens
from llama_adapter.training.packing import packed_rows

ALPACA, EPOCHS = 52002, 5
"""Examples and epochs of the paper's run; how long it takes is extrapolated from a row's rate."""
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 0.1)}
"""Largest relative difference of the loss, and of the gradients' norm; about ten times what rounding alone makes."""


def choose_micro_batches(rows: Sequence[Method], batches: Batches, setting: Setting) -> None:
    """Settle how many examples each row takes at once.

    Where a size was left open (0), it is the quickest of those that fit in memory, for each way to batch; on a GPU, a
    row that needs more memory than the one it was tried on gets less.
    """
    found: dict[str, int] = {}
    for name in (OURS, PEFT_LIKE, PEFT_BEST):
        method = next(row for row in rows if row.name == name)
        found[kind(method)] = method.micro_batch or quickest_size(method, batches, setting.device)
    for row in rows:
        row.micro_batch = row.micro_batch or found[kind(row)]
        if setting.device.type == "cuda":
            shrink_to_fit(row, batches, setting.device)


def kind(row: Method) -> str:
    """How it batches: rows of a kind take micro-batches of one size."""
    if row.regrouped:
        return "grouped"
    return "packed" if row.batches in (packed_rows, unshared_rows) else "padded"


def worst_batch(row: Method, batches: Batches) -> Sequence[Encoded]:
    """The batch that needs most memory: of all tokens where rows are packed, else of the longest example."""
    measure = sum if kind(row) == "packed" else max
    return max(row.arrange(batches), key=lambda batch: measure([len(example.input_ids) for example in batch]))


def shrink_to_fit(row: Method, batches: Batches, device: torch.device) -> None:
    """Halve the micro-batch until forward and backward fit in memory; what fails for another reason fails later."""
    while row.micro_batch > 1:
        try:
            row.accumulate(worst_batch(row, batches), device)
        except torch.OutOfMemoryError:
            row.micro_batch //= 2
        except Exception:
            return
        else:
            return


def quickest_size(method: Method, batches: Batches, device: torch.device) -> int:
    """The micro-batch size with the quickest forward and backward; larger ones are tried while they gain.

    Raises:
        BenchmarkError: not even the smallest fits.
    """
    times: dict[int, float] = {}
    for size in [size for size in (4, 8, 16, 32) if size < len(batches[0])] + [len(batches[0])]:
        method.micro_batch = size
        try:
            # Without the optimiser: a step would move one adapter away from the others before they are compared.
            method.accumulate(worst_batch(method, batches), device)
            typical = method.arrange(batches)[0]
            seconds, _ = harness.timed(lambda _, batch=typical: method.accumulate(batch, device), 0, device)
        except torch.OutOfMemoryError:
            break
        times[size] = seconds / sum(len(example.input_ids) for example in typical)
        if times[size] > 1.2 * min(times.values()):
            break
    method.micro_batch = 0
    if not times:
        raise BenchmarkError(f"'{method.name}' does not fit on this GPU: choose a smaller --shape.")
    return min(times, key=lambda size: times[size])


def check_parity(rows: Sequence[Method], examples: Sequence[Encoded], setting: Setting) -> dict[str, dict[str, float]]:
    """Loss and gradients of every zero-init row against ours padded, by name; an optional row that fails has none.

    A row that is not exact is allowed any difference, and has the cosine between the prompts' gradients too.

    Raises:
        BenchmarkError: others differ by more than `TOLERANCE`, or a gradient is zero, which would make them alike.
    """
    reference = next(row for row in rows if row.name == OURS_PADDED)
    loss = float(reference.accumulate(examples, setting.device))
    prompts, gates = flat(reference.gradients() if reference.gradients else [])
    if not (prompts.norm() > 0 and (gates != 0).all()):
        raise BenchmarkError("Parity was not checked: a gradient of the reference is zero, so the gates are closed.")
    found = {}
    for row in rows:
        if row.gradients is None:
            continue
        try:
            other = float(row.accumulate(examples, setting.device))
        except Exception as error:
            harness.failure_of(Contender(row.name, lambda _: None, row.optional), error)
            continue
        their_prompts, their_gates = flat(row.gradients())
        found[row.name] = apart((other, their_prompts, their_gates), (loss, prompts, gates))
        if not row.exact:
            found[row.name]["prompts_cosine"] = float(cosine_similarity(their_prompts, prompts, 0))
    refuse_differences(exact_only(found), setting.dtype)
    return found


def apart(found: tuple[float, Tensor, Tensor], reference: tuple[float, Tensor, Tensor]) -> dict[str, float]:
    """How far loss, prompts' and gates' gradients are from the reference's, as a share of its size."""
    (loss, *gradients), (other, *others) = found, reference
    shares = [float((one - two).norm() / two.norm()) for one, two in zip(gradients, others, strict=True)]
    return {"loss": abs(loss - other) / abs(other), "prompts": shares[0], "gates": shares[1]}


def exact_only(parity: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Without the rows that only come near."""
    return {name: differences for name, differences in parity.items() if "prompts_cosine" not in differences}


def flat(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """All prompts' gradients, and all gates', as two vectors."""
    return torch.cat([prompt.flatten() for prompt, _ in gradients]), torch.cat([gate for _, gate in gradients])


def refuse_differences(found: dict[str, dict[str, float]], dtype: torch.dtype, reference: str = OURS_PADDED) -> None:
    """Stop where rows do not compute what the reference does.

    Raises:
        BenchmarkError: names the first that differs, by how much, and what was allowed.
    """
    allowed = dict(zip(("loss", "prompts", "gates"), (*TOLERANCE[dtype], TOLERANCE[dtype][1]), strict=True))
    for name, differences in found.items():
        for what, difference in differences.items():
            if not difference <= allowed[what]:  # so that nan is refused too
                raise BenchmarkError(
                    f"'{name}' does not compute what '{reference}' does: its {what} differ by {difference:.2g} of "
                    f"their size, where {allowed[what]:g} is allowed in {str(dtype).removeprefix('torch.')}; "
                    "nothing was timed."
                )


def results(rows: Sequence[Method], timings: dict[str, harness.Timing], batches: Batches) -> list[dict[str, Any]]:
    """The figures of each row. Its ratio to ours is per token of the examples, whose padding does not count."""
    per_token = {row.name: time_per_token(timings[row.name], row.arrange(batches)) for row in rows}
    found = []
    for row in rows:
        timing, own = timings[row.name], row.arrange(batches)
        responses = [response_tokens(batch) / s for batch, s in zip(own, timing.seconds, strict=False)]
        examples = harness.spread([len(own[0]) / s for s in timing.seconds]) if responses else None
        minutes = ALPACA * EPOCHS / examples["median"] / 60 if examples and row.name.startswith("ours") else None
        found.append({
            "name": row.name,
            "micro_batch": row.micro_batch,
            "failure": timing.failure,
            "tokens_computed_per_real": sum(map(row.computed_tokens, own)) / sum(real_tokens(own)),
            "examples_per_second": examples,
            "minutes_of_alpaca": minutes,
            "response_tokens_per_second": harness.spread(responses) if responses else None,
            "seconds": timing.seconds,
            "peak_bytes": timing.peak_bytes,
            "ours_faster_by": harness.ratios(per_token[row.name], per_token[OURS]) if OURS in per_token else None,
        })  # fmt: skip
    return found


def time_per_token(timing: harness.Timing, batches: Batches) -> harness.Timing:
    """Seconds per token of the examples: rows that met other examples in a turn can be compared by it."""
    pairs = zip(timing.seconds, real_tokens(batches), strict=False)
    return harness.Timing([seconds / tokens for seconds, tokens in pairs])


def show(found: Sequence[dict[str, Any]], setting: Setting, parity: dict[str, dict[str, float]]) -> str:
    """The table, with how long the paper's run would take at the shape that the paper has."""
    head = ["row", "micro", "examples/s", "response tokens/s", "computed/real tokens", "ours faster by", "peak GiB"]
    rows, with_minutes = [], setting.options.shape == "7b"
    for row in found:
        speed = row["failure"] or harness.with_range(row["examples_per_second"])
        rows.append([
            row["name"], str(row["micro_batch"]), speed,
            harness.with_range(row["response_tokens_per_second"], "{:,.0f}"),
            f"{row['tokens_computed_per_real']:.2f}", harness.with_range(row["ours_faster_by"], "{:.2f}"),
            harness.gibibytes(row["peak_bytes"]),
        ])  # fmt: skip
        if with_minutes:
            rows[-1].append("-" if row["minutes_of_alpaca"] is None else f"{row['minutes_of_alpaca']:,.0f}")
    turns = max(len(row["seconds"]) for row in found)
    title = f"Training, {setting.line()}: global batch {setting.options.batch_size}, {turns} turns, median (quartiles)"
    lines = [harness.table(title, head + ["minutes for 52K x 5"] * with_minutes, rows), *footnotes(parity)]
    if with_minutes:
        lines.append(f"Minutes: {ALPACA:,} examples x {EPOCHS} epochs at this rate (extrapolated).")
    return "\n".join(lines) + "\n"


def footnotes(parity: dict[str, dict[str, float]]) -> list[str]:
    """How near the rows are to each other: all that must be equal in one sentence, each of the others in its own."""
    exact = exact_only(parity)
    worst = max(max(differences.values()) for differences in exact.values())
    return [f"Losses and gradients agree to {worst:.1g} at open gates."] + [
        f"'{name}' only comes near them: gradient cosine {near['prompts_cosine']:.4f} (prompts), loss off by "
        f"{near['loss']:.2g} of its size."
        for name, near in parity.items()
        if name not in exact
    ]


def parse(arguments: Sequence[str] | None) -> Any:
    """The options."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="examples of an optimiser step")
    parser.add_argument("--packed-micro-batch", type=int, default=0, help="of packed rows; 0: the quickest that fits")
    parser.add_argument(
        "--padded-micro-batch", type=int, default=0, help="of sorted batches; 0: the quickest that fits"
    )
    parser.add_argument(
        "--grouped-micro-batch", type=int, default=0, help="of regrouped ones; 0: the quickest that fits"
    )
    parser.add_argument("--parity-examples", type=int, default=16, help="that parity is checked on")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="rows with torch.compile as well")
    parser.add_argument("--fp8", action="store_true", help="rows on a base in FP8 as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, report."""
    setting = Setting.of(parse(arguments))
    options = setting.options
    batches = global_batches(max(options.turns, options.warmup), options.batch_size, setting.shape.vocab, options.seed)
    rows = methods(setting)
    choose_micro_batches(rows, batches, setting)
    parity = check_parity(rows, batches[0][: options.parity_examples], setting)
    rows = [row for row in rows if row.name in setting.chosen([row.name for row in rows])]
    contenders = []
    for row in rows:
        own = row.arrange(batches)
        contenders.append(
            Contender(row.name, lambda turn, row=row, own=own: row.step(own[turn], setting.device), row.optional)
        )
    timings = harness.interleave(contenders, options.turns, options.warmup, setting.device, setting.budget)
    found = results(rows, timings, batches)
    setting.report("train", {"parity": parity, "rows": found})
    print(show(found, setting, parity))


if __name__ == "__main__":
    harness.run(main)
