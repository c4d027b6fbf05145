"""A question set about drawn pictures, in the layout of ScienceQA.

    python recipes/pictures/questions.py --output DIR --train 3000 --val 300 --test 600 --seed 0

Of every twenty questions fourteen are about a picture, three about a short tale in the hint, and three about a fact
that the bundled base knows. Test pictures show combinations of words that no other picture shows (`combos.py`), and
test facts are those that no instruction of the bundled set mentions.

`--scenes one` takes pictures of one sort of thing (some red stars, a big cross, a digit); `two` those of two, whose
questions ask which of them is red, or where it stands: there the answer depends on who has which colour, and a
condition that is added to all prompts alike can hardly tell. `all` has both.

A picture's question cannot be answered without it. What is asked for is drawn first, evenly, and the rest of the scene
around it; every choice could as well have been drawn. So each is right equally often, whatever the question names.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import facts
from captions import asked, captions
from combos import (
    Combination,
    coloured,
    colours_of,
    colours_of_digit,
    combinations,
    counts_of,
    places_between,
    random_group,
    random_sized,
    shapes_of,
    shapes_placed,
    with_company,
)
from draw import Counted, Digit, Group, Placed, Scene, draw
from scenes import COLOURS, PLACES, SHAPES, SIZES, held
from world import NUMBER_WORDS

LETTERS = 4
HINT_SHARE = 0.3
"""Of the questions about pictures; as in ScienceQA, a question with a picture may have a context, too."""


@dataclass(frozen=True)
class Kind:
    """What a record says of its question beside the question."""

    subject: str
    topic: str
    category: str
    skill: str
    grade: int
    lecture: str


COUNT = Kind("natural science", "mathematics", "Counting", "Count shapes", 1, "To count, point at each shape once.")
COLOUR = Kind("natural science", "physics", "Colours", "Name colours", 1, "A colour is how a thing looks in the light.")
SHAPE = Kind("natural science", "mathematics", "Shapes", "Name shapes", 2, "A shape is told by its sides and corners.")
SIZE = Kind("natural science", "mathematics", "Sizes", "Compare sizes", 1, "A big shape fills much of the picture.")
PLACE = Kind("social science", "geography", "Maps", "Say where things are", 3, "On a map, above is nearer to the top.")
DIGIT = Kind("language science", "writing", "Digits", "Read digits", 2, "Every digit is written in its own way.")
TALE = Kind("language science", "reading", "Short tales", "Find it in the text", 4, "Look for the name in the text.")


Asker = Callable[[random.Random, bool], "Asking"]


@dataclass(frozen=True)
class Asking:
    """A scene, what is asked about it, and what the choices are taken from.

    Attributes:
        scene: what the picture shows.
        about: one of the keys of `captions.asked`.
        kind: for the record.
        pool: answers that could all have been drawn, the right one among them.
        near: of these, the one that the picture shows elsewhere; it is always a choice.
    """

    scene: Scene
    about: str
    kind: Kind
    pool: list[str]
    near: str = ""


def how_many(rng: random.Random, unseen: bool) -> Asking:
    """A count."""
    shape = rng.choice(SHAPES)
    group = Group(rng.choice(counts_of(shape, unseen)), rng.choice(colours_of(shape, unseen)), shape)
    return Asking(Counted((group,)), "count", COUNT, [NUMBER_WORDS[count] for count in counts_of(shape, unseen)])


def group_colour(rng: random.Random, unseen: bool) -> Asking:
    """The colour of counted shapes."""
    group = random_group(rng, unseen)
    return Asking(Counted((group,)), "colour", COLOUR, colours_of(group.shape, unseen))


def beside(asker: Asker) -> Asker:
    """The same question, with something else in the picture, too."""

    def ask(rng: random.Random, unseen: bool) -> Asking:
        asking = asker(rng, unseen)
        return replace(asking, scene=with_company(asking.scene.groups[0], rng, unseen))

    return ask


def shape_of_colour(rng: random.Random, unseen: bool) -> Asking:
    """Which of two groups has a colour; the other could have had it, too."""
    colour = rng.choice(COLOURS)
    pool = shapes_of(colour, unseen)
    shape = rng.choice(pool)
    other = random_group(rng, unseen, [name for name in pool if name != shape], colour)
    scene = Counted((Group(rng.choice(counts_of(shape, unseen)), colour, shape), other))
    return Asking(scene, "shape of colour", SHAPE, pool, other.shape)


def place(rng: random.Random, unseen: bool) -> Asking:
    """Where one of two shapes stands."""
    while True:
        shape, other = rng.sample(SHAPES, 2)
        if places := places_between(shape, other, unseen):
            scene = coloured(shape, rng.choice(places), other, rng, unseen)
            return Asking(scene, "place", PLACE, [f"{where} the {other}" for where in places])


def shape_of_place(rng: random.Random, unseen: bool) -> Asking:
    """What stands somewhere."""
    while True:
        where, other = rng.choice(list(PLACES)), rng.choice(SHAPES)
        pool = shapes_placed(where, other, unseen)
        if len(pool) > 1:
            scene = coloured(rng.choice(pool), where, other, rng, unseen)
            return Asking(scene, "shape of place", PLACE, pool)


def placed_colour(rng: random.Random, unseen: bool) -> Asking:
    """The colour of one of two shapes; the other's colour is a choice where the one could have had it."""
    while True:
        shape, other = rng.sample(SHAPES, 2)
        places = places_between(shape, other, unseen)
        both = [colour for colour in colours_of(shape, unseen) if colour in colours_of(other, unseen)]
        if places and len(both) > 1:
            colour, near = rng.sample(both, 2)
            return Asking(Placed(colour, shape, rng.choice(places), near, other), "colour", COLOUR, both, near)


