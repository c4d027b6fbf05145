"""Support tickets: the desk they belong to and a short reason, `billing: Nimbus was charged twice`.

There are fifteen reasons, in fixed words; tickets say them in many. The product's name is copied.
"""

from __future__ import annotations

from skill_kit import Draw, Example, Skill, exact
from skill_words import PEOPLE, PRODUCTS

PROBLEMS = {
    "billing": {
        "was charged twice": (
            (
                "You charged my card twice for {product}",
                "I paid two times for {product}",
                "{product} is on my bill twice",
            ),
            ("The same sum for {product} left my bank account on Monday and again on Tuesday",),
        ),
        "price is wrong": (
            ("{product} costs more than we agreed", "The price of {product} on the invoice is not right"),
            ("The offer said 20 euros for {product} and I was asked for 30",),
        ),
        "refund is missing": (
            ("I sent {product} back and got no refund", "The refund for {product} has not come"),
            ("I returned {product} in May and my money is still with you",),
        ),
    },
    "delivery": {
        "has not arrived": (
            ("{product} has not arrived", "I am still waiting for the parcel with {product}", "{product} never came"),
            ("{product} should have been at my door last week",),
        ),
        "arrived damaged": (
            ("The parcel with {product} was crushed", "{product} arrived broken", "{product} was damaged on the way"),
            ("I opened the box and found {product} in pieces",),
        ),
        "went to the wrong address": (
            ("The courier took {product} to my neighbour", "{product} was sent to my old address"),
            ("Somebody in another street has received {product} instead of me",),
        ),
    },
    "technical": {
        "does not start": (
            ("{product} does not start", "I press the button and {product} stays dark", "{product} will not switch on"),
            ("{product} shows no sign of life",),
        ),
        "crashes": (
            ("{product} keeps crashing", "{product} freezes every hour", "{product} closes by itself with an error"),
            ("In the middle of work {product} hangs and all is lost",),
        ),
        "is too slow": (
            ("{product} is very slow", "It takes minutes until {product} opens a page"),
            ("I could make tea while {product} loads",),
        ),
    },
    "account": {
        "password is lost": (
            ("I forgot my password for {product}", "My password for {product} is gone"),
            ("{product} asks for a secret word that I no longer know",),
        ),
        "login is locked": (
            ("{product} says that my login is locked", "I am locked out of {product}"),
            ("After three wrong tries {product} will not let me in",),
        ),
        "needs a new email": (
            ("Please change my email address for {product}", "{product} still has my old email"),
            ("{product} writes to a mailbox that I gave up, here is the right one",),
        ),
    },
    "sales": {
        "quote is wanted": (
            ("What would {product} cost for ten people?", "Could you send us a quote for {product}?"),
            ("Our school thinks of buying {product}, please name a price",),
        ),
        "trial is wanted": (
            ("Can I test {product} for a week before I buy?", "Is there a free trial of {product}?"),
            ("I would like to see whether I like {product} and pay later",),
        ),
        "upgrade is wanted": (
            ("How do I get the bigger version of {product}?", "I want to upgrade {product}"),
            ("We have outgrown the small plan of {product} and would pay for the next size",),
        ),
    },
}
"""By desk: a reason, and how tickets say it in known and in new words."""
TICKETS = (
    "Hello, {problem} Please help. {name}",
    "{problem} Can you look into it? Thanks, {name}",
    "Dear team, I have a question. {problem} Regards, {name}",
    "Hi! It is about {product}. {problem} {name}",
    "{name} writes: {problem}",
    "Good morning. {problem} What now? {name}",
    "Ticket from {name}: {problem}",
    "I have been your customer for years. {problem} {name}",
)
NEW_TICKETS = (
    "{name} here again. {problem}",
    "Could somebody take care of this? {problem} Best, {name}",
    "Phone note, caller {name}: {problem}",
    "I am sorry to trouble you. {problem} {name}",
)
TASKS = (
    "Route the ticket to billing, delivery, technical, account or sales. Answer as label: product and reason.",
    "Which desk (billing, delivery, technical, account, sales) takes this ticket, and why? Write desk: product reason.",
    "Label the ticket billing, delivery, technical, account or sales, then a colon, the product and a short reason.",
)
NEW_TASKS = (
    "Sort this ticket: billing, delivery, technical, account or sales? Give the label, a colon, product and reason.",
    "Ticket desk: name the queue (billing, delivery, technical, account, sales), a colon, and what is wrong.",
)


def drawn(draw: Draw) -> Example:
    """A ticket, its desk and its reason."""
    product, name = draw.entity(PRODUCTS), draw.entity(PEOPLE)
    desk = draw.rng.choice(list(PROBLEMS))
    reason = draw.rng.choice(list(PROBLEMS[desk]))
    problem = draw.wording(*PROBLEMS[desk][reason]).format(product=product)
    sentence = problem if problem.endswith("?") else f"{problem}."
    text = draw.wording(TICKETS, NEW_TICKETS).format(product=product, name=name, problem=sentence)
    return draw.example(draw.wording(TASKS, NEW_TASKS), text, f"{desk}: {product} {reason}")


ROUTING = Skill("routing", "a support ticket to its desk, with a short reason", drawn, exact)
