"""Run the plan on SmolLM2, one trial after the other, and write the first part of docs/evidence.md.

    python recipes/real/skills_evidence.py               # what docs/evidence/skills.jsonl lacks, then the report
    python recipes/real/skills_evidence.py --minutes 40  # starts no trial after that; call it again to go on
    python recipes/real/skills_evidence.py --groups methods --jobs 2
    python recipes/real/skills_evidence.py --data SCIENCEQA  # its questions too; the folder with problems.json
    python recipes/real/skills_evidence.py --gpu         # on a GPU, kept in docs/evidence/skills-gpu.jsonl
    python recipes/real/skills_evidence.py --report-only

A result is kept as its trial ends, so a run that was stopped goes on where it was. RESULTS_FOLDER in the environment
keeps results elsewhere; the page is made of docs/evidence alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from skill_plan import trials
from skill_report import write_page
from skill_trial import RECIPES, Science, Trial, run, shares
from tqdm import tqdm

from llama_adapter.errors import LlamaAdapterError
from llama_adapter.evaluation.demo import smollm2
from llama_adapter.files import append_line, whole_lines

FOLDER = RECIPES.parent / "docs" / "evidence"
ROOM = 50_000_000
"""Bytes that must be free before a run begins: results are small, but a full disk would lose an hour's."""


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(trial.group for trial in trials()))
    parser.add_argument("--groups", nargs="*", choices=groups, help="only these groups of the plan")
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side, 3 GB of memory each")
    parser.add_argument("--minutes", type=float, help="start no trial after so many minutes")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with results of their own")
    parser.add_argument("--data", type=Path, help="folder of ScienceQA, for the group science")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    results = Path(os.environ.get("RESULTS_FOLDER") or FOLDER) / ("skills-gpu.jsonl" if args.gpu else "skills.jsonl")
    if not args.report_only:
        check(args, results)
        wanted = [t for t in trials() if not args.groups or t.group in args.groups]
        run_missing([t for t in wanted if args.data or Science.name not in t.skills], results, args)
    files = [load(FOLDER / f"{name}.jsonl", args.data) for name in ("skills", "skills-gpu")]
    write_page(*files, trials(), FOLDER)


def check(args: argparse.Namespace, results: Path) -> None:
    """Find out before the first minute what would stop the run in its last; exit code 2 with one sentence."""
    try:
        smollm2()
    except LlamaAdapterError as error:
        sys.exit(_say(str(error)))
    if args.jobs < 1:
        sys.exit(_say(f"--jobs is {args.jobs}: it must be at least 1."))
    if args.gpu and not torch.cuda.is_available():
        sys.exit(_say("--gpu is given, and PyTorch sees no GPU: leave it out to run on the CPU."))
    try:
        for trial in trials() if args.data else []:
            if Science.name in trial.skills:
                trial.digest(args.data)
    except (LlamaAdapterError, ValueError) as error:  # no such folder, or too few questions in it
        sys.exit(_say(f"--data: {error}"))
    if "science" in (args.groups or ()) and not args.data:
        sys.exit(_say("--groups science needs --data with the folder of ScienceQA's problems.json."))
    if args.minutes is not None and not args.minutes > 0:
        sys.exit(_say(f"--minutes is {args.minutes:g}: it must be above 0; leave it out to run to the end."))
    if not results.parent.is_dir():
        sys.exit(_say(f"The folder of the results, {results.parent}, is not there: make it, or unset RESULTS_FOLDER."))
    free = shutil.disk_usage(results.parent).free
    if free < ROOM:
        sys.exit(_say(f"{results.parent} has {free / 1e6:.0f} MB free, and a run needs {ROOM / 1e6:.0f}: make room."))


def load(results: Path, data: Path | None = None) -> list[dict[str, Any]]:
    """Results about the skills' examples as they are now, their kept answers checked anew.

    A line that a crash cut off is left out. Questions of ScienceQA are held against `data`, where it is given.
    """
    found = []
    for line in whole_lines(results):
        trial = Trial.asked_in(line["settings"])
        if Science.name in trial.skills and not data:
            found.append(line)
        elif line["digest"] == trial.digest(data):
            found.append({**line, **(shares(trial, line["answers"], data) if "answers" in line else {})})
    return found


def run_missing(wanted: list[Trial], results: Path, args: argparse.Namespace) -> None:
    """Run trials whose settings have no result yet."""
    done, missing = [line["settings"] for line in load(results, args.data)], []
    for trial in wanted:
        if trial.key() not in done:
            done.append(trial.key())
            missing.append(trial)
    deadline = time.monotonic() + 60 * (1e9 if args.minutes is None else args.minutes)
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)) // args.jobs)
    device = ("cuda", "bf16") if args.gpu else ("cpu", "auto")
    running: dict[Future[dict[str, Any]], Trial] = {}
    with (
        ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
        tqdm(total=len(missing), unit="trial") as bar,
    ):
        while running or (missing and time.monotonic() < deadline):
            while missing and len(running) < args.jobs and time.monotonic() < deadline:
                trial = missing.pop(0)
                running[pool.submit(run, trial, *device, args.data)] = trial
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                keep(results, running.pop(future), future.result(), args.data)
                bar.update()
    if missing:
        _say(f"{len(missing)} trials are left: call the same command again to go on.")


def keep(results: Path, trial: Trial, figures: dict[str, Any], data: Path | None = None) -> None:
    """Append a result; a line that an earlier crash cut off is ended first."""
    line = {"digest": trial.digest(data), "settings": trial.key(), "when": time.strftime("%Y-%m-%d"), **figures}
    append_line(results, line)
    shares = " ".join(f"{split} {line[split]['all']:.1%}" for split in ("heldout_entities", "heldout_wordings"))
    tqdm.write(
        f"{trial.group:<8} {trial.label:<36} lr {trial.lr:g} seed {trial.seed}: loss {line['val_loss'][-1][1]:.4f} "
        f"{shares} prose {line['prose_perplexity']}"
    )


def _say(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
