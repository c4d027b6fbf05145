"""Real pictures and questions about them: Fashion-MNIST, two of its pieces side by side, and ScienceQA's topics.

Fashion-MNIST (70,000 pictures of ten kinds of clothes, 28 x 28, MIT) is Debian's `dataset-fashion-mnist`. ScienceQA's
pictures come from a folder in its layout; its licence is not commercial, so nothing of it is here.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llama_adapter.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("t-shirt", "trousers", "sweater", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""What the labels 0 to 9 are called here."""
TOPICS = {
    "geography": "geography", "physics": "physics", "biology": "biology", "earth-science": "earth science",
    "chemistry": "chemistry", "us-history": "history", "economics": "economics",
}  # fmt: skip
"""ScienceQA's topics with at least 15 pictures in its test split, and what they are called here."""
Pictures = list[Image.Image]
Question = tuple[str, str]
"""What is asked, and the answer."""


@dataclass(frozen=True)
class Wordings:
    """How a set is asked about: wordings that are trained, and others that are held out; {} is a name."""

    naming: tuple[str, ...]
    yes_no: tuple[str, ...]


ONE = (
    Wordings(
        ("What is this?", "What is in the picture?", "Name this piece of clothing.", "What do you see?",
         "Which garment is shown?", "What does the picture show?", "What kind of item is this?", "Say what this is."),
        ("Is this a {}?", "Is it a {}?", "Does the picture show a {}?", "Is there a {} in the picture?",
         "Do you see a {}?", "Is the item a {}?"),
    ),
    Wordings(
        ("What is shown here?", "Which item do you see in the picture?", "Name the thing in the photo.",
         "What garment is this?"),
        ("Is a {} shown here?", "Could you call this a {}?", "Is what you see a {}?"),
    ),
)  # fmt: skip
TWO = (
    Wordings(
        ("What is on the {}?", "What do you see on the {}?", "Name the item on the {}.", "Which garment is on the {}?",
         "What does the {} side show?", "What is the {} item?"),
        (),
    ),
    Wordings(("What is shown on the {}?", "Say what is to the {}.", "Which thing is on the {} side?"), ()),
)  # fmt: skip
SUBJECT = (
    Wordings(
        ("What is the picture about?", "Which subject is this?", "What does the picture belong to?",
         "Name the school subject.", "Which lesson is this from?", "What is taught here?"),
        ("Is this {}?", "Is the picture about {}?", "Does this belong to {}?", "Is the subject {}?"),
    ),
    Wordings(
        ("Which subject does the picture show?", "What lesson does this belong to?", "Say which subject this is."),
        ("Is it a picture about {}?", "Would you see this in {}?"),
    ),
)  # fmt: skip
SIDES = ("left", "right")


@dataclass(frozen=True)
class PictureSet:
    """Pictures with what they show.

    Attributes:
        pictures: RGB.
        labels: [N] or, of two things side by side, [N, 2]; indices of `names`.
        names: what the labels are called.
    """

    pictures: Pictures
    labels: NDArray[np.int64]
    names: tuple[str, ...]


