"""ScienceQA: both layouts of the data, the texts of every style, scores counted by hand, and the published ones."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llama_adapter.cli import evaluate_scienceqa
from llama_adapter.cli.parser import Parser
from llama_adapter.data.sources import SOURCES, load_examples
from llama_adapter.errors import ConfigError, DataError, MissingExtraError
from llama_adapter.evaluation.scienceqa.questions import (
    LETTERS,
    Question,
    parse_style,
    question_example,
    question_prompt,
    question_target,
    read_scienceqa,
)
from llama_adapter.evaluation.scienceqa.scores import (
    CATEGORIES,
    FALLBACKS,
    PAPER_ROWS,
    RULES,
    SHOWN_ROWS,
    Predictions,
    paper_table,
    read_predictions,
    score,
)

PICTURE = b"\x89PNG and so on"
RECORD = {
    "question": "Which is a plant?", "choices": ["fern", "fox", "flint"], "answer": 0, "hint": "", "image": None,
    "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "biology",
    "category": "Classification", "skill": "Tell plants from animals", "lecture": "Plants grow.\nAnimals move.",
    "solution": "A fern grows.", "split": "test",
}  # fmt: skip
PROBLEMS = {
    "3": RECORD,
    "5": {**RECORD, "image": "image.png", "subject": "social science", "grade": "grade7", "choices": ["a", "b"]},
    "8": {**RECORD, "image": "image.png", "hint": "Look.", "answer": 2, "grade": "grade12"},
    "9": {**RECORD, "split": "train", "subject": "language science", "hint": "Read.", "answer": 1},
}
SPLITS = {"test": ["5", "3", "8"], "train": ["9"], "all": ["9", "3"], "none": []}
ASKED = Question("3", "Which is it?", ("x", "y", "z"), 1, hint="A hint.", lecture="Lec\nture.", solution="So.")


def written(question: Question, *style: str) -> tuple[str, str]:
    prompt, target = question_example(question, *style).messages
    assert (prompt.role, target.role) == ("user", "assistant")
    return prompt.content, target.content


def write_folder(folder: Path, problems=PROBLEMS, splits=SPLITS, pictures=("5", "8")) -> Path:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for pid in pictures:
        (folder / "test" / pid).mkdir(parents=True)
        (folder / "test" / pid / "image.png").write_bytes(PICTURE)
    return folder


def write_mirror(folder: Path, rows, name="test-00000-of-00001.parquet") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["image"] = pyarrow.array(columns["image"], struct)
    columns["answer"] = pyarrow.array(columns["answer"], pyarrow.int8())
    parquet.write_table(pyarrow.table(columns), folder / name)
    return folder


def error_of(function, *arguments, error=DataError, **options) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    return str(caught.value)


def read_error(folder, split="test", **options) -> str:
    return error_of(read_scienceqa, folder, split, **options)


# The official folder


def test_questions_come_in_the_order_of_the_split_with_all_that_is_known(tmp_path):
    questions = read_scienceqa(write_folder(tmp_path), "test")
    assert [question.pid for question in questions] == ["5", "3", "8"]
    assert [question.image for question in questions] == [
        tmp_path / "test" / "5" / "image.png", None, tmp_path / "test" / "8" / "image.png",
    ]  # fmt: skip
    first = questions[1]
    assert (first.question, first.choices, first.answer, first.hint) == (
        "Which is a plant?", ("fern", "fox", "flint"), 0, "",
    )  # fmt: skip
    for name in ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution", "split"):
        assert getattr(first, name) == RECORD[name]


def test_a_split_may_mix_others_and_pictures_lie_where_a_question_was_published(tmp_path):
    problems = {"9": {**PROBLEMS["9"], "image": "image.png"}, "3": RECORD}
    questions = read_scienceqa(write_folder(tmp_path, problems, pictures=()), "all", images=False)
    assert [question.split for question in questions] == ["train", "test"]
    assert questions[0].image == tmp_path / "train" / "9" / "image.png"


def test_limit_keeps_the_first_questions_and_their_pictures_only(tmp_path):
    folder = write_folder(tmp_path, pictures=("5",))
    assert [question.pid for question in read_scienceqa(folder, "test", limit=2)] == ["5", "3"]
    assert [question.pid for question in read_scienceqa(str(folder), "test", limit=1)] == ["5"]
    assert error_of(read_scienceqa, folder, "test", limit=0, error=ConfigError) == "limit is 0; it must be at least 1."


def test_a_problems_file_may_have_another_name(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "problems.json").rename(tmp_path / "part.json")
    assert len(read_scienceqa(tmp_path / "part.json", "test")) == 3
    assert "problems.json does not exist: a ScienceQA folder has" in read_error(tmp_path)


def test_what_a_record_does_not_have_is_none(tmp_path):
    bare = {"question": "Which?", "choices": ["a", "b"], "hint": None, "image": ""}
    (question,) = read_scienceqa(write_folder(tmp_path, {"9": bare}), "train", images=False)
    assert question == Question("9", "Which?", ("a", "b"), split="train")


def test_missing_files_are_named(tmp_path):
    assert read_error(tmp_path / "no") == (
        f"{tmp_path}/no does not exist: give the folder that holds ScienceQA's problems.json."
    )
    (tmp_path / "problems.json").write_text("{}")
    assert read_error(tmp_path).startswith(f"{tmp_path}/pid_splits.json does not exist: ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not JSON (line 1, column 2: Expecting property name enclosed in double quotes)"),
        (b"\xff{}", "is not UTF-8 (byte offset 0)"),
        (b"[" * 200_000, "is not JSON (line 1: nested too deeply)"),
        (b"[]", "holds a list, not an object of questions by pid"),
    ],
)
def test_a_problems_file_that_is_none_is_named(tmp_path, content, sentence):
    (write_folder(tmp_path) / "problems.json").write_bytes(content)
    assert read_error(tmp_path).startswith(f"{tmp_path}/problems.json {sentence}")


def test_a_problems_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    write_folder(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "pid_splits.json cannot be read (Permission denied): check the path" in read_error(tmp_path)


def test_splits_are_checked(tmp_path):
    folder = write_folder(tmp_path)
    assert read_error(folder, "tset").endswith("has no split 'tset': choose one of test, train, all, none.")
    assert "names no question in split 'none'" in read_error(folder, "none")
    (folder / "pid_splits.json").write_text('{"test": 3}')
    assert "must be an object with a list of pids for each split" in read_error(folder)


def test_questions_that_the_problems_file_lacks_are_counted(tmp_path):
    folder = write_folder(tmp_path, {"3": RECORD})
    assert "lacks 2 of the 3 questions of split 'test', the first with pid 5: take it and" in read_error(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"choices": ["a"]}, "Question 3: the number of choices is 1; it must be 2 to 5: "),
        ({"choices": list("abcdef")}, "Question 3: the number of choices is 6; it must be 2 to 5"),
        ({"choices": None}, "Question 3: 'choices' must be a list of texts: "),
        ({"choices": ["a", 2]}, "Question 3: 'choices' must be a list of texts: "),
        (
            {"answer": 3},
            "Question 3: the answer's index is 3; it must be at least 0 and below 3, the number of choices: ",
        ),
        ({"answer": -1}, "Question 3: the answer's index is -1; it must be at least 0 and below 3"),
        ({"answer": "A"}, "Question 3: 'answer' is 'A'; it must be the index of a choice: "),
        ({"answer": True}, "Question 3: 'answer' is True; it must be the index of a choice: "),
        ({"question": " "}, "Question 3 asks nothing"),
        ({"question": None}, "Question 3 asks nothing"),
        ({"hint": 7}, "Question 3: 'hint' is 7; it must be a text: "),
        ({"lecture": ["x"]}, "Question 3: 'lecture' is ['x']; it must be a text: "),
        ({"image": 7}, "Question 3: 'image' is neither a file's name nor an encoded picture: "),
    ],
)
def test_a_bad_record_is_one_sentence_with_its_pid(tmp_path, change, sentence):
    folder = write_folder(tmp_path, {"3": {**RECORD, **change}}, {"test": ["3"]})
    message = read_error(folder, images=False)
    assert message.startswith(sentence)
    assert message.endswith("repair the record, or take the data from another copy.")


def test_a_record_that_is_no_object_is_named(tmp_path):
    folder = write_folder(tmp_path, {"3": []}, {"test": ["3"]})
    assert read_error(folder).startswith("Question 3 is a list, not an object: ")


def test_pictures_are_demanded_only_where_they_are_needed(tmp_path):
    folder = write_folder(tmp_path, pictures=("5",))
    assert read_error(folder) == (
        f"{folder}/test/8/image.png, the picture of question 8, does not exist: unpack the split's pictures beside "
        "problems.json, or read it with images=False."
    )
    assert read_scienceqa(folder, "test", images=False)[2].image == folder / "test" / "8" / "image.png"


def test_many_missing_pictures_are_counted(tmp_path):
    message = read_error(write_folder(tmp_path, pictures=()))
    assert "test/5/image.png, the picture of question 5, does not exist (2 of the 2 pictures of split" in message


def test_a_split_without_pictures_cannot_serve_where_they_are_needed(tmp_path):
    folder = write_folder(tmp_path)
    assert read_error(folder, "train") == "No question of split 'train' has a picture: read it with images=False."
    assert len(read_scienceqa(folder, "train", limit=1)) == 1


# As a source of training data


def test_a_prefix_names_the_reader_and_its_options_reach_it(tmp_path):
    folder = write_folder(tmp_path, pictures=())
    (example,) = load_examples([f"scienceqa:{folder}"], pictures=False).examples
    assert example.messages[1].content == "The answer is (B)."
    assert example.origin == f"{folder}, train, question 9"
    (worded,) = load_examples([f"scienceqa:{folder}:train"], False, False, {"scienceqa": {"style": "words"}}).examples
    assert worded.messages[1].content == "fox."
    with pytest.raises(TypeError, match="stile"):
        load_examples([f"scienceqa:{folder}"], options={"scienceqa": {"stile": "words"}})


def test_a_question_without_an_answer_or_without_its_picture_is_a_bad_record(tmp_path):
    unanswered = {"9": {**PROBLEMS["9"], "answer": None}, "3": PROBLEMS["3"]}
    source = f"scienceqa:{write_folder(tmp_path, unanswered, {'all': ['9', '3'], 'seen': ['5']}, ())}:all"
    message = error_of(load_examples, [source], pictures=False)
    assert message.startswith(f"{tmp_path}, all, question 9: Question 9 has no answer to learn")
    loaded = load_examples([source], True, pictures=False)
    assert (len(loaded.examples), len(loaded.skipped)) == (1, 1)
    (tmp_path / "pictures").mkdir()
    source = f"scienceqa:{write_folder(tmp_path / 'pictures', pictures=('5',))}:test"
    assert "question 8: " in error_of(load_examples, [source])
    loaded = load_examples([source], True)
    assert (len(loaded.examples), len(loaded.skipped)) == (2, 1)
    assert "8/image.png, its picture, does not exist" in loaded.skipped[0]


def test_every_reader_is_there_and_none_is_imported_before_it_is_asked_for():
    for path in SOURCES.values():
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    code = "import sys, llama_adapter.data\nprint([m for m in sys.modules if m.startswith('llama_adapter.evaluation')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# The hub mirror


def mirror_rows(count: int) -> list[dict]:
    rows = [{**RECORD, "question": f"Number {i}?", "hint": "h" * (i % 2)} for i in range(count)]
    for row in rows:
        del row["split"]
    rows[1]["image"] = {"bytes": PICTURE, "path": "image.png"}
    return rows


@pytest.mark.parametrize("inner", [".", "data"])
def test_parquet_files_are_read_in_their_order_with_rows_for_pids(tmp_path, inner):
    rows = mirror_rows(5)
    write_mirror(tmp_path / inner, rows[3:], "validation-00001-of-00002.parquet")
    write_mirror(tmp_path / inner, rows[:3], "validation-00000-of-00002.parquet")
    write_mirror(tmp_path / inner, rows[:1], "test-00000-of-00001.parquet")
    for split in ("validation", "val"):
        questions = read_scienceqa(tmp_path, split)
        assert [(q.pid, q.question) for q in questions] == [(str(i), f"Number {i}?") for i in range(5)]
        assert [q.image for q in questions] == [None, PICTURE, None, None, None]
        assert {(q.split, q.answer, q.subject, q.lecture) for q in questions} == {
            ("validation", 0, "natural science", RECORD["lecture"])
        }
    assert [q.pid for q in read_scienceqa(tmp_path, "validation", limit=4)] == ["0", "1", "2", "3"]


def test_the_official_folder_wins_over_parquet_files_in_it(tmp_path):
    write_mirror(write_folder(tmp_path), mirror_rows(2))
    assert [question.pid for question in read_scienceqa(tmp_path, "test")] == ["5", "3", "8"]


def test_a_bad_row_a_bad_file_and_an_unknown_split_are_named(tmp_path):
    rows = mirror_rows(2)
    write_mirror(tmp_path, [rows[0], {**rows[1], "answer": 9}])
    assert read_error(tmp_path).startswith("Question 1: the answer's index is 9; it must be at least 0 and below 3")
    assert read_error(tmp_path, "minitest").endswith("no parquet file of split 'minitest': choose one of test.")
    write_mirror(tmp_path, [rows[0], {**rows[1], "image": {"bytes": None, "path": None}}])
    assert read_error(tmp_path).startswith("Question 1: 'image' is neither")
    write_mirror(tmp_path, [rows[0], {**rows[1], "image": {"bytes": None, "path": "1.png"}}])
    assert read_error(tmp_path).startswith(f"{tmp_path}/1.png, the picture of question 1, does not exist")
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    assert "test-00000-of-00001.parquet cannot be read as parquet (" in read_error(tmp_path)


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "test-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = error_of(read_scienceqa, tmp_path, "test", error=MissingExtraError)
    assert message.startswith("reading ScienceQA's parquet files needs 'pyarrow', which is not installed: pip install")
    assert message.endswith(" 'llama-adapter[datasets]'.")


# Texts


def test_the_papers_style():
    prompt = "Question: Which is it?\nContext: A hint.\nOptions: (A) x (B) y (C) z"
    assert written(ASKED) == (prompt, "The answer is (B).")
    assert (
        question_prompt(Question("1", "Q?", ("x", "y"), hint=" ")) == "Question: Q?\nContext: N/A\nOptions: (A) x (B) y"
    )


@pytest.mark.parametrize(
    ("style", "lines"),
    [
        ("QCM-A", "QCM"), ("CQM-A", "CQM"), ("QM-A", "QM"), ("QCML-A", "QCML"), ("QCME-A", "QCME"),
        ("QCMLE-A", "QCMB"), ("QCLEM-A", "QCBM"), ("QCLM-A", "QCLM"), ("QCEM-A", "QCEM"), ("LQEM-A", "LQEM"),
    ],
)  # fmt: skip
def test_official_prompts_have_a_line_for_each_letter_and_one_for_reasoning_side_by_side(style, lines):
    texts = {
        "Q": "Question: Which is it?", "C": "Context: A hint.", "M": "Options: (A) x (B) y (C) z",
        "L": r"BECAUSE: Lec\nture.", "E": "BECAUSE: So.", "B": r"BECAUSE: Lec\nture. So.",
    }  # fmt: skip
    assert question_prompt(ASKED, style) == "\n".join(texts[line] for line in lines)


@pytest.mark.parametrize(
    ("style", "target"),
    [
        ("QCM-A", "Answer: The answer is B."),
        ("QCM-AL", "Answer: The answer is B. BECAUSE: So."),  # the dataset's own code has these two the other way round
        ("QCM-AE", r"Answer: The answer is B. BECAUSE: Lec\nture."),
        ("QCML-AE", r"Answer: The answer is B. BECAUSE: Lec\nture."),
        ("QCM-ALE", r"Answer: The answer is B. BECAUSE: Lec\nture. So."),
        ("QCM-AEL", r"Answer: The answer is B. BECAUSE: So. Lec\nture."),
        ("QCM-LA", r"Answer: Lec\nture. The answer is B."),
        ("QCM-EA", "Answer: So. The answer is B."),
        ("QCM-LEA", r"Answer: Lec\nture. So. The answer is B."),
        ("QCM-ELA", r"Answer: So. Lec\nture. The answer is B."),
        ("QCM-LAE", r"Answer: Lec\nture. The answer is B. BECAUSE: So."),
        ("QCM-LE", r"Solution: Lec\nture. So."),
        ("QCM-E", "Solution: So."),
    ],
)
def test_official_targets(style, target):
    assert written(ASKED, style) == (question_prompt(ASKED, style), target)


def test_empty_reasoning_leaves_no_because():
    silent = Question("3", "Q?", ("x", "y"), 0, lecture="", solution="")
    assert question_target(silent, "QCM-ALE") == "Answer: The answer is A."
    assert question_target(silent, "QCM-LA") == "Answer: The answer is A."
    assert question_target(Question("3", "Q?", ("x", "y"), 0, lecture="", solution="S."), "QCM-ALE") == (
        "Answer: The answer is A. BECAUSE: S."
    )


def test_two_blanks_become_one_in_a_single_pass():
    prompt = question_prompt(Question("3", "Two  blanks,   three.", ("x ", "y")), "QCM-A")
    assert prompt == "Question: Two blanks,  three.\nContext: N/A\nOptions: (A) x (B) y"


@pytest.mark.parametrize(
    "style",
    ["", "QCM", "QCM-", "-A", "qcm-a", "QCM-B", "QCMA-A", "QQM-A", "QCM-AA", "CM-A", "QC-A", "QCM-A-L", "Paper"],
)
def test_a_malformed_style_is_refused(style):
    message = error_of(parse_style, style, error=ConfigError)
    assert message.startswith(
        f"The style {style!r} is unknown: write 'paper', 'words', or letters of QCMLE with Q and M"
    )


def test_words_are_read_without_options_and_answered_without_letters():
    told = Question("3", "What does Ada have?", ("a cup", "a key."), 1, hint="Ada has a key.")
    assert written(told, "words") == ("Ada has a key.\nWhat does Ada have?", "a key.")
    assert written(Question("3", "Which?", ("x", "y"), 0), "words") == ("Which?", "x.")


def test_what_a_style_needs_must_be_there():
    bare = Question("7", "Q?", ("x", "y"))
    assert error_of(question_target, bare) == "Question 7 has no answer to learn: leave it out, or only ask it."
    answered = Question("7", "Q?", ("x", "y"), 1)
    assert error_of(question_target, answered, "QCM-AL").startswith(
        "Question 7 has no solution, which style QCM-AL needs"
    )
    assert error_of(question_prompt, answered, "QCML-A").startswith(
        "Question 7 has no lecture, which style QCML-A needs"
    )


# Reading answers


@pytest.mark.parametrize(
    ("rule", "text", "index"),
    [
        ("official", "The answer is B.", 1),
        ("official", "Answer: The answer is C. BECAUSE: it is.", 2),
        ("official", "The answer is C, it is.", 2),  # any character for the full stop, as published
        ("official", "The answer is B", None),
        ("official", "The answer is (B).", None),
        ("official", "The answer is A. No! The answer is B.", None),
        ("official", "The answer is D.", None),  # there are three choices
        ("official", "the answer is B.", None),
        ("official", "", None),
        ("mm-cot", "The answer is (B)", 1),
        ("mm-cot", "So. The answer is (C).", 2),
        ("mm-cot", "The answer is (E).", 4),  # a wrong answer, not an unreadable one
        ("mm-cot", "The answer is (F).", None),
        ("mm-cot", "The answer is (A). The answer is (A).", None),
        ("mm-cot", "The answer is B.", None),
        ("letter", "B", 1),
        ("letter", " C\n", 2),
        ("letter", "A. fern", 0),
        ("letter", "(B) fox", 1),
        ("letter", "(C)", 2),
        ("letter", "A fern", None),
        ("letter", "D", None),
        ("letter", "BC", None),
        ("letter", "The answer is B.", None),
        ("words", "Fox.", 1),
        ("words", " a  FERN ", 0),
        ("words", "B", None),
        ("words", "fox and fern", None),
    ],
)
def test_rules(rule, text, index):
    assert RULES[rule](text, ("a fern", "fox", "moss")) == index


@pytest.mark.parametrize(
    ("name", "content", "recorded"),
    [
        ("a.json", {"5": "x", "3": "y"}, None),
        ("a.json", {"acc": 1, "outputs": {"5": "x", "3": "y"}, "results": {"5": 0, "3": 2}}, {"5": 0, "3": 2}),
        ("a.jsonl", [{"pid": "5", "text": "x", "more": 1}, {"pid": 3, "text": "y"}], None),
    ],
)
def test_predictions_are_read_from_every_form(tmp_path, name, content, recorded):
    lines = content if isinstance(content, list) else [content]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_predictions(tmp_path / name) == Predictions({"5": "x", "3": "y"}, recorded)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "[1]", "a.json holds a list, not an object {pid: text}"),
        ("a.json", "{", "a.json is not JSON (line 1"),
        ("a.json", '{"5": 1}', "a.json: the entry of '5' is 1; each must be the text of an answer"),
        ("a.json", '{"outputs": {"5": "x"}}', "a.json: the entry of 'outputs' is {'5': 'x'}; each must be the text"),
        ("a.json", '{"outputs": {"5": "x"}, "results": {}}', "a.json: 'results' has no index for question 5"),
        ("a.json", '{"outputs": {"5": "x"}, "results": {"5": "0"}}', "a.json: 'results' has no index for question 5"),
        ("a.jsonl", '{"pid": "5"}', "a.jsonl, line 1 must be an object with a 'pid' and a 'text'"),
        ("a.jsonl", '\n{"pid": 1.5, "text": "x"}', "a.jsonl, line 2 must be an object with a 'pid' and a 'text'"),
        ("a.jsonl", "[]", "a.jsonl holds no records"),
        ("a.jsonl", '{"pid": 5, "text": "x"}\n{"pid": "5", "text": "x"}', "a.jsonl, line 2 answers question 5 again"),
        ("a.jsonl", "{", "a.jsonl is not JSON (line 1"),
    ],
)
def test_malformed_predictions_are_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    assert sentence in error_of(read_predictions, tmp_path / name)


def test_answers_to_no_question_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"3": "x", "4": "y", "5": "z"}')
    assert error_of(read_predictions, tmp_path / "a.json", [ASKED]) == (
        f"{tmp_path}/a.json answers 2 questions that the split does not have, the first with pid 4: "
        "check --split and --data."
    )


# Scores


def question(pid: str, answer: int | None = 0, choices: int = 2, **more) -> Question:
    return Question(pid, "Q?", tuple("abcde"[:choices]), answer, **more)


@pytest.fixture
def asked():
    known = {"subject": "natural science", "grade": "grade6"}
    return [
        question("1", 0, hint="h", image=b"p", **known),
        question("2", 1, 3, hint="h", **known),
        question("3", 1, 4, image=Path("p"), subject="social science", grade="grade7"),
        question("4", 0, 5, subject="language science", grade="grade12"),
    ]


ANSWERS = {"1": "The answer is A.", "2": "The answer is A.", "3": "The answer is B.", "4": "?"}


def test_categories_are_counted_by_hand(asked):
    result = score(asked, Predictions(ANSWERS), fallback="wrong")
    assert (result.count, result.right, result.unparseable, result.missing) == (4, 2, 1, 0)
    assert result.counts == {
        "Avg": 4, "NAT": 2, "SOC": 1, "LAN": 1, "TXT": 2, "IMG": 2, "NO": 1, "G1-6": 2, "G7-12": 2,
    }  # fmt: skip
    assert result.accuracies == {
        "Avg": 50, "NAT": 50, "SOC": 100, "LAN": 0, "TXT": 50, "IMG": 100, "NO": 0, "G1-6": 50, "G7-12": 50,
    }  # fmt: skip


def test_a_category_that_is_empty_or_not_known_of_all_has_no_accuracy(asked):
    result = score(asked[:2], Predictions(ANSWERS))
    assert (result.counts["SOC"], result.accuracies["SOC"], result.counts["NAT"]) == (0, None, 2)
    result = score([*asked[:2], question("3")], Predictions(ANSWERS))
    for name in ("NAT", "SOC", "LAN", "G1-6", "G7-12"):
        assert (result.counts[name], result.accuracies[name]) == (None, None)
    assert result.counts["TXT"] == 2


def test_random_draws_repeat_with_the_seed_and_stay_among_the_choices():
    asked = [question(str(i), choices=2) for i in range(400)]
    texts = Predictions({q.pid: "?" for q in asked})
    first = score(asked, texts, seed=1)
    assert first == score(asked, texts, seed=1)
    assert len({score(asked, texts, seed=seed).right for seed in range(5)}) > 1
    draws = random.Random(1)
    assert first.right == sum(draws.randrange(2) == 0 for _ in asked)
    assert first.unparseable == 400
    # Under mm-cot two choices are drawn among five letters, so that a fifth is right and not a half.
    assert 150 < first.right < 250
    assert 50 < score(asked, texts, "mm-cot", seed=1).right < 110


def test_recorded_draws_count_where_the_text_says_nothing(asked):
    results = {"1": 0, "2": 0, "3": 1, "4": 0}
    assert score(asked, Predictions(ANSWERS, results), fallback="recorded").right == 3
    assert score(asked, Predictions(ANSWERS, {**results, "4": -1}), fallback="recorded").right == 2
    message = error_of(score, asked, Predictions(ANSWERS, {**results, "2": 1}), fallback="recorded")
    assert message.startswith("Question 2: 'results' holds the index 1, but the official rule reads 0 in 'outputs'")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rule": "offical"}, "unknown rule 'offical'; did you mean 'official'?"),
        ({"fallback": "none"}, "unknown fallback 'none'; known: random, wrong, recorded."),
        ({"fallback": "recorded"}, "fallback is 'recorded', which takes the official rule and a result file"),
    ],
)
def test_unknown_settings_are_refused(asked, options, sentence):
    assert error_of(score, asked, Predictions(ANSWERS), error=ConfigError, **options).startswith(sentence)
    with pytest.raises(ConfigError, match="takes the official rule"):
        score(asked, Predictions(ANSWERS, {}), "letter", "recorded")


def test_every_question_needs_a_prediction_unless_they_may_be_missing(asked):
    some = Predictions({"1": ANSWERS["1"], "3": ANSWERS["3"], "77": "?"})
    assert error_of(score, asked, some) == (
        "2 of 4 questions have no prediction, the first with pid 2: answer them, or pass --allow-missing to leave them "
        "out."
    )
    result = score(asked, some, allow_missing=True)
    assert (result.count, result.right, result.missing) == (2, 2, 2)
    assert "None of the 4 questions has a prediction" in error_of(score, asked, Predictions({}), allow_missing=True)
    unknown = [question("1", None)]
    assert "Question 1 has no right answer to compare with" in error_of(score, unknown, Predictions(ANSWERS))


def test_the_papers_rows_are_shares_of_the_questions_that_there_are():
    """A share k/n fits two decimals at n = 4,241 by chance four times in ten, nine of them and two sums never."""
    sizes = (4241, 2252, 889, 1100, 2046, 2017, 1435, 2724, 1517)
    assert len(PAPER_ROWS) == 17
    for name, row in PAPER_ROWS.items():
        assert len(row.accuracies) == len(CATEGORIES)
        if name in ("Random", "Human"):
            continue  # means of several runs or people
        right = [round(share * size / 100) for share, size in zip(row.accuracies, sizes, strict=True)]
        shares = [round(100 * k / size, 2) for k, size in zip(right, sizes, strict=True)]
        assert shares == list(row.accuracies), name
        assert right[0] == sum(right[1:4]) == sum(right[7:9]), name


def test_tables_have_ours_first_and_the_papers_rows_that_are_asked_for(asked):
    result = score(asked, Predictions(ANSWERS), fallback="wrong")
    rows = paper_table(result)
    assert [row["model"] for row in rows] == ["yours", *SHOWN_ROWS]
    assert rows[0]["Avg"] == 50
    assert (rows[-1]["Avg"], rows[-1]["G7-12"], rows[-1]["parameters"]) == (85.19, 84.05, "1.8M")
    assert len(paper_table(result, tuple(PAPER_ROWS))) == 18


# The command


def run(*arguments) -> None:
    parser = Parser(prog="evaluate")
    evaluate_scienceqa.add_parser(parser.add_subparsers(required=True, parser_class=Parser))
    args = parser.parse_args(["scienceqa", *map(str, arguments)])
    args.run(args)


@pytest.fixture
def answers_file(tmp_path):
    write_folder(tmp_path, pictures=())
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"5": "The answer is A.", "3": "The answer is (A).", "8": "The answer is C."}))
    return path


def test_command_prints_the_table(answers_file, capsys):
    arguments = ("--data", answers_file.parent, "--predictions", answers_file)
    run(*arguments, "--fallback", "wrong")
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[0] == ["model", "trained", *CATEGORIES]
    assert lines[1] == ["yours", "66.67", "50.00", "100.00", "-", "100.00", "100.00", "0.00", "0.00", "100.00"]
    assert lines[2] == ["of", "questions", "3", "2", "1", "0", "1", "2", "1", "1", "2"]
    assert [" ".join(line[:-9]).split(" 1.")[0] for line in lines[3:8]] == [
        "Human", "GPT-3 CoT", "MM-CoT 223M", "Adapter_T", "Adapter",
    ]  # fmt: skip
    assert printed.out.splitlines()[-1] == (
        "2 of 3 right by rule 'official'; answers that could not be parsed: 1 (fallback 'wrong')."
    )
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80
    assert printed.err == "The paper's rows are of 4241 questions of test, yours of 3 of test.\n"
    run(*arguments, "--all-rows")
    assert "UnifiedQA CoT" in capsys.readouterr().out


def test_command_prints_json_with_notes_beside_it(answers_file, capsys):
    arguments = ("--data", answers_file.parent, "--predictions", answers_file, "--json")
    run(*arguments, "--rule", "mm-cot", "--limit", "2", "--fallback", "wrong")
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["split"], found["count"], found["right"], found["unparseable"]) == ("test", 2, 1, 1)
    assert "yours of 2 of test" in printed.err
    answers_file.write_text('{"8": "?"}')
    run(*arguments, "--allow-missing")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fallback"] == "random"
    assert "2 questions have no prediction and are left out." in printed.err
    assert "Rule 'official' parses few of these answers; another --rule may fit them." in printed.err


def test_command_takes_the_recorded_draws_of_a_result_file_under_its_own_rule(answers_file, capsys):
    outputs = json.loads(answers_file.read_text())
    answers_file.write_text(json.dumps({"outputs": outputs, "results": {"5": 0, "3": 2, "8": 2}}))
    arguments = ("--data", answers_file.parent, "--predictions", answers_file, "--json")
    run(*arguments)
    assert json.loads(capsys.readouterr().out)["fallback"] == "recorded"
    run(*arguments, "--rule", "mm-cot")
    assert json.loads(capsys.readouterr().out)["fallback"] == "random"


def test_command_says_what_the_data_do_not_tell(answers_file, capsys):
    write = {pid: {key: record[key] for key in record if key != "grade"} for pid, record in PROBLEMS.items()}
    (answers_file.parent / "problems.json").write_text(json.dumps(write))
    run("--data", answers_file.parent, "--predictions", answers_file)
    assert "No G1-6, G7-12: the data do not give every question's subject and grade." in capsys.readouterr().err


def test_command_refuses_what_it_cannot_do(answers_file):
    with pytest.raises(ConfigError, match="Nobody answers: pass --adapter FOLDER"):
        run("--data", answers_file.parent)
    with pytest.raises(ConfigError, match="--limit is 0; it must be at least 1"):
        run("--data", answers_file.parent, "--predictions", answers_file, "--limit", "0")
    with pytest.raises(DataError, match="answers 2 questions that the split does not have"):
        run("--data", answers_file.parent, "--predictions", answers_file, "--split", "all")


def test_the_commands_choices_are_those_of_the_evaluation():
    assert tuple(RULES) == evaluate_scienceqa._RULES
    assert evaluate_scienceqa._FALLBACKS == FALLBACKS
    assert LETTERS == "ABCDE"


def test_scoring_reads_neither_torch_nor_transformers():
    code = (
        "import sys, llama_adapter.cli.evaluate_scienceqa, llama_adapter.evaluation.scienceqa.scores\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# The published score


@pytest.mark.skipif("SCIENCEQA_DIR" not in os.environ, reason="SCIENCEQA_DIR names no folder with the real data")
def test_the_authors_result_file_scores_what_they_published():
    folder = Path(os.environ["SCIENCEQA_DIR"])
    whole = folder / "problems.json"
    questions = read_scienceqa(whole if whole.exists() else folder / "problems_test.json", "test", images=False)
    predictions = read_predictions(folder / "gpt3_cot_test_predictions.json", questions)
    result = score(questions, predictions, fallback="recorded")
    assert (result.count, result.right, result.unparseable) == (4241, 3188, 249)
    published = dict(zip(CATEGORIES, PAPER_ROWS["GPT-3 CoT"].accuracies, strict=True))
    for name, accuracy in result.accuracies.items():
        if result.counts[name] is not None:
            assert f"{accuracy:.2f}" == f"{published[name]:.2f}", name
    assert [result.counts[name] for name in ("Avg", "TXT", "IMG", "NO")] == [4241, 2046, 2017, 1435]
    # Drawn anew, the same texts come close and no more.
    drawn = [score(questions, predictions, seed=seed).accuracies["Avg"] for seed in range(3)]
    assert all(74 < accuracy < 76.5 for accuracy in drawn)
    assert score(questions, predictions, fallback="wrong").right == 3061
