"""Dates and quantities somewhere in a sentence, brought into one form; formats are held out, too."""

from __future__ import annotations

import calendar
import json
import random
from datetime import date, timedelta

from skill_kit import Draw, Example, Skill, same_object
from skill_words import PEOPLE, cut

QUANTITY_SHARE = 0.3
FIRST, DAYS = date(1900, 1, 1), 47_000
ONES = cut(
    """
    zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
    sixteen, seventeen, eighteen, nineteen
    """
)
TENS = cut(
    """
    _, _, twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety
    """
)
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
ORDINALS |= {"twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}
MONTHS = calendar.month_name[:]
"""English in any locale that Python starts in: it asks for no other."""

DATE_FORMATS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{year}-{mm}-{dd}",
    "{dd}.{mm}.{year}",
    "the {nth} of {month} {year}",
    "{day} {mon} {year}",
    "{month} {nth}, {year}",
    "{year}/{mm}/{dd}",
)
NEW_DATE_FORMATS = ("{dd}/{mm}/{year}", "the {spelt} of {month}, {year}", "{day}-{mon}-{year}", "{year}, {month} {day}")
DATE_SENTENCES = (
    "{name} signed the lease on {date}.",
    "The parcel for {name} left the depot on {date}.",
    "Note to {name}: the hearing is set for {date}, room 4.",
    "On {date} {name} moved to a new flat.",
    "Passport of {name}, valid until {date}.",
    "{name} was born on {date} in a small town.",
    "According to {name}, the bridge opened on {date}.",
    "Invoice sent by {name}, due {date}.",
)
NEW_DATE_SENTENCES = (
    "Please remind {name} that the course begins on {date}.",
    "{date}: {name} called and left a message.",
    "The photograph, taken on {date}, shows {name} at the beach.",
    "{name} retired on {date} after many years at the mill.",
)
DATE_TASKS = (
    "Write the date in the text as JSON with the keys year, month and day.",
    'Which date does the text give? Answer like this: {"year": 2001, "month": 2, "day": 3}',
    "Find the date and return it as a JSON object of three numbers: year, month, day.",
    "Turn the date in this sentence into JSON (year, month, day).",
)
NEW_DATE_TASKS = (
    'Extract the date. Return JSON only, as in {"year": 1999, "month": 12, "day": 31}.',
    "Give the date that is mentioned, as JSON with year, month and day as numbers.",
)

UNITS = {
    "kg": ("kilograms", "kilos"),
    "km": ("kilometres", "kilometers"),
    "l": ("litres", "liters"),
    "h": ("hours", "hrs"),
    "min": ("minutes", "mins"),
    "EUR": ("euros", "Euro"),
}
"""A unit's name and a variant that is held out."""
QUANTITY_FORMATS = ("{amount} {unit}", "{amount} {long}", "{spelt} {long}", "{amount}{unit}")
NEW_QUANTITY_FORMATS = ("{amount} {variant}", "{spelt} {variant}", "{spelt} ({amount}) {long}")
QUANTITY_SENTENCES = (
    "{name} wrote {quantity} on the form.",
    "The note for {name} says {quantity} in all.",
    "Last time {name} needed {quantity}.",
    "{quantity}, that was the guess of {name}.",
    "According to {name}, it comes to {quantity} a week.",
    "They agreed on {quantity}, said {name}.",
)
NEW_QUANTITY_SENTENCES = (
    "Please tell {name} that {quantity} will be enough.",
    "With {quantity} {name} set a new record.",
    "{name} had counted on {quantity}, not more.",
)
QUANTITY_TASKS = (
    "Write the quantity in the text as JSON with the keys amount and unit (kg, km, l, h, min or EUR).",
    'Which quantity does the text give? Answer like this: {"amount": 5, "unit": "kg"}',
    "Find the quantity and return it as a JSON object: amount (a number), unit (kg, km, l, h, min, EUR).",
)
NEW_QUANTITY_TASKS = (
    'Extract the quantity. Return JSON only, as in {"amount": 8, "unit": "km"}.',
    "Give the quantity that is mentioned, as JSON with amount (number) and unit (kg, km, l, h, min, EUR).",
)


def spelt(number: int) -> str:
    """0 to 99 in words."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]}-{ONES[ones]}" if ones else TENS[tens]


def spelt_ordinal(number: int) -> str:
    """1 to 31 in words: first, second."""
    *head, last = spelt(number).split("-")
    return "-".join([*head, ORDINALS.get(last, f"{last}th")])


def nth(number: int) -> str:
    """1st, 2nd, 11th."""
    ending = "th" if 11 <= number <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def written(day: date, form: str) -> str:
    """A date in a format."""
    month = MONTHS[day.month]
    return form.format(
        day=day.day, month=month, mon=month[:3], year=day.year, dd=f"{day.day:02}", mm=f"{day.month:02}",
        nth=nth(day.day), spelt=spelt_ordinal(day.day),
    )  # fmt: skip


def a_date(draw: Draw) -> Example:
    """A date in a sentence. In `18/10/1980` the day is above twelve: nobody could tell otherwise."""
    form = draw.wording(DATE_FORMATS, NEW_DATE_FORMATS)
    ambiguous = form == "{dd}/{mm}/{year}"

    def a_day(rng: random.Random) -> tuple[date, int]:
        days = rng.randrange(DAYS)
        return FIRST + timedelta(days=days), days

    while (day := draw.until(a_day)).day <= 12 and ambiguous:
        pass
    draw.entities.append(day.isoformat())
    sentence = draw.wording(DATE_SENTENCES, NEW_DATE_SENTENCES)
    text = sentence.format(name=draw.entity(PEOPLE), date=written(day, form))
    answer = json.dumps({"year": day.year, "month": day.month, "day": day.day})
    return draw.example(draw.wording(DATE_TASKS, NEW_DATE_TASKS), text[0].upper() + text[1:], answer)


def a_quantity(draw: Draw) -> Example:
    """A quantity in a sentence."""

    def an_amount(rng: random.Random) -> tuple[int, int]:
        amount = rng.randrange(2, 100)
        return amount, amount

    amount, unit = draw.until(an_amount), draw.rng.choice(list(UNITS))
    draw.entities.append(f"{amount} {unit}")
    long, variant = UNITS[unit]
    form = draw.wording(QUANTITY_FORMATS, NEW_QUANTITY_FORMATS)
    quantity = form.format(amount=amount, unit=unit, long=long, variant=variant, spelt=spelt(amount))
    sentence = draw.wording(QUANTITY_SENTENCES, NEW_QUANTITY_SENTENCES)
    text = sentence.format(name=draw.entity(PEOPLE), quantity=quantity)
    answer = json.dumps({"amount": amount, "unit": unit})
    return draw.example(draw.wording(QUANTITY_TASKS, NEW_QUANTITY_TASKS), text[0].upper() + text[1:], answer)


def drawn(draw: Draw) -> Example:
    """A date, or a quantity."""
    return a_quantity(draw) if draw.rng.random() < QUANTITY_SHARE else a_date(draw)


DATES = Skill("dates", "a date or quantity in a sentence, as JSON in one form", drawn, same_object)