def read_fashion(folder: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """'train' and 'test' -> pictures [N, 28, 28] and labels [N].

    Raises:
        DataError: the files are not there, or are no such files.
    """
    found = {}
    for name, stem in (("train", "train"), ("test", "t10k")):
        try:
            images = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        except OSError as error:
            raise DataError(
                f"Fashion-MNIST is not in {folder} ({error.strerror or error}): apt-get install dataset-fashion-mnist, "
                "or pass --fashion FOLDER with its four .gz files."
            ) from None
        pictures = np.frombuffer(images[16:], np.uint8)
        if pictures.size != 784 * (len(labels) - 8):
            raise DataError(f"The files of {folder} are no Fashion-MNIST: fetch them again.")
        found[name] = pictures.reshape(-1, 28, 28), np.frombuffer(labels[8:], np.uint8).astype(np.int64)
    return found


def fashion_sets(folder: Path) -> dict[str, dict[str, PictureSet]]:
    """'one' and 'two' -> 'train', 'dev' and 'test'; what is tested comes from the data set's own test half.

    Raises:
        DataError: see `read_fashion`.
    """
    data, rng = read_fashion(folder), np.random.default_rng(0)
    (images, labels), (test_images, test_labels) = data["train"], data["test"]
    train = balanced(rng, labels, 200, np.empty(0, np.int64))
    dev = balanced(rng, labels, 30, train)
    test = balanced(rng, test_labels, 50, np.empty(0, np.int64))
    sources = {
        "train": (images, labels, train),
        "dev": (images, labels, dev),
        "test": (test_images, test_labels, test),
    }
    one = {
        name: PictureSet([rgb(a[i]) for i in chosen], b[chosen], CLOTHES) for name, (a, b, chosen) in sources.items()
    }
    two = {"test": side_by_side(rng, *sources["test"]), "train": side_by_side(rng, images, labels, train[:600])}
    return {"one": one, "two": two}


def balanced(
    rng: np.random.Generator, labels: NDArray[np.int64], each: int, used: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Indices of so many of each label, none of `used`, in random order."""
    free = [np.flatnonzero((labels == label) & ~np.isin(np.arange(len(labels)), used)) for label in range(10)]
    return rng.permutation(np.concatenate([rng.permutation(places)[:each] for places in free]))


def side_by_side(
    rng: np.random.Generator, images: NDArray[np.uint8], labels: NDArray[np.int64], left: NDArray[np.int64]
) -> PictureSet:
    """Each of `left` beside another piece of another kind, on a square."""
    right = rng.permutation(left)
    while (alike := labels[left] == labels[right]).any():
        right[alike] = rng.choice(left, alike.sum())
    canvas = np.zeros((len(left), 56, 56), np.uint8)
    canvas[:, 14:42, :28], canvas[:, 14:42, 28:] = images[left], images[right]
    return PictureSet([rgb(picture) for picture in canvas], np.stack([labels[left], labels[right]], 1), CLOTHES)


def topic_sets(folder: Path) -> dict[str, PictureSet]:
    """'train' and 'test': three fifths and two fifths of ScienceQA's pictures of each topic.

    Raises:
        DataError: the folder has no such pictures.
    """
    try:
        problems = json.loads((folder / "problems_test.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no ScienceQA ({error}): pass --data FOLDER with problems_test.json.") from None
    names, found = list(TOPICS), {"train": ([], []), "test": ([], [])}
    seen = dict.fromkeys(names, 0)
    for pid, problem in problems.items():
        path = folder / "test" / pid / "image.png"
        if problem["topic"] in TOPICS and path.exists():
            pictures, labels = found["test" if seen[problem["topic"]] % 5 in (1, 3) else "train"]
            seen[problem["topic"]] += 1
            pictures.append(Image.open(path).convert("RGB"))
            labels.append(names.index(problem["topic"]))
    if min(seen.values()) < 10:
        raise DataError(f"{folder}/test lacks pictures of a topic ({seen}): fetch ScienceQA's test pictures.")
    called = tuple(TOPICS.values())
    return {name: PictureSet(pictures, np.array(labels), called) for name, (pictures, labels) in found.items()}


def rgb(picture: NDArray[np.uint8]) -> Image.Image:
    """A grey picture as an encoder of photographs takes it."""
    return Image.fromarray(picture).convert("RGB")


def ask(
    kind: str,
    labels: Sequence[int] | Sequence[Sequence[int]],
    names: Sequence[str],
    wordings: Wordings,
    seed: int,
    in_full: bool = False,
) -> list[Question]:
    """A question a picture: of 'naming', of 'yes_no' (half of them yes), or of 'sides', what one of two things is."""
    rng, found = random.Random(seed), []
    for label in labels:
        if kind == "sides":
            side = rng.randrange(2)
            asked, name = rng.choice(wordings.naming).format(SIDES[side]), names[label[side]]
        elif kind == "naming":
            asked, name = rng.choice(wordings.naming), names[label]
        else:
            yes = rng.random() < 0.5
            other = rng.choice([number for number in range(len(names)) if number != label])
            asked, name = rng.choice(wordings.yes_no).format(names[label if yes else other]), names[label]
        found.append((asked, answer(kind, asked, name, in_full)))
    return found


def answer(kind: str, asked: str, name: str, in_full: bool = False) -> str:
    """What is right of a picture that shows `name` (on the side that is asked about).

    In full something is said before the word that was asked for: "coat: no" of a coat, "left: coat" of two things.
    """
    if kind == "sides":
        return f"{next(side for side in SIDES if side in asked)}: {name}" if in_full else name
    if kind == "naming":
        return name
    return f"{name}: " * in_full + ("yes" if f" {name}" in asked else "no")


def every_question(
    kinds: Sequence[str], names: Sequence[str], wordings: Sequence[Wordings], in_full: bool = False
) -> list[Question]:
    """All that `ask` can give of these kinds."""
    found = []
    for kind, way in product(kinds, wordings):
        inserted = {"sides": SIDES, "yes_no": names}.get(kind, ("",))
        for text, word, name in product(way.yes_no if kind == "yes_no" else way.naming, inserted, names):
            asked = text.format(word)
            found.append((asked, answer(kind, asked, name, in_full)))
    return list(dict.fromkeys(found))
