"""What the multi-modal adapter shows on the drawn world, measured: trains and asks, then writes docs/pictures.md.

    python recipes/pictures/evidence.py     # what is missing from docs/evidence/pictures.jsonl, then the page
    python recipes/pictures/evidence.py --report-only

Every trial is the recipe beside this file with a few settings changed, trained by `llama-adapter train`'s own function.
Test pictures show combinations that neither the tower nor the adapter has seen.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from real_page import section
from results_page import write_page

import llama_adapter
from llama_adapter import get_adapter
from llama_adapter.evaluation.scienceqa.answers import answer_questions, choose_letters
from llama_adapter.evaluation.scienceqa.questions import WORDS, Question, read_scienceqa
from llama_adapter.evaluation.scienceqa.scores import RULES
from llama_adapter.files import append_line, whole_lines
from llama_adapter.inference.session import Session, load_session
from llama_adapter.training import draft
from llama_adapter.training.config import load_recipe
from llama_adapter.training.loop import train

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "docs" / "evidence" / "pictures.jsonl"
REAL = RESULTS.with_name("pictures-real.jsonl")
WORK = ROOT / "runs" / "pictures"
CPU = torch.device("cpu")
SEEDS = (0, 1, 2)
VISUAL = {"condition": "visual_prompt", "tower_depths": [], "visual_blocks": 2, "visual_width": 128, "visual_heads": 4}
EARLY = {**VISUAL, "adapter_layers": 7, "condition_layers": 1}
"""Early fusion, as LLaMA-Adapter V2 has it: the first layer reads the picture, the others their prompts."""


@dataclass(frozen=True)
class Trial:
    """One run: what the report calls it, its seed, the pictures, changed settings, and how the gates start."""

    label: str
    seed: int
    scenes: str = "one"
    changes: dict[str, Any] = field(default_factory=dict)
    gate_start: float = 0.0

    def key(self) -> dict[str, Any]:
        """Everything that decides the figures."""
        return {"seed": self.seed, "scenes": self.scenes, "changes": self.changes, "gate_start": self.gate_start}


def trials() -> list[Trial]:
    """The plan, the most important first."""
    plan = [Trial("zero-init, last layer", seed) for seed in SEEDS]
    plan += [Trial("zero-init, six layers", seed, changes={"tower_depths": []}) for seed in SEEDS]
    plan += [Trial("random gates, last layer", seed, gate_start=1.0) for seed in SEEDS]
    plan += [Trial("text only", seed, changes={"condition": None}) for seed in SEEDS]
    plan += [Trial("early fusion, half as long", 0, changes={**EARLY, "epochs": 3, "warmup_epochs": 0.3})]
    plan += [Trial("two things", 0, "two"), Trial("two things, visual prompt", 0, "two", VISUAL)]
    return plan


def question_set(scenes: str) -> Path:
    """The folder of a question set, made where it is missing."""
    folder = WORK / f"questions-{scenes}"
    if not (folder / "pid_splits.json").exists():
        command = [sys.executable, str(HERE / "questions.py"), "--scenes", scenes, "--output", str(folder)]
        subprocess.run(command, check=True)
    return folder


@contextmanager
def gates_from(spread: float) -> Iterator[None]:
    """Within the block new adapters have gates drawn from N(0, spread^2) instead of zero: the paper's ablation."""
    stock = draft.add_adapter

    def with_open_gates(*args: Any, **kwargs: Any) -> Any:
        adapter = stock(*args, **kwargs)
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.gate.normal_(0, spread)
        return adapter

    draft.add_adapter = with_open_gates
    try:
        yield
    finally:
        draft.add_adapter = stock


