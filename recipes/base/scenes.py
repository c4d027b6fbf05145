"""Pages whose questions are answered by the page itself: short tales about who has what, and pictures put into words.

Facts of the world are recalled; here the answer stands a few lines above the question. The pictures use the words of
the drawn picture world (shapes, colours, counts, places, digits), so that a base which has read these pages can be
told about a real picture later, through an adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from everyday import NAMES
from world import NUMBER_WORDS, upper_first, words

SHAPES = words("circle square triangle star cross ring diamond heart")
COLOURS = words("red blue green yellow orange purple pink brown black grey")
SIZES = ("big", "small")
PLACES = {"above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of"}
THINGS = words("ball cup book key coat hat lamp bag box ring spoon drum kite boat map coin rope bell")
WHERE = words("kitchen garden cellar school shop barn attic hall yard tower")
QUESTION_MARKS = ("Question: {q}\nAnswer: {a}.", "{q} {a}.", "{q}\n{a}.", "Q: {q}\nA: {a}.", '"{q}" asked {n}. "{a}."')


@dataclass(frozen=True)
class Asked:
    """A question about a page, with its answer."""

    question: str
    answer: str


def written(asked: Asked, rng: random.Random) -> str:
    """The question and its answer in one of several forms."""
    return rng.choice(QUESTION_MARKS).format(q=asked.question, a=asked.answer, n=rng.choice(NAMES))


def with_article(noun: str) -> str:
    """'a circle', 'an orange circle'."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def several(count: int, colour: str, shape: str) -> str:
    """'one red circle', 'three red circles'."""
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    return f"{NUMBER_WORDS[count]} {colour} {shape if count == 1 else plural}"


def counted(rng: random.Random) -> tuple[str, list[Asked]]:
    """A picture of a few groups of shapes."""
    shapes = rng.sample(SHAPES, rng.randint(1, 2))
    groups = [(rng.randint(1, 6), rng.choice(COLOURS), shape) for shape in shapes]
    listed = " and ".join(several(*group) for group in groups)
    verb = "is" if groups[0][0] == 1 else "are"
    text = rng.choice((f"There {verb} {listed}.", f"The picture shows {listed}.", f"We see {listed}."))
    asked = []
    for count, colour, shape in groups:
        plural = several(2, "", shape).split()[-1]
        asked.append(Asked(f"How many {plural} are there?", NUMBER_WORDS[count]))
        asked.append(Asked(f"What colour {'is the ' + shape if count == 1 else 'are the ' + plural}?", colour))
        asked.append(Asked(f"Which shape is {colour}?", shape) if groups[0][1] != groups[-1][1] else asked[-1])
    return text, asked


def placed(rng: random.Random) -> tuple[str, list[Asked]]:
    """A picture of two shapes and where they stand."""
    first, second = rng.sample(SHAPES, 2)
    one, two = rng.sample(COLOURS, 2)
    place = rng.choice(list(PLACES))
    text = rng.choice(
        (
            f"{with_article(f'{one} {first}')} is {place} {with_article(f'{two} {second}')}.",
            f"The picture shows {with_article(f'{one} {first}')} {place} {with_article(f'{two} {second}')}.",
        )
    )
    asked = [
        Asked(f"What colour is the {first}?", one),
        Asked(f"What colour is the {second}?", two),
        Asked(f"Which shape is {place} the {second}?", first),
        Asked(f"Which shape is {PLACES[place]} the {first}?", second),
        Asked(f"Where is the {first}?", f"{place} the {second}"),
        Asked(f"Which shape is {one}?", first),
    ]
    return upper_first(text), asked


def sized(rng: random.Random) -> tuple[str, list[Asked]]:
    """A picture of one shape, big or small, or of one digit."""
    colour, size = rng.choice(COLOURS), rng.choice(SIZES)
    if rng.random() < 0.5:
        digit = rng.randrange(10)
        text = f"The picture shows a {size} {colour} digit {digit}."
        return text, [Asked("Which digit is it?", str(digit)), Asked("What colour is the digit?", colour)]
    shape = rng.choice(SHAPES)
    text = rng.choice((f"The picture shows a {size} {colour} {shape}.", f"This is a {size} {colour} {shape}."))
    return text, [
        Asked(f"Is the {shape} big or small?", size),
        Asked(f"What colour is the {shape}?", colour),
        Asked("Which shape is it?", shape),
    ]


def held(rng: random.Random) -> tuple[str, list[Asked]]:
    """A short tale: who has what, and where they go."""
    people, things, rooms = rng.sample(NAMES, 3), rng.sample(THINGS, 3), rng.sample(WHERE, 3)
    told, asked = [], []
    for name, thing, room in list(zip(people, things, rooms, strict=True))[: rng.randint(2, 3)]:
        colour = rng.choice(COLOURS)
        thing_said = with_article(f"{colour} {thing}")
        told.append(rng.choice((f"{name} has {thing_said}", f"{name} found {thing_said}", f"{name} took {thing_said}")))
        told[-1] += rng.choice((f" and goes to the {room}.", f" in the {room}.", f", then went to the {room}."))
        asked += [
            Asked(f"Who has the {thing}?", name),
            Asked(f"Where is {name}?", f"in the {room}"),
            Asked(f"What colour is the {thing}?", colour),
            Asked(f"What does {name} have?", with_article(f"{colour} {thing}")),
        ]
    return " ".join(told), asked


PAGES: tuple[Callable[[random.Random], tuple[str, list[Asked]]], ...] = (counted, placed, sized, held)


def scene_page(rng: random.Random) -> str:
    """One page: a picture in words or a tale, then questions about it."""
    text, asked = rng.choice(PAGES)(rng)
    opening = rng.choice(("", "", "Look at the picture. ", "Read this. ")) + text
    questions = [written(q, rng) for q in rng.sample(asked, min(len(asked), rng.randint(1, 3)))]
    return "\n\n".join([opening, *questions]) if rng.random() < 0.7 else "\n".join([opening, *questions])


def options(answer: str, others: list[str], rng: random.Random) -> tuple[str, str]:
    """Lettered options with the answer among two to four, and the letter of the answer."""
    wrong = [other for other in dict.fromkeys(others) if other != answer]
    chosen = [answer, *rng.sample(wrong, min(len(wrong), rng.randint(1, 3)))]
    rng.shuffle(chosen)
    return " ".join(f"({'ABCDE'[i]}) {text}" for i, text in enumerate(chosen)), "ABCDE"[chosen.index(answer)]
