"""docs/pictures.md, from the figures of `evidence.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Result = dict[str, Any]

INTRO = """\
## The project's own base, encoder and pictures

From `docs/evidence/pictures.jsonl`, by `python recipes/pictures/evidence.py`. Everything is the project's own:
the bundled base, the bundled tower ({parameters:,} numbers are trained between and above them), pictures that the
project draws and questions in ScienceQA's layout that it writes. Test pictures show combinations (a red star, four
hearts, a green 7) that no training picture of the adapter shows; the tower has seen them. The answer is the choice
whose words the model finds likeliest; `decoded` is the share of greedy answers that are the right words to the
letter, with no choices to go by. Means, and lowest to highest of the seeds.

Held-out combinations are hard on purpose: two fifths of the colours and counts of every shape and a fifth of every
digit's colours never occur in training, so that what goes with what there points away from the right answer.

"""
TITLE = """\
# Questions about pictures

Written from `docs/evidence/*.jsonl` by `recipes/pictures/real.py` and `recipes/pictures/evidence.py`.

"""
EXPLANATION = """
`without` asks the same adapter without the picture, `another's` shows the picture of another question. `text` are the
questions of the set that have no picture: short tales and facts of the base's world. Rows without a range are of one
seed. Early fusion is LLaMA-Adapter V2's: the first layer reads a visual prompt alone, the other seven their prompts;
it was trained for half as many steps.

### Two drawn things in a picture

The paper adds one vector to all prompts of a layer. In the second softmax such a vector c shifts every score of a
query q by the same q (Wk c)', which changes no weight; what remains is act(g) Wv c, the same at every token whatever
it asks. So a picture can say "red", "star" and "four", and the frozen base takes what fits the question; which of two
shapes is red is more than such a sum can hold. Hence these questions apart, one seed each. The visual prompt of
LLaMA-Adapter V2 gives every prompt a vector of its own; how far that carries, the table says.

"""


def spread(values: Sequence[float]) -> str:
    """Mean, and the range of several seeds."""
    if not values:
        return ""
    return f"{mean(values):.1%}" + (f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def by_label(results: Sequence[Result], scenes: str) -> dict[str, list[Result]]:
    """Results on a set of pictures, by label, in order."""
    found: dict[str, list[Result]] = defaultdict(list)
    for line in results:
        if line["settings"]["scenes"] == scenes:
            found[line["label"]].append(line)
    return found


def arms(found: dict[str, list[Result]]) -> str:
    """One row a label."""
    head = ["", "with the picture", "decoded", "without", "another's", "text", "validation loss", "parameters"]
    rows = []
    for label, lines in found.items():
        cells = [spread([line[name] for line in lines if name in line]) for name in
                 ("with", "decoded", "blind", "swapped", "text")]  # fmt: skip
        loss = f"{mean(line['val_loss'] for line in lines):.3f}"
        rows.append([label, *cells, loss, f"{lines[0]['parameters']:,}"])
    return table(head, rows)


def kinds(found: dict[str, list[Result]]) -> str:
    """With the picture, by what is asked."""
    names = sorted({kind for lines in found.values() for line in lines for kind in line.get("by_kind", {})})
    rows = [
        [label, *(spread([line["by_kind"][kind] for line in lines if kind in line["by_kind"]]) for kind in names)]
        for label, lines in found.items()
        if "by_kind" in lines[0]
    ]
    return table(["right with the picture", *names], rows)


def guessing(found: dict[str, list[Result]]) -> str:
    """What guessing among the choices gives on a set of pictures."""
    return f"Guessing gives {next(iter(found.values()))[0]['chance']:.1%}.\n\n"


def write_page(results: Sequence[Result], path: Path, real: str = "") -> None:
    """The page, which begins with the section about real pictures; without results nothing is written."""
    if not results:
        return
    one, two = by_label(results, "one"), by_label(results, "two")
    page = TITLE + (real and real + "\n")
    page += INTRO.format(parameters=next(iter(one.values()))[0]["parameters"])
    page += f"{guessing(one)}{arms(one)}\n{kinds(one)}{EXPLANATION}"
    page += f"{guessing(two)}{arms(two)}\n{kinds(two)}" if two else ""
    path.write_text(page, encoding="utf-8")
