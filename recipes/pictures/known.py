"""What the base knows of a question where the answer is written: a linear probe of what the top layers get, no picture.

An adapter can only combine with a picture what is there. "Which thing is asked about" and "which side" may be there and
still be of no use: the thing and the picture would have to be compared. Whether the word after a name is "yes" is, in a
full answer, a matter of the text alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from clothes import SIDES, Question, Wordings, every_question
from real_trial import PROBES, classify, share
from top_layers import TopLayers
from torch import Tensor


def known(
    top: TopLayers, kind: str, names: Sequence[str], wordings: Sequence[Wordings], in_full: bool
) -> dict[str, Any]:
    """Share of held-out wordings of which a probe of the trained ones tells what the answer hangs on.

    That is the name or the side that is asked about; of yes or no in full it is whether that name was just said.
    """
    found = [of_wordings(top, kind, names, way, in_full) for way in wordings]
    (train, labels), (test, expected) = found
    mean, spread = train.mean(0), train.std(0) + 1e-3
    guesses = [classify((train - mean) / spread, labels, (test - mean) / spread, strength) for strength in PROBES]
    return {"right": max(share((guess == expected).tolist()) for guess in guesses)}


def of_wordings(
    top: TopLayers, kind: str, names: Sequence[str], wordings: Wordings, in_full: bool
) -> tuple[Tensor, Any]:
    """States [N, hidden] before the word that was asked for, and what they should tell [N]."""
    questions = every_question([kind], names, [wordings], in_full)
    if kind == "yes_no" and in_full:  # as many of yes as of no
        yes, no = ([q for q in questions if q[1].endswith(word)] for word in (" yes", " no"))
        questions = yes + random.Random(0).sample(no, len(yes))
    top.read(questions)
    states = torch.stack([top.before(question, 2 if in_full else len(top.answer(question))) for question in questions])
    return states, np.array([told(kind, question, names, in_full) for question in questions])


def told(kind: str, question: Question, names: Sequence[str], in_full: bool) -> int:
    """The label of a question."""
    asked, answer = question
    if kind == "sides":
        return int(SIDES[1] in asked)
    return int(answer.endswith("yes")) if in_full else next(i for i, name in enumerate(names) if f" {name}" in asked)
