"""The small world of facts that the bundled base model is trained on.

A fact is a (family, subject, answer) triple with one short, unambiguous answer.  Families come
from the text files in ``world_data/``: each holds the wordings of a family (plain statements,
questions, commands, questions whose subject is given separately) and, where the facts are real,
the facts themselves.  Facts about made-up people and about numbers are produced here from a seed.
Made-up people matter most for measuring: nothing but the training text can give them away.

File syntax: ``[family]`` opens a family; ``title:`` and ``kind:`` name its heading and what its
subjects are; ``= ? ! /`` open a statement, a question, a command and a separate-subject question;
``-`` opens a line of ``subject=answer`` pairs; ``#`` opens a comment.  In wordings ``{s}`` is the
subject, ``{S}`` the subject with its indefinite article, ``{a}`` the answer.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path

DATA_DIR = Path(__file__).parent / "world_data"
WORLD_SEED = 20230328
HELDOUT_SHARE = 0.2


def words(text: str) -> list[str]:
    """The words of a text, for tables that read better without quotes."""
    return text.split()


FIRST_NAMES = words("""
    Nora Felix Clara Hugo Ida Oscar Greta Victor Stella Jasper Mabel Otto Lydia Simon Flora Rufus Agnes Cyril
    Hazel Edgar Pearl Silas Thea Boris Ivy Magnus Celia Amos Freda Lionel Dora Basil Wanda Cedric Olga Duncan
    Rhoda Percy Sylvia Ralph Albert Alma Ambrose Anton Arthur Audrey Barnaby Beatrice Bella Bernard Bridget
    Bruno Camilla Caspar Cecil Charlotte Chester Conrad Cora Daphne Dennis Dexter Doris Dudley Edith Edmund
    Elsie Emil Enid Ernest Esther Ethel Eugene Eunice Eva Fergus Fiona Florence Gerald Gilbert Gloria Gordon
    Gwen Harold Harriet Hector Henrietta Herbert Hilda Horace Hubert Imogen Irene Iris Isaac Jerome Joan Julia
    Kenneth Laura Leonard Lorna Louis Marcus Marion Martha Maud Maurice Mildred Miriam Muriel Nancy Neville
    Norman Olive Oswald Phoebe Philip Quentin Rachel Roland Rupert Selma Stanley Theodore Tobias Ursula Vera
    Vernon Violet
""")
LAST_NAMES = words("""
    Finch Marsh Holt Barlow Quill Tanner Voss Pike Lark Dunn Frost Hale Birch Moss Reed Sharp Stone Wills
    Yates Crane Drake Ellis Gale Hobbs Ingram Judd Kerr Lowe Myers Nash Odell Parr Rowe Sloane Thorn Upton
    Vance Wren York Zeller Abbot Ames Ashby Atwood Bagley Banks Barton Baxter Beale Beck Benson Blake Bolton
    Booth Bowen Briggs Brook Burke Byrne Calder Chase Clay Cobb Colby Cotton Cross Dale Darby Dawson Denby
    Dobbs Doyle Eaton Elgin Emery Farrow Fenton Field Flint Forbes Fry Garth Gibbs Gill Goddard Gower Graves
    Grove Gunn Hart Hatch Hayes Heath Hodge Hood Howe Hull Hyde Irwin Jarvis Kemp Kirby Lamb Langley Lawton
    Leigh Lodge Mercer Mills Nolan Oakes Osborne Peck Penrose Platt Potts Quinn Ramsey Rhodes Rigby Seaton
    Shaw Skelton Snow Stokes Sutton Tate Todd Tucker Underhill
""")
JOBS = words("""
    baker teacher painter farmer doctor tailor gardener writer cook judge sailor plumber miner clerk
    porter hunter printer weaver singer miller
""")
TOWNS = words("""
    Elmford Redhill Stonebury Ashwick Millport Larkfield Greyham Oakdale Westmere Foxley Harrowgate
    Linden Saltcove Thornby Brookton Wexcombe
""")
PETS = words("cat dog parrot rabbit pony goat turtle canary hamster lizard crow hedgehog")
INSTRUMENTS = words("piano violin drum flute guitar trumpet harp cello clarinet organ")
FOODS = words("bread soup rice cheese honey fish pasta salad cake porridge ham yogurt chocolate jam")

NUMBER_WORDS = words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
""")
TENS_WORDS = words("twenty thirty forty fifty sixty seventy eighty ninety")
ROMAN_SIGNS = ((40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))

_MARKS = {"=": "statements", "?": "questions", "!": "commands", "/": "splits"}
_SLOT = re.compile(r"\{[sSa]\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO])")


@dataclass(frozen=True, order=True)
class Fact:
    """One thing that is so: the answer about a subject within a family."""

    family: str
    subject: str
    answer: str


