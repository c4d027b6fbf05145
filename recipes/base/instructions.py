"""The instruction set for the bundled base, and what is kept out of it.

Three files, all lists of Alpaca records (instruction, input, output) with the family added:

* ``instructions.json``: the training facts in many wordings;
* ``heldout_facts.json``: facts that no instruction mentions, asked in wordings that instructions use.
  The base knows them, so answering them shows that the adapter has brought out a skill;
* ``heldout_wordings.json``: training facts asked in wordings that no instruction uses.

Answers are the bare fact with a full stop, always.

    python recipes/base/instructions.py --output src/llama_adapter/bundled
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from world import WORLD_SEED, Fact, Family, World, all_facts, heldout_facts, load_world, render

Record = dict[str, str]

PLAIN_PER_FACT = 1
SPLIT_PER_FACT = 0.5
WORDINGS_SHARE = 0.25
WRAPPED_SHARE = 0.25
WRAPPERS = (
    "Answer the question: {}",
    "{} Answer in one word or two.",
    "Read the question and write a short answer. {}",
    "Here is a question: {}",
    "{} Give a short answer.",
    "Please answer: {}",
)
COMMAND_WRAPPERS = ("Please do this: {}", "{} Be short.", "Your task: {}", "{} Write only the answer.")


def used(wordings: list[str]) -> list[str]:
    """The wordings that instructions may use: all but the last."""
    return wordings[:-1]


def make_record(fact: Fact, instruction: str, given: str = "") -> Record:
    """One Alpaca record."""
    return {"instruction": instruction, "input": given, "output": f"{fact.answer}.", "family": fact.family}


def wrap(text: str, rng: random.Random) -> str:
    """Some questions and commands come inside a longer instruction."""
    if rng.random() >= WRAPPED_SHARE:
        return text
    return rng.choice(WRAPPERS if text.endswith("?") else COMMAND_WRAPPERS).format(text)


def plain_records(fact: Fact, family: Family, count: int, rng: random.Random) -> list[Record]:
    """Instructions that name the subject themselves, in different wordings."""
    choices = used(family.questions) + used(family.commands)
    return [make_record(fact, wrap(render(w, fact), rng)) for w in rng.sample(choices, count)]


def split_records(fact: Fact, family: Family, count: int, rng: random.Random) -> list[Record]:
    """Instructions whose subject stands in the input."""
    return [make_record(fact, wording, fact.subject) for wording in rng.sample(used(family.splits), count)]


def training_records(world: World, held: set[Fact], seed: int) -> list[Record]:
    """The instruction set."""
    rng, records = random.Random(f"{seed}/instructions"), []
    for fact in all_facts(world):
        if fact not in held:
            splits = int(SPLIT_PER_FACT) + (rng.random() < SPLIT_PER_FACT % 1)
            family = world[fact.family]
            records += plain_records(fact, family, PLAIN_PER_FACT, rng) + split_records(fact, family, splits, rng)
    rng.shuffle(records)
    return records


def asked_once(fact: Fact, family: Family, choose: Callable[[list[str]], str], rng: random.Random) -> Record:
    """The fact in a question, a command, or a question with the subject in the input."""
    kind = rng.choice(("questions", "commands", "splits"))
    wording = choose(getattr(family, kind))
    return make_record(fact, wording, fact.subject) if kind == "splits" else make_record(fact, render(wording, fact))


def heldout_fact_records(world: World, held: set[Fact], seed: int) -> list[Record]:
    """Every held-out fact once, in a wording that instructions use."""
    rng = random.Random(f"{seed}/heldout facts")
    return [asked_once(f, world[f.family], lambda wordings: rng.choice(used(wordings)), rng) for f in sorted(held)]


def heldout_wording_records(world: World, held: set[Fact], seed: int) -> list[Record]:
    """Some training facts of every family, in the last question, command or separate-subject question of the family."""
    rng, records = random.Random(f"{seed}/heldout wordings"), []
    for family in world.values():
        known = [fact for fact in family.facts if fact not in held]
        for fact in rng.sample(known, max(1, round(WORDINGS_SHARE * len(known)))):
            records.append(asked_once(fact, family, lambda wordings: wordings[-1], rng))
    return records


def instruction_sets(world: World, seed: int = WORLD_SEED) -> dict[str, list[Record]]:
    """All three sets by file name."""
    held = heldout_facts(world, seed)
    return {
        "instructions.json": training_records(world, held, seed),
        "heldout_facts.json": heldout_fact_records(world, held, seed),
        "heldout_wordings.json": heldout_wording_records(world, held, seed),
    }


def file_text(records: list[Record]) -> str:
    """A JSON list with one record to a line, so that changes can be read."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the files")
    folder = Path(parser.parse_args().output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in instruction_sets(load_world()).items():
        (folder / name).write_text(file_text(records), encoding="utf-8")
        print(f"{name}: {len(records)} records")


if __name__ == "__main__":
    main()
