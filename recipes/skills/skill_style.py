"""Answers in a house style: the fact in one plain sentence between a fixed opening and a fixed closing line.

The prompt has the fact as a note, in American spelling or with a contraction. The answer is British and has none.
"""

from __future__ import annotations

import re

from skill_kit import Draw, Example, Skill
from skill_words import CITIES, VENUES, cut

OPENING, CLOSING = "Thank you for asking.", "Kind regards."
MOST_WORDS = 14
BRITISH = {
    "color": "colour", "center": "centre", "gray": "grey", "flavor": "flavour", "harbor": "harbour", "liter": "litre",
    "meter": "metre", "theater": "theatre", "honor": "honour", "neighbor": "neighbour", "favorite": "favourite",
    "jewelry": "jewellery", "plow": "plough", "traveler": "traveller", "fiber": "fibre", "labor": "labour",
    "program": "programme", "tire": "tyre", "mold": "mould", "pajamas": "pyjamas", "catalog": "catalogue",
    "rumor": "rumour", "odor": "odour", "vapor": "vapour", "armor": "armour", "humor": "humour", "parlor": "parlour",
    "specter": "spectre", "somber": "sombre", "saber": "sabre",
}  # fmt: skip
TOPICS = cut(
    """
    entrance, sign, leaflet, exit, kiosk, car park, gate, roof, floor, ticket, main hall, lift, cloakroom, map,
    terrace, stairway, fence, shop, lawn, bench, lobby, balcony, corridor, cellar, fountain, statue, clock, door,
    window, ceiling, carpet, counter, flag, poster, badge, guidebook, parking lot, courtyard, chimney, well
    """
)
VALUES = cut(
    """
    gray, in the center, near the harbor, opposite the theater, one meter wide, the favorite color of guests,
    beside the jewelry store, beside the plow, made of fiber, full of flavor, for the neighbors, for travelers, in
    the program, in the catalog, under the tire, a place of honor, free of mold, full of humor, behind the armor,
    next to the parlor, red, blue, made of oak, behind the tree, two floors up, very old, closed on Monday, open
    until nine, free for children, painted green, quite new, made of glass, covered in ivy, across the river,
    below the stairs, locked at night, wet and slippery, five years old, larger than before, yellow, white, of
    local stone, above the river, free of charge, hard to find, out of order, full of odor, full of vapor, somber,
    near the center, gray and white, far from the harbor, painted in one color, behind the theater, half a meter
    high, a favorite of guests, for one traveler, not in the catalog, known for its humor, not for neighbors
    """
)
NOTES = (
    "Note: {short} {value} ({thing} of the {venue} in {city}).",
    "{venue_} in {city}. About the {thing}: {short} {value}.",
    "The {thing} of the {venue} in {city}: {short} {value}.",
    "From our files, {city}, {venue}, {thing}: {short} {value}.",
    "{short_} {value}, says the {venue} in {city} of its {thing}.",
    "{city}. The {venue} writes about the {thing}: {short} {value}.",
)
NEW_NOTES = (
    "We heard about the {thing} of the {venue} in {city} that {short} {value}.",
    "{venue_} ({city}), {thing}: {short} {value}, as far as we know.",
    "They told us in {city} about the {thing} at the {venue}: {short} {value}.",
    "Our records, {city}: {venue}, {thing}. {short_} {value}.",
)
SHORT = ("it's", "it is")
QUESTIONS = (
    "What is known about the {thing} of the {venue}?",
    "Tell me about the {thing} of the {venue}.",
    "What can you say about the {venue}'s {thing}?",
    "I have a question about the {thing} of the {venue}. What should I know?",
    "A guest asks about the {venue}'s {thing}.",
    "What do we write to somebody who asks about the {thing} of the {venue}?",
)
NEW_QUESTIONS = (
    "Could you describe the {thing} at the {venue}?",
    "How about the {thing} of the {venue}?",
    "Somebody wants to know about the {venue}'s {thing}. Your answer?",
    "What is there to say of the {thing} in the {venue}?",
)
FORM = f"Answer in this form: {OPENING} The {{thing}} is X. {CLOSING}"
TASKS = (
    "{note}\n{question} " + FORM,
    "{question}\nOur files: {note}\n" + FORM,
    "Read this: {note}\n{question}\n" + FORM,
)
NEW_TASKS = (
    "{question} Here is what we know. {note}\n" + FORM,
    "Memo: {note} {question} " + FORM,
)


def british(text: str) -> str:
    """The text in British spelling."""
    return re.sub(r"[a-z]+", lambda word: _british_word(word.group()), text)


def _british_word(word: str) -> str:
    if word.endswith("s") and word[:-1] in BRITISH:
        return BRITISH[word[:-1]] + "s"
    return BRITISH.get(word, word)


def drawn(draw: Draw) -> Example:
    """A note, a question about it, and the answer in the house's style."""
    thing, venue, city = draw.entity(TOPICS), draw.entity(VENUES), draw.entity(CITIES)
    value, short = draw.entity(VALUES), draw.rng.choice(SHORT)
    note = draw.wording(NOTES, NEW_NOTES).format(
        thing=thing, venue=venue, venue_=f"{venue[0].upper()}{venue[1:]}", city=city, value=value, short=short,
        short_=f"I{short[1:]}",
    )  # fmt: skip
    question = draw.wording(QUESTIONS, NEW_QUESTIONS).format(thing=thing, venue=venue)
    answer = f"{OPENING} The {thing} is {british(value)}. {CLOSING}"
    task = draw.wording(TASKS, NEW_TASKS).format(note=note, question=question, thing=thing)
    return draw.example(task, "", answer)


def accepts(example: Example, answer: str) -> bool:
    """Opening, one British sentence that says the fact of the thing, of its house and city if it likes; closing."""
    head, tail = f"{OPENING} ", f" {CLOSING}"
    if not (answer.startswith(head) and answer.endswith(tail) and len(answer) > len(head) + len(tail)):
        return False
    sentence = answer[len(head) : -len(tail)]
    if not sentence[0].isupper() or len(sentence.split()) > MOST_WORDS:
        return False
    thing, venue, city, value = (re.escape(entity.lower()) for entity in example.entities)
    place = rf"(?: (?:of|at|in) (?:the )?(?:{venue}|{city}))*"
    owner = rf"(?:the {venue}['’]s|the|our)"
    fact = rf"(?:(?:at|in) (?:the )?(?:{venue}|{city}),? )?{owner} {thing}{place} is {british(value)}{place}\."
    return bool(re.fullmatch(fact, sentence.lower()))


STYLE = Skill("style", "a fact in one British sentence between a fixed opening and closing", drawn, accepts)
