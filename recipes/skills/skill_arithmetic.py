"""Small word problems and small logic; the answer is a number or a name in a given form."""

from __future__ import annotations

import random
from collections.abc import Callable

from skill_kit import Draw, Example, Skill, exact
from skill_words import GOODS, PEOPLE

LOGIC_SHARE = 0.3
STORIES = {
    "+": (
        (
            "{name} has {a} {goods} and buys {b} more. How many {goods} are there now?",
            "There are {a} {goods} in one box and {b} in another. How many does {name} count in all?",
            "{name} sold {a} {goods} on Monday and {b} on Tuesday. How many were sold?",
            "{name} owns {a} {goods}. A friend brings {b}. What is the total?",
        ),
        (
            "A shelf holds {a} {goods}, the floor another {b}. {name} wants to know the sum.",
            "After {name} added {b} {goods} to the {a} in the hall, how many stood there?",
        ),
    ),
    "-": (
        (
            "{name} had {a} {goods} and gave {b} away. How many are left?",
            "Of {a} {goods} {b} are broken. How many can {name} still use?",
            "{name} needs {a} {goods} and has {b}. How many are missing?",
            "The shop had {a} {goods}. {name} took {b}. How many remain?",
        ),
        (
            "{name} lost {b} out of {a} {goods}. What is the rest?",
            "From a pile of {a} {goods} {name} carries off {b}. How many stay behind?",
        ),
    ),
    "*": (
        (
            "{name} fills {a} boxes with {b} {goods} each. How many {goods} is that?",
            "One truck takes {b} {goods}. How many do {a} trucks of {name} take?",
            "{name} makes {b} {goods} a day. How many in {a} days?",
            "There are {a} rows of {b} {goods}. How many does {name} see?",
        ),
        (
            "Each of {a} friends of {name} brings {b} {goods}. How many come together?",
            "{a} times {name} orders {b} {goods}. How many arrive in all?",
        ),
    ),
}
ANSWER = "The answer is X."
FORM = f"Answer in this form: {ANSWER}"
TASKS = (
    f"{{text}}\n{FORM}",
    f"{{text}}\nWork it out. {FORM}",
    f"Solve this: {{text}}\n{FORM}",
    f"Here is a problem. {{text}}\n{FORM}",
)
NEW_TASKS = (f"{{text}}\nCalculate. {FORM}", f"Problem: {{text}} {FORM}")

ORDERS = (
    (
        "{x} is {more} than {y}. {y} is {more} than {z}.",
        "{y} is {more} than {z}, and {x} is {more} than {y}.",
        "{z} is {less} than {y}. {x} is {more} than {y}.",
        "{y} is {less} than {x}. {z} is {less} than {y}.",
    ),
    (
        "{x} is {more} than {y}, who is {more} than {z}.",
        "We know that {z} is {less} than {y} and {y} is {less} than {x}.",
    ),
)
MEASURES = (
    (
        "taller/shorter/tallest/shortest",
        "older/younger/oldest/youngest",
        "faster/slower/fastest/slowest",
        "stronger/weaker/strongest/weakest",
    ),
    ("richer/poorer/richest/poorest", "heavier/lighter/heaviest/lightest"),
)
LOGIC_FORM = "Answer in this form: NAME is the {most}."
LOGIC_TASKS = (
    f"{{text}} Who is the {{most}}?\n{LOGIC_FORM}",
    f"{{text}} Which of the three is the {{most}}?\n{LOGIC_FORM}",
    f"Think: {{text}} Name the {{most}} person.\n{LOGIC_FORM}",
)
NEW_LOGIC_TASKS = (
    f"{{text}} Who, then, is the {{most}}? {LOGIC_FORM}",
    f"Riddle: {{text}} Tell us who is the {{most}}.\n{LOGIC_FORM}",
)


def numbers(sign: str) -> Callable[[random.Random], tuple[tuple[int, int], int]]:
    """Two small numbers to go with a sign, and what decides their split."""

    def make(rng: random.Random) -> tuple[tuple[int, int], int]:
        if sign == "*":
            a, b = rng.randrange(2, 11), rng.randrange(2, 16)
        else:
            a, b = sorted((rng.randrange(2, 50), rng.randrange(2, 50)), reverse=True)
        return (a, b), 3 * a + b

    return make


def result(sign: str, a: int, b: int) -> int:
    """The answer."""
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def a_story(draw: Draw) -> Example:
    """A word problem with one step."""
    sign = draw.rng.choice(list(STORIES))
    a, b = draw.until(numbers(sign))
    draw.entities.append(f"{a} {sign} {b}")
    text = draw.wording(*STORIES[sign]).format(name=draw.entity(PEOPLE), goods=draw.entity(GOODS), a=a, b=b)
    answer = ANSWER.replace("X", str(result(sign, a, b)))
    return draw.example(draw.wording(TASKS, NEW_TASKS).format(text=text), "", answer)


def an_order(draw: Draw) -> Example:
    """Three people in an order, told in two steps; either end is asked for."""
    x = draw.entity(PEOPLE)
    y = draw.entity(PEOPLE, unlike=x)
    while (z := draw.entity(PEOPLE, unlike=x)) == y:
        draw.entities.pop()
    more, less, most, least = draw.wording(*MEASURES).split("/")
    text = draw.wording(*ORDERS).format(x=x, y=y, z=z, more=more, less=less)
    asked, answer = draw.rng.choice(((most, x), (least, z)))
    task = draw.wording(LOGIC_TASKS, NEW_LOGIC_TASKS).format(text=text, most=asked)
    return draw.example(task, "", f"{answer} is the {asked}.")


def drawn(draw: Draw) -> Example:
    """A word problem, or an order of three."""
    return an_order(draw) if draw.rng.random() < LOGIC_SHARE else a_story(draw)


ARITHMETIC = Skill("arithmetic", "a small word problem or a riddle of three people, in a given form", drawn, exact)
