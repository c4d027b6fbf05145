"""What was asked about pictures and what was answered, as one HTML file or one PNG.

An answer is marked as right or wrong by its letter, however it is written; one without a letter is wrong.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from llama_adapter.conditions.pictures import read_picture
from llama_adapter.errors import DataError
from llama_adapter.evaluation.scienceqa.questions import LETTERS
from llama_adapter.evaluation.scienceqa.scores import RULES
from llama_adapter.files import write_atomically

SIDE = 256
"""Longest side of a picture in the file; a larger one is reduced."""
HEADINGS = {"base": "Base", "adapter": "Adapter", "blind": "Without the picture"}
"""Heading of each field of `Row` that is an answer."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #1c1c1e; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #d5d5da; padding: .6em .8em; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #8e8e93; }
img { display: block; width: 128px; image-rendering: pixelated; }
ol { list-style: none; margin: .4em 0 0; padding: 0; }
.right { color: #12662f; }
.wrong { color: #a3261c; }
"""


@dataclass(frozen=True)
class Row:
    """One question with its answers.

    Attributes:
        picture: in memory, its path, or the content of its file.
        question: what is asked.
        options: two to five possible answers.
        answer: index of the right one.
        base: what the bare base writes.
        adapter: what the adapter writes.
        blind: what the adapter writes when it is asked without the picture.
    """

    picture: Image.Image | Path | str | bytes
    question: str
    options: tuple[str, ...]
    answer: int
    base: str
    adapter: str
    blind: str

    def is_right(self, name: str) -> bool:
        """Whether one of the answers of `HEADINGS` names the right option."""
        text = getattr(self, name)
        read = (rule(text, self.options) for rule in RULES.values())
        return next((index for index in read if index is not None), None) == self.answer


def write_report(rows: Sequence[Row], path: Path, title: str = "Questions about pictures") -> None:
    """One HTML file that needs no other: pictures inside, no scripts, every text escaped.

    Raises:
        DataError: there are no rows, or a picture cannot be read.
    """
    head = "".join(f"<th>{name}</th>" for name in ("Picture", "Question", "Right answer", *HEADINGS.values()))
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(summary(rows))}</p>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(map(html_row, rows))
        + "\n</tbody>\n</table>\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def write_sheet(rows: Sequence[Row], path: Path, columns: int = 4) -> None:
    """The same as one PNG: every picture with its question and answers below.

    Raises:
        DataError: there are no rows, or a picture cannot be read.
    """
    heading = summary(rows)
    columns = min(columns, len(rows))
    texts = [caption(row) for row in rows]
    height = 2.0 + 0.16 * (1 + max(text.count("\n") for text in texts))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.2 * columns, height * lines + 0.5), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(heading, 44 * columns)), fontsize=9)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, row, text in zip(grid.flat, rows, texts, strict=False):
        axes.imshow(small(row.picture), interpolation="nearest")
        axes.text(0, -0.04, text, transform=axes.transAxes, va="top", fontsize=8, parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def summary(rows: Sequence[Row]) -> str:
    """How many each answered right.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("There is nothing to report: give at least one question.")
    shares = [f"{heading} {sum(row.is_right(name) for row in rows)}" for name, heading in HEADINGS.items()]
    return f"Right answers to {len(rows)} question{'s' * (len(rows) > 1)}: {', '.join(shares)}."


def html_row(row: Row) -> str:
    """One row of the table."""
    options = "".join(f"<li>{escape(option)}</li>" for option in lettered(row))
    answers = "".join(
        f'<td class="{"right" if row.is_right(name) else "wrong"}">{mark(row, name)} {escape(getattr(row, name))}</td>'
        for name in HEADINGS
    )
    return (
        f'<tr><td><img alt="" src="data:image/png;base64,{png(row.picture)}"></td>'
        f"<td>{escape(row.question)}<ol>{options}</ol></td><td>{escape(lettered(row)[row.answer])}</td>{answers}</tr>"
    )


def caption(row: Row) -> str:
    """The same below a picture, in lines that fit."""
    parts = [row.question, *lettered(row), f"right: {lettered(row)[row.answer]}"]
    parts += [f"{mark(row, name)} {heading.lower()}: {getattr(row, name)}" for name, heading in HEADINGS.items()]
    return "\n".join(line for part in parts for line in textwrap.wrap(part, 44) or [""])


def lettered(row: Row) -> list[str]:
    """The options as they are asked."""
    return [f"({letter}) {option}" for letter, option in zip(LETTERS, row.options, strict=False)]


def mark(row: Row, name: str) -> str:
    """Right or wrong, for those who do not see it by the colour."""
    return "✓" if row.is_right(name) else "✗"


def small(picture: Image.Image | Path | str | bytes) -> Image.Image:
    """The picture as RGB, at most `SIDE` long."""
    found = picture.convert("RGB") if isinstance(picture, Image.Image) else read_picture(picture)
    found.thumbnail((SIDE, SIDE))
    return found


def png(picture: Image.Image | Path | str | bytes) -> str:
    """The picture as text inside a file."""
    content = io.BytesIO()
    small(picture).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode("ascii")
