"""Orders, bookings and contacts in free text, as JSON of the schema that the instruction gives.

The keys' names and their order change from example to example, so the schema has to be read; some names are held out.
"""

from __future__ import annotations

import json
import random

from skill_kit import Draw, Example, Skill, same_object
from skill_words import CITIES, GOODS, PEOPLE, SURNAMES

KEYS = {
    "goods": (("item", "product", "article"), ("goods", "what")),
    "count": (("quantity", "count", "pieces"), ("number", "amount")),
    "city": (("city", "town", "place"), ("location", "where")),
    "name": (("name", "customer", "person"), ("client", "contact")),
    "guests": (("guests", "people", "seats"), ("party", "visitors")),
    "day": (("day", "weekday", "best_day"), ("when", "day_name")),
    "hour": (("hour", "time", "start"), ("begins", "at")),
    "phone": (("phone", "telephone", "tel"), ("mobile", "line")),
}
"""Known and new names of what a text can give."""
ALL_SHARE = 0.15
"""Of the schemas that ask for all four fields of a text; the others ask for three."""
NUMBERS = ("count", "guests", "hour")
KINDS = {
    "order": (
        ("goods", "count", "city", "name"),
        (
            "{name} orders {count} {goods}, to be sent to {city}.",
            "Please ship {count} {goods} to {name} in {city}.",
            "Hello, this is {name} from {city}. I would like {count} {goods}.",
            "New order: {goods}, {count} of them, for {name}, {city}.",
        ),
        (
            "Our shop in {city} has run out of {goods}; could we have {count} more? Yours, {name}",
            "{city} needs {count} {goods} at once. The contact there is {name}.",
        ),
    ),
    "booking": (
        ("name", "guests", "day", "hour"),
        (
            "A table for {guests} on {day} at {hour}, please. The name is {name}.",
            "{name} booked for {guests} people, {day}, {hour} o'clock.",
            "Hi, {name} here. We are {guests} and would come on {day} at {hour}.",
            "Booking: {day} at {hour}, {guests} guests, under {name}.",
        ),
        (
            "Could you seat {guests} of us at {hour} this {day}? Ask for {name}.",
            "On {day} {name} is coming with friends, {guests} in all, around {hour}.",
        ),
    ),
    "contact": (
        ("name", "phone", "city", "day"),
        (
            "{name} lives in {city}. Phone {phone}, best on {day}.",
            "You can reach {name} ({city}) under {phone} on {day}.",
            "Contact: {name}, {city}, {phone}. Free every {day}.",
            "On {day} call {phone} and ask for {name} in {city}.",
        ),
        (
            "If you are in {city} on a {day}, ring {name}: {phone}.",
            "{phone} is the number of {name}, who is in {city} each {day}.",
        ),
    ),
}
"""What a kind of text tells, how it is told, and how in the held-out wordings."""
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TASKS = (
    "Fill in this JSON from the text: {schema}",
    "Return a JSON object with {keys} from the text. Schema: {schema}",
    "Extract the data as JSON. Use these keys and types: {schema}",
    "Read the text and answer with JSON of this form: {schema}",
)
NEW_TASKS = ("What does the text say? Reply only with JSON like {schema}", "Convert to JSON, no other words: {schema}")


def a_value(draw: Draw, field: str) -> str | int:
    """Something for a field."""
    rng = draw.rng
    if field == "goods":
        return draw.entity(GOODS)
    if field == "city":
        return draw.entity(CITIES)
    if field == "name":
        return f"{draw.entity(PEOPLE)} {draw.entity(SURNAMES)}"
    if field == "phone":
        return a_phone(draw)
    return {
        "count": lambda: rng.randrange(2, 60), "guests": lambda: rng.randrange(2, 13),
        "hour": lambda: rng.randrange(11, 23), "day": lambda: rng.choice(WEEKDAYS),
    }[field]()  # fmt: skip


def a_phone(draw: Draw) -> str:
    """Five digits, of the split's own numbers."""

    def digits(rng: random.Random) -> tuple[str, int]:
        number = rng.randrange(20_000, 100_000)
        return str(number), number

    phone = draw.until(digits)
    draw.entities.append(phone)
    return phone


def drawn(draw: Draw) -> Example:
    """Three fields of a text, or all four, by the names and in the order of a schema."""
    fields, known, new = KINDS[draw.rng.choice(list(KINDS))]
    values = {field: a_value(draw, field) for field in fields}
    text = draw.wording(known, new).format(**values)
    asked = draw.rng.sample(fields, 4 if draw.rng.random() < ALL_SHARE else 3)
    names = {field: draw.wording(*KEYS[field]) for field in asked}
    answer = {name: values[field] for field, name in names.items()}
    types = {name: "number" if field in NUMBERS else "string" for field, name in names.items()}
    schema = "{" + ", ".join(f'"{name}": {kind}' for name, kind in types.items()) + "}"
    keys = ", ".join(types)
    return draw.example(draw.wording(TASKS, NEW_TASKS).format(schema=schema, keys=keys), text, json.dumps(answer))


EXTRACT = Skill("extract", "an order, a booking or a contact, as JSON of the given schema", drawn, same_object)
