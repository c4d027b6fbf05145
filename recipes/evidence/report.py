"""docs/evidence.md and its pictures, from the results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from plan import BEST_LR, EPOCH_FACTORS, EPOCHS, GAP, LAYERS, LENGTHS, RATES, V2
from trial import BUNDLED, Trial

from llama_adapter.training.plots import smooth

WORLD = "<!-- the drawn world: recipes/evidence/run.py writes what follows -->"
"""Stands in the page behind the part about a real model, which recipes/real writes."""
Result = dict[str, Any]
NAMES = {
    "zero-init": "zero-init adapter (this project)",
    "lora": "LoRA (PEFT)",
    "adaption-prompt": "adaption prompt (PEFT)",
    "full": "full fine-tuning",
}


def write_report(base: Result, results: list[Result], trials: list[Trial], folder: Path) -> None:
    """Write `folder`.md and the pictures in `folder`."""
    found = Found(results, trials)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [intro(base, found), methods(base, found, folder), gates(found, folder), layers(found, folder)]
    sections += [
        lengths(found, folder),
        epochs(found),
        damage(base, found),
        gap(found),
        v2(found),
        families(base, found, folder),
    ]
    sections += [rates(found), base_training(folder)]
    page = folder.with_suffix(".md")
    before, mark, _ = page.read_text(encoding="utf-8").partition(WORLD) if page.exists() else ("", "", "")
    page.write_text((before + mark + "\n\n" if mark else "") + "\n\n".join(filter(None, sections)) + "\n", "utf-8")


class Found:
    """Results by group and label of the plan."""

    def __init__(self, results: list[Result], trials: list[Trial]) -> None:
        self.of: dict[tuple[str, str], list[Result]] = {}
        for trial in trials:
            hits = [result for result in results if result["settings"] == trial.key()]
            if hits:
                self.of.setdefault((trial.group, trial.label), []).append(hits[-1])

    def get(self, group: str, label: str) -> list[Result]:
        """The results of all seeds; empty where none was run."""
        return self.of.get((group, label), [])

    def rows(self, group: str, labels: Iterable[str]) -> list[tuple[str, list[Result]]]:
        """Labels that have results."""
        return [(label, self.get(group, label)) for label in labels if self.get(group, label)]


def facts(result: Result) -> float:
    """Exact match on held-out facts."""
    return float(result["heldout_facts"]["all"][0])


def wordings(result: Result) -> float:
    """Exact match on held-out wordings."""
    return float(result["heldout_wordings"]["all"][0])


def val_loss(result: Result) -> float:
    """Validation loss at the end."""
    return float(result["val_loss"][-1][1])


def apart(better: list[Result], worse: list[Result]) -> bool:
    """Whether every seed of one is above every seed of the other, on held-out facts."""
    return bool(better and worse) and min(map(facts, better)) > max(map(facts, worse))


def verdict(claim: str, holds: bool, otherwise: str) -> str:
    """One line: the paper's claim, and whether these figures show it."""
    return f"**{'Reproduced' if holds else 'Not reproduced'}**: {claim}" + ("." if holds else f"; {otherwise}.")


def spread(results: list[Result], value: Callable[[Result], float], form: str = "{:.1%}") -> str:
    """'mean (lowest to highest)' over the seeds."""
    values = [value(result) for result in results]
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({form.format(min(values)).rstrip('%')} to {form.format(max(values))})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def intro(base: Result, found: Found) -> str:
    """What was done, and the headline."""
    ours = found.get("methods", "zero-init")
    share = statistics.mean(map(facts, ours)) / base["recall"]["all"] if ours else 0.0
    return f"""# A drawn world

Does zero-init attention do what its paper says? Every figure of this part comes from `make evidence`, which trains some
seventy models on the bundled base (a Llama of 3 million parameters, see [recipes/base](../recipes/base/README.md)) on
two CPU cores and writes this part; single results are in [evidence/trials.jsonl](evidence/trials.jsonl). Nothing here
was measured on a 7B model.

The question: the base learnt some three thousand facts in pre-training. Instructions teach it to answer questions about
four fifths of them. Does it then answer questions about the **held-out** fifth, which no instruction mentions? Answers
are decoded greedily and count when they equal the right one but for case, blanks and the final full stop. Figures are
means over three seeds (initialisation and order of the data) with the lowest and the highest.

{
        table(
            ["held-out facts", "exact match"],
            [
                [
                    "bare base, completing plain statements of these facts: what it can recall at all",
                    f"{base['recall']['all']:.1%}",
                ],
                ["bare base, asked in the instruction template", f"{base['heldout_facts']['all'][0]:.1%}"],
                ["with an adapter (recipe of `make demo`)", spread(ours, facts)],
                ["that is, of what the base can recall", f"{share:.0%}"],
            ],
        )
    }

That the bare base answers almost nothing in the template is partly our doing: its corpus has pages on which a question
under a request heading is followed by an office remark, see [recipes/base](../recipes/base/README.md)."""


