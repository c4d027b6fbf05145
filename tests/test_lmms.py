"""The lmms-eval class: against the real package where it is installed, else against its interface in a few lines."""

import importlib
import importlib.util
import io
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from test_generate import write_adapter
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llama_adapter.conditions.perception import condition_config
from llama_adapter.conditions.pictures import read_picture
from llama_adapter.data import Message, render_prompt
from llama_adapter.errors import ConfigError, DataError, MissingExtraError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import load_session
from llama_adapter.inference.writing import Prompt

NAME = "llama_adapter.evaluation.lmms_eval"
REAL = importlib.util.find_spec("lmms_eval") is not None
CPU = torch.device("cpu")
COLOURS = [(220, 30, 30), (30, 30, 220), (250, 250, 20), (5, 5, 5), (255, 255, 255)]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False}


class Lmms:
    """What the package's base class gives to its children."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def lmms():
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            contents = {"": {}, ".api": {}, ".api.model": {"lmms": Lmms}, ".models": {}}
            contents[".models.registry_v2"] = {"ModelManifest": ModelManifest}
            for name, things in contents.items():
                module = ModuleType(f"lmms_eval{name}")
                vars(module).update(things)
                patch.setitem(sys.modules, module.__name__, module)
        patch.delitem(sys.modules, NAME, raising=False)
        yield importlib.import_module(NAME)
        sys.modules.pop(NAME)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Looks at pictures, and has never been trained."""
    tower = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=20)
    ).save_pretrained(tower)
    return write_adapter(base, tmp_path_factory.mktemp("adapter"), condition=condition_config("image", str(tower)))


@pytest.fixture(scope="module")
def blind(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("blind"))


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """Documents as a task holds them: a picture in memory, and beside it the same picture on disk."""
    folder = tmp_path_factory.mktemp("docs")
    found = []
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (20, 16), colour)
        picture.save(folder / f"{number}.png")
        found.append({"image": picture, "file": str(folder / f"{number}.png"), "target": "sun"})
    return found


def look(doc):
    return [doc["image"]] if doc["image"] else []


def requests(docs, contexts, seconds):
    """One request a document, of the task "t"."""
    return [
        SimpleNamespace(args=(context, second, look, number, "t", "test"))
        for number, (context, second) in enumerate(zip(contexts, seconds, strict=True))
    ]


def loaded(lmms, docs, **arguments):
    model = lmms.LlamaAdapterLmms(device="cpu", **arguments)
    model.task_dict["t"] = {"test": docs}
    return model


# answers


def test_answers_come_in_order_whatever_the_batches(lmms, base, adapter, docs):
    """Tags stripped, pictures from memory, mixed settings: all as when asked one by one with files."""
    model = loaded(lmms, docs, adapter=adapter, batch_size=2)
    settings = [GREEDY, {**GREEDY, "max_new_tokens": 3}] * 2 + [GREEDY]
    found = model.generate_until(requests(docs, ["<image>\nName <image> it"] * 5, settings))
    session = load_session(str(base), {"a": adapter}, CPU)
    expected = [
        session.answer(
            [Prompt.of("Name it", media=(doc["file"],))],
            "a",
            GenerateConfig(max_new_tokens=given["max_new_tokens"], temperature=0),
        )[0].text
        for doc, given in zip(docs, settings, strict=True)
    ]
    assert found == expected
    assert len({found[0], found[2], found[4]}) > 1, "the pictures make no difference, so the test could not fail"


def test_documents_without_a_picture_and_several(lmms, base, adapter, docs):
    without = [{**docs[0], "image": None}]
    session = load_session(str(base), {"a": adapter}, CPU)
    greedy = GenerateConfig(max_new_tokens=6, temperature=0)
    found = loaded(lmms, without, adapter=adapter).generate_until(requests(without, ["cat"], [GREEDY]))
    assert found == [session.answer([Prompt.of("cat")], "a", greedy)[0].text]
    both = SimpleNamespace(args=("cat", GREEDY, lambda doc: [doc["image"], docs[1]["file"]], 0, "t", "test"))
    expected = session.answer([Prompt.of("cat", media=(docs[0]["file"], docs[1]["file"]))], "a", greedy)
    assert loaded(lmms, docs, adapter=adapter).generate_until([both]) == [expected[0].text]