def size(rng: random.Random, unseen: bool) -> Asking:
    """Big or small."""
    return Asking(random_sized(rng, unseen), "size", SIZE, list(SIZES))


def sized_colour(rng: random.Random, unseen: bool) -> Asking:
    """The colour of a shape that is alone."""
    scene = random_sized(rng, unseen)
    return Asking(scene, "colour", COLOUR, colours_of(scene.shape, unseen))


def shape(rng: random.Random, unseen: bool) -> Asking:
    """The name of a shape that is alone."""
    scene = random_sized(rng, unseen)
    return Asking(scene, "shape", SHAPE, shapes_of(scene.colour, unseen))


def digit(rng: random.Random, unseen: bool) -> Asking:
    """The name of a digit."""
    number = rng.randrange(10)
    scene = Digit(rng.choice(SIZES), rng.choice(colours_of_digit(number, unseen)), number)
    pool = [str(i) for i in range(10) if scene.colour in colours_of_digit(i, unseen)]
    return Asking(scene, "digit", DIGIT, pool)


def digit_colour(rng: random.Random, unseen: bool) -> Asking:
    """The colour of a digit."""
    colour = rng.choice(COLOURS)
    number = rng.choice([i for i in range(10) if colour in colours_of_digit(i, unseen)])
    pool = colours_of_digit(number, unseen)
    return Asking(Digit(rng.choice(SIZES), colour, number), "colour", COLOUR, pool)


ONE: dict[Asker, float] = {
    how_many: 3,
    group_colour: 1,
    size: 1.5,
    sized_colour: 1,
    shape: 2,
    digit: 2,
    digit_colour: 1,
}
TWO: dict[Asker, float] = {
    beside(how_many): 1.5,
    beside(group_colour): 1,
    shape_of_colour: 2,
    place: 3,
    shape_of_place: 2,
    placed_colour: 1.5,
}
SCENES = {"one": ONE, "two": TWO, "all": ONE | TWO}
"""What is asked for and how often, by what the pictures show."""


