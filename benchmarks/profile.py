"""Where the time of a training step goes, and how far it is from what the machine's matrix products allow.

    python -m benchmarks.profile --shape tiny

Run it as a module: a script called profile would hide Python's own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Setting
from benchmarks.lengths import global_batches
from benchmarks.methods import Method, methods
from benchmarks.train import choose_micro_batches

MATMUL, ATTENTION, HEAD, ELEMENTWISE, OTHER = "matmul", "attention", "head and loss", "elementwise", "copies and other"
PARTS = {
    ATTENTION: ("attention", "softmax", "bmm", "baddbmm"),
    MATMUL: ("mm", "addmm", "matmul", "linear"),
    HEAD: ("nll_loss", "cross_entropy", "log_softmax"),
    ELEMENTWISE: (
        "mul", "add", "sub", "div", "neg", "pow", "rsqrt", "silu", "sigmoid", "mean", "sum", "tanh", "cos", "sin",
        "norm", "rms_norm", "where", "foreach", "sqrt", "addcmul", "addcdiv", "lerp", "masked_fill",
    ),
}  # fmt: skip
"""Operators by what they are for. A product over heads (bmm) is attention; one over the vocabulary is the head's."""


@dataclass
class Group:
    """Microseconds of a group, by operator, and how often it was called."""

    times: dict[str, float] = field(default_factory=dict)
    calls: int = 0

    @property
    def total(self) -> float:
        """Of all its operators."""
        return sum(self.times.values())

    def top(self, count: int = 3) -> str:
        """Its most expensive operators with their shares of the group."""
        ordered = sorted(self.times.items(), key=lambda item: item[1], reverse=True)[:count]
        return ", ".join(f"{name} {spent / max(self.total, 1e-9):.0%}" for name, spent in ordered)


def group_of(name: str, shapes: Sequence[Any], vocab: int) -> str:
    """Which group an operator with inputs of these shapes belongs to."""
    operator = name.removeprefix("aten::").strip("_")
    if any(operator.startswith(known) for known in (*PARTS[HEAD], "embedding")):
        return OTHER if operator.startswith("embedding") else HEAD
    over_vocabulary = any(isinstance(shape, Sequence) and len(shape) > 1 and shape[-1] == vocab for shape in shapes)
    if over_vocabulary and not operator.startswith("index"):
        return HEAD
    if any(part in operator for part in PARTS[ATTENTION]):
        return ATTENTION
    if operator in PARTS[MATMUL]:
        return MATMUL
    return ELEMENTWISE if any(operator.startswith(part) for part in PARTS[ELEMENTWISE]) else OTHER


def grouped(events: Iterable[Any], vocab: int, on_gpu: bool) -> dict[str, Group]:
    """Own time of every operator, by group. On a GPU it is that of the kernels which the operator started."""
    groups = {name: Group() for name in (MATMUL, ATTENTION, HEAD, ELEMENTWISE, OTHER)}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel; its time is also its operator's
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent <= 0 or event.key.startswith("ProfilerStep"):
            continue
        group = groups[group_of(event.key, event.input_shapes or [], vocab)]
        name = event.key.removeprefix("aten::")
        group.times[name] = group.times.get(name, 0.0) + spent
        group.calls += event.count
    return groups


def profiled(method: Method, examples: Sequence[Any], setting: Setting) -> dict[str, Group]:
    """One step under torch's profiler."""
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True, acc_events=True) as recorded:
        method.step(examples, setting.device)
        harness.synchronise(setting.device)
    return grouped(recorded.key_averages(group_by_input_shape=True), setting.shape.vocab, on_gpu)


def flops_of_step(method: Method, examples: Sequence[Any], device: torch.device) -> int:
    """Floating-point operations of the matrix products of one step, attention included where torch counts it."""
    with FlopCounterMode(display=False) as counter:
        method.step(examples, device)
    return int(counter.get_total_flops())


