"""The bundled world: facts, corpus and instruction sets (nothing is trained here)."""

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "src" / "llama_adapter" / "bundled"
sys.path.insert(0, str(ROOT / "recipes" / "base"))

import corpus  # noqa: E402
import instructions  # noqa: E402
import prose  # noqa: E402
import world as world_module  # noqa: E402

TEMPLATE_WORDS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. Instruction Input Response"
)


@pytest.fixture(scope="module")
def world():
    return world_module.load_world()


@pytest.fixture(scope="module")
def documents(world):
    return list(islice(corpus.documents(world, seed=5), 12_000))


@pytest.fixture(scope="module")
def sets(world):
    return instructions.instruction_sets(world)


def askings(family, fact):
    """All ways to ask for the fact in one sentence."""
    return [world_module.render(wording, fact) for wording in family.questions + family.commands]


def test_every_family_has_wordings_and_distinct_subjects(world):
    for family in world.values():
        assert family.title, family.name
        assert family.kind, family.name
        assert len(family.statements) >= 5, family.name
        assert len(family.completions()) >= 2, family.name
        assert len(family.questions) >= 4, family.name
        assert len(family.commands) >= 3, family.name
        assert len(family.splits) >= 3, family.name
        subjects = [fact.subject for fact in family.facts]
        assert len(subjects) == len(set(subjects)), family.name


def test_wordings_hold_what_they_should(world):
    for family in world.values():
        for wording in family.statements:
            assert re.search(r"\{[sS]\}", wording), wording
            assert "{a}" in wording, wording
        for wording in family.questions + family.commands:
            assert re.search(r"\{[sS]\}", wording), wording
            assert "{a}" not in wording, wording
        for wording in family.splits:
            assert "{" not in wording, wording


def test_rendering_puts_articles_and_capitals_right():
    fact = world_module.Fact("young", "owl", "owlet")
    assert world_module.render("{S} has an {a}.", fact) == "An owl has an owlet."
    assert world_module.render("a young {s}", fact) == "A young owl"


def test_world_and_corpus_are_deterministic(world, documents):
    again = world_module.load_world()
    assert again == world
    assert list(islice(corpus.documents(again, seed=5), 500)) == documents[:500]
    assert list(islice(corpus.documents(again, seed=6), 500)) != documents[:500]


def test_the_instruction_template_never_occurs(documents):
    for text in documents:
        for forbidden in corpus.FORBIDDEN:
            assert forbidden not in text


def test_every_template_word_occurs_in_everyday_use(documents):
    seen = set(re.findall(r"\w+", " ".join(documents)))
    assert set(re.findall(r"\w+", TEMPLATE_WORDS)) <= seen


def test_every_fact_is_stated_about_equally_often(world):
    deck = corpus.Deck(world, random.Random(1))
    counts = dict.fromkeys(world_module.all_facts(world), 0)
    for _ in range(60 * len(counts)):
        counts[deck.deal(deck.family())] += 1
    assert min(counts.values()) > 30
    assert max(counts.values()) < 90


def test_shares_of_prose_and_everyday_pages(documents):
    passages = set(prose.training_passages(random.Random(0)))
    assert passages
    total = sum(map(len, documents))
    long_ones = sum(len(text) for text in documents if len(text) > 700)
    assert 0.1 < long_ones / total < 0.4


def test_held_out_prose_is_never_trained_on():
    trained = "\n".join(prose.training_passages(random.Random(0)))
    for passage in prose.heldout_passages():
        longest = max(passage.split("\n\n"), key=len)
        if len(longest) > 100:
            assert longest not in trained


def test_held_out_facts_are_a_fifth_of_every_family(world):
    held = world_module.heldout_facts(world)
    for family in world.values():
        share = len(held & set(family.facts)) / len(family.facts)
        assert 0.1 < share < 0.3, family.name


def test_no_instruction_asks_for_a_held_out_fact(world, sets):
    held = world_module.heldout_facts(world)
    askable = {text: fact for fact in held for text in askings(world[fact.family], fact)}
    subjects = {(fact.family, fact.subject) for fact in held}
    for record in sets["instructions.json"] + sets["heldout_wordings.json"]:
        assert (record["family"], record["input"]) not in subjects
        assert record["instruction"] not in askable
    everything = "\n".join(record["instruction"] for record in sets["instructions.json"])
    assert not [text for text in askable if text in everything]


def test_instructions_never_name_held_out_people_places_or_elements(world, sets):
    for name in ("capital", "continent", "language", "currency", "job", "city", "pet", "symbol"):
        named = " ".join(f"{r['instruction']} {r['input']}" for r in sets["instructions.json"] if r["family"] == name)
        for fact in world_module.heldout_facts(world):
            assert fact.family != name or not re.search(rf"\b{fact.subject}\b", named), fact


def test_held_out_wordings_are_not_instructed(sets):
    def trained_texts(record):
        return (record["instruction"], record["input"])

    trained = {trained_texts(record) for record in sets["instructions.json"]}
    assert not trained & {trained_texts(record) for record in sets["heldout_wordings.json"]}
    assert not trained & {trained_texts(record) for record in sets["heldout_facts.json"]}


def test_answers_end_with_a_full_stop_and_are_right(world, sets):
    answers = {(fact.family, f"{fact.answer}.") for fact in world_module.all_facts(world)}
    for records in sets.values():
        for record in records:
            assert (record["family"], record["output"]) in answers


def test_the_bundled_files_are_what_the_recipe_makes(sets):
    for name, records in sets.items():
        assert json.loads((BUNDLED / name).read_text(encoding="utf-8")) == records
