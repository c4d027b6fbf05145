"""What a process holds: the parts of its memory, read from Linux, and random bases on disk that are worth measuring.

Pages of a file that is mapped are resident, and yet nobody's: they are shared, and given back whenever memory is short.
So the private part is told apart, which is what has to be there.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES, build
from llama_adapter.base import load_tokenizer

PARTS = {"private": "RssAnon", "mapped": "RssFile"}
"""What they are called here, and in /proc; in kB there."""
BETWEEN = 0.002
"""Seconds from one look to the next."""


def held() -> dict[str, float]:
    """MB of this process now: private, and pages of files."""
    status = Path("/proc/self/status").read_text()
    return {
        name: int(re.findall(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)[0]) / 1024 for name, key in PARTS.items()
    }


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """MB that this process holds at most within the block, filled in as it goes: private, mapped, and both together."""
    found: dict[str, float] = {}
    ended = threading.Event()

    def look() -> None:
        now = held()
        now["resident"] = sum(now.values())
        for name, value in now.items():
            found[name] = max(found.get(name, 0.0), value)

    def keep_looking() -> None:
        while not ended.is_set():
            look()
            time.sleep(BETWEEN)

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        look()


def write_base(folder: Path, shape: str, dtype: torch.dtype) -> int:
    """A random base of that shape with the bundled tokenizer, in several files; how many numbers it has."""
    model = build(SHAPES[shape], torch.device("cpu"), dtype)
    model.save_pretrained(folder, max_shard_size="200MB")
    load_tokenizer("bundled").save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