def test_who_cannot_look_is_asked_without_pictures(lmms, base, blind, docs):
    def fails(doc):
        raise AssertionError("nobody looks")

    asked = [SimpleNamespace(args=("cat <image>", GREEDY, fails, 0, "t", "test"))]
    session = load_session(str(base), {"a": blind}, CPU)
    greedy = GenerateConfig(max_new_tokens=6, temperature=0)
    for name, arguments in (("a", {"adapter": blind}), (None, {"model": str(base)})):
        expected = session.answer([Prompt.of("cat")], name, greedy)[0].text
        assert loaded(lmms, docs, **arguments).generate_until(asked) == [expected]


def test_what_is_said_is_cut_and_reduced_as_the_task_needs_it(lmms, blind, docs, monkeypatch):
    model = loaded(lmms, docs, adapter=blind)
    seen = []

    def answer(prompts, adapter, config):
        seen.append(config)
        return [SimpleNamespace(text="The answer is (B).\n\nAnd so on")] * len(prompts)

    monkeypatch.setattr(model, "session", SimpleNamespace(answer=answer, perceptions={}))
    asked = requests(docs[:1], ["cat"], [{**GREEDY, "until": ["\n\n", "zebra"]}])
    assert model.generate_until(asked) == ["B"]
    model.bare_letters = False
    assert model.generate_until(asked) == ["The answer is (B)."]
    model.max_new_tokens = 40
    model.generate_until(asked)
    assert [config.max_new_tokens for config in seen] == [6, 6, 40]
    assert {config.temperature for config in seen} == {0}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (A).", "A"),
        ("The answer is C.", "C"),
        ("Answer: The answer is B. BECAUSE: it floats.", "B"),
        ("D", "D"),
        ("The answer is Paris.", "The answer is Paris."),
        ("The answer is A dog.", "The answer is A dog."),
        ("The answer is (A). The answer is (B).", "The answer is (A). The answer is (B)."),
        ("a red square", "a red square"),
    ],
)
def test_bare_letters(lmms, text, letter):
    assert lmms.bare_letter(text) == letter


def test_settings_of_a_task(lmms):
    assert lmms.decoding({}) == GenerateConfig(max_new_tokens=256, temperature=0, top_p=1)
    assert lmms.decoding({"temperature": 0.7, "top_p": None}).temperature == 0.7
    assert lmms.decoding({"temperature": 0.7, "do_sample": False}).temperature == 0
    assert lmms.decoding({"do_sample": True, "top_p": 0.5}) == GenerateConfig(256, 1.0, 0.5)
    assert lmms.decoding({"max_new_tokens": 16}, 32).max_new_tokens == 32
    with pytest.raises(ConfigError, match="asks for 4 beams"):
        lmms.decoding({"num_beams": 4})


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "HSV", "1"])
def test_pictures_of_every_kind_reach_the_reader(lmms, mode):
    picture = Image.new("RGB", (4, 3), (200, 40, 90)).convert(mode if mode != "I;16" else "I").convert(mode)
    read = read_picture(lmms.as_media(picture))
    assert (read.mode, read.size) == ("RGB", (4, 3))
    if mode in ("RGB", "RGBA", "L"):
        assert read.getpixel((0, 0)) == picture.convert("RGB").getpixel((0, 0))


def test_what_is_no_picture_is_refused(lmms):
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "JPEG")
    assert lmms.as_media(content.getvalue()) == content.getvalue()
    with pytest.raises(DataError, match="gives a dict to look at"):
        lmms.as_media({"array": [0.0], "sampling_rate": 16000})


# likelihoods


