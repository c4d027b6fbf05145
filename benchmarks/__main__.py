"""The whole benchmark with one command: `python -m benchmarks cpu` or `python -m benchmarks gpu`.

Every script runs in a process of its own, within a time budget, and adds its section to one JSON file.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
"""Within the repository, which the scripts run in."""
CPU = ["--device", "cpu", "--shape", "tiny"]
GPU = ["--device", "cuda", "--shape", "7b"]
SUITES = {
    "cpu": [
        [
            "train",
            *CPU,
            "--turns=30",
            "--warmup=1",
            "--budget=700",
            "--packed-micro-batch=64",
            "--padded-micro-batch=16",
            "--compile",
        ],
        ["decode", *CPU, "--turns=20", "--budget=110", "--new-tokens=64"],
        ["adapters", *CPU, "--turns=20", "--budget=60", "--new-tokens=32"],
    ],
    "gpu": [
        ["train", *GPU, "--turns=30", "--warmup=1", "--budget=170", "--fp8", "--compile"],
        [
            "decode",
            *GPU,
            "--turns=10",
            "--warmup=1",
            "--budget=95",
            "--new-tokens=64",
            "--batches",
            "1",
            "32",
            "--compile",
        ],
        ["adapters", *GPU, "--turns=10", "--warmup=1", "--budget=40", "--new-tokens=32"],
        ["profile", *GPU, "--turns=5", "--warmup=1", "--budget=25"],
        ["sharding", *GPU, "--turns=10", "--warmup=1", "--budget=15"],
        ["many", *GPU, "--turns=10", "--warmup=1", "--budget=45", "--batch=128"],
    ],
}


def commands(suite: str, results: Path = RESULTS) -> list[list[str]]:
    """What a suite runs."""
    file = f"--json={results / f'{suite}.json'}"
    return [[sys.executable, "-m", f"benchmarks.{script}", *options, file] for script, *options in SUITES[suite]]


def main(arguments: Sequence[str]) -> int:
    """Run a suite; the first script that fails ends it."""
    if len(arguments) != 1 or arguments[0] not in SUITES:
        print("usage: python -m benchmarks cpu|gpu", file=sys.stderr)
        return 2
    for command in commands(arguments[0]):
        print("$", " ".join(["python", *command[1:]]), flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