class Letters:
    """Places of the right answer, dealt so that with any number of choices all come equally often."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.hands = rng, defaultdict(list)

    def choices(self, answer: str, others: list[str], near: str = "") -> tuple[list[str], int]:
        """The answer among one to three of the others, one of them given, and where it stands."""
        rest = [other for other in dict.fromkeys(others) if other not in (answer, near)]
        wrong = [near] if near else []
        wrong += self.rng.sample(rest, min(len(rest), self.rng.randint(1, LETTERS - 1)))
        wrong = wrong[: LETTERS - 1]
        self.rng.shuffle(wrong)
        hand = self.hands[len(wrong)]
        if not hand:
            hand += self.rng.sample(range(len(wrong) + 1), len(wrong) + 1)
        where = hand.pop()
        return [*wrong[:where], answer, *wrong[where:]], where


@dataclass(frozen=True)
class Made:
    """A record of problems.json, and the scene that its picture shows."""

    record: dict[str, Any]
    scene: Scene | None = None


def record(kind: Kind, question: str, choices: tuple[list[str], int], hint: str, solution: str) -> dict[str, Any]:
    """A record without picture and split."""
    return {
        "question": question,
        "choices": choices[0],
        "answer": choices[1],
        "hint": hint,
        "image": None,
        "task": "closed choice",
        "grade": f"grade{kind.grade}",
        "subject": kind.subject,
        "topic": kind.topic,
        "category": kind.category,
        "skill": kind.skill,
        "lecture": kind.lecture,
        "solution": solution,
    }


def picture_question(letters: Letters, unseen: bool, scenes: str) -> Made:
    """A question about a picture."""
    rng, askers = letters.rng, SCENES[scenes]
    asking = rng.choices(list(askers), list(askers.values()))[0](rng, unseen)
    about = asked(asking.scene)[asking.about]
    choices = letters.choices(about.answer, asking.pool, asking.near)
    hint = "Look at the picture." if rng.random() < HINT_SHARE else ""
    made = record(asking.kind, about.question, choices, hint, rng.choice(captions(asking.scene)))
    return Made(made | {"image": "image.png"}, asking.scene)


def tale_question(letters: Letters) -> Made:
    """A question that its hint answers; all choices are from the tale, so that none can be ruled out by its words."""
    rng = letters.rng
    while True:
        hint, about = held(rng)
        number = rng.randrange(4)  # who has it, where, in what colour, what: so the questions follow each other
        alike = about[number::4]
        answers = [each.answer for each in alike]
        if len(set(answers)) == len(answers):
            one = rng.choice(alike)
            told = hint.split(". ")[alike.index(one)].rstrip(".") + "."
            return Made(record(TALE, one.question, letters.choices(one.answer, answers), hint, told))


def fact_question(letters: Letters, asking: facts.Asking) -> Made:
    """A question about the world, with nothing to read and nothing to see."""
    school, title = asking.school, asking.title
    kind = Kind(school.subject, school.topic, title, f"Know: {title.lower()}", school.grade, "")
    choices = letters.choices(asking.answer, asking.answers)
    return Made(record(kind, asking.question, choices, "", asking.statement))


def questions(split: str, count: int, seed: int, scenes: str = "all") -> Iterator[Made]:
    """The questions of one split; fewer of them are the first of more."""
    pictures, tales, world = (Letters(random.Random(f"{seed}/{split}/{sort}")) for sort in ("picture", "tale", "fact"))
    known = facts.askings(split, random.Random(f"{seed}/facts"))
    for number in range(count):
        sort = number % 20
        if sort in (3, 9, 16):
            made = tale_question(tales)
        elif sort in (6, 13, 19):
            made = fact_question(world, next(known))
        else:
            made = picture_question(pictures, split == "test", scenes)
        yield Made(made.record | {"split": split}, made.scene)


def shown(made: list[Made]) -> set[Combination]:
    """All combinations in the pictures."""
    return {combination for one in made if one.scene for combination in combinations(one.scene)}


def check_held_out(sets: dict[str, list[Made]]) -> None:
    """Make sure that test pictures show no combination that other pictures show.

    Raises:
        ValueError: they do.
    """
    both = shown(sets["test"]) & (shown(sets["train"]) | shown(sets["val"]))
    if both:
        raise ValueError(f"{len(both)} combinations are in test and other pictures, such as {min(both, key=repr)}.")


def write(sets: dict[str, list[Made]], folder: Path, seed: int) -> None:
    """The three parts of the layout: problems.json, pid_splits.json and the pictures."""
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {split: [] for split in sets}
    for split, made in sets.items():
        for number, one in enumerate(made):
            pid = str(len(problems) + 1)
            problems[pid] = one.record
            splits[split].append(pid)
            if one.scene:
                picture = draw(one.scene, random.Random(f"{seed}/{split}/{number}"))
                (folder / split / pid).mkdir(parents=True)
                picture.save(folder / split / pid / "image.png", optimize=True)
    lines = (f"{json.dumps(pid)}: {json.dumps(problem, ensure_ascii=False)}" for pid, problem in problems.items())
    (folder / "problems.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits) + "\n", encoding="utf-8")


def main() -> None:
    """Make the set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the set; it must be empty or new")
    for split, count in (("train", 3000), ("val", 300), ("test", 600)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"questions for {split} ({count})")
    parser.add_argument("--scenes", choices=SCENES, default="all", help="what the pictures show (all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--output {folder} is not empty: pictures of another set would stay among the new ones.")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {split: getattr(arguments, split) for split in ("train", "val", "test")}
    sets = {split: list(questions(split, count, arguments.seed, arguments.scenes)) for split, count in counts.items()}
    check_held_out(sets)
    write(sets, folder, arguments.seed)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{sum(counts.values())} questions in {folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
