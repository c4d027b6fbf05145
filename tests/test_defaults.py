"""The base's generation_config.json: its end tokens are followed, and nothing else changes an answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_generate import GREEDY, QUESTIONS, write_adapter
from transformers import GenerationConfig

from llama_adapter.cli import main
from llama_adapter.errors import ModelError
from llama_adapter.formats.native import read_config
from llama_adapter.inference.session import load_session

CPU = torch.device("cpu")
FIELDS = sorted(name for name in vars(GenerationConfig()) if name[0] != "_")
VALUES = {
    "eos_token_id": None,  # the configuration's then
    "stop_strings": ["a", "e", "s", " "],
    "num_beams": 4,
    "max_time": 1e-9,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "repetition_penalty": 50.0,
    "encoder_repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(3, 200)],
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(3, 200)),
    "sequence_bias": [[[5], 100.0]],
    "exponential_decay_length_penalty": [1, 100.0],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "min_length": 100,
    "min_new_tokens": 100,
    "max_length": 1,
    "max_new_tokens": 1,
    "guidance_scale": 5.0,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0},
    "temperature": 9.0,
    "early_stopping": "never",
    "dola_layers": "high",
    "constraints": ["x"],
    "compile_config": {"mode": "reduce-overhead"},
    "pad_token_id": -1,
}
WRONG_TYPES = {"temperature": "hot", "num_beams": [], "watermarking_config": 3, "max_length": "long", "top_k": {}}


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def with_settings(base, tmp_path):
    """The base with another generation_config.json: an object, text, or none."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)

    def write(values):
        path = copy / "generation_config.json"
        path.unlink(missing_ok=True)
        if values is not None:
            path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(copy)

    return write


def answers(folder, adapter):
    """What a session answers, and what transformers' own `generate`, on which harnesses call, does with its model."""
    session = load_session(folder, {"a": adapter}, CPU)
    ours = [answer.text for answer in session.answer(QUESTIONS, "a", GREEDY)]
    ids = torch.tensor([[1, 20, 21, 22]])
    theirs = session.model.generate(ids, max_new_tokens=8, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return ours, theirs.tolist()


def test_all_fields_at_once_change_no_greedy_answer(with_settings, adapter):
    wanted = answers(with_settings(None), adapter)
    assert all(wanted[0])
    assert answers(with_settings({name: VALUES.get(name, 3) for name in {*FIELDS, *VALUES}}), adapter) == wanted


@pytest.mark.slow
def test_no_field_but_the_end_tokens_changes_a_greedy_answer(with_settings, adapter):
    wanted = answers(with_settings(None), adapter)
    for name in sorted({*FIELDS, *VALUES}):
        assert answers(with_settings({name: VALUES.get(name, 3)}), adapter) == wanted, name


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_values_of_wrong_types_in_what_is_not_followed_do_no_harm(with_settings, adapter, name):
    wanted = answers(with_settings(None), adapter)
    assert answers(with_settings({name: WRONG_TYPES[name]}), adapter) == wanted


@pytest.mark.parametrize("listed", [False, True])
def test_its_end_tokens_end_answers(with_settings, adapter, listed):
    session = load_session(with_settings(None), {"a": adapter}, CPU)
    full = session.engine.generate(session.rows(QUESTIONS[:1], ["a"], GREEDY))[0]
    end = full[1]
    folder = with_settings({"eos_token_id": [300, end] if listed else end})
    answer = load_session(folder, {"a": adapter}, CPU).answer(QUESTIONS[:1], "a", GREEDY)[0]
    assert (answer.finish_reason, answer.new_tokens) == ("stop", full.index(end))


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}', "\udc80"]
)
def test_a_file_that_cannot_be_followed_is_one_sentence_before_the_weights(with_settings, monkeypatch, text):
    monkeypatch.setattr("llama_adapter.inference.session.load_base", lambda *_: pytest.fail("read the weights"))
    folder = with_settings("")
    with open(f"{folder}/generation_config.json", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    with pytest.raises(ModelError, match=r"generation_config\.json") as error:
        load_session(folder, {}, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pad", [-1, -400, 287, 32000, None])
def test_a_pad_token_that_the_base_has_no_embedding_for_is_never_used(with_settings, adapter, pad):
    folder = with_settings(None)
    wanted = answers(folder, adapter)
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": pad}))
    assert answers(folder, adapter) == wanted


def test_training_does_not_need_that_file(with_settings, data, tmp_path):
    out = str(tmp_path / "out")
    main(["train", "--model", with_settings("{"), "--data", str(data), "--max-steps", "1", "--trackers", "none",
          "--adapter-layers", "2", "--output-dir", out])  # fmt: skip
    assert read_config(out).adapter_layers == 2


def test_what_would_have_changed_tokens_is_named_once(with_settings, caplog):
    caplog.set_level("INFO", "llama_adapter")
    load_session(with_settings({"repetition_penalty": 1.2, "num_beams": 1, "temperature": 0.6, "top_k": 20}), {}, CPU)
    told = [text for text in caplog.messages if "generation_config" in text]
    assert told == ["of the base's generation_config.json only the end tokens are followed, not: repetition_penalty"]