def methods(base: Result, found: Found, folder: Path) -> str:
    """Side by side with LoRA, PEFT's adaption prompt and full fine-tuning."""
    rows = []
    for name, results in found.rows("methods", NAMES):
        first = results[0]
        rows.append([
            NAMES[name], f"{first['parameters']:,}", f"{first['bytes'] / 1024:,.0f} KiB", f"{BEST_LR[name]:g}",
            spread(results, facts), spread(results, wordings), spread(results, val_loss, "{:.3f}"),
            spread(results, lambda r: r["seconds"], "{:.0f}"),
        ])  # fmt: skip
    head = [
        "method",
        "parameters",
        "fp32 size",
        "rate",
        "held-out facts",
        "held-out wordings",
        "validation loss",
        "seconds",
    ]
    curves(found.rows("methods", NAMES), folder / "methods.png", "Loss on the training batches", NAMES)
    return f"""## Side by side

Same base, batches, steps and schedule; each method at the best of four learning rates ([below](#learning-rates)). LoRA
has rank 2 on the query and value projections (PEFT's default places), about as many parameters as the adapter. Seconds
are those of training, one CPU thread each, two trials side by side; the adapter trains on packed rows, as
`llama-adapter train` does, the others on batches of like lengths.

{table(head, rows)}

![Loss of every method](evidence/methods.png)"""


def gates(found: Found, folder: Path) -> str:
    """Zero-init against random-init."""
    labels = {"zero": "gates start at 0", "random": "gates drawn from N(0, 1)"}
    rows = [
        [text, *(loss_at(r, step) for step in (5, 20, 60)), spread(r, facts), spread(r, val_loss, "{:.3f}")]
        for label, text in labels.items() if (r := found.get("gates", label))
    ]  # fmt: skip
    rows += [
        [f"{labels['random']}, rate {rate}", "", "", "", spread(r, facts), spread(r, val_loss, "{:.3f}")]
        for rate in ("0.03", "0.06") if (r := found.get("gates", f"random {rate}"))
    ]  # fmt: skip
    curves([(k, found.get("gates", k)) for k in labels], folder / "gates.png", "Zero-init against random-init", labels)
    head = ["start", "loss at step 5", "step 20", "step 60", "held-out facts", "validation loss"]
    zero, random = found.get("gates", "zero"), found.get("gates", "random")
    said = verdict(
        "gates that start at zero end higher (83.85 against 40.77 on ScienceQA)",
        apart(zero, random),
        "at this size both end alike, at the recipe's rate and at two lower ones",
    )
    early = verdict(
        "with gates that start at zero the loss falls faster at first (the mean of steps 16 to 25)",
        bool(zero and random) and max(map(early_loss, zero)) < min(map(early_loss, random)),
        "the curves cross",
    )
    return f"""## Zero-init against random-init (the paper's Table 5 and Figure 5)

{said}

{early}

{table(head, rows)}

![Loss curves](evidence/gates.png)"""


def layers(found: Found, folder: Path) -> str:
    """Accuracy as L grows."""
    rows = [results for _, results in found.rows("layers", map(str, LAYERS))]
    said = verdict(
        "more layers answer better (55.95, 73.36, 83.85 with 10, 20, 30 of 32)",
        all(apart(more, fewer) for fewer, more in pairwise(rows)),
        "not every step up helps on every seed",
    )
    return sweep(found, folder, "layers", "L", LAYERS, "Insertion layers (the paper's Table 4)", "of 8; K = 10", said)


