"""Kill a training run at random, fill its disk, and see that nothing is lost or damaged.

    python -m benchmarks.survival                      # 50 kills of one process, then a full disk at 20 places
    python -m benchmarks.survival --processes 2        # one of two processes is killed, the launcher ends the other
    python -m benchmarks.survival --streaming --kills 20

A kill is SIGKILL: every other time after a random time, every other time in the middle of a random file operation,
of which a write has then been done by half. A full disk is ENOSPC from one file operation on. After each the run goes
on by --resume. Asked for: at most the step that was being computed is done again, every file that is there is whole,
and the run ends bit for bit where one ends that nobody disturbed. Needs fork, so no Windows.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llama_adapter.errors import LlamaAdapterError, NotWrittenError
from llama_adapter.files import whole_lines
from llama_adapter.formats.native import read_config
from llama_adapter.training import journal
from llama_adapter.training.checkpoint import RunFolder
from llama_adapter.training.config import TrainConfig
from llama_adapter.training.journal import JOURNAL_FILES
from llama_adapter.training.loop import train

OPERATIONS = ("open", "write", "fsync", "replace", "mkdir", "ftruncate")
"""Functions of `os` through which a run changes its folder."""
DONE, STOPPED, FULL = 0, 1, 3
LONGEST = 300.0


def at_operation(number: int, folder: Path, act: Callable[[str, Any], Any]) -> None:
    """From now on call `act` before every file operation in `folder` from the `number`-th on, with what it is given."""
    count = 0
    handles = set()

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal count
            ours = args[0] in handles if isinstance(args[0], int) else str(args[0]).startswith(str(folder))
            if not ours or (name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)):
                return original(*args, **options)
            count += 1
            if count >= number:
                act(name, args)
            result = original(*args, **options)
            if name == "open":
                handles.add(result)
            return result

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def kill_within(write: Callable[..., int]) -> Callable[[str, Any], None]:
    """SIGKILL to this process; a write has then been done by half."""

    def act(name: str, args: Any) -> None:
        if name == "write":
            write(args[0], args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def disk_is_full(write: Callable[..., int]) -> Callable[[str, Any], None]:
    """ENOSPC for whatever needs space; a write has then been done by half."""

    def act(name: str, args: Any) -> None:
        if name == "write":
            write(args[0], args[1][: len(args[1]) // 2])
        if name in ("open", "write", "fsync", "mkdir"):
            raise OSError(errno.ENOSPC, "No space left on device")

    return act


def start(config: TrainConfig, environment: dict[str, str], disturb: Callable[[], None], log: Path) -> int:
    """A process that trains; what it says goes to `log`. Everything has been imported, so it starts at once."""
    child = os.fork()
    if child:
        return child
    code = STOPPED
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        torch.set_num_threads(1)
        journal.QUICK = LONGEST  # what is kept may not depend on how busy this machine is
        disturb()
        train(config)
        code = DONE
    except NotWrittenError as error:
        code = FULL
        print(error, file=sys.stderr)
    except LlamaAdapterError as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def launch(
    config: TrainConfig, processes: int, log: Path, disturb: Callable[[], None] = lambda: None, after: float = LONGEST
) -> list[int]:
    """Train in so many processes until they end; SIGKILL to one of them `after` so many seconds ends the others too.

    Returns:
        Each one's exit code, negative where a signal ended it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    environments = [
        {**places, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)
    ]
    children = [start(config, environment, disturb, log) for environment in environments]
    codes: dict[int, int] = {}
    began, victim = time.monotonic(), random.choice(children)
    while len(codes) < processes:
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > after and victim not in codes:
            os.kill(victim, signal.SIGKILL)
        elif any(codes.values()):  # what a launcher does when it has lost a process
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[child] for child in children]


def resumed(config: TrainConfig) -> TrainConfig:
    """The recipe, going on where there is a run to go on with."""
    return replace(config, resume=RunFolder(config.output_dir).holds_run())


def lost_steps(folder: RunFolder) -> int:
    """Steps that were finished and are not kept, besides the one that was being finished when the run ended."""
    done = max((line["step"] for line in whole_lines(folder.metrics)), default=0)
    return max(0, done - folder.finished_steps() - 1)


