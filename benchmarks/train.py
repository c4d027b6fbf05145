"""Training speed: one optimiser step (forward, backward, AdamW) on the same examples, by every way there is.

    python -m benchmarks.train --shape tiny --json benchmarks/results/cpu.json

Before anything is timed, loss and gradients of every zero-init row must be equal at open gates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, shapes
from benchmarks.batching import (
    full_head_loss,
    in_order,
    padded_to_longest,
    regroup,
    share_of_loss,
    stock_loss,
    unshared_rows,
)
from benchmarks.harness import BenchmarkError, Contender, Setting
from benchmarks.lengths import global_batches, real_tokens
from llama_adapter.data import Encoded
from llama_adapter.data.batches import micro_batches, response_tokens
from llama_adapter.data.packing import packed_rows

OURS = "ours, packed"
OURS_PADDED = "ours, padded, like lengths"
PEFT_LIKE = "PEFT, like lengths"
PEFT_BEST = "PEFT, grouped by length"
PEFT_COMPILED = "PEFT, grouped by length, compiled"
SHIPPED_MICRO_BATCH = 8
"""transformers' default per device, which is how PEFT's examples run."""
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 0.1)}
"""Largest relative difference of the loss, and of the gradients' norm; about ten times what rounding alone makes."""

Gradients = list[tuple[Tensor, Tensor]]
Batches = Sequence[Sequence[Encoded]]


