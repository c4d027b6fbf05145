"""The drawn world: pictures show what their scenes say, and the question set about them cannot be answered without."""

import colorsys
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama_adapter.conditions.towers import load_tower
from llama_adapter.evaluation.scienceqa.questions import read_scienceqa

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "pictures"))

import captions  # noqa: E402
import combos  # noqa: E402
import draw  # noqa: E402
import pool  # noqa: E402
import questions  # noqa: E402
import scenes  # noqa: E402
import towers  # noqa: E402
import train_tower  # noqa: E402
from draw import Counted, Digit, Group, Placed, Sized  # noqa: E402
from scenes import COLOURS, PLACES, SHAPES, SIZES  # noqa: E402
from world import NUMBER_WORDS  # noqa: E402

KINDS = (combos.random_counted, combos.random_placed, combos.random_sized, combos.random_digit)


def some_scenes(count, seed=0, kinds=KINDS):
    rng = random.Random(seed)
    return [kind(rng, unseen) for _ in range(count) for kind in kinds for unseen in (False, True)]


def blobs(picture):
    """Connected parts that stand out from the paper: (colour's name, y, x, area) of each."""
    values = np.asarray(picture).astype(int)
    paper = np.median(np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]]), axis=0)
    left = {(int(y), int(x)) for y, x in np.argwhere(np.abs(values - paper).max(2) > 50)}
    found = []
    while left:
        edge = [left.pop()]
        part = list(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
            part += near
        spots = np.array(part)
        middle = np.median(values[spots[:, 0], spots[:, 1]], axis=0)
        name = min(draw.RGB, key=lambda colour: np.abs(np.array(draw.RGB[colour]) - middle).sum())
        found.append((name, *spots.mean(0), len(part)))
    return found


def drawn_blobs(scene, seed=0):
    return blobs(draw.draw(scene, random.Random(seed)))


# Pictures


def test_the_words_are_those_that_the_base_has_read():
    assert list(draw.RGB) == COLOURS
    assert sorted(draw.OUTLINES) == sorted(SHAPES)
    assert sorted(draw.STROKES) == [str(i) for i in range(10)]


def test_drawing_is_deterministic_and_pictures_vary():
    for scene in some_scenes(2):
        first, again, other = (draw.draw(scene, random.Random(seed)) for seed in (1, 1, 2))
        assert first.tobytes() == again.tobytes()
        assert first.tobytes() != other.tobytes()
        assert (first.mode, first.size) == ("RGB", (64, 64))


def common_name(red, green, blue):
    """What a colour is called, by hue, saturation and value and not by the table that it was drawn from."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "grey"
    hue *= 360
    if 10 <= hue < 42:
        return "brown" if value < 0.65 else "orange"
    if hue >= 310 and saturation < 0.65:
        return "pink"
    ends = {10: "red", 65: "yellow", 165: "green", 250: "blue", 300: "purple", 340: "pink", 361: "red"}
    return next(name for end, name in ends.items() if hue < end)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_what_they_are_called(colour):
    for i in range(24):
        scene = Sized(SIZES[i % 2], colour, SHAPES[i % 8])
        assert [blob[0] for blob in drawn_blobs(scene, i)] == [colour]
        assert common_name(*draw.shade(colour, random.Random(i))) == colour


def test_as_many_shapes_as_told_of_each_colour():
    for seed, scene in enumerate(some_scenes(40, kinds=KINDS[:1])):
        told = Counter({group.colour: group.count for group in scene.groups})
        assert Counter(blob[0] for blob in drawn_blobs(scene, seed)) == told, scene


def test_the_most_shapes_that_may_be_told_still_stand_apart():
    for seed, (one, two) in enumerate(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True)):
        scene = Counted((Group(combos.MOST, "red", one), Group(combos.MOST, "blue", two)))
        assert Counter(blob[0] for blob in drawn_blobs(scene, seed)) == {"red": combos.MOST, "blue": combos.MOST}


def test_shapes_do_not_touch_and_are_inside():
    for seed, scene in enumerate(some_scenes(40)):
        marks = draw.layout(scene, random.Random(seed))
        for i, mark in enumerate(marks):
            assert mark.radius <= min(mark.x, mark.y, 1 - mark.x, 1 - mark.y)
            for other in marks[:i]:
                apart = np.hypot(mark.x - other.x, mark.y - other.y)
                assert apart > mark.radius + other.radius + draw.GAP
    points = [point for outline in draw.OUTLINES.values() for point in outline]
    assert max(np.hypot(*point) for point in points) <= 1
    strokes = [point for digit in draw.STROKES.values() for stroke in digit for point in stroke]
    assert max(np.hypot(*point) for point in strokes) + draw.STROKE / 2 <= 1.1  # there is room of 0.02 at the edge


@pytest.mark.parametrize("place", PLACES)
def test_shapes_stand_where_they_are_told_to(place):
    for seed in range(10):
        scene = Placed("red", "star", place, "blue", "ring")
        (_, y, x, _), (_, other_y, other_x, _) = sorted(drawn_blobs(scene, seed), key=lambda blob: blob[0] == "blue")
        down, right = y - other_y, x - other_x
        ahead = {"above": -down, "below": down, "to the left of": -right, "to the right of": right}[place]
        aside = right if place in ("above", "below") else down
        assert ahead > 2 * abs(aside), seed
        assert ahead > 16


def test_big_is_bigger_than_small():
    for name in [*SHAPES, *range(10)]:
        make = Sized if name in SHAPES else Digit
        big, small = ([drawn_blobs(make(size, "green", name), seed) for seed in range(5)] for size in SIZES)
        assert all(len(found) == 1 for found in big + small), name
        assert min(found[0][3] for found in big) > 2.5 * max(found[0][3] for found in small), name


# Words


def pattern(text):
    """The text with slots in place of the words that change."""
    changing = sorted([*COLOURS, *PLACES, *NUMBER_WORDS[:7], *(s + "e?s" for s in SHAPES), *SHAPES], key=len)
    text = re.sub(rf"\b(is|are) (?={'|'.join(NUMBER_WORDS[:7])})", "is ", text)
    text = re.sub(r"\b(big|small)\b(?! or|\?)", "{}", text)
    slotted = re.sub("|".join(rf"\b{word}\b" for word in reversed(changing)), "{}", text, flags=re.IGNORECASE)
    return re.sub(r"\b[Aa]n? |digit \d", lambda match: "a " if "igit" not in match[0] else "digit {}", slotted)


def test_captions_and_questions_are_worded_as_the_base_has_read_them():
    rng = random.Random(0)
    read_captions, read_questions = set(), set()
    for _ in range(3000):
        text, asked = rng.choice((scenes.counted, scenes.placed, scenes.sized))(rng)
        read_captions.add(pattern(text))
        read_questions.update(pattern(one.question) for one in asked)
    said = {pattern(text) for scene in some_scenes(200) for text in captions.captions(scene)}
    asked = {pattern(one.question) for scene in some_scenes(200) for one in captions.asked(scene).values()}
    assert said == read_captions
    assert asked == read_questions


def test_captions_of_a_scene_name_all_of_it():
    scene = Counted((Group(1, "orange", "cross"), Group(3, "red", "star")))
    assert "There is one orange cross and three red stars." in captions.captions(scene)
    assert "We see three red stars and one orange cross." in captions.captions(scene)
    placed = captions.captions(Placed("red", "star", "above", "orange", "ring"))
    assert placed[0] == "A red star is above an orange ring."
    assert placed[-1] == "The picture shows an orange ring below a red star."


# Combinations


def test_seen_and_unseen_scenes_share_words_and_no_combination():
    seen, unseen = (
        {c for scene in some_scenes(600) if test(scene) for c in combos.combinations(scene)}
        for test in (combos.is_seen, combos.is_unseen)
    )
    assert not seen & unseen
    for kind in ("shape colour", "shape count", "digit colour", "shape place"):
        words, new_words = ({pair for c in found if c[0] == kind for pair in enumerate(c)} for found in (seen, unseen))
        alone = {(2, 1)} if kind == "shape count" else set()
        assert words - alone == new_words, kind  # one shape alone is never held out


def test_every_scene_is_what_was_asked_for():
    rng = random.Random(1)
    assert all(combos.is_seen(combos.random_scene(rng)) for _ in range(300))
    assert all(combos.is_unseen(combos.random_scene(rng, unseen=True)) for _ in range(300))
    mixed = Counted((Group(1, combos.colours_of("star", True)[0], "star"),))
    assert not combos.is_seen(mixed)
    assert not combos.is_unseen(mixed)
    assert combos.combinations(Placed("red", "star", "below", "blue", "ring")) == combos.combinations(
        Placed("blue", "ring", "above", "red", "star")
    )


# Questions


@pytest.fixture(scope="module")
def sets():
    return {
        split: list(questions.questions(split, n, 0)) for split, n in (("train", 3000), ("val", 300), ("test", 2000))
    }


def is_true(question, choice, scene):
    """Whether the choice is a right answer, found out from the scene alone."""
    ends = [scene, scene.swapped()] if isinstance(scene, Placed) else [scene]
    things = list(scene.groups) if isinstance(scene, Counted) else ends
    if match := re.fullmatch(r"How many (\w+?)e?s are there\?", question):
        return [NUMBER_WORDS[thing.count] for thing in things if thing.shape in (match[1], match[1] + "e")] == [choice]
    if match := re.fullmatch(r"What colour (?:is|are) the (\w+)\?", question):
        return any(choice == thing.colour for thing in things if match[1].startswith(getattr(thing, "shape", "digit")))
    if match := re.fullmatch(r"Which shape is (\w+)\?", question):
        return any(choice == thing.shape for thing in things if match[1] in ("it", thing.colour))
    if match := re.fullmatch(r"Which shape is (.+) the (\w+)\?", question):
        return any((choice, *match.groups()) == (end.shape, end.place, end.other_shape) for end in ends)
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return any((match[1], choice) == (end.shape, f"{end.place} the {end.other_shape}") for end in ends)
    if re.fullmatch(r"Is the \w+ big or small\?", question):
        return choice == scene.size
    assert question == "Which digit is it?"
    return choice == str(scene.digit)


def test_the_answer_and_no_other_choice_is_true(sets):
    for made in sets["train"] + sets["test"]:
        record = made.record
        assert len(set(record["choices"])) == len(record["choices"]) in (2, 3, 4)
        if made.scene:
            true = [choice for choice in record["choices"] if is_true(record["question"], choice, made.scene)]
            assert true == [record["choices"][record["answer"]]], record
            assert record["solution"] in captions.captions(made.scene)


def test_answers_stand_everywhere_equally_often(sets):
    for made in sets.values():
        where = Counter((len(m.record["choices"]), m.record["answer"]) for m in made if m.scene)
        for choices in (2, 3, 4):
            counts = [where[choices, place] for place in range(choices)]
            assert max(counts) - min(counts) <= 1


def test_the_text_alone_gives_chance(sets):
    """How often each choice was right among the times it was offered, with the question and without, tells nothing."""
    right, offered = defaultdict(int), defaultdict(float)

    def keys(record, choice):
        return (record["question"], choice), (record["skill"], choice)

    for made in sets["train"]:
        if made.scene:
            choices = made.record["choices"]
            for place, choice in enumerate(choices):
                for key in keys(made.record, choice):
                    right[key] += place == made.record["answer"]
                    offered[key] += 1 / len(choices)

    def liked(record, choice):
        return sum((right[key] + 5) / (offered[key] + 5) for key in keys(record, choice))

    for split in ("val", "test"):
        records = [made.record for made in sets[split] if made.scene]
        picked = [max(range(len(r["choices"])), key=lambda i, r=r: liked(r, r["choices"][i])) for r in records]
        chances = np.array([1 / len(record["choices"]) for record in records])
        hits = sum(pick == record["answer"] for pick, record in zip(picked, records, strict=True))
        assert abs(hits - chances.sum()) < 3 * np.sqrt((chances * (1 - chances)).sum()), split


def test_test_pictures_show_new_combinations_only(sets):
    questions.check_held_out(sets)
    assert all(combos.is_seen(made.scene) for split in ("train", "val") for made in sets[split] if made.scene)
    assert all(combos.is_unseen(made.scene) for made in sets["test"] if made.scene)
    with pytest.raises(ValueError, match="are in test and other pictures"):
        questions.check_held_out(sets | {"val": sets["test"][:1]})


def test_shares_and_categories(sets):
    for made in sets.values():
        records = [m.record for m in made]
        pictures = sum(r["image"] is not None for r in records)
        tales = sum(r["image"] is None and r["hint"] != "" for r in records)
        assert pictures / len(records) == pytest.approx(0.7, abs=0.001)
        assert tales / len(records) == pytest.approx(0.15, abs=0.001)
        assert {r["subject"] for r in records} == {"natural science", "social science", "language science"}
        assert {int(r["grade"][5:]) > 6 for r in records} == {True, False}


def test_tales_hold_their_answer_and_test_facts_are_new(sets):
    facts = defaultdict(set)
    for split, made in sets.items():
        for record in (m.record for m in made if not m.scene):
            answer = record["choices"][record["answer"]]
            if record["hint"]:
                assert all(choice.removeprefix("in ") in record["hint"] for choice in record["choices"])
                assert answer.removeprefix("in ") in record["solution"]
                assert record["solution"] in record["hint"]
            else:
                facts[split].add((record["category"], record["question"], answer))
    assert not facts["test"] & (facts["train"] | facts["val"])


def test_the_written_set_is_read_and_is_deterministic(tmp_path):
    counts = {"train": 40, "val": 20, "test": 20}
    for folder in ("one", "two"):
        made = {split: list(questions.questions(split, n, 3)) for split, n in counts.items()}
        (tmp_path / folder).mkdir()
        questions.write(made, tmp_path / folder, 3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    sizes = []
    for split, count in counts.items():
        read = read_scienceqa(tmp_path / "one", split)
        assert len(read) == count
        assert {question.split for question in read} == {split}
        for question in (q for q in read if q.image):
            sizes.append(question.image.stat().st_size)
            with Image.open(question.image) as picture:
                assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert len(sizes) == 56
    assert sum(sizes) / len(sizes) < 2300  # 3900 questions stay below 8 MB


# Tower


def test_the_pool_holds_seen_scenes_that_differ_in_one_thing():
    stock = pool.Pool(12, random.Random(0), seen_only=True)
    stock.refresh(5)
    batch = stock.batch(24)
    assert batch.pictures.shape == (24, 64, 64, 3)
    assert all(map(combos.is_seen, batch.scenes))
    for start in range(0, 24, pool.GROUP):
        first, *others = batch.scenes[start : start + pool.GROUP]
        near = [other for alike in combos.changes(first).values() for other in alike]
        assert all(other in near for other in others)
        assert len(set(others)) == pool.GROUP - 1


def test_the_pool_of_the_bundled_tower_holds_every_combination():
    shown = {
        combination
        for seed in range(2000)
        for scene in pool.group_of_scenes(random.Random(seed), False)
        for combination in combos.combinations(scene)
        if combination[0] != "shape place"
    }
    everything = [("shape colour", s, c) for s in combos.SHAPES for c in combos.COLOURS]
    everything += [("shape count", s, n) for s in combos.SHAPES for n in range(1, combos.MOST + 1)]
    everything += [("digit colour", d, c) for d in range(10) for c in combos.COLOURS]
    assert shown == set(everything)


def test_changes_differ_and_leave_the_rest():
    for scene in some_scenes(10):
        for name, others in combos.changes(scene).items():
            told = {pool.canonical(other) for other in others}
            assert pool.canonical(scene) not in told
            assert len(told) == len(others) >= (1 if name == "size" else 3), (scene, name)


def test_scenes_told_in_two_ways_are_no_negatives():
    scene = Placed("red", "star", "above", "blue", "ring")
    same = train_tower.same_scenes([scene, scene.swapped(), Sized("big", "red", "star")])
    assert same.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    torch.manual_seed(0)
    pictures, texts = torch.randn(2, 3, 4, dtype=torch.float64)
    logits = 2 * pictures @ texts.T
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    by_hand = -sum((r[0, 0] + r[0, 1] + r[1, 0] + r[1, 1]) / 2 + r[2, 2] for r in (rows, columns)) / 6
    assert train_tower.contrastive_loss(pictures, texts, torch.tensor(2.0), same).item() == pytest.approx(
        by_hand.item()
    )


def test_a_short_training_writes_a_tower_that_loads(tmp_path, monkeypatch):
    options = "--steps 2 --batch 8 --pool 4 --fresh 1 --hidden 32 --layers 2 --heads 2 --intermediate 32 --warmup 1"
    monkeypatch.setattr(
        sys, "argv", ["train_tower.py", "--output", str(tmp_path / "tower"), "--test-pictures", "4", *options.split()]
    )
    train_tower.train(train_tower.parse_arguments())
    training = json.loads((tmp_path / "tower" / "training.json").read_text())
    assert training["steps"] == 2
    assert set(training["caption_choice"]) == set(train_tower.ATTRIBUTES)
    tower = load_tower(str(tmp_path / "tower"))
    assert (tower.width, tower.depths) == (32, 3)  # the embeddings' too
    picture = draw.draw(Sized("big", "red", "star"), random.Random(0))
    assert torch.allclose(tower.pieces(picture)[0].values, towers.normalised(np.stack([picture]))[0], atol=1e-6)
    assert torch.isfinite(tower.features([picture], [0, 2])).all()
