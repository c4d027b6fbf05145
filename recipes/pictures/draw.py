"""Draw scenes of the picture world: counted shapes, two shapes and how they stand, one shape or one digit.

The words are those of `recipes/base/scenes.py`, so a base that has read about such pictures can be shown them. No two
pictures of a scene are alike: places, sizes, turns, shades, light and grain are drawn at random. What a caption says
is never left to chance: shapes do not touch, colours stay nearer to their own name than to any other, and a turn is
too small to make a diamond of a square.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).resolve().parents[1] / "base"))
from scenes import PLACES

SIZE = 64
FINER = 4
"""Pictures are drawn so many times larger and then reduced, which smooths every edge."""
GAP = 0.04
"""Least distance between two shapes, as a share of the picture: about two and a half pixels."""
RGB = {
    "red": (215, 25, 35),
    "blue": (35, 80, 220),
    "green": (30, 145, 60),
    "yellow": (250, 220, 30),
    "orange": (250, 130, 15),
    "purple": (125, 40, 170),
    "pink": (250, 135, 190),
    "brown": (115, 65, 30),
    "black": (22, 22, 24),
    "grey": (135, 137, 138),
}
LIGHTER, OTHERWISE = 12, 6
"""How far a shade may be from its colour: all channels together, and each by itself, which changes the hue."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """So many equal shapes."""

    count: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Counted:
    """One or two groups of shapes, strewn over the picture."""

    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Placed:
    """One shape beside, above or below another: the first is at `place` of the other."""

    colour: str
    shape: str
    place: str
    other_colour: str
    other_shape: str

    def swapped(self) -> Placed:
        """The same picture, told from the other shape."""
        return Placed(self.other_colour, self.other_shape, PLACES[self.place], self.colour, self.shape)


@dataclass(frozen=True)
class Sized:
    """One shape, big or small."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Digit:
    """One digit, big or small."""

    size: str
    colour: str
    digit: int


Scene = Counted | Placed | Sized | Digit


@dataclass(frozen=True)
class Mark:
    """Something to be drawn inside a circle; lengths are shares of the picture's side, the turn is in degrees."""

    name: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float


def draw(scene: Scene, rng: random.Random, size: int = SIZE) -> Image.Image:
    """A picture of the scene; the same generator in the same state gives the same picture."""
    side = size * FINER
    tint = tuple(rng.randint(226, 255) for _ in range(3))
    canvas = Image.new("RGB", (side, side), tint)
    pen = ImageDraw.Draw(canvas)
    shades: dict[str, tuple[int, ...]] = {}
    for mark in layout(scene, rng):
        if mark.colour not in shades:  # shapes of one group have one shade
            shades[mark.colour] = shade(mark.colour, rng)
        paint(pen, mark, shades[mark.colour], side)
    return lit(canvas.reduce(FINER), rng)


def shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    """A colour near the named one."""
    lighter = rng.randint(-LIGHTER, LIGHTER)
    mixed = (value + lighter + rng.randint(-OTHERWISE, OTHERWISE) for value in RGB[colour])
    return tuple(min(255, max(0, value)) for value in mixed)


