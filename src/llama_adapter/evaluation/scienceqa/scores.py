"""Accuracy on ScienceQA as it is published: answers read out of texts, by category, beside the paper's table.

How an answer is read, and what one counts as that cannot be read, differ from code to code and move the figures by
points. Both are named here, and how many answers could not be read is always told.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_adapter.data.kinds import LINE_SUFFIXES, load_json
from llama_adapter.data.records import read_records
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.evaluation.scienceqa.questions import LETTERS, Question
from llama_adapter.settings import unknown_name

TEST_QUESTIONS = 4241
"""Size of the test split, which every row of the paper's table is about."""
FALLBACKS = ("random", "wrong", "recorded")
"""What an answer that cannot be parsed counts as; see `score`."""


@dataclass(frozen=True)
class Predictions:
    """What a model answered.

    Attributes:
        texts: its words by pid.
        recorded: the index that an official result file holds for every pid, drawn at random where the words could
            not be parsed; None in other files.
    """

    texts: Mapping[str, str]
    recorded: Mapping[str, int] | None = None


@dataclass(frozen=True)
class ScienceQAScore:
    """What one model reached.

    Attributes:
        count: number of questions scored.
        right: how many of them were answered right.
        unparseable: how many answers the rule could not parse; some of them may be right by the fallback.
        missing: how many questions had no prediction and were left out.
        rule, fallback, seed: how the texts were read.
        counts: number of questions by category, in the order of the paper's table; None where the data do not
            tell of every question whether it belongs there.
        accuracies: per cent right, likewise; None also where no question belongs there.
    """

    count: int
    right: int
    unparseable: int
    missing: int
    rule: str
    fallback: str
    seed: int
    counts: dict[str, int | None]
    accuracies: dict[str, float | None]


def official(text: str, choices: Sequence[str]) -> int | None:
    """The dataset's rule: "The answer is X" and any one character, once; it does not see "(X)"."""
    # The last full stop is a wildcard in the dataset's own rule, too.
    return _only("The answer is ([A-Z]).", text, LETTERS[: len(choices)])


def mm_cot(text: str, choices: Sequence[str]) -> int | None:
    """Multimodal-CoT's rule: "The answer is (X)", once; a letter behind the last choice is a wrong answer."""
    return _only(r"The answer is \(([A-Z])\)", text, LETTERS)


def letter(text: str, choices: Sequence[str]) -> int | None:
    """The letter alone, or in front as "X." or "(X)"."""
    match = re.match(r"([A-Z])(?:\.|$)|\(([A-Z])\)", text.strip())
    return _index(match[1] or match[2], LETTERS[: len(choices)]) if match else None


def words(text: str, choices: Sequence[str]) -> int | None:
    """The one choice that the text is, but for case and a full stop at the end."""
    same = [index for index, choice in enumerate(choices) if _bare(choice) == _bare(text)]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


RULES: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "official": official,
    "mm-cot": mm_cot,
    "letter": letter,
    "words": words,
}
"""By name, what takes a text and a question's choices to the index of the answer, or None."""
_DRAWN_FROM_ALL_LETTERS = ("mm-cot",)


def _any(question: Question) -> bool:
    return True


def _subject(name: str) -> Callable[[Question], bool | None]:
    return lambda question: None if question.subject is None else question.subject == name


def _grades(first: int, last: int) -> Callable[[Question], bool | None]:
    names = {f"grade{number}" for number in range(first, last + 1)}
    return lambda question: None if question.grade is None else question.grade in names


CATEGORIES: dict[str, Callable[[Question], bool | None]] = {
    "Avg": _any,
    "NAT": _subject("natural science"),
    "SOC": _subject("social science"),
    "LAN": _subject("language science"),
    "TXT": lambda question: bool(question.hint),
    "IMG": lambda question: question.image is not None,
    "NO": lambda question: not question.hint and question.image is None,
    "G1-6": _grades(1, 6),
    "G7-12": _grades(7, 12),
}
"""Whether a question belongs to a column of the table, or None where the data do not tell. TXT and IMG overlap."""


class PaperRow(NamedTuple):
    """One line of table 2 of the LLaMA-Adapter paper: trained parameters, and per cent right by category."""

    parameters: str
    accuracies: tuple[float, ...]


