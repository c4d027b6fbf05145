"""What all skills share: an example, the splits, what an example is drawn from, and a strict reading of JSON.

Every word list and every number is cut in three parts by its place, so that no entity of one part can turn up in
another: training, validation, held out. Every list of wordings comes twice: known and new.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

SPLITS = ("train", "validation", "heldout_entities", "heldout_wordings")
PARTS = {"train": "train", "validation": "validation", "heldout_entities": "heldout", "heldout_wordings": "heldout"}
"""The part of the entities that a split draws from."""
TRIES = 2000
"""How often in a row a draw may repeat what is there before a skill is said to have no more."""

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A question and the answer that is wanted.

    Attributes:
        instruction: what is to be done.
        input: the text to do it with; may be empty.
        output: the reference answer.
        entities: what it is about, as far as splits are kept apart by it.
        wordings: the templates and formats that it was made with.
    """

    instruction: str
    input: str
    output: str
    entities: tuple[str, ...] = ()
    wordings: tuple[str, ...] = ()

    def record(self) -> dict[str, str]:
        """The usual instruction, input and output."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output}


@dataclass(frozen=True)
class Skill:
    """A task with its examples and its checker.

    Attributes:
        name: as in `--skill`.
        summary: one line for tables.
        draw: makes one example of the split that its `Draw` belongs to.
        accepts: whether an answer, without white space around it, is right for an example.
    """

    name: str
    summary: str
    draw: Callable[[Draw], Example]
    accepts: Callable[[Example, str], bool]

    def examples(self, split: str, seed: int, count: int) -> list[Example]:
        """`count` distinct examples, always the same ones for a seed; fewer are the first of more.

        Raises:
            ValueError: there is no such split, or the skill has fewer distinct examples.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split '{split}': take {', '.join(SPLITS)}.")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[tuple[str, str], Example] = {}
        repeats = 0
        while len(found) < count:
            example = self.draw(Draw(rng, split))
            repeats = repeats + 1 if (example.instruction, example.input) in found else 0
            found.setdefault((example.instruction, example.input), example)
            if repeats > TRIES:
                raise ValueError(
                    f"{self.name} has about {len(found)} examples in '{split}', not {count}: ask for fewer."
                )
        return list(found.values())

    def check(self, example: Example, answer: str) -> bool:
        """Whether an answer is right in content and form; white space around it does not count."""
        return self.accepts(example, answer.strip())


def part(number: int) -> str:
    """Where an entity belongs by its place or its number: of ten, seven to train, one to validate, two held out."""
    return {5: "validation", 3: "heldout", 7: "heldout"}.get(number % 10, "train")


@dataclass
class Draw:
    """One example in the making: draws what its split may use, and notes it.

    Attributes:
        rng: where chance comes from.
        split: one of `SPLITS`.
    """

    rng: random.Random
    split: str
    entities: list[str] = field(default_factory=list)
    wordings: list[str] = field(default_factory=list)

    def entity(self, pool: Sequence[str], unlike: str = "") -> str:
        """A word of a pool's part; `unlike` is one that was drawn before."""
        mine = [word for place, word in enumerate(pool) if part(place) == PARTS[self.split] and word != unlike]
        word = self.rng.choice(mine)
        self.entities.append(word)
        return word

    def until(self, make: Callable[[random.Random], tuple[T, int]]) -> T:
        """What `make` gives as soon as its number is in this split's part; the caller notes it."""
        while True:
            value, number = make(self.rng)
            if part(number) == PARTS[self.split]:
                return value

    def wording(self, known: Sequence[str], new: Sequence[str]) -> str:
        """A template: a known one, or a new one where the split asks for that."""
        wording = self.rng.choice(new if self.split == "heldout_wordings" else known)
        self.wordings.append(wording)
        return wording

    def example(self, instruction: str, text: str, output: str) -> Example:
        """The example that was drawn."""
        return Example(instruction, text, output, tuple(self.entities), tuple(self.wordings))


def exact(example: Example, answer: str) -> bool:
    """The reference answer, letter by letter."""
    return answer == example.output


def same_object(example: Example, answer: str) -> bool:
    """One JSON object with the keys, values and types of the reference and nothing around it; in any order."""
    wanted = json.loads(example.output)
    try:
        given = json.loads(answer, object_pairs_hook=_keys_once)
    except (ValueError, RecursionError):
        return False
    if type(given) is not dict or given.keys() != wanted.keys():
        return False
    return all(type(given[key]) is type(value) and given[key] == value for key, value in wanted.items())


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)
