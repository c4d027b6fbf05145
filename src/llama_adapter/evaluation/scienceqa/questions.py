"""ScienceQA: its questions from the official folder or the hub mirror, and their text as prompt and target.

A question is written in a style. "paper" is LLaMA-Adapter's: question, context and options, answered by
"The answer is (A).". "words" reads context and question alone and answers with the choice itself ("red."), for bases
too small to know letters from what stands behind them. Any other style is named in the dataset's own grammar, such as
"QCM-ALE": before the hyphen what is read, after it what is written, in the order of the letters.

    Q  question      C  context: the hint, or N/A      M  multiple options      A  answer
    L  lecture       E  explanation, which the data call solution
"""

import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llama_adapter.data.examples import Example, Message
from llama_adapter.data.kinds import load_json
from llama_adapter.errors import ConfigError, DataError, MissingExtraError

LETTERS = "ABCDE"
PAPER = "paper"
"""Name of LLaMA-Adapter's own style."""
WORDS = "words"
"""Name of the style without options and letters."""

_OPTIONAL = ("subject", "grade", "task", "topic", "category", "skill", "lecture", "solution")
_COLUMNS = ("question", "choices", "answer", "hint", "image", *_OPTIONAL)
_REPAIR = "repair the record, or take the data from another copy"
# The dataset's code gives the solution for AL and the lecture for AE. Published scores of these two styles are
# from such texts, so the names keep that meaning; every other style says what its letters say.
_SWAPPED = {"AL": "AE", "AE": "AL"}


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        pid: its key in problems.json; in the hub mirror, which has none, its row in the split, counted from 0.
        question: what is asked.
        choices: two to five possible answers.
        answer: index of the right one, or None where it is not known.
        hint: the textual context; empty where there is none.
        image: the picture's path or its encoded bytes, or None where the question has none.
        split: the split it was published in, which for "trainval" or "minitest" is not the one it was read by.
        subject, grade, task, topic, category, skill: what the data say of it, or None.
        lecture, solution: background and reasoning; empty or None where there is none.

    Raises:
        DataError: there are fewer than two choices or more than letters, or no choice is the answer.
    """

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int | None = None
    hint: str = ""
    image: Path | bytes | None = field(default=None, repr=False)
    split: str = ""
    subject: str | None = None
    grade: str | None = None
    task: str | None = None
    topic: str | None = None
    category: str | None = None
    skill: str | None = None
    lecture: str | None = None
    solution: str | None = None

    @property
    def media(self) -> tuple[str | bytes, ...]:
        """The picture, as an `Example` has it; empty where there is none."""
        if self.image is None:
            return ()
        return (self.image if isinstance(self.image, bytes) else str(self.image),)

    def __post_init__(self) -> None:
        count = len(self.choices)
        if not 2 <= count <= len(LETTERS):
            raise DataError(
                f"Question {self.pid}: the number of choices is {count}; it must be 2 to {len(LETTERS)}: {_REPAIR}."
            )
        if self.answer is not None and not 0 <= self.answer < count:
            raise DataError(
                f"Question {self.pid}: the answer's index is {self.answer}; it must be at least 0 and below "
                f"{count}, the number of choices: {_REPAIR}."
            )


def read_scienceqa(source: str | Path, split: str, images: bool = True, limit: int | None = None) -> list[Question]:
    """Read the questions of one split, in the order of the split.

    Args:
        source: the official folder with problems.json, pid_splits.json and <split>/<pid>/image.png; a problems file
            of another name in such a folder; or a folder with the parquet files of the hub mirror, such as
            test-00000-of-00001.parquet, or with a data/ folder that has them.
        split: any name in pid_splits.json, such as "test" or "minival"; for the mirror train, validation or test.
        images: whether pictures are needed: each must then be there, and the whole split must have some.
            Without, a question's picture may be a path to nothing.
        limit: only the first of them.

    Raises:
        ConfigError: `limit` is below 1.
        DataError: a file, the split, a question or a picture is missing or cannot be used.
        MissingExtraError: the mirror is to be read and `pyarrow` is not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1.")
    path = Path(os.path.expanduser(source))
    questions = [_question(*record) for record in _records(path, split, limit)]
    if images:
        _check_pictures(questions, split, whole=limit is None)
    return questions


def read_source(name: str, pictures: bool, style: str = PAPER) -> Iterator[tuple[str, Callable[[], Example]]]:
    """What `--data scienceqa:name` trains on; see `llama_adapter.data.sources.SOURCES`.

    Args:
        name: "FOLDER:SPLIT", or "FOLDER" for its split "train"; a folder that exists is never taken apart.
        pictures: whether they must be there.
        style: how questions are written.

    Raises:
        DataError, MissingExtraError: as `read_scienceqa`.
    """
    folder, colon, split = name.rpartition(":")
    if not (colon and split) or os.path.exists(os.path.expanduser(name)):
        folder, split = name, "train"
    parse_style(style)
    for pid, record, own_split, place in _records(Path(os.path.expanduser(folder)), split, None):
        make = partial(_example_of, pid, record, own_split, place, pictures, style)
        yield f"{folder}, {split}, question {pid}", make


