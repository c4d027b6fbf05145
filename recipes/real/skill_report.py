"""The first part of docs/evidence.md, from the results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from skill_trial import SKILLS, Trial

from llama_adapter.files import write_atomically

Result = dict[str, Any]
WORLD = "<!-- the drawn world: recipes/evidence/run.py writes what follows -->"
"""Stands in docs/evidence.md between the two parts, which two commands write."""


def write_page(results: list[Result], on_gpu: list[Result], plan: list[Trial], folder: Path) -> None:
    """Put this part before the other in `folder`.md."""
    page = folder.with_suffix(".md")
    before, mark, world = page.read_text(encoding="utf-8").partition(WORLD) if page.exists() else ("", WORLD, "\n")
    if not mark:  # a page of the other part alone
        world = f"\n\n{before}"
    parts = [part(results, plan)]
    if on_gpu:
        parts.append("## The same on a GPU\n\n" + tables(on_gpu, plan))
    write_atomically(page, ("\n\n".join(parts) + f"\n\n{WORLD}{world}").encode())


class Row:
    """The trials of one label: of several rates the best by validation loss on the first seed, with all its seeds."""

    def __init__(self, group: str, label: str, trials: list[Trial], results: list[Result]) -> None:
        self.group, self.label = group, label
        found = [(t, r) for t in trials for r in results[::-1] if r["settings"] == t.key()]
        first = {t.lr: r["val_loss"][-1][1] for t, r in found if t.seed == 0}
        self.tried = first
        self.lr = min(first, key=lambda lr: first[lr]) if first else None
        self.results = list({t.seed: r for t, r in found if t.lr == self.lr}.values())

    def values(self, value: Callable[[Result], float]) -> list[float]:
        """One figure of every seed."""
        return [value(result) for result in self.results]

    def mean(self, value: Callable[[Result], float]) -> float:
        """Over the seeds."""
        return statistics.mean(self.values(value))

    def shown(self, value: Callable[[Result], float], form: str = "{:.1%}") -> str:
        """'mean (lowest to highest)'; the mean alone of one seed."""
        values = self.values(value)
        text = form.format(statistics.mean(values))
        return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def rows(results: list[Result], plan: list[Trial], group: str) -> list[Row]:
    """A group's rows that have results, in the plan's order."""
    labels = dict.fromkeys(t.label for t in plan if t.group == group)
    made = [Row(group, label, [t for t in plan if (t.group, t.label) == (group, label)], results) for label in labels]
    return [row for row in made if row.results]


def entities(result: Result) -> float:
    """Right answers about new entities in known wordings."""
    return float(result["heldout_entities"]["all"])


def wordings(result: Result) -> float:
    """Right answers about new entities in new wordings."""
    return float(result["heldout_wordings"]["all"])


def both(result: Result) -> float:
    """Right answers on both held-out splits."""
    return (entities(result) + wordings(result)) / 2


def loss(result: Result) -> float:
    """Validation loss at the end."""
    return float(result["val_loss"][-1][1])


def prose(result: Result) -> float:
    """Perplexity on held-out prose."""
    return float(result["prose_perplexity"])


def seconds_to(result: Result, target: float) -> float | None:
    """CPU seconds of training until the validation loss is `target`, between validations as a line in its logarithm."""
    total = result["val_loss"][-1][0]
    for (before, high), (step, low) in pairwise(result["val_loss"]):
        if low <= target:
            share = (math.log(high) - math.log(target)) / (math.log(high) - math.log(low))
            return float(result["cpu_seconds"] / total * (before + share * (step - before)))
    return None


def part(results: list[Result], plan: list[Trial]) -> str:
    """Text and tables."""
    return f"""# Evidence

Does zero-init attention do what its paper says, and is it as good as LoRA? First on a real model, then on a small world
of our own where everything about the data is known.

## A real model

SmolLM2-135M-Instruct (30 layers, Apache-2.0) from its PyPI package, in fp32 on a CPU, learns {len(SKILLS)} skills at
once ([recipes/skills](../recipes/skills/README.md)): {", ".join(SKILLS)}. Each step reads two new examples of each. It
is then asked about entities that training never showed, in known and in new wordings; answers are greedy and a strict
checker decides. `make evidence-real` runs what is missing and writes this part; single results are in
[evidence/skills.jsonl](evidence/skills.jsonl). The runs are short ({plan[0].steps} steps of
{plan[0].per_skill * len(SKILLS)}): they show how far each method gets in a few minutes, not where it ends.

{_read_by(results)}