def matmul_peak(setting: Setting, repetitions: int = 20) -> float:
    """FLOP per second of the quickest of some matrix products: the roof."""
    rows = 8192 if setting.device.type == "cuda" else 1024
    shape, best = setting.shape, 0.0
    for inner, outer in ((rows, rows), (shape.hidden, shape.intermediate), (shape.intermediate, shape.hidden)):
        left = torch.randn(rows, inner, device=setting.device, dtype=setting.dtype)
        right = torch.randn(inner, outer, device=setting.device, dtype=setting.dtype)
        for _ in range(repetitions):
            seconds, _ = harness.timed(lambda _, a=left, b=right: a @ b, 0, setting.device)
            best = max(best, 2 * rows * inner * outer / seconds)
    return best


def show(groups: dict[str, Group], title: str, roofline: str) -> str:
    """The table, and the roofline under it."""
    everything = sum(group.total for group in groups.values())
    rows = [
        [name, f"{group.total / 1e3:,.1f}", f"{group.total / everything:.1%}", f"{group.calls:,}", group.top()]
        for name, group in groups.items()
    ]
    rows.append(["all", f"{everything / 1e3:,.1f}", "100.0%", f"{sum(group.calls for group in groups.values()):,}", ""])
    return harness.table(title, ["part", "ms", "share", "calls", "most of it"], rows) + f"\n{roofline}\n"


def parse(arguments: Sequence[str] | None) -> Any:
    """The options."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="examples of the step")
    parser.add_argument("--packed-micro-batch", type=int, default=0, help="of packed rows; 0: the quickest that fits")
    parser.add_argument("--padded-micro-batch", type=int, default=8, help="of padded rows; 0: the quickest that fits")
    parser.add_argument("--grouped-micro-batch", type=int, default=8, help="as --padded-micro-batch")
    parser.add_argument("--row", default="ours, packed", help="which row of the training benchmark")
    parser.set_defaults(turns=5, lora_rank=8, compile=False, fp8=False)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time a step, count its work, take it apart."""
    setting = Setting.of(parse(arguments))
    options, device = setting.options, setting.device
    batches = global_batches(1, options.batch_size, setting.shape.vocab, options.seed)
    rows = methods(setting)
    method = next((row for row in rows if row.name == options.row), None)
    if method is None:
        raise BenchmarkError(f"No row is called '{options.row}': choose one of {', '.join(row.name for row in rows)}.")
    choose_micro_batches(rows, batches, setting)
    examples = method.arrange(batches)[0]
    contender = harness.Contender(method.name, lambda _: method.step(examples, device))
    timing = harness.interleave([contender], options.turns, options.warmup, device, setting.budget)[method.name]
    if not timing.seconds:
        raise BenchmarkError(f"'{method.name}' could not be measured: {timing.failure}.")
    seconds = harness.spread(timing.seconds)["median"]
    flops, peak = flops_of_step(method, examples, device), matmul_peak(setting)
    groups = profiled(method, examples, setting)
    roofline = (
        f"Roofline: {flops / 1e9:,.0f} GFLOP a step; at the {peak / 1e9:,.0f} GFLOP/s that this machine's best matrix "
        f"product reaches they take {flops / peak * 1e3:,.1f} ms. The step takes {seconds * 1e3:,.1f} ms without the "
        f"profiler: {flops / peak / seconds:.0%} of the roof, {flops / seconds / 1e9:,.0f} GFLOP/s."
    )
    parts = {name: {"microseconds": group.times, "calls": group.calls} for name, group in groups.items()}
    setting.report("profile", {
        "row": method.name, "micro_batch": method.micro_batch, "flops": flops, "matmul_flops_per_second": peak,
        "step_seconds": timing.seconds, "parts": parts,
    })  # fmt: skip
    title = f"One training step, '{method.name}', {setting.line()}: global batch {options.batch_size}"
    print(show(groups, title, roofline))


if __name__ == "__main__":
    harness.run(main)
