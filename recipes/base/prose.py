"""The public-domain books: reading, splitting off the held-out end, and sampling passages."""

from __future__ import annotations

import gzip
import random
from functools import cache
from pathlib import Path

PROSE_DIR = Path(__file__).parent / "prose"
HELDOUT_TAIL = 0.05
_PLAIN = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "—": "-",
        "–": "-",
        "…": "...",
        "\u00a0": " ",
        "\u2060": None,
        "\u200a": " ",
        "\u202f": " ",
        "\ufeff": None,
    }
)


@cache
def _book_paragraphs() -> tuple[tuple[str, ...], ...]:
    """Paragraphs of every book, with typewriter punctuation so that a small vocabulary suffices."""
    books = []
    for path in sorted(PROSE_DIR.glob("*.txt.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8").translate(_PLAIN)
        books.append(tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip()))
    return tuple(books)


def _cut(paragraphs: tuple[str, ...]) -> int:
    """Where the held-out end of a book begins, as a paragraph number."""
    limit = (1 - HELDOUT_TAIL) * sum(map(len, paragraphs))
    seen = 0
    for number, paragraph in enumerate(paragraphs):
        seen += len(paragraph)
        if seen > limit:
            return number
    return len(paragraphs)


def _passages(paragraphs: list[str], size: int) -> list[str]:
    """Join paragraphs to passages of at least ``size`` characters."""
    passages, current = [], ""
    for paragraph in paragraphs:
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= size:
            passages.append(current)
            current = ""
    return [*passages, current] if current else passages


def training_passages(rng: random.Random, size: int = 900) -> list[str]:
    """One pass over the training part of all books, cut at new places each time, in random order."""
    passages: list[str] = []
    for book in _book_paragraphs():
        passages += _passages(list(book[rng.randrange(3) : _cut(book)]), rng.randint(size // 2, size))
    rng.shuffle(passages)
    return passages


def heldout_passages(size: int = 900) -> list[str]:
    """The ends of all books, which no training text contains."""
    return [passage for book in _book_paragraphs() for passage in _passages(list(book[_cut(book) :]), size)]
