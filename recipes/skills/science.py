"""ScienceQA's questions without pictures as one more skill; the data are the user's own (they may not be shipped).

Of the test questions, whose pids decide: seven of ten train, one validates, two are held out. That is no official
split, so the share of right answers stands beside other methods of the same run and not beside published scores.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from skill_kit import PARTS, SPLITS, Example, part

from llama_adapter.errors import DataError
from llama_adapter.evaluation.scienceqa.questions import Question, question_prompt, question_target, read_scienceqa

KNOWN, NEW = "QCM-A", "CQM-A"
"""Order of what is read: the question before its context in training, after it in the new wording."""


class Science:
    """A skill, as `skill_kit.Skill`, of the questions in a folder."""

    name = "science"

    def __init__(self, folder: Path) -> None:
        """Read the questions.

        Raises:
            DataError: there are no such files, or all questions have pictures.
        """
        self.questions = _without_pictures(folder)

    def examples(self, split: str, seed: int, count: int) -> list[Example]:
        """`count` distinct questions; both held-out splits ask the same ones.

        Raises:
            ValueError: there is no such split, or the data have fewer.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split '{split}': take {', '.join(SPLITS)}.")
        mine = [q for q in self.questions if part(int(q.pid)) == PARTS[split]]
        if count > len(mine):
            raise ValueError(f"{self.name} has {len(mine)} examples in '{split}', not {count}: ask for fewer.")
        style = NEW if split == "heldout_wordings" else KNOWN
        chosen = random.Random(f"{self.name}/{PARTS[split]}/{seed}").sample(mine, count)
        return [Example(question_prompt(q, style), "", question_target(q), (q.pid,), (style,)) for q in chosen]

    def check(self, example: Example, answer: str) -> bool:
        """Whether the answer is the sentence that names the right letter, and no more."""
        return answer.strip() == example.output


@cache
def _without_pictures(folder: Path) -> tuple[Question, ...]:
    file = next(iter(sorted(folder.glob("problems*test*.json"))), folder / "problems.json")
    found = [q for q in read_scienceqa(file, "test", images=False) if q.image is None]
    distinct = {json.dumps([q.question, q.hint, sorted(q.choices)]): q for q in found}
    if not distinct:
        raise DataError(f"{file} has no question without a picture: take the whole data set's problems.json.")
    return tuple(distinct.values())
