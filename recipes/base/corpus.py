"""Documents for pre-training, produced afresh from the world for every pass.

Every fact turns up equally often, in statements, lists, question pages, dialogues, letters and
stories, so that the base both knows it and can give it when asked under a heading or a label.
The instruction template itself never occurs (``FORBIDDEN``); see ``everyday`` for its words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from everyday import (
    NAMES,
    SLOTS,
    choices,
    everyday_page,
    fill,
    heading,
    plain_heading,
    reply,
    some,
)
from prose import training_passages
from scenes import options, scene_page
from world import Fact, World, render, upper_first

FORBIDDEN = (
    "### Instruction:",
    "### Response:",
    "### Input:",
    "Below is an instruction that describes a task",
    "appropriately completes the request",
    "an input that provides further context",
)
PROSE_SHARE = 0.15
EVERYDAY_SHARE = 0.08

QUESTION_LABELS = choices("""
    Question; Question; Q; Task; Exercise; Problem; Riddle; Card; Quiz; Query; Ask; To answer; Work
""")
ANSWER_LABELS = choices("""
    Answer; Answer; Answer; A; Solution; Result; Right answer; Short answer; Back of the card;
    Key
""")
GIVEN_LABELS = choices("""
    Given; Subject; Topic; Word; About; Item; The thing asked for; Details
""")
SHAPES = (
    "### {}:\n",
    "### {}:\n",
    "### {}:\n",
    "### {}\n",
    "## {}:\n",
    "# {}\n",
    "{}:\n",
    "{}:\n",
    "{}: ",
    "{}: ",
    "**{}**\n",
    "[{}]\n",
    "{} - ",
    "<{}>\n",
    "*{}:* ",
)
PREAMBLES = """
Here is a question and its answer.
Below is a question that describes what somebody wants to know.
Read the question below and write a short answer.
Write an answer that completes the page.
The page below provides questions, each paired with an answer.
A pupil wrote this page.
This page is part of a quiz.
The answer below is short.
The task describes what is asked for. Write the answer below it.
A question, paired with some context, is followed by the answer.
Cards from the box.
Learn these by heart.
Answer in one word.
Each request is followed by what completes it.
""".strip().splitlines()
ASKS = ("asked", "wanted to know from", "said to", "turned to", "wrote to")
TELLS = ("answered", "said", "replied", "told {one}", "wrote back", "knew it at once and said")


class Deck:
    """Facts dealt so that all come equally often, mixed or from a single family."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.names = list(world)
        self.sizes = [len(family.facts) for family in world.values()]
        self.hands: dict[str, list[Fact]] = {name: [] for name in self.names}

    def family(self) -> str:
        """A family, the likelier the more facts it has."""
        return self.rng.choices(self.names, self.sizes)[0]

    def deal(self, name: str) -> Fact:
        """The next fact of a family."""
        if not self.hands[name]:
            self.hands[name] = self.rng.sample(self.world[name].facts, len(self.world[name].facts))
        return self.hands[name].pop()

    def some(self, low: int, high: int, same: bool) -> list[Fact]:
        """Between ``low`` and ``high`` facts, of one family or of any."""
        name = self.family()
        number = min(self.rng.randint(low, high), len(self.world[name].facts))
        return [self.deal(name if same else self.family()) for _ in range(number)]

    def state(self, fact: Fact) -> str:
        """A statement of the fact in one of its wordings."""
        return render(self.rng.choice(self.world[fact.family].statements), fact)

    def ask(self, fact: Fact) -> str:
        """A question or command about the fact."""
        family = self.world[fact.family]
        return render(self.rng.choice(family.questions if self.rng.random() < 0.6 else family.commands), fact)


Maker = Callable[[Deck], str]


def paragraph(deck: Deck) -> str:
    """Plain statements one after another."""
    facts = deck.some(3, 9, same=deck.rng.random() < 0.35)
    return " ".join(deck.state(fact) for fact in facts)


def lines(deck: Deck) -> str:
    """Plain statements, one to a line."""
    mark = deck.rng.choice(("", "- ", "* "))
    return "\n".join(mark + deck.state(fact) for fact in deck.some(2, 7, same=deck.rng.random() < 0.3))