def lit(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture under a light that falls off to one side, with specks on it.

    Specks are few and of one strength: grain on every pixel would make the files of a question set four times larger.
    """
    values = np.asarray(picture, np.float32)
    grain = np.random.default_rng(rng.getrandbits(64))
    ramp = np.linspace(-0.5, 0.5, picture.width, dtype=np.float32)
    light = 1 + rng.uniform(-0.05, 0.05) * ramp[:, None] + rng.uniform(-0.05, 0.05) * ramp[None, :]
    specks = 9 * (grain.random(values.shape[:2], dtype=np.float32) < 0.04)
    values = values * light[..., None] - specks[..., None]
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def layout(scene: Scene, rng: random.Random) -> list[Mark]:
    """Where the scene's shapes stand."""
    match scene:
        case Counted():
            return strewn(scene, rng)
        case Placed():
            return side_by_side(scene, rng)
        case Sized():
            return [alone(scene.shape, scene.size, scene.colour, rng)]
        case Digit():
            return [alone(str(scene.digit), scene.size, scene.colour, rng)]


def turned(rng: random.Random) -> float:
    """A small turn in degrees."""
    return rng.uniform(-10, 10)


def alone(name: str, size: str, colour: str, rng: random.Random) -> Mark:
    """One shape or digit anywhere; nothing is between big and small."""
    radius = rng.uniform(0.34, 0.44) if size == "big" else rng.uniform(0.15, 0.2)
    x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
    return Mark(name, colour, x, y, radius, turned(rng))


def side_by_side(scene: Placed, rng: random.Random) -> list[Mark]:
    """Two shapes far apart in the direction that is told, and nearly level in the other."""
    one, two = rng.uniform(0.13, 0.19), rng.uniform(0.13, 0.19)
    apart = rng.uniform(one + two + 2 * GAP, 0.96 - one - two)
    along = rng.uniform(one + 0.02, 0.98 - two - apart)
    widest = max(one, two) + 0.1
    across = rng.uniform(widest, 1 - widest)
    ends = [(along, across + rng.uniform(-0.07, 0.07)), (along + apart, across + rng.uniform(-0.07, 0.07))]
    if scene.place in ("above", "below"):
        ends = [(y, x) for x, y in ends]
    if scene.place in ("below", "to the right of"):
        ends = [(1 - x, 1 - y) for x, y in ends]
    first = Mark(scene.shape, scene.colour, *ends[0], one, turned(rng))
    return [first, Mark(scene.other_shape, scene.other_colour, *ends[1], two, turned(rng))]


def strewn(scene: Counted, rng: random.Random) -> list[Mark]:
    """All shapes of a counted scene where there is room for them; a try that gets stuck is begun anew, smaller."""
    names = [(group.shape, group.colour) for group in scene.groups for _ in range(group.count)]
    radius = min(0.22, 0.3 / math.sqrt(len(names))) * rng.uniform(0.85, 1.05)
    while True:
        marks: list[Mark] = []
        for name, colour in names:
            for _ in range(40):
                r = radius * rng.uniform(0.94, 1.06)
                x, y = (rng.uniform(r + 0.01, 0.99 - r) for _ in range(2))
                if all(math.hypot(x - m.x, y - m.y) > r + m.radius + GAP for m in marks):
                    marks.append(Mark(name, colour, x, y, r, turned(rng)))
                    break
        if len(marks) == len(names):
            return marks
        radius *= 0.98


def paint(pen: ImageDraw.ImageDraw, mark: Mark, rgb: tuple[int, ...], side: int) -> None:
    """Put one shape or digit onto the canvas."""
    cos, sin = math.cos(math.radians(mark.turn)), math.sin(math.radians(mark.turn))

    def onto(points: list[Point]) -> list[Point]:
        return [
            (side * (mark.x + mark.radius * (x * cos - y * sin)), side * (mark.y + mark.radius * (x * sin + y * cos)))
            for x, y in points
        ]

    if mark.name in OUTLINES:
        pen.polygon(onto(OUTLINES[mark.name]), fill=rgb)
        return
    half = side * mark.radius * STROKE / 2
    for stroke in STROKES[mark.name]:
        points = onto(stroke)
        pen.line(points, fill=rgb, width=round(2 * half))
        for x, y in points:  # round ends and joints
            pen.ellipse((x - half, y - half, x + half, y + half), fill=rgb)


def arc(x: float, y: float, across: float, down: float, start: float, end: float) -> list[Point]:
    """Points on a part of an ellipse; angles in degrees, from the right towards the bottom."""
    count = max(2, round(abs(end - start) / 8) + 1)
    angles = [math.radians(start + (end - start) * i / (count - 1)) for i in range(count)]
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in angles]


def star() -> list[Point]:
    """Five points, the first at the top."""
    angles = [math.radians(36 * i - 90) for i in range(10)]
    return [((0.45 if i % 2 else 1) * math.cos(a), (0.45 if i % 2 else 1) * math.sin(a)) for i, a in enumerate(angles)]


def heart() -> list[Point]:
    """The sine-cubed heart curve, brought into the unit circle."""
    curve = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((16 * math.sin(t) ** 3 / 18.2, (-y - 2.5) / 18.2))
    return curve


def cross() -> list[Point]:
    """A plus sign."""
    a, b = 0.3, 0.95
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


OUTLINES: dict[str, list[Point]] = {
    "circle": arc(0, 0, 0.85, 0.85, 0, 360),
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": [(0, -0.98), (0.87, 0.48), (-0.87, 0.48)],
    "star": star(),
    "cross": cross(),
    # Once around outside and back inside: the seam between the two lies in the filled part.
    "ring": arc(0, 0, 0.95, 0.95, 0, 360) + arc(0, 0, 0.5, 0.5, 360, 0),
    "diamond": [(0, -0.98), (0.6, 0), (0, 0.98), (-0.6, 0)],
    "heart": heart(),
}
"""Every shape inside a circle of radius 1, y downwards."""
STROKE = 0.26
STROKES: dict[str, list[list[Point]]] = {
    "0": [arc(0, 0, 0.48, 0.78, 0, 360)],
    "1": [[(-0.32, -0.46), (0.08, -0.78), (0.08, 0.78)]],
    "2": [[*arc(0, -0.36, 0.45, 0.42, -170, 35), (-0.47, 0.78), (0.5, 0.78)]],
    "3": [arc(-0.03, -0.39, 0.42, 0.39, -155, 90), arc(-0.03, 0.38, 0.48, 0.4, -90, 155)],
    "4": [[(0.24, 0.78), (0.24, -0.78), (-0.54, 0.3), (0.54, 0.3)]],
    "5": [[(0.42, -0.78), (-0.34, -0.78), (-0.4, -0.06), *arc(-0.02, 0.27, 0.47, 0.5, -125, 145)]],
    "6": [arc(0, 0.34, 0.45, 0.44, 0, 360), arc(0.42, 0.34, 0.87, 1.1, 180, 262)],
    "7": [[(-0.48, -0.78), (0.48, -0.78), (-0.12, 0.78)]],
    "8": [arc(0, -0.4, 0.38, 0.38, 0, 360), arc(0, 0.39, 0.46, 0.4, 0, 360)],
    "9": [arc(0, -0.34, 0.45, 0.44, 0, 360), arc(-0.42, -0.34, 0.87, 1.1, 0, 82)],
}
"""Every digit as strokes of a pen that is STROKE wide, in the same circle."""
