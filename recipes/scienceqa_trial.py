"""From ScienceQA's files to the table without a hand's help, on the test questions whose pictures are there.

    python recipes/scienceqa_trial.py --data FOLDER --output runs/scienceqa-trial

Splits those questions 60/20/20, trains an adapter with the bundled base and tower on the first part, answers the last
and prints its table. It shows that the machinery runs on real data: training on parts of the test split, with a base of
3M parameters, gives no score that could stand beside the paper's.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

from llama_adapter.cli import main as llama_adapter

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def prepare(source: Path, folder: Path, seed: int) -> int:
    """Write the official layout for questions that have their picture; returns how many there are."""
    problems = json.loads(
        next(source.glob("problems*test*.json"), source / "problems.json").read_text(encoding="utf-8")
    )
    pids = sorted(pid for pid in problems if (source / "test" / pid / "image.png").is_file())
    random.Random(seed).shuffle(pids)
    splits, start = {}, 0
    for name, share in SHARES.items():
        end = start + round(share * len(pids))
        splits[name], start = pids[start:end], end
        for pid in splits[name]:
            (folder / name / pid).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "test" / pid / "image.png", folder / name / pid / "image.png")
    records = {pid: {**problems[pid], "split": name} for name, of_split in splits.items() for pid in of_split}
    (folder / "problems.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")
    return len(records)


def main() -> None:
    """Prepare, train, answer, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with problems.json and test/<pid>/image.png")
    parser.add_argument("--output", type=Path, default=Path("runs/scienceqa-trial"))
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--tower", default="bundled")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data, run = args.output / "data", args.output / "adapter"
    print(f"{prepare(args.data, data, args.seed)} questions with pictures")
    llama_adapter(
        ["train", "--data", f"scienceqa:{data}:train", "--val-data", f"scienceqa:{data}:val", "--condition", "image",
         "--tower", args.tower, "--adapter-layers", "8", "--epochs", args.epochs, "--warmup-epochs", "0.3", "--lr",
         "0.05", "--batch-size", "32", "--micro-batch-size", "16", "--output-dir", str(run), "--overwrite"]
    )  # fmt: skip
    llama_adapter(
        [
            "evaluate",
            "scienceqa",
            "--data",
            str(data),
            "--adapter",
            str(run),
            "--save",
            str(args.output / "answers.json"),
        ]
    )


if __name__ == "__main__":
    main()