PAPER_ROWS = {
    "Random": PaperRow("", (39.83, 40.28, 46.13, 29.25, 47.45, 40.08, 33.66, 39.35, 40.67)),
    "Human": PaperRow("", (88.40, 90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42)),
    "MCAN": PaperRow("95M", (54.54, 56.08, 46.23, 58.09, 59.43, 51.17, 55.40, 51.65, 59.72)),
    "Top-Down": PaperRow("70M", (59.02, 59.50, 54.33, 61.82, 62.90, 54.88, 59.79, 57.27, 62.16)),
    "BAN": PaperRow("112M", (59.37, 60.88, 46.57, 66.64, 62.61, 52.60, 65.51, 56.83, 63.94)),
    "DFAF": PaperRow("74M", (60.72, 64.03, 48.82, 63.55, 65.88, 54.49, 64.11, 57.12, 67.17)),
    "ViLT": PaperRow("113M", (61.14, 60.48, 63.89, 60.27, 63.20, 61.38, 57.00, 60.72, 61.90)),
    "Patch-TRM": PaperRow("90M", (61.42, 65.19, 46.79, 65.55, 66.96, 55.28, 64.95, 58.04, 67.50)),
    "VisualBERT": PaperRow("111M", (61.87, 59.33, 69.18, 61.18, 62.71, 62.17, 58.54, 62.96, 59.92)),
    "UnifiedQA": PaperRow("223M", (70.12, 68.16, 69.18, 74.91, 63.78, 61.38, 77.84, 72.98, 65.00)),
    "UnifiedQA CoT": PaperRow("223M", (74.11, 71.00, 76.04, 78.91, 66.42, 66.53, 81.81, 77.06, 68.82)),
    "GPT-3": PaperRow("", (74.04, 75.04, 66.59, 78.00, 74.24, 65.74, 79.58, 76.36, 69.87)),
    "GPT-3 CoT": PaperRow("", (75.17, 75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68)),
    "MM-CoT_T": PaperRow("223M", (70.53, 71.09, 70.75, 69.18, 71.16, 65.84, 71.57, 71.00, 69.68)),
    "MM-CoT": PaperRow("223M", (84.91, 87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37)),
    "Adapter_T": PaperRow("1.2M", (78.31, 79.00, 73.79, 80.55, 78.30, 70.35, 83.14, 79.77, 75.68)),
    "Adapter": PaperRow("1.8M", (85.19, 84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05)),
}
"""The paper's table; "_T" is text only, and "Adapter" LLaMA-Adapter."""
SHOWN_ROWS = ("Human", "GPT-3 CoT", "MM-CoT", "Adapter_T", "Adapter")
"""Those that a table shows unless all are asked for."""


def read_predictions(file: str | Path, questions: Sequence[Question] | None = None) -> Predictions:
    """Read answers from the official result file, a JSON object {pid: text}, or JSON lines with "pid" and "text".

    Args:
        file: a .json file of either form, or a .jsonl or .ndjson file.
        questions: where given, an answer to none of them is refused.

    Raises:
        DataError: the file cannot be read or has another form, or answers a question that is not among `questions`.
    """
    path = Path(file)
    if path.suffix.lower() in LINE_SUFFIXES:
        predictions = Predictions(_from_lines(path))
    else:
        predictions = _from_object(path, load_json(path))
    known = None if questions is None else {question.pid for question in questions}
    strange = [] if known is None else [pid for pid in predictions.texts if pid not in known]
    if strange:
        raise DataError(
            f"{path} answers {len(strange)} questions that the split does not have, the first with pid {strange[0]}: "
            "check --split and --data."
        )
    return predictions


def score(
    questions: Sequence[Question],
    predictions: Predictions,
    rule: str = "official",
    fallback: str = "random",
    seed: int = 0,
    allow_missing: bool = False,
) -> ScienceQAScore:
    """Compare answers with the right ones.

    Args:
        questions: what was asked.
        predictions: what was answered; answers to other questions do not count.
        rule: a key of `RULES`.
        fallback: what an unparseable answer counts as. "random" draws among the question's choices (among all five
            letters under "mm-cot", as that code does); "wrong" is wrong; "recorded" is the draw that an official
            result file holds, and repeats its published score to the digit. Drawing anew does not: the dataset's code
            starts from its seed again whenever a run is taken up again.
        seed: of these draws, one after the other in the order of `questions`.
        allow_missing: leave questions without a prediction out instead of refusing.

    Raises:
        ConfigError: an unknown rule or fallback, or "recorded" without records or under another rule.
        DataError: a prediction is missing, a right answer is not known, there is nothing to score, or the records
            are not of the official rule.
    """
    if rule not in RULES:
        raise ConfigError(unknown_name("rule", rule, RULES))
    if fallback not in FALLBACKS:
        raise ConfigError(unknown_name("fallback", fallback, FALLBACKS))
    if fallback == "recorded" and (predictions.recorded is None or rule != "official"):
        raise ConfigError(
            "fallback is 'recorded', which takes the official rule and a result file of the dataset's code: choose "
            "random or wrong."
        )
    asked = _answered(questions, predictions, allow_missing)
    parsed = [RULES[rule](predictions.texts[question.pid], question.choices) for question in asked]
    chosen: Sequence[int | None] = parsed
    if fallback == "recorded":
        chosen = _recorded(asked, parsed, predictions)
    elif fallback == "random":
        chosen = _drawn(asked, parsed, rule, random.Random(seed))
    right = [index == question.answer for question, index in zip(asked, chosen, strict=True)]
    counts, accuracies = _by_category(asked, right)
    unparseable, missing = parsed.count(None), len(questions) - len(asked)
    return ScienceQAScore(len(asked), sum(right), unparseable, missing, rule, fallback, seed, counts, accuracies)