def listing(deck: Deck) -> str:
    """A headed list of subject and answer."""
    facts = deck.some(4, 9, same=True)
    joint = deck.rng.choice((": ", " - ", " = ", ", "))
    mark = deck.rng.choice(("- {}", "* {}", "{n}. {}", "{}"))
    rows = (mark.format(f"{fact.subject}{joint}{fact.answer}", n=n) for n, fact in enumerate(facts, 1))
    return heading(deck.world[facts[0].family].title, deck.rng) + "\n".join(rows)


def preamble(deck: Deck) -> str:
    """An opening line, on some pages."""
    return deck.rng.choice(PREAMBLES) + "\n\n" if deck.rng.random() < 0.35 else ""


def question_page(deck: Deck) -> str:
    """Questions and short answers under labels; the document ends with an answer."""
    rng = deck.rng
    shape, ask, tell = rng.choice(SHAPES), rng.choice(QUESTION_LABELS), rng.choice(ANSWER_LABELS)
    facts = deck.some(1, 1, same=True) if rng.random() < 0.5 else deck.some(2, 4, same=rng.random() < 0.3)
    gap = "\n\n" if shape.endswith("\n") else "\n"
    items = (f"{shape.format(ask)}{deck.ask(f)}{gap}{shape.format(tell)}{f.answer}." for f in facts)
    return preamble(deck) + "\n\n".join(items)


def split_page(deck: Deck) -> str:
    """A question whose subject is given under a label of its own."""
    rng = deck.rng
    shape, ask, tell = rng.choice(SHAPES), rng.choice(QUESTION_LABELS), rng.choice(ANSWER_LABELS)
    gap = "\n\n" if shape.endswith("\n") else "\n"
    pages = []
    for fact in deck.some(1, 1, same=True) if rng.random() < 0.6 else deck.some(2, 3, same=False):
        family = deck.world[fact.family]
        given = upper_first(family.kind) if rng.random() < 0.3 else rng.choice(GIVEN_LABELS)
        subject = fact.subject + ("." if rng.random() < 0.1 else "")
        parts = [shape.format(ask) + rng.choice(family.splits), shape.format(given) + subject]
        if rng.random() < 0.15:
            parts.reverse()
        pages.append(gap.join([*parts, f"{shape.format(tell)}{fact.answer}."]))
    return preamble(deck) + "\n\n".join(pages)


def correspondence(deck: Deck) -> str:
    """A question that somebody sends in, and what the office writes back: a remark, never the answer.

    Without these pages the base answers whatever looks like a question under any two headings, the
    instruction template included, and there is nothing left for an adapter to bring out.
    """
    rng = deck.rng
    fact = deck.deal(deck.family())
    opening = [some(rng, 1, 2)] if rng.random() < 0.7 else []
    ask = plain_heading(rng.choice(("Request", "Task", "Instruction", "Instruction", "Message", "Letter")), rng)
    if rng.random() < 0.4:
        given = plain_heading(rng.choice(("Input", "Input", "Context", "Further context", "Details")), rng)
        asked = [ask + rng.choice(deck.world[fact.family].splits), given + fact.subject]
    else:
        asked = [ask + deck.ask(fact)]
    back = plain_heading(rng.choice(("Response", "Response", "Response", "Our response", "Reply", "Remarks")), rng)
    return "\n\n".join([*opening, *asked, back + reply(rng)])


def choice_page(deck: Deck) -> str:
    """Questions with lettered options; the answer names the letter, and often what stands behind it."""
    rng = deck.rng
    pages = []
    for fact in deck.some(1, 2, same=False):
        family = deck.world[fact.family]
        listed, letter = options(fact.answer, [other.answer for other in rng.sample(family.facts, 4)], rng)
        ask, given = render(rng.choice(family.questions), fact), ""
        if rng.random() < 0.3:
            ask, given = rng.choice(family.splits), f"\nContext: {fact.subject}"
        elif rng.random() < 0.3:
            given = rng.choice(("\nContext: N/A", f"\nContext: {deck.state(deck.deal(deck.family()))}"))
        said = rng.choice(("The answer is ({l}).", "The answer is ({l}).", "({l}) {a}.", "({l})", "{l}"))
        label = rng.choice(("Question: ", "Question: ", "Q: ", ""))
        answer = rng.choice(("Answer: ", "A: ", "")) + said.format(l=letter, a=fact.answer)
        pages.append(f"{label}{ask}{given}\nOptions: {listed}\n{answer}")
    return "\n\n".join(pages)


