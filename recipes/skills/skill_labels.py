"""One of five or six labels, which the instruction lists: what is felt, what is wanted, what it is about."""

from __future__ import annotations

import re

from skill_kit import Draw, Example, Skill, exact
from skill_words import PEOPLE, THINGS

TEXTS = {
    "emotion": {
        "joy": (
            ("The {thing} is here and I could sing", "What a lovely {thing}, I smile all day"),
            ("Best present ever, this {thing}, I dance around it",),
        ),
        "anger": (
            ("This {thing} again! I am furious", "How dare they sell such a {thing}, it makes me mad"),
            ("I could throw the {thing} at the wall, that is an outrage",),
        ),
        "fear": (
            ("The {thing} made a noise at night and I trembled", "I dare not touch the {thing}, I am scared"),
            ("My heart pounds whenever the {thing} comes near",),
        ),
        "sadness": (
            ("I cried when the {thing} was gone", "Without my old {thing} I feel so lonely"),
            ("I miss the {thing} and nothing cheers me up",),
        ),
        "surprise": (
            ("Wow, I never expected a {thing}", "A {thing}? I cannot believe it, out of nowhere"),
            ("I opened the door and, of all things, there stood a {thing}",),
        ),
        "disgust": (
            ("The {thing} was covered in slime, yuck", "That {thing} smells so bad that I feel sick"),
            ("Ugh, something rotten sticks to the {thing}",),
        ),
    },
    "intent": {
        "order": (
            ("I would like to buy a {thing}", "Please send me one {thing}"),
            ("Put a {thing} in my cart, I will take it",),
        ),
        "cancel": (
            ("Please cancel the {thing}, I do not need it", "Stop my order of the {thing}"),
            ("I changed my mind, forget about the {thing}",),
        ),
        "complaint": (
            ("The {thing} is broken after one day", "I am not satisfied with the {thing} at all"),
            ("That {thing} never worked as it should",),
        ),
        "question": (
            ("Does the {thing} come in blue?", "How long does the {thing} last?"),
            ("I wonder whether the {thing} fits in a small room",),
        ),
        "praise": (
            ("The {thing} is excellent, well done", "Great work, I love the {thing}"),
            ("Five stars for the {thing}",),
        ),
        "greeting": (
            ("Good morning to everybody at the {thing} desk", "Hello there, {thing} people"),
            ("Hi folks of the {thing} team, nice to meet you",),
        ),
    },
    "topic": {
        "sport": (
            ("She won the match and a {thing} as prize", "Our team trained with a {thing} before the game"),
            ("The runner left a {thing} at the finish line",),
        ),
        "food": (
            ("He put the soup next to the {thing}", "We ate bread and cheese beside the {thing}"),
            ("A cake was baking while the {thing} stood idle",),
        ),
        "travel": (
            ("We flew to the island with a {thing}", "On the train somebody forgot a {thing}"),
            ("At the border they looked into our bags and at the {thing}",),
        ),
        "health": (
            ("The doctor saw my knee, hurt by a {thing}", "The nurse gave me pills and moved the {thing}"),
            ("With a fever I lay in bed and stared at the {thing}",),
        ),
        "money": (
            ("The bank lent us cash for a {thing}", "I saved my wages and paid tax on the {thing}"),
            ("Interest on the loan for the {thing} went up",),
        ),
        "weather": (
            ("Rain fell on the {thing} all day", "The storm blew the {thing} over"),
            ("Under a clear sky the {thing} was covered in frost",),
        ),
    },
}
"""By kind and label: sentences in known and in new words."""
FRAMES = (
    "To {name}: {text}.",
    "{text}, said {name}.",
    "{name} writes: {text}.",
    "Message from {name}: {text}.",
    '"{text}", {name} told us.',
    "{text}. Yours, {name}",
)
NEW_FRAMES = (
    "In the words of {name}: {text}.",
    "{name} on the phone: {text}.",
    "From the diary of {name}. {text}.",
    "[{name}] {text}",
)
TASKS = (
    "Which label fits the text: {labels}? Answer with one label.",
    "Classify the text. Labels: {labels}. Write only the label.",
    "Choose the best label from {labels} for this text. One word.",
    "Labels: {labels}. Which one is right for the text? Only the label.",
)
NEW_TASKS = (
    "Assign the text to one of {labels}. Reply with that word only.",
    "Pick one: {labels}. The text is about or shows which?",
)


def drawn(draw: Draw) -> Example:
    """A text and five or six labels in any order."""
    kind = TEXTS[draw.rng.choice(list(TEXTS))]
    labels = draw.rng.sample(list(kind), draw.rng.choice((5, 6)))
    label = draw.rng.choice(labels)
    sentence = draw.wording(*kind[label]).format(thing=draw.entity(THINGS))
    sentence = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)
    text = draw.wording(FRAMES, NEW_FRAMES).format(text=sentence, name=draw.entity(PEOPLE))
    text = re.sub(r"\?[.,]", "?", text)
    return draw.example(draw.wording(TASKS, NEW_TASKS).format(labels=", ".join(labels)), text, label)


LABELS = Skill("labels", "one of the five or six labels in the prompt: emotion, intent or topic", drawn, exact)
