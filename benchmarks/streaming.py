"""How much memory `--streaming` takes, and how quickly the first step has its batch, as records grow in number.

Records are written to a folder that is deleted at the end. Each count is read in a process of its own, once through the
whole pipeline of a run (read, shuffle, parse, write in the template, tokenise, batch), without the model. Memory is the
resident set of the process: the most that it ever was, and at the end.

    python -m benchmarks.streaming --counts 100000 10000000 --folder /tmp/records
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import write_section

WORDS = ["sun", "moon", "cat", "dog", "tree", "lake", "bird", "fish", "river", "stone", "cloud", "leaf"]
FILES = 10


def write_records(folder: Path, count: int) -> int:
    """`count` short records in ten files of lines; bytes of all of them."""
    folder.mkdir(parents=True)
    numbers = random.Random(0)
    for number in range(FILES):
        with (folder / f"part-{number}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(number * count // FILES, (number + 1) * count // FILES):
                words = numbers.choices(WORDS, k=6)
                file.write(json.dumps({"instruction": f"Say {i}", "output": " ".join(words)}) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def read_once(folder: str, batch_size: int, encode_every: int) -> dict[str, float]:
    """Go once through the records as a run would, without its model."""
    from llama_adapter.base import load_config, load_tokenizer
    from llama_adapter.data.limits import Limits
    from llama_adapter.training.config import TrainConfig
    from llama_adapter.training.prepare import prepare

    began = time.perf_counter()
    config = TrainConfig(data=(folder,), streaming=True, max_steps=2**30, batch_size=batch_size, val_size=256)
    data = prepare(config, load_tokenizer("bundled"), Limits.of(load_config("bundled")))
    feed = data.streamed
    assert feed is not None  # as it is asked for above
    feed.batch(0)
    first = time.perf_counter() - began
    step, early = 1, 0.0
    while feed.epoch(step) < 1:
        if step % encode_every:
            feed.stream.take(batch_size)
        else:
            feed.batch(step)
        step += 1
        if step * batch_size == 64_000:
            early = resident()
    seconds = time.perf_counter() - began
    return {
        "batches": step,
        "first batch s": round(first, 2),
        "records/s": round(step * batch_size / seconds),
        "MB after 64,000": round(early, 1),
        "MB at the end": round(resident(), 1),
        "MB at most": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, read and delete each count's records, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama-adapter-records"), help="must not exist")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--encode-every", type=int, nargs="+", default=[1],
        help="parse and tokenise every N-th batch only, of each count; all are read and shuffled",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="add the section to this file")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.read:
        print(json.dumps(read_once(args.read, args.batch_size, args.encode_every[0])))
        return
    rows = []
    for i, count in enumerate(args.counts):
        try:
            size = write_records(args.folder, count)
            command = [sys.executable, "-m", "benchmarks.streaming", "--read", str(args.folder)]
            every = args.encode_every[i % len(args.encode_every)]
            command += ["--batch-size", str(args.batch_size), "--encode-every", str(every)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        finally:
            shutil.rmtree(args.folder, ignore_errors=True)
        rows.append(
            {
                "records": count,
                "encode every": every,
                "data MB": round(size / 2**20),
                **json.loads(done.stdout.splitlines()[-1]),
            }
        )
        print(", ".join(f"{key} {value:,}" for key, value in rows[-1].items()), flush=True)
    if args.json:
        write_section(args.json, "streaming", {"rows": rows})


if __name__ == "__main__":
    main()
