"""A stock of drawn pictures for training: groups that differ in one thing, redrawn bit by bit, varied when taken out.

Contrast alone teaches colours and shapes soon and counts and places late, because few captions of a batch differ in
nothing but these. So pictures come in groups: a scene and others that are the same but for one word. The captions of a
group are each other's hard negatives.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from combos import changes, is_seen, random_scene
from draw import Counted, Placed, Scene, draw
from numpy.typing import NDArray

GROUP = 4
UNSEEN = 0.4
"""Share of the scenes that show what the questions hold out; it is about the share of combinations that they do."""
SHIFT = 2
"""Pixels, in any direction; less than what would hide a shape or make a high one a low one."""


def canonical(scene: Scene) -> Scene:
    """One form for scenes that look the same and can be told in two orders."""
    match scene:
        case Placed() if scene.place in ("below", "to the right of"):
            return scene.swapped()
        case Counted():
            return Counted(tuple(sorted(scene.groups, key=repr)))
    return scene


def other_order(scene: Scene, rng: random.Random) -> Scene:
    """The scene, half of the time told from its other end, so that changes reach both."""
    if rng.random() < 0.5:
        if isinstance(scene, Placed):
            return scene.swapped()
        if isinstance(scene, Counted):
            return Counted(scene.groups[::-1])
    return scene


def group_of_scenes(rng: random.Random, seen_only: bool) -> list[Scene]:
    """A scene and others that differ from it in one thing each; all of them seen ones where that is asked for."""
    scene = other_order(random_scene(rng, not seen_only and rng.random() < UNSEEN), rng)
    allowed = {
        name: [other for other in others if not seen_only or is_seen(other)] for name, others in changes(scene).items()
    }
    group = [scene]
    while len(group) < GROUP:
        others = rng.choice([others for others in allowed.values() if others])
        group.append(others.pop(rng.randrange(len(others))))
    return group


@dataclass
class Batch:
    """Pictures [N, size, size, 3], and what each of them shows."""

    pictures: NDArray[np.uint8]
    scenes: list[Scene]


class Pool:
    """Groups of drawn scenes."""

    def __init__(self, groups: int, rng: random.Random, seen_only: bool = False) -> None:
        self.rng, self.oldest, self.seen_only = rng, 0, seen_only
        self.scenes: list[list[Scene]] = [group_of_scenes(rng, seen_only) for _ in range(groups)]
        self.pictures = np.stack([self._drawn(group) for group in self.scenes])

    def refresh(self, groups: int) -> None:
        """Draw anew the groups that have been there longest."""
        for _ in range(groups):
            self.scenes[self.oldest] = group_of_scenes(self.rng, self.seen_only)
            self.pictures[self.oldest] = self._drawn(self.scenes[self.oldest])
            self.oldest = (self.oldest + 1) % len(self.scenes)

    def batch(self, pictures: int) -> Batch:
        """That many pictures in whole groups, each a little shifted."""
        chosen = self.rng.sample(range(len(self.scenes)), pictures // GROUP)
        scenes = [scene for index in chosen for scene in self.scenes[index]]
        return Batch(shifted(self.pictures[chosen].reshape(-1, *self.pictures.shape[2:]), self.rng), scenes)

    def _drawn(self, group: list[Scene]) -> NDArray[np.uint8]:
        return np.stack([np.asarray(draw(scene, self.rng)) for scene in group])


def shifted(pictures: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    """Every picture [N, H, W, 3] moved by a few pixels; the edge goes on outside."""
    height, width = pictures.shape[1:3]
    padded = np.pad(pictures, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    moved = np.empty_like(pictures)
    for i in range(len(pictures)):
        top, left = rng.randint(0, 2 * SHIFT), rng.randint(0, 2 * SHIFT)
        moved[i] = padded[i, top : top + height, left : left + width]
    return moved
