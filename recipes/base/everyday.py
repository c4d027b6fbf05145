"""Everyday pages without facts: office memos, manuals, letters and shop notes.

Why they exist: an adapter of a few thousand parameters can steer a frozen base towards what it
knows, but cannot teach it words.  So the base meets all the words of the instruction template
here in ordinary use (below, instruction, describes, task, paired, input, provides, further,
context, write, response, appropriately, completes, request), and headings of all kinds, but never
the template.  What follows a response heading here is a polite reply or a remark, not a fact, even
where a fact was asked for (``corpus.correspondence``): answering there is left to the adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from world import words


def choices(text: str) -> list[str]:
    """The parts of a table row, which semicolons set apart."""
    return [" ".join(part.split()) for part in text.split(";")]


NAMES = words("""
    Tom Ann Ben Mary John Lucy Sam Kate Paul Jane Peter Rose George Emma Harry Alice Frank Helen Jack
    Ellen
""")

SLOTS: dict[str, list[str]] = {
    "thing": choices("""
        lamp; clock; radio; pump; press; kettle; printer; mower; heater; bell; camera; stove;
        lock; engine; scale
    """),
    "part": choices("""
        lid; handle; button; wheel; cord; screw; filter; belt; spring; cover; switch; lever
    """),
    "verb": choices("""
        turn; press; lift; clean; check; open; close; pull; push; hold; remove; loosen
    """),
    "goods": choices("""
        two boxes of soap; a new chair; ten bags of flour; a roll of wire; paper and ink; six
        cups; a load of coal; four tins of paint; a box of candles; some garden seeds
    """),
    "room": choices("""
        office; kitchen; store room; hall; workshop; library; school; shop; cellar; garden
    """),
    "task": choices("""
        count the boxes; write a letter to the bank; clean the windows; order more paper; plan
        the meeting; mend the gate; copy the list of names; sort the post; feed the birds; water
        the plants; set the table
    """),
    "state": choices("""
        done; late; ready; not finished; easy; too long; in good order; still open; well done;
        better than before
    """),
    "time": choices("""
        today; tomorrow; this week; before noon; by Friday; next month; after lunch; at once; in
        the evening
    """),
    "adj": choices("""
        short; long; clear; polite; careful; kind; simple; quick; complete; useful; full; plain
    """),
    "text": choices("""
        letter; note; report; story; list; page; poem; message; answer; reply; description;
        summary
    """),
}

SENTENCES = """
The task below is to {task}.
This task describes what to do {time}.
Your next task is to {task} {time}.
The instruction describes how to {verb} the {part}.
Each instruction describes one step, and each step completes a part of the task.
An instruction that is {adj} saves time.
A good instruction describes the task and provides the context.
The page below describes the {thing} in a {adj} way.
This is a {thing} that completes the task by itself.
Read the instruction below before you {verb} the {part}.
The list below provides further help with the {thing}.
The {thing} is paired with a {part} that provides power.
Every {thing} comes paired with a {adj} {text}.
The {text} is paired with an input from the {room}.
The input goes in at the top, and the output comes out below.
The input of the {thing} is a {part}; its output is heat.
An input that is wrong gives a wrong output.
Please write a {adj} {text} {time}.
Write a {text} that provides context for the {room}.
Write your name below and wait for a response.
The response to the {text} was {adj}.
We expect a {adj} response {time}.
A {adj} response is always welcome.
The clerk responded appropriately to the request.
The {room} should be used appropriately.
She answered the request appropriately and in {adj} words.
Dress appropriately for the {room}.
Your request for {goods} was received {time}.
The request below is for {goods}.
This {text} completes the request of {name}.
He who completes the task {time} may go home.
The {text} provides further context.
For further context, ask {name} in the {room}.
{name} provides the {room} with {goods}.
No further request came from the {room}.
Without context the {text} makes no sense.
The work is {state}.
{name} wrote to say that the {text} is {state}.
See the {text} below for further details.
Use the {thing} only in the {room}.
{name} will {task} {time}.
""".strip().splitlines()

REPLIES = """
Thank you for your {text}. We will {task} {time}.
{name} has read your request. The work is {state}.
We are sorry, but the {thing} is {state}. Please write again {time}.
The {room} has sent {goods}. Nothing further is needed.
Your request is {state}. {name} will write {time}.
I will {task} {time}, and {name} will help me.
Please ask {name} in the {room}. The {text} is {state}.
The {thing} stops and the {part} comes loose. Wait, then try again {time}.
A light goes on and the {thing} starts. This completes the test.
We can send {goods} {time}. Further goods must wait.
""".strip().splitlines()

Maker = Callable[[random.Random], str]


def fill(template: str, rng: random.Random) -> str:
    """Put a random word into every slot."""
    for slot, fillings in SLOTS.items():
        while "{" + slot + "}" in template:
            template = template.replace("{" + slot + "}", rng.choice(fillings), 1)
    while "{name}" in template:
        template = template.replace("{name}", rng.choice(NAMES), 1)
    return template[:1].upper() + template[1:]


def some(rng: random.Random, low: int, high: int) -> str:
    """A few everyday sentences."""
    return " ".join(fill(s, rng) for s in rng.sample(SENTENCES, rng.randint(low, high)))


def reply(rng: random.Random) -> str:
    """What people write back."""
    return fill(rng.choice(REPLIES), rng)


def heading(label: str, rng: random.Random) -> str:
    """A heading in one of many shapes, with its line break."""
    shapes = (
        "### {}:\n",
        "### {}\n",
        "## {}\n",
        "## {}:\n",
        "# {}\n",
        "{}:\n",
        "**{}**\n",
        "[{}]\n",
        "{}\n---\n",
        "{}: ",
    )
    return rng.choice(shapes).format(label)


def plain_heading(label: str, rng: random.Random) -> str:
    """A heading without the three hash marks and colon: for the labels that the template itself uses."""
    shapes = (
        "## {}\n",
        "# {}:\n",
        "{}:\n",
        "**{}:**\n",
        "[{}]\n",
        "{}: ",
        "-- {} --\n",
        "### {} of the day\n",
        "### Our {}:\n",
        "### The {}:\n",
    )
    return rng.choice(shapes).format(label)


def memo(rng: random.Random) -> str:
    """An office memo: a request under one heading and a response under another."""
    parts = [some(rng, 1, 2)] if rng.random() < 0.5 else []
    ask = rng.choice(("Request", "Task", "Instruction", "Message", "Letter"))
    parts.append(plain_heading(ask, rng) + some(rng, 1, 2))
    if rng.random() < 0.4:
        more = rng.choice(("Input", "Context", "Further context", "Note", "Details"))
        parts.append(plain_heading(more, rng) + fill(rng.choice(SLOTS["goods"] + SENTENCES), rng))
    back = rng.choice(("Response", "Response", "Reply", "Our response", "Remarks"))
    parts.append(plain_heading(back, rng) + reply(rng))
    return "\n\n".join(parts)


def manual(rng: random.Random) -> str:
    """Numbered instructions for a machine."""
    thing = rng.choice(SLOTS["thing"])
    title = heading(rng.choice((f"How to use the {thing}", f"The {thing}", "Manual", "Instructions", "Steps")), rng)
    steps = (
        f"{n}. "
        + fill(
            rng.choice(
                (
                    "{verb} the {part}.",
                    "{verb} the {part} and wait.",
                    "{verb} the {part}, then {verb} the {part}.",
                    "Write down the input.",
                    "Wait for a response.",
                )
            ),
            rng,
        )
        for n in range(1, 7)
    )
    text = "\n".join(list(steps)[: rng.randint(2, 6)])
    return (some(rng, 1, 1) + "\n\n" if rng.random() < 0.5 else "") + title + text


def letter(rng: random.Random) -> str:
    """A letter between two people."""
    one, two = rng.sample(NAMES, 2)
    body = some(rng, 2, 4)
    close = rng.choice(("Yours", "Kind regards", "Your friend", "With best wishes"))
    return f"Dear {one},\n\n{body}\n\n{close},\n{two}"


def table(rng: random.Random) -> str:
    """Input and output pairs, as on a machine's label."""
    first, second = rng.choice(
        (("Input", "Output"), ("Instruction", "Response"), ("Request", "Response"), ("Task", "State"))
    )
    rows = (
        f"{first}: {fill('{verb} the {part}', rng)}\n{second}: "
        + (rng.choice(SLOTS["state"]) if rng.random() < 0.5 else reply(rng))
        for _ in range(rng.randint(1, 3))
    )
    return "\n\n".join(rows)


def note(rng: random.Random) -> str:
    """A few sentences, perhaps under a heading."""
    body = some(rng, 2, 5)
    return (
        heading(rng.choice(("Note", "Notice", "To all", "Context", "Work", "Further news")), rng) + body
        if rng.random() < 0.4
        else body
    )


MAKERS: tuple[Maker, ...] = (memo, memo, manual, letter, table, note)


def everyday_page(rng: random.Random) -> str:
    """One page of everyday writing."""
    return rng.choice(MAKERS)(rng)