def _example_of(pid: str, record: object, split: str, folder: Path, pictures: bool, style: str) -> Example:
    question = _question(pid, record, split, folder)
    if pictures and isinstance(question.image, Path) and not os.path.isfile(question.image):
        raise DataError(f"{question.image}, its picture, does not exist")
    return question_example(question, style)


def question_example(question: Question, style: str = PAPER) -> Example:
    """A question with its answer, written in a style.

    Raises:
        ConfigError, DataError: as `question_prompt` and `question_target`.
    """
    messages = Message("user", question_prompt(question, style)), Message("assistant", question_target(question, style))
    return Example(messages, media=question.media)


def question_prompt(question: Question, style: str = PAPER) -> str:
    """Write what is read.

    In an official style, the prompt, a line break and "Answer:" are what the dataset's authors asked GPT-3, and the
    prompt, a line break and the target are their worked example (but for its missing "BECAUSE:" above, where QCML-AE
    meets an empty lecture).

    Raises:
        ConfigError: the style's name is malformed.
        DataError: the style needs a lecture or solution that the question has not.
    """
    read, _ = parse_style(style)
    if style == WORDS:
        return _collapse("\n".join(filter(None, (question.hint.strip(), question.question))))
    # Lectures and solutions that stand side by side share one line.
    lines = [_line(question, letters, style) for letters in re.findall("[LE]+|.", read)]
    return _collapse("\n".join(lines))


def question_target(question: Question, style: str = PAPER) -> str:
    """Write what the model is to say.

    AL holds the solution and AE the lecture, as in the dataset's own code; other styles hold what they name.
    Without an A the target is the reasoning alone ("Solution: ...").

    Raises:
        ConfigError: the style's name is malformed.
        DataError: the answer is not known, or the style needs a lecture or solution that the question has not.
    """
    _, written = parse_style(style)
    if "A" not in written:
        return _collapse(f"Solution: {_reasoning(question, written, style)}").strip()
    if question.answer is None:
        raise DataError(f"Question {question.pid} has no answer to learn: leave it out, or only ask it.")
    if style == WORDS:
        return f"{question.choices[question.answer].strip().rstrip('.')}."
    letter = LETTERS[question.answer]
    if style == PAPER:
        return f"The answer is ({letter})."
    before, after = _SWAPPED.get(written, written).split("A")
    text = "Answer: " + (f"{_reasoning(question, before, style)} " if before else "") + f"The answer is {letter}."
    if after:
        text += f" BECAUSE: {_reasoning(question, after, style)}"
    return _collapse(text).strip().removesuffix("BECAUSE:").strip()


def parse_style(style: str) -> tuple[str, str]:
    """Split a style's name into the letters of what is read and of what is written.

    Raises:
        ConfigError: the name is malformed.
    """
    if style == PAPER:
        return "QCM", "A"
    if style == WORDS:
        return "CQ", "A"
    read, _, written = style.partition("-")
    known = re.fullmatch("[QCMLE]+-[ALE]+", style) is not None
    if not known or not {"Q", "M"} <= set(read) or any(len(set(part)) < len(part) for part in (read, written)):
        raise ConfigError(
            f"The style {style!r} is unknown: write '{PAPER}', '{WORDS}', or letters of QCMLE with Q and M, a "
            "hyphen and letters of ALE, each at most once a side, such as QCM-ALE."
        )
    return read, written


