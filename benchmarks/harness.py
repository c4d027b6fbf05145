"""Timing by turns, medians with their spread, ratios pair by pair, one table and one JSON file for every script.

Contenders take turns (A B C A B C ...), so that whatever else the machine does falls on all of them; a ratio is taken
within each turn, and the median of those ratios is what is reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Contenders of different sizes take turns on one GPU: without this, what one leaves cached is of no use to the next.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import llama_adapter
from benchmarks.shapes import SHAPES, Shape
from llama_adapter.files import write_atomically

NO_CUDA = "This benchmark needs a CUDA device and torch sees none here: run it on a machine with an NVIDIA GPU."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class BenchmarkError(Exception):
    """Nothing could be measured, or what would be compared is not equal; one sentence says why."""


@dataclass
class Budget:
    """Seconds a script may take from its start; None is no limit."""

    seconds: float | None
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """What remains."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.began)

    def share(self, among: int) -> "Budget":
        """An equal part of what remains, starting now."""
        return Budget(None if self.seconds is None else self.left() / among)


@dataclass
class Contender:
    """Something to time.

    Attributes:
        name: its row's title.
        step: does the work of turn i.
        optional: whether it may fail, as compiled variants may; its row then says why.
    """

    name: str
    step: Callable[[int], Any]
    optional: bool = False


@dataclass
class Timing:
    """Seconds of each turn, the GPU memory at its peak in bytes, and why there is nothing where there is nothing."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str | None = None


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[int], Any], turn: int, device: torch.device) -> tuple[float, int | None]:
    """Seconds and peak memory of one step."""
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    step(turn)
    synchronise(device)
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def failure_of(contender: Contender, error: Exception) -> str:
    """One line for a contender that may fail or ran out of memory; any other error is raised again."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    if not contender.optional:
        raise error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def interleave(
    contenders: Sequence[Contender], turns: int, warmup: int, device: torch.device, budget: Budget
) -> dict[str, Timing]:
    """Warm every contender up, then time them by turns until there are `turns` of each or the budget is spent.

    A turn is begun only where the last one would still have fitted; one is always taken.
    """
    timings = {contender.name: Timing() for contender in contenders}

    def take(contender: Contender, turn: int, keep: bool) -> None:
        timing = timings[contender.name]
        if timing.failure is not None:
            return
        try:
            seconds, peak = timed(contender.step, turn, device)
        except Exception as error:
            timing.failure = failure_of(contender, error)
            return
        if keep:
            timing.seconds.append(seconds)
            timing.peak_bytes = peak if peak is None else max(peak, timing.peak_bytes or 0)

    for contender in contenders:
        for turn in range(warmup):
            take(contender, turn, keep=False)
    longest = 0.0
    for turn in range(turns):
        began = time.monotonic()
        if turn and budget.left() < longest:
            print(f"time budget spent: {turn} of {turns} turns", file=sys.stderr)
            break
        for contender in contenders:
            take(contender, turn, keep=True)
        longest = max(longest, time.monotonic() - began)
    return timings


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and count."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
    }


def ratios(slower: Timing, quicker: Timing) -> dict[str, float] | None:
    """How many times as long `slower` took as `quicker`, turn by turn; None where one of them has no turns."""
    pairs = list(zip(slower.seconds, quicker.seconds, strict=False))
    return spread([one / other for one, other in pairs]) if pairs else None


def with_range(figures: dict[str, float] | None, form: str = "{:,.1f}") -> str:
    """'median (q1 to q3)'."""
    if figures is None:
        return "-"
    return f"{form.format(figures['median'])} ({form.format(figures['q1'])} to {form.format(figures['q3'])})"


def gibibytes(count: int | None) -> str:
    """Bytes in GiB."""
    return "-" if count is None else f"{count / 2**30:.2f}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([title, "", line(head), rule, *map(line, rows), ""])


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    import peft
    import transformers

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "llama-adapter": llama_adapter.__version__,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_section(file: Path | None, section: str, content: dict[str, Any]) -> None:
    """Put one script's results into the JSON file that the scripts share."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[section] = rounded(content)
    write_atomically(file, (json.dumps(known, indent=1) + "\n").encode())


def rounded(content: Any) -> Any:
    """The same with six significant digits, which is more than any timing has."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--shape", choices=SHAPES, default="tiny", help="the base's dimensions; weights are random")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    made.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on cuda, else fp32")
    made.add_argument("--turns", type=int, default=30, help="measured turns of every contender")
    made.add_argument("--warmup", type=int, default=2, help="turns before, not measured")
    made.add_argument("--budget", type=float, help="seconds that the script may take; it then measures fewer turns")
    made.add_argument("--threads", type=int, help="of torch on the CPU")
    made.add_argument("--seed", type=int, default=0, help="of weights, lengths and tokens")
    made.add_argument("--json", type=Path, help="write the figures here, beside those of the other scripts")
    made.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose title has one of these texts")
    return made


def device_of(name: str) -> torch.device:
    """What `--device` means here.

    Raises:
        BenchmarkError: a CUDA device is asked for where there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise BenchmarkError(NO_CUDA)
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """What `--dtype` means on that device."""
    return DTYPES[("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name]


@dataclass(frozen=True)
class Setting:
    """What a script's options come to."""

    options: argparse.Namespace
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    budget: Budget

    @staticmethod
    def of(options: argparse.Namespace) -> "Setting":
        """Resolve `auto`.

        Raises:
            BenchmarkError: a CUDA device is asked for where there is none.
        """
        budget, device = Budget(options.budget), device_of(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        return Setting(options, SHAPES[options.shape], device, dtype_of(options.dtype, device), budget)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that `--only` lets through."""
        texts = self.options.only
        return [name for name in names if not texts or any(text in name for text in texts)]

    def report(self, section: str, content: dict[str, Any]) -> None:
        """Write a section with the machine and the options it was measured under."""
        described = {key: value for key, value in vars(self.options).items() if key != "json"}
        head = {"machine": machine(self.device), "options": described | {"dtype": str(self.dtype)}}
        write_section(self.options.json, section, head | content)

    def line(self) -> str:
        """The same for people."""
        about = machine(self.device)
        where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.options.shape} shape, {kind}, {where}, torch {about['torch']}, peft {about['peft']}"


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what cannot be measured is one sentence and exit status 2."""
    try:
        main()
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
