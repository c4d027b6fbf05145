"""Run the plan, several trials side by side, and write docs/evidence.md from the results.

    python recipes/evidence/run.py                 # what is missing from docs/evidence/trials.jsonl, then the report
    python recipes/evidence/run.py --report-only
    python recipes/evidence/run.py --fresh         # everything again

Results are appended as they come, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from plan import trials
from report import write_report
from tqdm import tqdm
from trial import BUNDLED, Trial, base_figures, run

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "evidence"
RESULTS = FOLDER / "trials.jsonl"
BASE = FOLDER / "base.json"


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="trials side by side")
    groups = list(dict.fromkeys(trial.group for trial in trials()))
    parser.add_argument("--groups", nargs="*", choices=groups, help="only these groups of the plan")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        RESULTS.unlink(missing_ok=True)
        BASE.unlink(missing_ok=True)
    wanted = [t for t in trials() if not args.groups or t.group in args.groups]
    if not args.report_only:
        if not BASE.exists() or json.loads(BASE.read_text()).get("digest") != digest():
            BASE.write_text(json.dumps({"digest": digest(), **base_figures()}, indent=1) + "\n", encoding="utf-8")
        run_missing(wanted, args.jobs)
    write_report(json.loads(BASE.read_text(encoding="utf-8")), load_results(), trials(), FOLDER)
    print(f"wrote {FOLDER.with_suffix('.md')}")


def digest() -> str:
    """Of base and instructions: figures about other ones are not mixed in."""
    files = [BUNDLED / "base" / "model.safetensors", *sorted(BUNDLED.glob("*.json"))]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def load_results() -> list[dict[str, Any]]:
    """Results about the base and instructions as they are now."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [line for line in map(json.loads, lines) if line["digest"] == digest()]


def run_missing(wanted: list[Trial], jobs: int) -> None:
    """Run trials whose settings have no result yet."""
    done = [line["settings"] for line in load_results()]
    missing: list[Trial] = []
    for trial in wanted:
        if trial.key() not in done and trial.key() not in [other.key() for other in missing]:
            missing.append(trial)
    threads, of = max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)) // jobs), digest()
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        running = {pool.submit(run, trial): trial for trial in missing}
        for future in tqdm(as_completed(running), total=len(missing), unit="trial"):
            trial = running[future]
            line = {"digest": of, "settings": trial.key(), "when": time.strftime("%Y-%m-%d"), **future.result()}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            score = line["heldout_facts"]["all"]
            tqdm.write(f"{trial.group:<8} {trial.label:<30} seed {trial.seed}: held-out facts {score[0]:.1%}")


if __name__ == "__main__":
    main()