def paper_table(result: ScienceQAScore, rows: Sequence[str] = SHOWN_ROWS) -> list[dict[str, Any]]:
    """One row for the model scored and one for each of these rows of the paper, for a table or JSON."""
    ours = {"model": "yours", "parameters": "", **result.accuracies}
    paper = [
        {"model": name, "parameters": row.parameters, **dict(zip(CATEGORIES, row.accuracies, strict=True))}
        for name, row in PAPER_ROWS.items()
        if name in rows
    ]
    return [ours, *paper]


def _only(pattern: str, text: str, letters: str) -> int | None:
    found = re.findall(pattern, text)
    return _index(found[0], letters) if len(found) == 1 else None


def _index(found: str, letters: str) -> int | None:
    return letters.index(found) if found in letters else None


def _from_object(path: Path, data: object) -> Predictions:
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not an object {{pid: text}}: write one, or .jsonl.")
    texts, recorded = data, None
    if isinstance(data.get("outputs"), dict) and isinstance(data.get("results"), dict):
        texts, recorded = data["outputs"], data["results"]
        for pid in texts:
            if type(recorded.get(pid)) is not int:
                raise DataError(f"{path}: 'results' has no index for question {pid}: take a whole result file.")
    for pid, text in texts.items():
        if not isinstance(text, str):
            raise DataError(
                f"{path}: the entry of '{pid}' is {repr(text)[:40]}; each must be the text of an answer: write "
                "{pid: text}, or 'outputs' and 'results' as the dataset's code does."
            )
    return Predictions(texts, recorded)


def _from_lines(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, record in read_records(str(path)):
        pid = record.get("pid") if isinstance(record, dict) else None
        text = record.get("text") if isinstance(record, dict) else None
        if type(pid) not in (str, int) or not isinstance(text, str):
            raise DataError(f"{path}, line {number} must be an object with a 'pid' and a 'text': write both.")
        if str(pid) in texts:
            raise DataError(f"{path}, line {number} answers question {pid} again: leave one answer to each.")
        texts[str(pid)] = text
    return texts


def _answered(questions: Sequence[Question], predictions: Predictions, allow_missing: bool) -> list[Question]:
    asked = [question for question in questions if question.pid in predictions.texts]
    missing = [question.pid for question in questions if question.pid not in predictions.texts]
    if not asked:
        raise DataError(f"None of the {len(questions)} questions has a prediction: check --split and --predictions.")
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no prediction, the first with pid {missing[0]}: answer "
            "them, or pass --allow-missing to leave them out."
        )
    unknown = [question.pid for question in asked if question.answer is None]
    if unknown:
        raise DataError(f"Question {unknown[0]} has no right answer to compare with: score a split that has them.")
    return asked


def _recorded(asked: Sequence[Question], parsed: Sequence[int | None], predictions: Predictions) -> list[int]:
    """The recorded indices, which must be the parsed ones where there are any: else they are of another rule."""
    chosen = [(predictions.recorded or {})[question.pid] for question in asked]
    for question, index, recorded in zip(asked, parsed, chosen, strict=True):
        if index is not None and index != recorded:
            raise DataError(
                f"Question {question.pid}: 'results' holds the index {recorded}, but the official rule reads {index} "
                "in 'outputs': choose the fallback random or wrong."
            )
    return chosen


def _drawn(
    asked: Sequence[Question], parsed: Sequence[int | None], rule: str, draws: random.Random
) -> list[int | None]:
    every = rule in _DRAWN_FROM_ALL_LETTERS
    return [
        draws.randrange(len(LETTERS) if every else len(question.choices)) if index is None else index
        for question, index in zip(asked, parsed, strict=True)
    ]


def _by_category(
    questions: Sequence[Question], right: Sequence[bool]
) -> tuple[dict[str, int | None], dict[str, float | None]]:
    counts: dict[str, int | None] = {}
    accuracies: dict[str, float | None] = {}
    for name, belongs in CATEGORIES.items():
        members = [belongs(question) for question in questions]
        # A share of those whose subject or grade happens to be known is no figure to put beside the paper's.
        counts[name] = None if None in members else sum(map(bool, members))
        hits = sum(hit for hit, member in zip(right, members, strict=True) if member)
        accuracies[name] = 100 * hits / count if (count := counts[name]) else None
    return counts, accuracies