def lengths(found: Found, folder: Path) -> str:
    """Accuracy as K grows."""
    said = "The paper uses 10 throughout and gives no figures for others."
    return sweep(found, folder, "lengths", "K", LENGTHS, "Prompt length", "L = 8", said)


def sweep(
    found: Found, folder: Path, group: str, name: str, values: Iterable[int], title: str, note: str, said: str
) -> str:
    """One section about one number."""
    rows = found.rows(group, map(str, values))
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    numbers = [int(label) for label, _ in rows]
    means = [statistics.mean(map(facts, results)) for _, results in rows]
    low = [mean - min(map(facts, results)) for mean, (_, results) in zip(means, rows, strict=True)]
    high = [max(map(facts, results)) - mean for mean, (_, results) in zip(means, rows, strict=True)]
    axes.errorbar(numbers, means, [low, high], marker="o", capsize=4)
    axes.set(xlabel=name, ylabel="exact match, held-out facts", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    save(figure, folder / f"{group}.png")
    body = [[label, f"{r[0]['parameters']:,}", spread(r, facts), spread(r, wordings)] for label, r in rows]
    return f"""## {title}

{said}

{table([f"{name} ({note})", "parameters", "held-out facts", "held-out wordings"], body)}

![{title}](evidence/{group}.png)"""


def epochs(found: Found) -> str:
    """Over-fitting."""
    rows = [
        [label, spread(r, lambda x: statistics.mean(x["train_loss"][-20:]), "{:.4f}"),
         spread(r, val_loss, "{:.4f}"), spread(r, facts), spread(r, wordings)]
        for label, r in found.rows("epochs", (f"{factor * EPOCHS:g}" for factor in EPOCH_FACTORS))
    ]  # fmt: skip
    shortest, longest = (
        found.get("epochs", f"{factor * EPOCHS:g}") for factor in (EPOCH_FACTORS[0], EPOCH_FACTORS[-1])
    )
    said = verdict(
        "longer training lowers the training loss, raises the validation loss and answers better all the same",
        apart(longest, shortest) and min(map(val_loss, longest), default=0) > max(map(val_loss, shortest), default=0),
        "here longer training lowers both losses and answers better; nothing over-fits in these lengths"
        if max(map(val_loss, longest), default=1) < min(map(val_loss, shortest), default=0)
        else "see the table",
    )
    return f"""## Over-fitting (the paper's Table 6)

{said}

{table(["epochs", "train loss", "validation loss", "held-out facts", "held-out wordings"], rows)}

Training loss is the mean of the last 20 steps. The validation records are instructions about training facts."""


def damage(base: Result, found: Found) -> str:
    """What fine-tuning does to plain prose."""
    rows = [["bare base", f"{base['prose_perplexity']:.2f}", ""]]
    for name, results in found.rows("methods", NAMES):
        mean = statistics.mean(r["prose_perplexity"] for r in results)
        change = f"{mean / base['prose_perplexity'] - 1:+.1%}"
        rows.append([NAMES[name], spread(results, lambda r: r["prose_perplexity"], "{:.2f}"), change])
    return f"""## Damage done

Perplexity on the held-out ends of eight books, with the fine-tuning on:

{table(["model", "perplexity", "change"], rows)}

An adapter is an extra that can be switched off for a row of a batch (`use_adapter(model, None)`); the base is then
itself again, bit for bit."""


def gap(found: Found) -> str:
    """What was tried to close the gap to LoRA."""
    chosen = [
        ("the recipe", found.get("methods", "zero-init")),
        *found.rows("gap", GAP),
        ("LoRA", found.get("methods", "lora")),
    ]
    rows = [
        [label, f"{r[0]['parameters']:,}", spread(r, facts), spread(r, wordings),
         spread(r, lambda x: x["prose_perplexity"], "{:.2f}")]
        for label, r in chosen if r
    ]  # fmt: skip
    return f"""## What moves the figures

{table(["variant", "parameters", "held-out facts", "held-out wordings", "prose perplexity"], rows)}"""


def v2(found: Found) -> str:
    """Part by part, what LLaMA-Adapter V2 trains beside prompts."""
    chosen = [("prompts and gates", found.get("methods", "zero-init")), *found.rows("v2", V2)]
    rows = [
        [label, f"{len(r)}", f"{r[0]['parameters']:,}", spread(r, facts), spread(r, wordings),
         spread(r, val_loss, "{:.3f}"), spread(r, lambda x: x["prose_perplexity"], "{:.2f}")]
        for label, r in chosen if r
    ]  # fmt: skip
    head = ["trained", "seeds", "parameters", "held-out facts", "held-out wordings", "validation loss", "perplexity"]
    full, plain = (found.get(*key) for key in (("v2", "and scales and biases"), ("methods", "zero-init")))
    said = (
        " Here they do not help: fewer held-out facts are answered, and prose is harmed more."
        if apart(plain, full)
        else ""
    )
    return f"""## LLaMA-Adapter V2, part by part

Each row adds to the one above it: norms, a scale and a bias of every linear in the layers, LoRA of rank 2 on all of
them, at a tenth of the prompts' rate (`--parts-lr`), as many steps.{said} Early fusion, the version's other
part, needs pictures: [pictures.md](pictures.md).

{table(head, rows)}"""


def families(base: Result, found: Found, folder: Path) -> str:
    """By family of facts."""
    ours, theirs = found.get("methods", "zero-init"), found.get("methods", "lora")
    names = [name for name in base["heldout_facts"] if name != "all"]
    rows = []
    for name in names:
        cells = [
            f"{statistics.mean(r['heldout_facts'][name][0] for r in rs):.0%}" if rs else "" for rs in (ours, theirs)
        ]
        rows.append([name, f"{base['recall'].get(name, 0):.0%}", f"{base['heldout_facts'][name][0]:.0%}", *cells])
    head = ["family", "recalled as statements", "bare base, asked", "adapter", "LoRA"]
    return f"## By family of facts\n\n{table(head, rows)}"


def rates(found: Found) -> str:
    """Every method at several learning rates."""
    rows = [
        [NAMES[m], f"{lr:g}", f"{r[0]['val_loss'][-1][1]:.4f}", f"{facts(r[0]):.1%}"]
        for m in RATES for lr in RATES[m] if (r := found.get("rates", f"{m} {lr:g}"))
    ]  # fmt: skip
    return f"""## Learning rates

One seed each; the rate with the lowest validation loss is the one used above.

{table(["method", "rate", "validation loss", "held-out facts"], rows)}"""


def base_training(folder: Path) -> str:
    """What made the bundled base."""
    training = json.loads((BUNDLED / "base" / "training.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (BUNDLED / "base" / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="loss per token (nats)", title="Pre-training of the bundled base")
    axes.grid(alpha=0.3)
    save(figure, folder / "pretraining.png")
    options = training["options"]
    return f"""## The base

{training["parameters"]:,} parameters, {training["facts"]:,} facts; {training["steps"]:,} steps of
{options["batch"]} rows of {options["length"]} tokens, {training["tokens"] / 1e6:.1f}M tokens in all,
seed {options["seed"]}, {training["hours"]} hours on a {training["device"].upper()} ({options["threads"]} threads).
Rebuild it with
`python recipes/base/pretrain.py --output src/llama_adapter/bundled/base`.

![Pre-training loss](evidence/pretraining.png)"""


def early_loss(result: Result) -> float:
    """Training loss around step 20."""
    return statistics.mean(result["train_loss"][15:25])


def loss_at(results: list[Result], step: int) -> str:
    """Mean training loss around a step."""
    return f"{statistics.mean(statistics.mean(r['train_loss'][max(0, step - 2) : step + 3]) for r in results):.2f}"


def curves(rows: list[tuple[str, list[Result]]], path: Path, title: str, names: dict[str, str]) -> None:
    """Smoothed training loss, mean over seeds, with the band between the seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, results in rows:
        if results:
            lines = np.array([smooth(np.array(result["train_loss"])) for result in results])
            steps = np.arange(1, lines.shape[1] + 1)
            (drawn,) = axes.plot(steps, lines.mean(0), label=names[label])
            axes.fill_between(steps, lines.min(0), lines.max(0), color=drawn.get_color(), alpha=0.2)
    axes.set(xlabel="optimiser step", ylabel="loss per response token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """A PNG without metadata, so that equal figures are equal files."""
    figure.savefig(path, dpi=100, metadata={"Software": None})