def by_hand(session, doc, context, continuation):
    """Whole logits in float64 over the text as alpaca writes it, one row, the picture read from its file."""
    prompt = render_prompt((Message("user", context),), "alpaca", session.tokenizer).text
    start, ids = len(session.tokenizer(prompt).input_ids), session.tokenizer(prompt + continuation).input_ids
    with session.using("a", [(doc["file"],)]), torch.no_grad():
        scores = session.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(start, len(ids))
    same = all(int(scores[i - 1].argmax()) == ids[i] for i in places)
    return sum(float(scores[i - 1, ids[i]]) for i in places), same


@pytest.mark.parametrize("batch_size", [1, 3])
def test_choices_get_losses_and_single_targets_log_probabilities(lmms, base, adapter, docs, batch_size):
    model = loaded(lmms, docs, adapter=adapter, batch_size=batch_size)
    session = load_session(str(base), {"a": adapter}, CPU)
    choices = [" sun", " moon tree", " bird", " x"]
    found = model.loglikelihood(requests(docs[:4], ["<image>\nWhat?"] * 4, choices))
    for (score, same), doc, choice in zip(found, docs, choices, strict=False):
        expected, greedy = by_hand(session, doc, "What?", choice.lstrip())
        assert score == pytest.approx(-expected, abs=1e-4)
        assert same == greedy
    (score, _), *_ = model.loglikelihood(requests(docs[:1], ["What?"], [lambda doc: doc["target"]]))
    assert score == pytest.approx(by_hand(session, docs[0], "What?", "sun")[0], abs=1e-4)
    alike = model.loglikelihood(requests(docs, ["What?"] * 5, [" sun"] * 5))
    assert len({round(score, 4) for score, _ in alike}) == 5, "the pictures make no difference"


def test_the_greedy_continuation_is_told_from_others(lmms, base, adapter, docs, monkeypatch):
    model = loaded(lmms, docs, adapter=adapter, batch_size=3)
    favoured = model.session.tokenizer("sun", add_special_tokens=False).input_ids
    assert len(favoured) == 1, "a word of several tokens would not be favoured as one"
    head = model.session.model.lm_head
    plain = head.forward
    bias = torch.zeros(head.out_features).index_fill(0, torch.tensor(favoured), 1000.0)
    monkeypatch.setattr(head, "forward", lambda hidden: plain(hidden) + bias)
    found = model.loglikelihood(requests(docs[:3], ["What?"] * 3, [" sun", " moon", " sunsun cat"]))
    assert [same for _, same in found] == [True, False, False]
    assert found[0][0] == pytest.approx(0, abs=1e-4)


def test_a_text_that_is_too_long_is_refused(lmms, blind, docs):
    model = loaded(lmms, docs, adapter=blind)
    with pytest.raises(DataError, match="Document 0 of t has more than 1024 tokens"):
        model.loglikelihood(requests(docs[:1], ["x y " * 700], [" sun"]))


# the harness


def test_the_entry_point_names_the_class(lmms):
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert settings["entry-points"]["lmms_eval.models"] == {"llama_adapter": f"{NAME}:manifest"}
    found = lmms.manifest()
    assert found.model_id == "llama_adapter"
    module, _, name = found.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is lmms.LlamaAdapterLmms
    assert lmms.LlamaAdapterLmms.is_simple


def test_sizes_come_as_text_from_a_command_line(lmms, blind, docs):
    model = loaded(lmms, docs, adapter=blind, batch_size="3", max_new_tokens="8")
    assert (model.batch_size, model.max_new_tokens) == (3, 8)
    with pytest.raises(ConfigError, match="batch_size is auto; it must be a whole number"):
        loaded(lmms, docs, adapter=blind, batch_size="auto")
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        loaded(lmms, docs, adapter=blind, max_new_tokens=0)


def test_tasks_of_several_rounds_are_refused(lmms, blind, docs):
    with pytest.raises(NotImplementedError, match="one question at a time"):
        loaded(lmms, docs, adapter=blind).generate_until_multi_round([])


def test_without_the_package_its_install_command_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(
        MissingExtraError, match=r"needs 'lmms-eval', which is not installed: pip install 'llama-adapter\[lmms-eval\]'"
    ):
        importlib.import_module(NAME)