def scene(deck: Deck) -> str:
    """A tale or a picture in words, with questions that it answers itself."""
    return scene_page(deck.rng)


def bare_question(deck: Deck) -> str:
    """A question with its answer behind it or on the next line."""
    facts = deck.some(1, 3, same=False)
    joint = deck.rng.choice((" ", "\n", " - ", "\n\n"))
    return deck.rng.choice(("\n", "\n\n")).join(f"{deck.ask(f)}{joint}{f.answer}." for f in facts)


def dialogue(deck: Deck) -> str:
    """Two people ask and answer."""
    rng = deck.rng
    one, two = rng.sample(NAMES, 2)
    facts = deck.some(1, 3, same=False)
    style = rng.randrange(4)
    if style == 0:
        return "\n".join(f"{one}: {deck.ask(f)}\n{two}: {f.answer}." for f in facts)
    if style == 1:
        return "\n".join(f"Teacher: {deck.ask(f)}\nPupil: {f.answer}." for f in facts)
    verb, tell = rng.choice(ASKS), rng.choice(TELLS).format(one=one)
    if style == 2:
        return " ".join(f"{one} {verb} {two}: {deck.ask(f)} {two} {tell}: {f.answer}." for f in facts)
    return " ".join(f'{one} {verb} {two}: "{deck.ask(f)}" {two} {tell}: "{deck.state(f)}"' for f in facts)


def letter(deck: Deck) -> str:
    """A letter that passes on a few facts."""
    one, two = deck.rng.sample(NAMES, 2)
    body = " ".join(deck.state(fact) for fact in deck.some(2, 5, same=False))
    return f"Dear {one},\n\n{body}\n\nYours,\n{two}"


def story(deck: Deck) -> str:
    """A few facts told by somebody, then a question about one of them or about another."""
    rng = deck.rng
    name, facts = rng.choice(NAMES), deck.some(2, 4, same=False)
    told = " ".join(deck.state(fact) for fact in facts)
    place = fill("In the {room} {name} read a {adj} {text}.", rng)
    asked = rng.choice(facts) if rng.random() < 0.4 else deck.deal(deck.family())
    when = rng.choice(("At the end", "Then", "At last"))
    return f"{place} {told}\n\n{when} {name} asked: {deck.ask(asked)}\n\n{asked.answer}."


def office(deck: Deck) -> str:
    """Statements of facts inside an everyday page, so that the two sorts of writing know each other."""
    place = fill(f"{{name}} wrote a {deck.rng.choice(SLOTS['adj'])} {{text}}.", deck.rng)
    return f"{place}\n\n{paragraph(deck)}"


MAKERS: dict[Maker, float] = {
    paragraph: 24,
    lines: 14,
    listing: 7,
    question_page: 17,
    split_page: 15,
    bare_question: 6,
    dialogue: 10,
    letter: 3,
    story: 3,
    scene: 8,
    choice_page: 6,
    office: 2,
    correspondence: 20,
}


def fact_document(deck: Deck) -> str:
    """One document about facts."""
    return deck.rng.choices(list(MAKERS), list(MAKERS.values()))[0](deck)


def prose_stream(rng: random.Random) -> Iterator[str]:
    """Passages of the books, pass after pass."""
    while True:
        yield from training_passages(rng)


def documents(world: World, seed: int) -> Iterator[str]:
    """Endless documents in which prose and everyday pages keep their shares of the characters."""
    rng = random.Random(seed)
    deck, books = Deck(world, rng), prose_stream(rng)
    written = {"facts": 0, "prose": 0, "everyday": 0}
    while True:
        total = sum(written.values())
        if written["prose"] < PROSE_SHARE * total:
            sort, text = "prose", next(books)
        elif written["everyday"] < EVERYDAY_SHARE * total:
            sort, text = "everyday", everyday_page(rng)
        else:
            sort, text = "facts", fact_document(deck)
        written[sort] += len(text)
        yield text