def damaged(folder: Path) -> list[str]:
    """Files under a name of their own that are not whole."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors" and not path.name.startswith("."):
                load_file(path)
            elif path.name == "adapter_config.json":
                read_config(path.parent)
            elif path.name in JOURNAL_FILES and not any(
                state.source == path for state in RunFolder(folder).journal.whole()
            ):
                found.append(f"{path}: torn")
            elif path.name == "metrics.jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def same_end(one: Path, other: Path) -> list[str]:
    """Names of what two runs have left that is not the same bit for bit."""
    names = ["adapter_model.safetensors", "adapter_config.json", "last/adapter_model.safetensors"]
    unlike = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    states = [load_file(folder / "last" / "training_state.safetensors") for folder in (one, other)]
    if states[0].keys() != states[1].keys() or any(
        not torch.equal(states[0][key], states[1][key]) for key in states[0]
    ):
        unlike.append("training_state.safetensors")
    lines = [
        [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in whole_lines(folder / "metrics.jsonl")
        ]
        for folder in (one, other)
    ]
    return unlike + (["metrics.jsonl"] if lines[0] != lines[1] else [])


def soak(config: TrainConfig, whole: Path, kills: int, processes: int, log: Path) -> dict[str, Any]:
    """Kill a run so often, each time go on with it, and compare its end with that of `whole`."""
    folder = RunFolder(config.output_dir)
    took, done, ends = 0.0, 0, 0
    lost: list[int] = []
    while done < kills:
        if folder.path.exists() and folder.finished_steps() >= (config.max_steps or 0):
            ends += 1  # it came to its end before it was killed often enough: once more from the beginning
            problems = same_end(whole, folder.path)
            if problems:
                return {"kills": done, "unlike": problems, "lost": sum(lost)}
            shutil.rmtree(folder.path)
        before = time.monotonic()
        number = random.randint(1, 60)
        if done % 2 and processes == 1:
            write = os.write
            codes = launch(resumed(config), 1, log, lambda: at_operation(number, folder.path, kill_within(write)))  # noqa: B023
        else:
            codes = launch(resumed(config), processes, log, after=random.uniform(0.2, 3.0 + took))
        took = min(2.0, time.monotonic() - before)
        if -signal.SIGKILL in codes:
            done += 1
            lost.append(lost_steps(folder))
        elif any(codes):
            return {"kills": done, "failed": codes, "log": log.read_text()[-2000:]}
    codes = launch(resumed(config), processes, log)
    return {
        "kills": done, "ends": ends + 1, "lost": sum(lost), "exit": codes, "unlike": same_end(whole, folder.path),
        "damaged": damaged(folder.path),
    }  # fmt: skip


def fill(config: TrainConfig, whole: Path, places: Sequence[int], log: Path) -> dict[str, Any]:
    """Fill the disk from each of these file operations on, look at the files, and go on."""
    folder = RunFolder(config.output_dir)
    found: dict[str, Any] = {"places": len(places), "stopped": 0, "damaged": [], "unlike": [], "lost": 0}
    for place in places:
        shutil.rmtree(folder.path, ignore_errors=True)
        write = os.write
        codes = launch(config, 1, log, lambda: at_operation(place, folder.path, disk_is_full(write)))  # noqa: B023
        found["stopped"] += codes == [FULL]
        found["damaged"] += damaged(folder.path)
        found["lost"] += lost_steps(folder)
        if codes == [STOPPED] or launch(resumed(config), 1, log) != [DONE]:
            return {**found, "failed": log.read_text()[-2000:]}
        found["unlike"] += same_end(whole, folder.path)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what was found; 1 where anything was lost or damaged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--full", type=int, default=20, help="places at which the disk is full; 0 for none")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", default="bundled", help="data file; with --streaming one that can be streamed")
    parser.add_argument("--streaming", action="store_true")
    args = parser.parse_args(arguments)
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = TrainConfig(
            model=args.model, data=(args.data,), val_size=8, max_steps=args.steps, batch_size=8, micro_batch_size=4,
            save_every=7, eval_every=10, trackers=("none",), precision="fp32", streaming=args.streaming,
            adapter_len=4, adapter_layers=2, output_dir=str(folder / "killed"),
        )  # fmt: skip
        whole, log = folder / "whole", folder / "log"
        if launch(replace(config, output_dir=str(whole)), args.processes, log) != [DONE] * args.processes:
            print(log.read_text(), file=sys.stderr)
            return 1
        found = soak(config, whole, args.kills, args.processes, log) if args.kills else {}
        print(json.dumps({"killed": found}), flush=True)
        bad = any(found.get(key) for key in ("lost", "unlike", "damaged", "failed"))
        if args.full:
            places = sorted(random.sample(range(1, 4 * args.steps), args.full))
            found = fill(replace(config, output_dir=str(folder / "full")), whole, places, log)
            print(json.dumps({"full": found}), flush=True)
            bad |= any(found.get(key) for key in ("lost", "unlike", "damaged", "failed"))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