{tables(results, plan)}"""


def _read_by(results: list[Result]) -> str:
    """Which checkers have read the answers."""
    kept = sum("answers" in result for result in results)
    return (
        f"{kept} of {len(results)} trials keep their answers, and the checkers as they are have read them. The others "
        "were read by an earlier checker of style that took more, a negated fact too; LoRA and the best recipe, run "
        "again on one seed, had the same shares under both."
    )


def tables(results: list[Result], plan: list[Trial]) -> str:
    """Every group that has results."""
    methods = rows(results, plan, "methods")
    reference, target = _lora(methods), _losses(methods)
    sections = [_table(methods, target), _verdict(methods, reference)]
    for group, title in TITLES.items():
        found = rows(results, plan, group)
        if len(found) > 1:
            own = _losses(found) if group == "science" else target
            words = [SCIENCE] if group == "science" else _claim(group, found)
            sections += [f"### {title}", *words, _over_fitting(found) if group == "epochs" else _table(found, own)]
    if methods:
        sections += ["### By skill", _by_skill(methods)]
    return "\n\n".join(filter(None, sections))


def _lora(found: list[Row]) -> Row | None:
    return next((row for row in found if row.label.startswith("LoRA")), None)


def _losses(found: list[Row]) -> dict[int, float]:
    """What LoRA came to, by seed."""
    reference = _lora(found)
    return {r["settings"]["seed"]: loss(r) for r in reference.results} if reference else {}


SCIENCE = """\
An adapter of this skill alone, 60 steps of 8 questions of the published test split, asked about 200 others of it in the
known order and in another; `new entities` are new questions. Guessing among the options gives 44 %: beside that, a
base of 135M parameters learns how to answer here, and not what."""
TITLES = {
    "gap": "What was tried to close the gap",
    "gates": "Zero-init against random gates (the paper's Table 5)",
    "layers": "Layers (the paper's Table 4)",
    "lengths": "Prompt length",
    "epochs": "Over-fitting (the paper's Table 6)",
    "levers": "One change to the best recipe",
    "science": "ScienceQA's questions without pictures",
}


def _table(found: list[Row], targets: dict[int, float]) -> str:
    head = ["method", "parameters", "rates tried", "best", "seeds", "new entities", "new wordings"]
    head += ["validation loss", "prose perplexity", "CPU s", "CPU s to LoRA's loss"]
    lines = []
    for row in found:
        compared = [r for r in row.results if r["settings"]["seed"] in targets]
        times = [seconds_to(r, targets[r["settings"]["seed"]]) for r in compared]
        lines.append(
            [
                row.label, f"{row.results[0]['parameters']:,}", ", ".join(f"{lr:g}" for lr in row.tried),
                f"{row.lr:g}", str(len(row.results)), row.shown(entities), row.shown(wordings),
                row.shown(loss, "{:.3f}"), row.shown(prose, "{:.1f}"), f"{row.mean(lambda r: r['cpu_seconds']):.0f}",
                _reached(times),
            ]
        )  # fmt: skip
    return markdown(head, lines)


def _over_fitting(found: list[Row]) -> str:
    head = ["data", "training loss", "validation loss", "new entities", "new wordings", "prose perplexity"]
    lines = [
        [
            row.label, row.shown(lambda r: statistics.mean(r["train_loss"][-5:]), "{:.3f}"), row.shown(loss, "{:.3f}"),
            row.shown(entities), row.shown(wordings), row.shown(prose, "{:.1f}"),
        ]
        for row in found
    ]  # fmt: skip
    return markdown(head, lines) + "\n\nTraining loss is the mean of the last five steps."


def _claim(group: str, found: list[Row]) -> list[str]:
    """Whether the paper's table of this group is reproduced, of a row's one seed each."""
    answers, losses = [row.mean(both) for row in found], [row.mean(loss) for row in found]
    shares = ", ".join(f"{row.label} {answer:.1%}" for row, answer in zip(found, answers, strict=True))
    claims = {
        "gates": ("gates that start at zero answer more than gates drawn at random", answers[0] > answers[-1]),
        "layers": ("more layers answer more", answers == sorted(answers) and losses == sorted(losses)[::-1]),
        "epochs": ("over-fitting costs no answers: they rise with the validation loss", answers[-1] >= answers[0]),
    }
    if group not in claims:
        return []
    claim, holds = claims[group]
    return [f"**{'Reproduced' if holds else 'Not reproduced'}**: {claim} (one seed, both held-out splits: {shares})."]


def _reached(times: list[float | None]) -> str:
    """The mean of those that got there, and how many did."""
    known = [x for x in times if x is not None]
    if not known:
        return "not reached"
    return f"{statistics.mean(known):.0f}" + ("" if len(known) == len(times) else f" ({len(known)} of {len(times)})")


def _verdict(methods: list[Row], reference: Row | None) -> str:
    ours = [row for row in methods if row.results[0]["settings"]["method"] == "zero-init"]
    bare = next((row for row in methods if row.label == "bare"), None)
    if reference is None or not ours or bare is None:
        return ""
    best = max(ours, key=lambda row: (len(row.results), row.mean(both)))
    values = reference.values(both)
    harm = (best.mean(prose) - bare.mean(prose)) / (reference.mean(prose) - bare.mean(prose) or 1e-9)
    return (
        f"On both held-out splits together: LoRA {reference.shown(both)}, {best.label} {best.shown(both)}. LoRA's "
        f"seeds lie {max(values) - min(values):.1%} apart. Harm to prose, the rise of perplexity above the bare "
        f"{bare.mean(prose):.1f}: {harm:.2f} times LoRA's."
    )


def _by_skill(methods: list[Row]) -> str:
    lines = []
    for row in methods:
        shares = [
            statistics.mean((r["heldout_entities"][name] + r["heldout_wordings"][name]) / 2 for r in row.results)
            for name in SKILLS
        ]
        lines.append([row.label, *(f"{share:.1%}" for share in shares)])
    return markdown(["both held-out splits", *SKILLS], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
