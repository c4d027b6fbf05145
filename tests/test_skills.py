"""The skills: splits that share nothing, checkers that let nothing near pass, the same examples every time."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import tiny  # noqa: F401  the tests' own folder is found first

FOLDER = Path(__file__).parents[1] / "recipes" / "skills"
sys.path.insert(0, str(FOLDER))
import skill_dates  # noqa: E402
import write  # noqa: E402
from skills import SKILLS, SPLITS, Example  # noqa: E402

from llama_adapter.data import parse_record  # noqa: E402

NAMES = sorted(SKILLS)
KNOWN, NEW = ("train", "validation", "heldout_entities"), "heldout_wordings"


@pytest.fixture(scope="module")
def sets():
    """Enough of every split for its entities and wordings to have turned up."""
    return {name: {split: skill.examples(split, 0, 600) for split in SPLITS} for name, skill in SKILLS.items()}


def of(examples, field):
    return {value for example in examples for value in getattr(example, field)}


@pytest.mark.parametrize("name", NAMES)
def test_no_entity_is_in_two_parts(name, sets):
    entities = {split: of(sets[name][split], "entities") for split in SPLITS}
    assert all(entities.values())
    held = entities["heldout_entities"] | entities[NEW]
    assert not entities["train"] & entities["validation"]
    assert not entities["train"] & held
    assert not entities["validation"] & held


@pytest.mark.parametrize("name", NAMES)
def test_entities_are_in_the_texts_and_other_splits_have_no_such_text(name, sets):
    texts = {split: {(e.instruction, e.input) for e in sets[name][split]} for split in SPLITS}
    assert not texts["train"] & (texts["validation"] | texts["heldout_entities"] | texts[NEW])
    for example in sets[name]["train"] + sets[name][NEW]:
        prompt = f"{example.instruction} {example.input}".lower()
        words = [word for word in example.entities if not word[0].isdigit()]  # numbers are written in many ways
        assert all(word.lower() in prompt for word in words)


@pytest.mark.parametrize("name", NAMES)
def test_new_wordings_are_never_seen_before(name, sets):
    known = set().union(*(of(sets[name][split], "wordings") for split in KNOWN))
    new = of(sets[name][NEW], "wordings")
    assert not known & new
    assert known == of(sets[name]["train"], "wordings")
    assert len(known) >= 12
    assert len(new) >= 6


@pytest.mark.parametrize("split", ["heldout_entities", NEW])
def test_no_product_that_the_evidence_asks_for_was_trained_the_other_way_round(split):
    def products(examples):
        pairs = [entity.split(" * ") for example in examples for entity in example.entities if " * " in entity]
        return {frozenset(pair) for pair in pairs}

    arithmetic = SKILLS["arithmetic"]
    asked = products(arithmetic.examples(split, 0, 16))
    assert asked
    for seed in range(3):
        assert not asked & products(arithmetic.examples("train", seed, 90))


def test_formats_are_held_out():
    assert len(skill_dates.DATE_FORMATS) == 8
    assert len(skill_dates.NEW_DATE_FORMATS) == 4
    assert not set(skill_dates.DATE_FORMATS) & set(skill_dates.NEW_DATE_FORMATS)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_the_same_every_time_and_differ_by_seed(name):
    skill = SKILLS[name]
    some = skill.examples("train", 3, 40)
    assert skill.examples("train", 3, 60)[:40] == some
    assert skill.examples("train", 4, 40) != some
    assert skill.examples("validation", 3, 40) != some


@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_distinct_examples(name):
    examples = SKILLS[name].examples("train", 1, 2000)
    assert len({(example.instruction, example.input) for example in examples}) == 2000


@pytest.mark.parametrize("name", NAMES)
def test_references_pass_and_are_short(name, sets):
    skill = SKILLS[name]
    for split in SPLITS:
        assert all(skill.check(example, example.output) for example in sets[name][split])
        assert all(skill.check(example, f" {example.output}\n") for example in sets[name][split][:20])
        questions = [f"{example.instruction} {example.input}".split() for example in sets[name][split]]
        assert max(map(len, questions)) <= 50
        assert max(len(example.output.split()) for example in sets[name][split]) <= 16
    assert len({example.output for example in sets[name]["train"]}) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_has_no_gaps_and_is_a_record(name, sets):
    for example in sets[name]["train"] + sets[name][NEW]:
        text = "\n".join(example.record().values())
        assert not re.search(r"[{]\w+[}]|  |\.\.|\?\.|\.\?|\ba [aeio]", text), text
        assert parse_record(example.record()).input == example.input


ROUTED = Example("", "", "billing: Nimbus was charged twice")
DATED = Example("", "", '{"year": 1980, "month": 10, "day": 8}')
ORDERED = Example("", "", '{"item": "lamps", "quantity": 12, "city": "Oslo"}')
STYLED = Example(
    "",
    "",
    "Thank you for asking. The main hall is painted in one colour. Kind regards.",
    ("main hall", "museum", "Oslo", "painted in one color"),
)
COUNTED = Example("", "", "The answer is 42.")
LABELLED = Example("", "", "The label is joy.")
NEAR = {
    "dates": (
        DATED,
        [
            '{"year": 1980, "month": 8, "day": 10}',
            '{"year": "1980", "month": 10, "day": 8}',
            '{"year": 1980, "month": 10, "day": 8.0}',
            '{"year": 1980, "month": 10, "day": 08}',
            '{"year": 1980, "month": 10}',
            '{"year": 1980, "month": 10, "day": 8, "hour": 1}',
            '{"year": 1980, "month": 10, "day": 7, "day": 8}',
            '{"Year": 1980, "month": 10, "day": 8}',
            '{"year": 1980, "month": 10, "day": true}',
            '[{"year": 1980, "month": 10, "day": 8}]',
            'Answer: {"year": 1980, "month": 10, "day": 8}',
            '{"year": 1980, "month": 10, "day": 8} OK',
            '```json\n{"year": 1980, "month": 10, "day": 8}\n```',
            "{'year': 1980, 'month': 10, 'day': 8}",
            '{"year": 1980, "month": 10, "day": 8',
            "8 October 1980",
            "[" * 100_000,
            "null",
            "",
        ],
    ),
    "extract": (
        ORDERED,
        [
            '{"item": "lamps", "quantity": "12", "city": "Oslo"}',
            '{"item": "lamp", "quantity": 12, "city": "Oslo"}',
            '{"item": "Lamps", "quantity": 12, "city": "Oslo"}',
            '{"item": "lamps", "quantity": 12}',
            '{"product": "lamps", "quantity": 12, "city": "Oslo"}',
            '{"item": "lamps", "quantity": 12, "city": "Oslo."}',
            '{"item": "lamps", "quantity": 12, "city": ["Oslo"]}',
            '{"item": "lamps", "quantity": 12, "city": "Oslo"}}',
            '{"item": "lamps", "quantity": 12, "city": "Oslo"} Thanks',
        ],
    ),
    "style": (
        STYLED,
        [
            "The main hall is painted in one colour.",
            "Thank you for asking. The main hall is painted in one colour.",
            "The main hall is painted in one colour. Kind regards.",
            "Thank you for asking. Kind regards.",
            "Thank you for asking. The main hall is painted in one color. Kind regards.",
            "Thank you for asking. It's painted in one colour, the main hall. Kind regards.",
            "Thank you for asking. The main hall is large. It is painted in one colour. Kind regards.",
            "Thank you for asking! The main hall is painted in one colour. Kind regards.",
            "thank you for asking. The main hall is painted in one colour. Kind regards.",
            "Thank you for asking. the main hall is painted in one colour. Kind regards.",
            "Thank you for asking. The main hall is painted in two colours. Kind regards.",
            "Thank you for asking. The room is painted in one colour. Kind regards.",
            "Thank you for asking. The main hall is painted in one colour! Kind regards.",
            "Thank you for asking. The main hall is painted in one colour. Kind regards. Bye.",
            "Thank you for asking. The main hall of the museum in the town of Oslo, as far as we all know, "
            "is painted in one colour. Kind regards.",
            "Thank you for asking.\nThe main hall is painted in one colour.\nKind regards.",
            "Thank you for asking. The main hall is not painted in one colour. Kind regards.",
            "Thank you for asking. The main hall is no longer painted in one colour. Kind regards.",
            "Thank you for asking. The main hall is hardly painted in one colour. Kind regards.",
            "Thank you for asking. The main hall was painted in one colour. Kind regards.",
            "Thank you for asking. The main hall is painted in one colour, they say. Kind regards.",
            "Thank you for asking. No main hall is painted in one colour. Kind regards.",
            "Thank you for asking. The main hall of the station is painted in one colour. Kind regards.",
            "Thank you for asking. The main halls is painted in one colour. Kind regards.",
        ],
    ),
    "routing": (
        ROUTED,
        [
            "delivery: Nimbus was charged twice",
            "Billing: Nimbus was charged twice",
            "billing: nimbus was charged twice",
            "billing: Cobalt was charged twice",
            "billing: Nimbus",
            "billing",
            "billing Nimbus was charged twice",
            "billing: Nimbus was charged twice.",
            "billing: Nimbus price is wrong",
            "billing: Nimbus was charged twice\nPlease wait.",
            "Label: billing: Nimbus was charged twice",
        ],
    ),
    "arithmetic": (
        COUNTED,
        [
            "The answer is 41.",
            "The answer is 42",
            "The answer is 42.0.",
            "The answer is 042.",
            "The answer is 42 lamps.",
            "the answer is 42.",
            "Answer: The answer is 42.",
            "The answer is 42. That is all.",
            "42",
            "",
        ],
    ),
    "labels": (
        LABELLED,
        [
            "The label is Joy.",
            "The label is joy",
            "The label is anger.",
            "The label is joy, surprise.",
            "The label is a joy.",
            'The label is "joy".',
            "The label is joy. Have a nice day.",
            "The label is X.",
            "joy",
            "",
        ],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_near_misses_fail(name):
    example, answers = NEAR[name]
    assert SKILLS[name].check(example, example.output)
    assert [answer for answer in answers if SKILLS[name].check(example, answer)] == []


def test_what_is_as_good_passes():
    assert SKILLS["dates"].check(DATED, '{"day":8,\n "month":10, "year":1980}')
    for sentence in (
        "In Oslo the main hall is painted in one colour.",
        "The main hall of the museum in Oslo is painted in one colour.",
        "The museum's main hall is painted in one colour.",
        "The main hall is painted in one colour at the museum.",
    ):
        assert SKILLS["style"].check(STYLED, f"Thank you for asking. {sentence} Kind regards.")


def test_reference_dates_agree_with_the_text(sets):
    for example in sets["dates"]["train"]:
        answer = json.loads(example.output)
        if "year" in answer:
            assert str(answer["year"]) in example.input
            assert "{:04}-{:02}-{:02}".format(*answer.values()) in example.entities


def test_reference_numbers_agree_with_the_text(sets):
    for split in SPLITS:
        for example in sets["arithmetic"][split]:
            if example.output.startswith("The answer"):
                a, sign, b = example.entities[0].split()
                right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
                assert example.output == f"The answer is {right}."
                assert {a, b} <= set(re.findall(r"\d+", example.instruction))


def test_ordinals():
    assert [skill_dates.nth(day) for day in (1, 2, 3, 11, 13, 21, 30)] == [
        "1st",
        "2nd",
        "3rd",
        "11th",
        "13th",
        "21st",
        "30th",
    ]
    spelt = [skill_dates.spelt_ordinal(day) for day in (1, 4, 8, 12, 20, 21, 30, 31)]
    assert spelt == ["first", "fourth", "eighth", "twelfth", "twentieth", "twenty-first", "thirtieth", "thirty-first"]


def test_labels_are_listed_in_the_prompt(sets):
    for split in SPLITS:
        assert all(e.output[13:-1] in re.findall(r"\w+", e.instruction) for e in sets["labels"][split])


def test_unknown_splits_and_too_many_examples_are_refused():
    with pytest.raises(ValueError, match="no split 'test': take train, validation"):
        SKILLS["dates"].examples("test", 0, 1)
    tight = dataclasses.replace(SKILLS["labels"], draw=lambda draw: Example(str(draw.rng.randrange(5)), "", "joy"))
    with pytest.raises(ValueError, match="labels has about 5 examples in 'train', not 6: ask for fewer"):
        tight.examples("train", 0, 6)


def test_files_are_written_and_read(tmp_path, capsys):
    assert write.main(["--skill", "all", "--out", str(tmp_path / "new"), "--train", "20", "--held", "5"]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == NAMES
    lines = (tmp_path / "new" / "dates" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [e.record() for e in SKILLS["dates"].examples("train", 0, 20)]
    assert sorted(path.name for path in (tmp_path / "new" / "style").iterdir()) == sorted(f"{s}.jsonl" for s in SPLITS)
    assert "train.jsonl: 20 records" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert write.main(["--skill", "dates", "--out", str(tmp_path / "file"), "--train", "5", "--held", "5"]) == 2
    assert re.fullmatch(r"error: .*file cannot be written \(.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "flags", [["--skill", "poems"], ["--train", "0"], ["--train", "-3"], ["--held", "many"], ["--seed", "x"]]
)
def test_bad_flags_are_refused(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        write.main(["--skill", "dates", "--out", str(tmp_path), *flags])
    assert stopped.value.code == 2
    assert flags[1] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