def _line(question: Question, letters: str, style: str) -> str:
    if letters == "Q":
        return f"Question: {question.question}"
    if letters == "C":
        return f"Context: {question.hint.strip() or 'N/A'}"
    if letters == "M":
        options = (f"({letter}) {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
        return f"Options: {' '.join(options)}"
    return f"BECAUSE: {_reasoning(question, letters, style)}"


def _reasoning(question: Question, letters: str, style: str) -> str:
    """Join lecture and solution; line ends become the two characters \\n, for a line end closes GPT-3's answer."""
    texts = []
    for name in ("lecture" if letter == "L" else "solution" for letter in letters):
        text = getattr(question, name)
        if text is None:
            raise DataError(
                f"Question {question.pid} has no {name}, which style {style} needs: choose a style such as QCM-A."
            )
        texts.append(text.replace("\n", "\\n"))
    return " ".join(texts)


def _collapse(text: str) -> str:
    """Two blanks become one, in a single pass as in the dataset's code: three leave two."""
    return text.replace("  ", " ")


def _records(path: Path, split: str, limit: int | None) -> Iterator[tuple[str, object, str, Path]]:
    """What `_question` makes a question of, for each of a split."""
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist: give the folder that holds ScienceQA's problems.json.")
    files = _parquet_files(path)
    yield from _read_mirror(path, files, split, limit) if files else _read_official(path, split, limit)


def _read_official(path: Path, split: str, limit: int | None) -> Iterator[tuple[str, object, str, Path]]:
    file = path / "problems.json" if os.path.isdir(path) else path
    folder = file.parent
    for needed in (file, folder / "pid_splits.json"):
        if not os.path.exists(needed):
            raise DataError(
                f"{needed} does not exist: a ScienceQA folder has problems.json and pid_splits.json, or the parquet "
                "files of the hub mirror."
            )
    pids = _pids_of(folder / "pid_splits.json", split)
    problems = load_json(file)
    if not isinstance(problems, dict):
        raise DataError(f"{file} holds a {type(problems).__name__}, not an object of questions by pid: {_REPAIR}.")
    lost = [pid for pid in pids if pid not in problems]
    if lost:
        raise DataError(
            f"{file} lacks {len(lost)} of the {len(pids)} questions of split '{split}', the first with pid {lost[0]}: "
            "take it and pid_splits.json from the same copy."
        )
    yield from ((pid, problems[pid], split, folder) for pid in pids[:limit])


def _pids_of(file: Path, split: str) -> list[str]:
    splits = load_json(file)
    if not isinstance(splits, dict) or not all(isinstance(pids, list) for pids in splits.values()):
        raise DataError(f"{file} must be an object with a list of pids for each split: {_REPAIR}.")
    if split not in splits:
        raise DataError(f"{file} has no split '{split}': choose one of {', '.join(splits)}.")
    if not splits[split]:
        raise DataError(f"{file} names no question in split '{split}': {_REPAIR}.")
    return [str(pid) for pid in splits[split]]


def _parquet_files(path: Path) -> list[Path]:
    """The mirror's files, or none where `path` has a problems.json or is a file."""
    if os.path.isfile(path) or os.path.exists(path / "problems.json"):
        return []
    return sorted(path.glob("*-*.parquet")) or sorted(path.glob("data/*-*.parquet"))


def _read_mirror(
    path: Path, files: Sequence[Path], split: str, limit: int | None
) -> Iterator[tuple[str, object, str, Path]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets", "reading ScienceQA's parquet files") from error
    # The official name of the validation split is understood, too.
    name = "validation" if split == "val" else split
    splits = sorted({file.name.partition("-")[0] for file in files})
    if name not in splits:
        raise DataError(f"{path} has no parquet file of split '{split}': choose one of {', '.join(splits)}.")
    row = 0
    for file in files:
        if file.name.partition("-")[0] != name:
            continue
        try:
            with parquet.ParquetFile(file) as table:
                columns = [column for column in table.schema_arrow.names if column in _COLUMNS]
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    for record in batch.to_pylist():
                        if row == limit:
                            return
                        yield str(row), record, name, file.parent
                        row += 1
        except (ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{file} cannot be read as parquet ({reason}): download it again.") from error


def _question(pid: str, record: object, split: str, folder: Path) -> Question:
    """Build a question from a record of either layout."""
    if not isinstance(record, dict):
        raise DataError(f"Question {pid} is a {type(record).__name__}, not an object: {_REPAIR}.")
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"Question {pid}: 'choices' must be a list of texts: {_REPAIR}.")
    if answer is not None and type(answer) is not int:
        raise DataError(f"Question {pid}: 'answer' is {answer!r}; it must be the index of a choice: {_REPAIR}.")
    asked = _text(pid, record, "question") or ""
    if not asked.strip():
        raise DataError(f"Question {pid} asks nothing, its 'question' is empty or missing: {_REPAIR}.")
    own_split = _text(pid, record, "split") or split
    return Question(
        pid=pid,
        question=asked,
        choices=tuple(choices),
        answer=answer,
        hint=_text(pid, record, "hint") or "",
        image=_image(pid, record.get("image"), folder, own_split),
        split=own_split,
        **{name: _text(pid, record, name) for name in _OPTIONAL},
    )


def _text(pid: str, record: dict[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"Question {pid}: {name!r} is {value!r}; it must be a text: {_REPAIR}.")
    return value


def _image(pid: str, value: object, folder: Path, split: str) -> Path | bytes | None:
    """Where a record's picture is: a name in the official folder, a struct of bytes and path in the mirror."""
    if isinstance(value, str):
        return folder / split / pid / value if value else None
    if isinstance(value, dict):
        if data := value.get("bytes"):
            return data
        if path := value.get("path"):
            return folder / path
    elif value is None:
        return None
    raise DataError(f"Question {pid}: 'image' is neither a file's name nor an encoded picture: {_REPAIR}.")


def _check_pictures(questions: Sequence[Question], split: str, whole: bool) -> None:
    pictured = [question for question in questions if question.image is not None]
    if whole and not pictured:
        raise DataError(f"No question of split '{split}' has a picture: read it with images=False.")
    lost = [q for q in pictured if isinstance(q.image, Path) and not os.path.isfile(q.image)]
    if not lost:
        return
    first = f"{lost[0].image!s}, the picture of question {lost[0].pid}, does not exist"
    if len(lost) > 1:
        first += f" ({len(lost)} of the {len(pictured)} pictures of split '{split}' are missing)"
    raise DataError(f"{first}: unpack the split's pictures beside problems.json, or read it with images=False.")