def run(trial: Trial) -> dict[str, Any]:
    """Train and ask; the figures."""
    folder, name = question_set(trial.scenes), trial.label.replace(" ", "-").replace(",", "")
    overrides = {
        "data": [f"scienceqa:{folder}:train"],
        "val_data": [f"scienceqa:{folder}:val"],
        "output_dir": str(WORK / f"{name}-{trial.seed}"),
        "seed": trial.seed,
        "overwrite": True,
        "trackers": ["none"],
        "eval_every": 10**6,
        **trial.changes,
    }
    config = load_recipe(str(HERE / "recipe.yaml"), overrides)
    with gates_from(trial.gate_start) if trial.gate_start else nullcontext():
        result = train(config)
    session = load_session("bundled", {"pictures": config.output_dir}, CPU, "fp32")
    return {
        "parameters": get_adapter(session.model, "pictures").num_parameters,
        "train_loss": round(result.train_loss or 0.0, 4),
        "val_loss": round(result.best_val_loss or 0.0, 4),
        **measure(session, read_scienceqa(folder, "test"), trial.changes.get("condition", "image") is not None),
    }


def measure(session: Session, questions: Sequence[Question], looks: bool) -> dict[str, Any]:
    """Shares of right answers: with the picture, without, with another's; of what is asked; of questions in text."""
    pictured = [q for q in questions if q.image is not None]
    text = [q for q in questions if q.image is None]
    blind = [replace(question, image=None) for question in pictured]
    written = answer_questions(session, "pictures", pictured if looks else blind, WORDS, 12, 64)
    figures = {
        "chance": sum(1 / len(q.choices) for q in pictured) / len(pictured),
        "text": share(session, text),
        "blind": share(session, blind),
        "decoded": sum(RULES["words"](written[q.pid], q.choices) == q.answer for q in pictured) / len(pictured),
    }
    if looks:
        others = random.Random(0).sample(pictured, len(pictured))
        swapped = [replace(q, image=other.image) for q, other in zip(pictured, others, strict=True)]
        by_kind: dict[str, list[Question]] = defaultdict(list)
        for question in pictured:
            by_kind[question.category or ""].append(question)
        figures |= {"with": share(session, pictured), "swapped": share(session, swapped)}
        figures["by_kind"] = {kind: round(share(session, asked), 4) for kind, asked in sorted(by_kind.items())}
    return {name: value if isinstance(value, dict) else round(value, 4) for name, value in figures.items()}


def share(session: Session, questions: Sequence[Question]) -> float:
    """How many are right when the likeliest choice is taken."""
    chosen = choose_letters(session, "pictures", questions, WORDS)
    return sum(chosen[question.pid] == question.answer for question in questions) / len(questions)


def digest() -> str:
    """Of base, tower and recipe: figures about other ones are not mixed in."""
    bundled = Path(llama_adapter.__file__).parent / "bundled"
    files = [bundled / "base" / "model.safetensors", bundled / "tower" / "model.safetensors", HERE / "recipe.yaml"]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def results() -> list[dict[str, Any]]:
    """Figures about base, tower and recipe as they are now."""
    return [line for line in whole_lines(RESULTS) if line["digest"] == digest()]


def write_pages() -> None:
    """docs/pictures.md, from these figures and those of `real.py`."""
    labels = list(dict.fromkeys(trial.label for trial in trials()))
    found = [line for line in results() if line["label"] in labels]
    drawn = sorted(found, key=lambda line: labels.index(line["label"]))
    write_page(drawn, ROOT / "docs" / "pictures.md", section(whole_lines(REAL)))


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    labels = list(dict.fromkeys(trial.label for trial in trials()))
    parser.add_argument("--only", nargs="*", choices=labels, help="labels of the plan")
    args = parser.parse_args()
    plan = [trial for trial in trials() if not args.only or trial.label in args.only]
    for trial in [] if args.report_only else plan:
        if trial.key() in [line["settings"] for line in results()]:
            continue
        line = {"digest": digest(), "label": trial.label, "settings": trial.key(), **run(trial)}
        append_line(RESULTS, line)
        print(trial.label, trial.seed, {key: line[key] for key in ("with", "blind", "text") if key in line}, flush=True)
    write_pages()


if __name__ == "__main__":
    main()