@dataclass
class Method:
    """One way to train.

    Attributes:
        name: its row's title.
        model: what is called.
        batches: (examples, micro-batch size) -> what each forward takes.
        loss: (model, one of these, response tokens of the global batch, device) -> its share of the mean loss.
        micro_batch: examples a forward.
        gradients: of prompts and gates; None for LoRA, which has none.
        regrouped: takes its global batches from `regroup`: the same examples, met in another order.
        optional: may fail without stopping the others.
    """

    name: str
    model: Any
    batches: Callable[[Sequence[Encoded], int], Iterator[Any]]
    loss: Callable[[Any, Any, int, torch.device], Tensor]
    micro_batch: int
    gradients: Callable[[], Gradients] | None = None
    regrouped: bool = False
    optional: bool = False
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        # A rate of 0 would do the same work; a small one keeps the losses finite and the values moving.
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-5)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def arrange(self, batches: Batches) -> Batches:
        """The global batches that this row trains on."""
        return regroup(batches, self.micro_batch) if self.regrouped else batches

    def accumulate(self, examples: Sequence[Encoded], device: torch.device) -> Tensor:
        """Gradients of the mean loss over the response tokens of a global batch, left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens, total = response_tokens(examples), torch.zeros((), device=device)
        for batch in self.batches(examples, self.micro_batch):
            loss = self.loss(self.model, batch, tokens, device)
            loss.backward()
            total += loss.detach().float()
        return total

    def step(self, examples: Sequence[Encoded], device: torch.device) -> float:
        """One optimiser step; the loss is read, as a training loop does."""
        total = self.accumulate(examples, device)
        self.optimizer.step()
        return float(total)

    def computed_tokens(self, examples: Sequence[Encoded]) -> int:
        """Tokens that go through the base, padding included."""
        return sum(batch.input_ids.numel() for batch in self.batches(examples, self.micro_batch))


def methods(setting: Setting) -> list[Method]:
    """Every row, all on the same weights and with equal adapters."""
    options, shape = setting.options, setting.shape
    base = shapes.build(shape, setting.device, setting.dtype, options.seed)
    model, adapter = shapes.with_ours(base, shape)
    peft = shapes.with_adaption_prompt(base, shape, adapter)
    lora = shapes.with_lora(base, options.lora_rank)
    packed, padded, grouped = options.packed_micro_batch, options.padded_micro_batch, options.grouped_micro_batch

    def ours() -> Gradients:
        return shapes.our_gradients(adapter)

    def theirs() -> Gradients:
        return shapes.peft_gradients(peft)

    rows = [
        Method(OURS, model, packed_rows, share_of_loss, packed, ours),
        Method("ours, packed, no prefix sharing", model, unshared_rows, share_of_loss, packed, ours),
        Method("ours, packed, head on every token", model, packed_rows, full_head_loss, packed, ours),
        Method("ours, packing alone", model, unshared_rows, full_head_loss, packed, ours),
        Method(OURS_PADDED, model, micro_batches, share_of_loss, padded, ours),
        Method("PEFT, as shipped", peft, in_order, stock_loss, SHIPPED_MICRO_BATCH, theirs),
        Method(PEFT_LIKE, peft, micro_batches, stock_loss, padded, theirs),
        Method(PEFT_BEST, peft, in_order, stock_loss, grouped, theirs, regrouped=True),
        Method(f"{PEFT_BEST}, response head", peft, in_order, share_of_loss, grouped, theirs, regrouped=True),
        Method("PEFT, padded to 512", peft, padded_to_longest, stock_loss, SHIPPED_MICRO_BATCH, theirs),
        Method("LoRA, grouped by length", lora, in_order, stock_loss, grouped, regrouped=True),
    ]
    if options.compile:
        rows += compiled(setting, base, adapter)
    return rows


def compiled(setting: Setting, base: Any, adapter: Any) -> list[Method]:
    """torch.compile on copies: whole layers where shapes allow it, feed-forward and norms in packed rows."""
    model, own = shapes.with_ours(base, setting.shape, adapter)
    peft = shapes.with_adaption_prompt(base, setting.shape, adapter)
    shapes.compile_parts(model, whole_layers=False)
    shapes.compile_parts(peft, whole_layers=True)
    packed, grouped = setting.options.packed_micro_batch, setting.options.grouped_micro_batch
    return [
        Method("ours, packed, compiled", model, packed_rows, share_of_loss, packed,
               lambda: shapes.our_gradients(own), optional=True),
        Method(PEFT_COMPILED, peft, in_order, stock_loss, grouped,
               lambda: shapes.peft_gradients(peft), regrouped=True, optional=True),
    ]  # fmt: skip


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

    Raises:
        BenchmarkError: some differ by more than `TOLERANCE`, or a gradient is zero, which would make them alike.
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
        found[row.name] = {
            "loss": abs(other - loss) / abs(loss),
            "prompts": float((their_prompts - prompts).norm() / prompts.norm()),
            "gates": float((their_gates - gates).norm() / gates.norm()),
        }
    refuse_differences(found, setting.dtype)
    return found


def flat(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """All prompts' gradients, and all gates', as two vectors."""
    return torch.cat([prompt.flatten() for prompt, _ in gradients]), torch.cat([gate for _, gate in gradients])


def refuse_differences(found: dict[str, dict[str, float]], dtype: torch.dtype) -> None:
    """Stop where rows do not compute the same thing.

    Raises:
        BenchmarkError: names the first that differs, by how much, and what was allowed.
    """
    allowed = dict(zip(("loss", "prompts", "gates"), (*TOLERANCE[dtype], TOLERANCE[dtype][1]), strict=True))
    for name, differences in found.items():
        for what, difference in differences.items():
            if not difference <= allowed[what]:  # so that nan is refused too
                raise BenchmarkError(
                    f"'{name}' does not compute what '{OURS_PADDED}' does: its {what} differ by {difference:.2g} of "
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
        found.append({
            "name": row.name,
            "micro_batch": row.micro_batch,
            "failure": timing.failure,
            "tokens_computed_per_real": sum(map(row.computed_tokens, own)) / sum(real_tokens(own)),
            "examples_per_second": harness.spread([len(own[0]) / s for s in timing.seconds]) if responses else None,
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
    """The table."""
    head = ["row", "micro", "examples/s", "response tokens/s", "computed/real tokens", "ours faster by", "peak GiB"]
    rows = []
    for row in found:
        speed = row["failure"] or harness.with_range(row["examples_per_second"])
        rows.append([
            row["name"], str(row["micro_batch"]), speed,
            harness.with_range(row["response_tokens_per_second"], "{:,.0f}"),
            f"{row['tokens_computed_per_real']:.2f}", harness.with_range(row["ours_faster_by"], "{:.2f}"),
            harness.gibibytes(row["peak_bytes"]),
        ])  # fmt: skip
    turns = max(len(row["seconds"]) for row in found)
    worst = max(max(differences.values()) for differences in parity.values())
    title = f"Training, {setting.line()}: global batch {setting.options.batch_size}, {turns} turns, median (quartiles)"
    return harness.table(title, head, rows) + f"\nLosses and gradients agree to {worst:.1g} at open gates.\n"


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
