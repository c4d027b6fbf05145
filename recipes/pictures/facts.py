"""Questions about the facts of the bundled base's world, for choices between answers of one kind."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "base"))
from world import DATA_DIR, Fact, Family, all_facts, heldout_facts, load_world, parse_families, render, words

UNCLEAR = words("home group diet material nature_place synonym opposite tool young language sound colour")
"""Families where the answer to another fact may be right, too: a cat is also a pet, and wood may be oak."""
PEOPLE = words("job city pet instrument food")


@dataclass(frozen=True)
class School:
    """Where facts are taught."""

    subject: str
    topic: str
    grade: int


NATURE = School("natural science", "science and nature", 7)
PLACES = School("social science", "geography", 8)
LANGUAGE = School("language science", "vocabulary", 4)
NEIGHBOURS = School("social science", "people", 5)
NUMBERS = School("natural science", "mathematics", 6)
BY_FILE = {"nature": NATURE, "places": PLACES, "words": LANGUAGE}


@dataclass(frozen=True)
class Asking:
    """A question about a fact, with all answers of its family and what a record says of it."""

    question: str
    answer: str
    answers: list[str]
    statement: str
    title: str
    school: School


def schools() -> dict[str, School]:
    """Where every family is taught, by the file that it comes from."""
    found = {}
    for path in sorted(DATA_DIR.glob("*.txt")):
        for family in parse_families(path.read_text(encoding="utf-8")):
            made = NEIGHBOURS if family.name in PEOPLE else NUMBERS
            found[family.name] = BY_FILE.get(path.stem, made)
    return found


def askings(split: str, rng: random.Random) -> Iterator[Asking]:
    """Questions without end, each fact once before any comes again.

    The test asks for facts that no bundled instruction mentions, training and validation for the others, beginning at
    opposite ends.
    """
    world, taught = load_world(), schools()
    held = heldout_facts(world)
    known = [fact for fact in all_facts(world) if fact.family not in UNCLEAR and (fact in held) == (split == "test")]
    rng.shuffle(known)
    if split == "val":
        known.reverse()
    while True:
        for fact in known:
            yield asking(world[fact.family], fact, taught[fact.family], rng)


def asking(family: Family, fact: Fact, school: School, rng: random.Random) -> Asking:
    """The question about one fact."""
    return Asking(
        question=render(rng.choice(family.questions), fact),
        answer=fact.answer,
        answers=sorted({other.answer for other in family.facts}),
        statement=render(rng.choice(family.statements), fact),
        title=family.title,
        school=school,
    )
