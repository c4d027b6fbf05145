"""Which words may meet in a picture: pairs that training never shows, and random scenes of either sort.

Every word is seen in training, alone or with other words; what the test asks about is a meeting that was never shown.
A scene is *seen* when none of its combinations is held out, and *unseen* when all of them are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from draw import Counted, Digit, Group, Placed, Scene, Sized
from scenes import COLOURS, PLACES, SHAPES, SIZES

MOST = 5
"""Shapes in a group."""
Combination = tuple[str | int, ...]

HELD_COUNTS = dict(zip(SHAPES, ((2, 3), (4, 5), (2, 4), (3, 5), (2, 5), (3, 4), (2, 4), (3, 5)), strict=True))
"""Held out by shape; one alone is in too many pictures to be held out."""


def is_held_out(combination: Combination) -> bool:
    """Whether training never shows these words together.

    Held out are four colours of every shape, two counts of every shape, two colours of every digit, and for two pairs
    of shapes in three either standing above each other or standing side by side. These are many on purpose: a test
    question can then offer held-out answers only, so that a model which has merely learnt what does not go together
    is neither helped nor misled.
    """
    kind, *words = combination
    if kind == "shape colour":
        return (COLOURS.index(words[1]) + 3 * SHAPES.index(words[0])) % 5 < 2
    if kind == "shape count":
        return words[1] in HELD_COUNTS[words[0]]
    if kind == "digit colour":
        return (COLOURS.index(words[1]) + 3 * words[0]) % 5 == 0
    third = sum(SHAPES.index(shape) for shape in words[:2]) % 3
    return third == ("above", "to the left of").index(words[2])


def shape_place(shape: str, place: str, other: str) -> Combination:
    """Two shapes and how they stand, told one way only: below is above with the shapes swapped."""
    if place in ("above", "to the left of"):
        return ("shape place", shape, other, place)
    return ("shape place", other, shape, PLACES[place])


def combinations(scene: Scene) -> set[Combination]:
    """Every combination that a picture of the scene shows."""
    match scene:
        case Counted():
            coloured = {("shape colour", group.shape, group.colour) for group in scene.groups}
            return coloured | {("shape count", group.shape, group.count) for group in scene.groups}
        case Placed():
            ends = ((scene.shape, scene.colour), (scene.other_shape, scene.other_colour))
            coloured = {("shape colour", *end) for end in ends}
            return coloured | {shape_place(scene.shape, scene.place, scene.other_shape)}
        case Sized():
            return {("shape colour", scene.shape, scene.colour)}
        case Digit():
            return {("digit colour", scene.digit, scene.colour)}


def is_seen(scene: Scene) -> bool:
    """Whether training may show the scene."""
    return not any(map(is_held_out, combinations(scene)))


def is_unseen(scene: Scene) -> bool:
    """Whether everything about the scene is new to who knows the training pictures."""
    return all(map(is_held_out, combinations(scene)))


# Words that go with others, in training (unseen is False) or in the test (True).


def colours_of(shape: str, unseen: bool) -> list[str]:
    """Colours that the shape may have."""
    return [colour for colour in COLOURS if is_held_out(("shape colour", shape, colour)) == unseen]


def shapes_of(colour: str, unseen: bool) -> list[str]:
    """Shapes that may have the colour."""
    return [shape for shape in SHAPES if is_held_out(("shape colour", shape, colour)) == unseen]


def counts_of(shape: str, unseen: bool) -> list[int]:
    """How many there may be of the shape."""
    return [count for count in range(1, MOST + 1) if is_held_out(("shape count", shape, count)) == unseen]


def colours_of_digit(digit: int, unseen: bool) -> list[str]:
    """Colours that the digit may have."""
    return [colour for colour in COLOURS if is_held_out(("digit colour", digit, colour)) == unseen]


def places_between(shape: str, other: str, unseen: bool) -> list[str]:
    """Where the shape may stand, seen from the other."""
    return [place for place in PLACES if is_held_out(shape_place(shape, place, other)) == unseen]


def shapes_placed(place: str, other: str, unseen: bool) -> list[str]:
    """Shapes that may stand there, seen from the other."""
    partners = (shape for shape in SHAPES if shape != other)
    return [shape for shape in partners if is_held_out(shape_place(shape, place, other)) == unseen]


# Random scenes, and scenes that differ from them in one thing.


def random_group(rng: random.Random, unseen: bool, shapes: Iterable[str] = SHAPES, but: str = "") -> Group:
    """A group of one of the shapes, in any colour but one."""
    shape = rng.choice([shape for shape in shapes if set(colours_of(shape, unseen)) - {but}])
    colour = rng.choice([colour for colour in colours_of(shape, unseen) if colour != but])
    return Group(rng.choice(counts_of(shape, unseen)), colour, shape)


def with_company(group: Group, rng: random.Random, unseen: bool) -> Counted:
    """The group, alone or with another of another shape and colour."""
    if rng.random() < 0.5:
        return Counted((group,))
    others = [shape for shape in SHAPES if shape != group.shape]
    return Counted((group, random_group(rng, unseen, others, group.colour)))


def random_counted(rng: random.Random, unseen: bool) -> Counted:
    """One or two groups."""
    return with_company(random_group(rng, unseen), rng, unseen)


def random_placed(rng: random.Random, unseen: bool) -> Placed:
    """Two shapes."""
    while True:
        shape, other = rng.sample(SHAPES, 2)
        if places := places_between(shape, other, unseen):
            return coloured(shape, rng.choice(places), other, rng, unseen)


def coloured(shape: str, place: str, other: str, rng: random.Random, unseen: bool) -> Placed:
    """Two placed shapes in colours of their own."""
    colour = rng.choice(colours_of(shape, unseen))
    left = [other_colour for other_colour in colours_of(other, unseen) if other_colour != colour]
    return Placed(colour, shape, place, rng.choice(left), other)


def random_sized(rng: random.Random, unseen: bool) -> Sized:
    """One shape."""
    shape = rng.choice(SHAPES)
    return Sized(rng.choice(SIZES), rng.choice(colours_of(shape, unseen)), shape)


def random_digit(rng: random.Random, unseen: bool) -> Digit:
    """One digit."""
    digit = rng.randrange(10)
    return Digit(rng.choice(SIZES), rng.choice(colours_of_digit(digit, unseen)), digit)


MAKERS: dict[Callable[[random.Random, bool], Scene], float] = {
    random_counted: 4,
    random_placed: 3,
    random_sized: 1.5,
    random_digit: 1.5,
}


def random_scene(rng: random.Random, unseen: bool = False) -> Scene:
    """A scene of any sort, seen or unseen."""
    return rng.choices(list(MAKERS), list(MAKERS.values()))[0](rng, unseen)


def changes(scene: Scene) -> dict[str, list[Scene]]:
    """All scenes that differ in one thing about the first shape or digit, by the name of that thing."""
    match scene:
        case Counted():
            first, *rest = scene.groups
            taken = {word for group in rest for word in (group.colour, group.shape)}
            fresh = {
                "count": [replace(first, count=count) for count in range(1, MOST + 1)],
                "colour": [replace(first, colour=colour) for colour in COLOURS if colour not in taken],
                "shape": [replace(first, shape=shape) for shape in SHAPES if shape not in taken],
            }
            found = {name: [Counted((group, *rest)) for group in groups] for name, groups in fresh.items()}
        case Placed():
            colours = [colour for colour in COLOURS if colour != scene.other_colour]
            shapes = [shape for shape in SHAPES if shape != scene.other_shape]
            found = {
                "colour": [replace(scene, colour=colour) for colour in colours],
                "shape": [replace(scene, shape=shape) for shape in shapes],
                "place": [replace(scene, place=place) for place in PLACES],
            }
        case Sized():
            found = {
                "size": [replace(scene, size=size) for size in SIZES],
                "colour": [replace(scene, colour=colour) for colour in COLOURS],
                "shape": [replace(scene, shape=shape) for shape in SHAPES],
            }
        case Digit():
            found = {
                "size": [replace(scene, size=size) for size in SIZES],
                "colour": [replace(scene, colour=colour) for colour in COLOURS],
                "digit": [replace(scene, digit=digit) for digit in range(10)],
            }
    return {name: [other for other in others if other != scene] for name, others in found.items()}