@dataclass
class Family:
    """Facts of one kind and all the ways to word them."""

    name: str
    title: str = ""
    kind: str = ""
    statements: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def completions(self) -> list[str]:
        """Statements that end with the answer, so that recall can be measured by completing them."""
        return [wording for wording in self.statements if wording.endswith(" {a}.")]


World = dict[str, Family]


def upper_first(text: str) -> str:
    """The text with a capital first letter, the rest unchanged."""
    return text[:1].upper() + text[1:]


def render(wording: str, fact: Fact) -> str:
    """Fill a wording with a fact and put right the articles and the first letter."""
    slots = {"{S}": f"a {fact.subject}", "{s}": fact.subject, "{a}": fact.answer}
    text = _SLOT.sub(lambda match: slots[match[0]], wording)
    return upper_first(_ARTICLE.sub(r"\1n ", text))


def parse_families(text: str) -> list[Family]:
    """Read the families of one data file."""
    families: list[Family] = []
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            families.append(Family(line.strip("[]")))
        elif line.startswith("title:"):
            families[-1].title = line.removeprefix("title:").strip()
        elif line.startswith("kind:"):
            families[-1].kind = line.removeprefix("kind:").strip()
        elif line.startswith("- "):
            pairs = (pair.split("=") for pair in line[2:].split(";"))
            families[-1].facts += [Fact(families[-1].name, s.strip(), a.strip()) for s, a in pairs]
        else:
            getattr(families[-1], _MARKS[line[0]]).append(line[2:].strip())
    return families


def number_word(number: int) -> str:
    """A number from 0 to 100 in words."""
    if number < len(NUMBER_WORDS):
        return NUMBER_WORDS[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return TENS_WORDS[tens - 2] + (f"-{NUMBER_WORDS[ones]}" if ones else "")


def roman_numeral(number: int) -> str:
    """A number from 1 to 49 in Roman numerals."""
    text = ""
    for value, sign in ROMAN_SIGNS:
        count, number = divmod(number, value)
        text += sign * count
    return text


def sum_facts() -> dict[str, list[Fact]]:
    """Sums, products and differences; each pair in one order only, as the other is no new fact."""
    pairs = list(combinations_with_replacement(range(2, 13), 2))
    return {
        "sum": [Fact("sum", f"{a} plus {b}", str(a + b)) for a, b in pairs],
        "product": [Fact("product", f"{a} times {b}", str(a * b)) for a, b in pairs],
        "difference": [Fact("difference", f"{b} minus {a}", str(b - a)) for a, b in pairs if a != b],
    }


def number_facts() -> dict[str, list[Fact]]:
    """What is to be said of single numbers."""
    return {
        "double": [Fact("double", str(n), str(2 * n)) for n in range(2, 41)],
        "half": [Fact("half", str(n), str(n // 2)) for n in range(2, 61, 2)],
        "spelling": [Fact("spelling", str(n), number_word(n)) for n in range(101)],
        "next_number": [Fact("next_number", str(n), str(n + 1)) for n in range(100)],
        "roman": [Fact("roman", str(n), roman_numeral(n)) for n in range(1, 41)],
    }


def people_facts(seed: int) -> dict[str, list[Fact]]:
    """Made-up people, each with a job, a home town, a pet, an instrument and a favourite food."""
    rng = random.Random(seed)
    lasts = LAST_NAMES[:]
    rng.shuffle(lasts)
    names = [f"{first} {last}" for first, last in zip(FIRST_NAMES, lasts, strict=True)]
    choices = {"job": JOBS, "city": TOWNS, "pet": PETS, "instrument": INSTRUMENTS, "food": FOODS}
    return {family: [Fact(family, name, rng.choice(options)) for name in names] for family, options in choices.items()}


def load_world(seed: int = WORLD_SEED) -> World:
    """All families by name, in a fixed order."""
    world: World = {}
    for path in sorted(DATA_DIR.glob("*.txt")):
        for family in parse_families(path.read_text(encoding="utf-8")):
            world[family.name] = family
    for name, facts in (sum_facts() | number_facts() | people_facts(seed)).items():
        world[name].facts = facts
    return world


def all_facts(world: World) -> list[Fact]:
    """Every fact of the world."""
    return [fact for family in world.values() for fact in family.facts]


def heldout_facts(world: World, seed: int = WORLD_SEED, share: float = HELDOUT_SHARE) -> set[Fact]:
    """The share of every family that no instruction may mention; pre-training sees them like all others."""
    held: set[Fact] = set()
    for name, family in world.items():
        rng = random.Random(f"{seed}/{name}")
        held.update(rng.sample(sorted(family.facts), round(share * len(family.facts))))
    return held
