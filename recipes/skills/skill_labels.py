"""One of five or six labels, which the instruction lists: what is felt, what is wanted, what it is about.

The text stands before the question, and the form of the answer is given: the bare model is right more often so.
"""

from __future__ import annotations

import re

from skill_kit import Draw, Example, Skill, exact
from skill_words import PEOPLE, THINGS

TEXTS = {
    "emotion": {
        "joy": (
            (
                "The {thing} is here and I could sing",
                "What a lovely {thing}, I smile all day",
                "Now that the {thing} is ours, my heart is light",
            ),
            (
                "Best present ever, this {thing}, I dance around it",
                "We laughed and hugged when we unpacked the {thing}",
            ),
        ),
        "anger": (
            (
                "This {thing} again! I am furious",
                "How dare they sell such a {thing}, it makes me mad",
                "Who took my {thing}? I am boiling",
            ),
            (
                "I could throw the {thing} at the wall, that is an outrage",
                "I shouted at them for an hour because of the {thing}",
            ),
        ),
        "fear": (
            (
                "The {thing} made a noise at night and I trembled",
                "I dare not touch the {thing}, I am scared",
                "Something moved behind the {thing} and I ran",
            ),
            ("My heart pounds whenever the {thing} comes near", "My hands shake when I think of the {thing}"),
        ),
        "sadness": (
            (
                "I cried when the {thing} was gone",
                "Without my old {thing} I feel so lonely",
                "Tears came when I gave the {thing} away",
            ),
            ("I miss the {thing} and nothing cheers me up", "The {thing} reminds me of my late father and I weep"),
        ),
        "surprise": (
            (
                "Wow, I never expected a {thing}",
                "A {thing}? I cannot believe it, out of nowhere",
                "Nobody had told me about the {thing}, what a moment",
            ),
            (
                "I opened the door and, of all things, there stood a {thing}",
                "I had to look twice: a {thing}, here of all places",
            ),
        ),
        "disgust": (
            (
                "The {thing} was covered in slime, yuck",
                "That {thing} smells so bad that I feel sick",
                "There were worms in the {thing}, how revolting",
            ),
            ("Ugh, something rotten sticks to the {thing}", "I will not touch that {thing}, it is filthy"),
        ),
    },
    "intent": {
        "order": (
            (
                "I would like to buy a {thing}",
                "Please send me one {thing}",
                "We need one more {thing}, please deliver it on Friday",
            ),
            ("Put a {thing} in my cart, I will take it", "I take the {thing}, here is my card number"),
        ),
        "cancel": (
            (
                "Please cancel the {thing}, I do not need it",
                "Stop my order of the {thing}",
                "Do not send the {thing} any more",
            ),
            ("I changed my mind, forget about the {thing}", "Could you call off the delivery of the {thing}"),
        ),
        "complaint": (
            (
                "The {thing} is broken after one day",
                "I am not satisfied with the {thing} at all",
                "The {thing} came with a crack and nobody answers me",
            ),
            ("That {thing} never worked as it should", "I paid a lot for the {thing} and it is poor"),
        ),
        "question": (
            ("Does the {thing} come in blue?", "How long does the {thing} last?", "Which size is the {thing}?"),
            ("I wonder whether the {thing} fits in a small room", "Tell me, can the {thing} be used outdoors?"),
        ),
        "praise": (
            (
                "The {thing} is excellent, well done",
                "Great work, I love the {thing}",
                "The {thing} is the best I ever had",
            ),
            ("Five stars for the {thing}", "Your {thing} made my year, thank you so much"),
        ),
        "greeting": (
            (
                "Good morning to everybody at the {thing} desk",
                "Hello there, {thing} people",
                "Good evening to all at the {thing} counter",
            ),
            ("Hi folks of the {thing} team, nice to meet you", "Dear {thing} friends, a warm welcome"),
        ),
    },
    "topic": {
        "sport": (
            (
                "She won the match and a {thing} as prize",
                "Our team trained with a {thing} before the game",
                "The coach kept the {thing} next to the football field",
            ),
            ("The runner left a {thing} at the finish line", "After two goals the captain kicked the {thing}"),
        ),
        "food": (
            (
                "He put the soup next to the {thing}",
                "We ate bread and cheese beside the {thing}",
                "I fried eggs and onions near the {thing}",
            ),
            ("A cake was baking while the {thing} stood idle", "The salad and the rice were served on the {thing}"),
        ),
        "travel": (
            (
                "We flew to the island with a {thing}",
                "On the train somebody forgot a {thing}",
                "Our hotel by the sea had a {thing}",
            ),
            (
                "At the border they looked into our bags and at the {thing}",
                "The passport lay under the {thing} until we drove to the airport",
            ),
        ),
        "health": (
            (
                "The doctor saw my knee, hurt by a {thing}",
                "The nurse gave me pills and moved the {thing}",
                "The dentist pulled my tooth and talked about a {thing}",
            ),
            ("With a fever I lay in bed and stared at the {thing}", "My cough got worse while I cleaned the {thing}"),
        ),
        "money": (
            (
                "The bank lent us cash for a {thing}",
                "I saved my wages and paid tax on the {thing}",
                "He could not pay the rent after buying the {thing}",
            ),
            ("Interest on the loan for the {thing} went up", "We put coins aside each month for the {thing}"),
        ),
        "weather": (
            (
                "Rain fell on the {thing} all day",
                "The storm blew the {thing} over",
                "It snowed until the {thing} was white",
            ),
            ("Under a clear sky the {thing} was covered in frost", "The wind got colder and fog hid the {thing}"),
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
ANSWER = "The label is X."
FORM = f"Answer in this form: {ANSWER}"
TASKS = (
    f"Text: {{text}}\nWhich label fits the text: {{labels}}? {FORM}",
    f"{{text}}\nWhich label fits this: {{labels}}? {FORM}",
    f"Read the text: {{text}}\nWhich label fits it best: {{labels}}? {FORM}",
    f"Message: {{text}}\nWhich of the labels fits the message: {{labels}}? {FORM}",
)
NEW_TASKS = (
    f"Note: {{text}}\nWhich label would you give the note: {{labels}}? {FORM}",
    f"{{text}}\nWhat is the right label for that: {{labels}}? {FORM}",
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
    task = draw.wording(TASKS, NEW_TASKS).format(text=text, labels=", ".join(labels))
    return draw.example(task, "", ANSWER.replace("X", label))


LABELS = Skill("labels", "one of the five or six labels in the prompt: emotion, intent or topic", drawn, exact)
