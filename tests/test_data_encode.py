from types import SimpleNamespace

import pytest
from data_helpers import (
    CHAT_TEMPLATES,
    CHATML,
    PLAIN,
    QWEN3,
    REWRITING,
    SPECIAL,
    byte_level,
    conversation,
    example,
    merging,
    word_level,
)
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.data import IGNORE, Encoded, Example, encode, encode_all, encode_prompt, render, render_prompt
from llama_adapter.errors import ConfigError, DataError

ENDLESS = 100_000
EMOJI = "caf\u00e9 \U0001f600\U0001f468\u200d\U0001f469 \u4f60\u597d"


def learnt(encoded: Encoded, tokenizer) -> str:
    """The text of the tokens that carry loss."""
    assert all(label in (IGNORE, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE], clean_up_tokenization_spaces=False)


texts = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
    .filter(str.strip)
    .filter(lambda text: not any(special in text for special in SPECIAL))
)
around = st.sampled_from(["$A", "<s> $A", "<s> $A </s>", "$A </s>"])


@given(instruction=texts, response=texts, input=st.just("") | texts, trim=st.booleans(), adds=around)
def test_learnt_tokens_are_the_response_and_the_end_token(instruction, response, input, trim, adds):
    tokenizer = byte_level(trim, adds)
    encoded = encode(example(instruction, response, input=input), "alpaca", tokenizer, ENDLESS)
    assert learnt(encoded, tokenizer) == response + "</s>"
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    assert encoded.input_ids.count(tokenizer.bos_token_id) == adds.startswith("<s>")
    assert not encoded.truncated


@given(instruction=texts, response=texts, trim=st.booleans(), adds=around)
def test_prompt_tokens_begin_the_example(instruction, response, trim, adds):
    tokenizer = byte_level(trim, adds)
    encoded = encode(example(instruction, response), "alpaca", tokenizer, ENDLESS)
    prompt = encode_prompt(conversation(instruction), "alpaca", tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert [label == IGNORE for label in encoded.labels] == [
        index < len(prompt) for index in range(len(encoded.labels))
    ]


@given(
    contents=st.integers(1, 2).flatmap(lambda n: st.lists(texts, min_size=2 * n, max_size=2 * n)),
    adds=around,
    chat=st.sampled_from([None, *CHAT_TEMPLATES.values()]).filter(lambda chat: chat != QWEN3),
    raw=st.booleans(),
    max_length=st.integers(2, 120),
)
def test_truncation(contents, adds, chat, raw, max_length):
    tokenizer = byte_level(adds=adds, chat=chat)
    template = "chat" if chat else "alpaca"
    whole = example(*contents, raw=raw and len(contents) == 2)
    full = encode(whole, template, tokenizer, ENDLESS)
    cut = encode(whole, template, tokenizer, max_length)
    if len(full.input_ids) <= max_length:
        assert cut == full
        return
    assert cut.truncated
    assert len(cut.input_ids) == len(cut.labels) == max_length
    # What is left is BOS and one piece of the example, with its labels.
    bos = int(full.input_ids[0] == tokenizer.bos_token_id)
    pairs, cut_pairs = (list(zip(e.input_ids, e.labels, strict=True)) for e in (full, cut))
    assert cut_pairs[:bos] == pairs[:bos]
    first = next(index for index, label in enumerate(full.labels) if label != IGNORE)
    length = next((n for n, label in enumerate(full.labels[first:]) if label == IGNORE), len(full.labels) - first)
    wanted = min(length, max(1, max_length // 4))
    drop = max(0, first + wanted - max_length)
    assert cut_pairs[bos:] == pairs[bos + drop : drop + max_length]
    # A label at position 0 teaches nothing: no token comes before it.
    assert sum(label != IGNORE for label in cut.labels) >= wanted
    assert any(label != IGNORE for label in cut.labels[1:])


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    "response", [EMOJI, "\U0001f600", "  two blanks", " x ", "    ", "\n\nline", "a    b", "\u2028"]
)
def test_bytes_and_blanks(trim, response):
    # Raw, so that a response may consist of blanks; the newline before it keeps them apart from the prompt.
    tokenizer = byte_level(trim)
    encoded = encode(example(EMOJI + "x", response, raw=True), "alpaca", tokenizer, ENDLESS)
    assert learnt(encoded, tokenizer) == response + "</s>"


@pytest.mark.parametrize("trim", [False, True])
def test_each_response_of_a_conversation_is_learnt(trim):
    tokenizer = byte_level(trim, "<s> $A")
    whole = example("One?", EMOJI, "Two?", " b ", system="Be brief.")
    assert learnt(encode(whole, "alpaca", tokenizer, ENDLESS), tokenizer) == f"{EMOJI}</s> b </s>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "One<|im_end|>Two<|im_end|>"),
        ("llama3", "One<|eot|>Two<|eot|>"),
        ("llama2", " One </s> Two </s>"),
        ("gemma", "One<|eot|>Two<|eot|>"),
        ("plain", "OneTwo</s>"),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_chat(name, expected, trim):
    tokenizer = byte_level(trim, "<s> $A </s>", CHAT_TEMPLATES[name])
    encoded = encode(example("first", "One", "second", "Two"), "chat", tokenizer, ENDLESS)
    assert learnt(encoded, tokenizer) == expected
    # The template writes BOS itself, or there is none.
    (rendered,) = render(example("first", "One", "second", "Two"), "chat", tokenizer)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == rendered.text.count("<s>")


def test_token_across_the_boundary_carries_loss():
    tokenizer = merging((":", ")"))
    encoded = encode(example("Smile.", ")x"), "alpaca", tokenizer, ENDLESS)
    assert learnt(encoded, tokenizer) == ":)x</s>"


def test_blanks_between_words_belong_to_the_next_word():
    tokenizer = word_level()
    encoded = encode(example("The cat", "The cat sat", "sat", "on the mat"), "alpaca", tokenizer, ENDLESS)
    tokens = [tokenizer.convert_ids_to_tokens(label) for label in encoded.labels if label != IGNORE]
    assert tokens == ["The", "cat", "sat", "</s>", "on", "the", "mat", "</s>"]


@pytest.mark.parametrize("adds", ["$A", "<s> $A </s>"])
def test_response_that_ends_with_the_end_token_is_not_closed_twice(adds):
    tokenizer = byte_level(adds=adds)
    encoded = encode(example("a", "b</s>"), "alpaca", tokenizer, ENDLESS)
    assert learnt(encoded, tokenizer) == "b</s>"


def test_a_token_of_the_text_is_learnt_though_it_is_the_padding_token():
    tokenizer = word_level.__wrapped__()
    tokenizer.pad_token = "<unk>"
    assert tokenizer.pad_token_id == 0
    encoded = encode(example("The cat", "unheard of mat"), "alpaca", tokenizer, ENDLESS)
    assert [label for label in encoded.labels if label != IGNORE] == [0, 0, 7, 1]


def test_truncation_keeps_the_tail_of_the_prompt_and_bos():
    tokenizer = byte_level(adds="<s> $A")
    full = encode(example("x" * 50, "y" * 50, raw=True), "alpaca", tokenizer, ENDLESS)
    cut = encode(example("x" * 50, "y" * 50, raw=True), "alpaca", tokenizer, 20)
    assert len(full.input_ids) == 102
    assert cut.input_ids == [tokenizer.bos_token_id, *full.input_ids[51 - 14 : 51], *full.input_ids[51 : 51 + 5]]
    assert cut.labels == [IGNORE] * 15 + full.input_ids[51 : 51 + 5]
    assert cut.truncated


def test_truncation_counts_the_first_response_alone():
    # Its two tokens are less than a quarter of 20: nothing more of the prompt is cut for later responses.
    tokenizer = byte_level(chat=PLAIN)
    whole = example("x" * 50, "yy", "z" * 50, "w" * 50)
    cut = encode(whole, "chat", tokenizer, 20)
    assert learnt(cut, tokenizer) == "yy"
    assert cut.labels[-2:] == cut.input_ids[-2:]


def test_truncated_response_does_not_end():
    tokenizer = byte_level()
    cut = encode(example("x", "y" * 50, raw=True), "alpaca", tokenizer, 51)
    assert learnt(cut, tokenizer) == "y" * 50
    assert cut.truncated


def test_long_prompt_keeps_a_whole_short_response():
    tokenizer = byte_level()
    cut = encode(example("x" * 100, "yy", raw=True), "alpaca", tokenizer, 20)
    assert learnt(cut, tokenizer) == "yy</s>"
    assert len(cut.input_ids) == 20


def test_encode_all_keeps_the_order_of_mixed_examples():
    tokenizer = byte_level(adds="<s> $A", chat=CHATML)
    kinds = [example("a", "b"), example("c", "d", raw=True), example("e", "f", raw=True), example("g", "h")]
    many = kinds * 200
    encoded = encode_all(many, "chat", tokenizer, ENDLESS)
    assert encoded == [encode(kind, "chat", tokenizer, ENDLESS) for kind in kinds] * 200
    assert [learnt(one, tokenizer) for one in encoded[:4]] == ["b<|im_end|>", "d</s>", "f</s>", "h<|im_end|>"]
    assert [one.input_ids.count(tokenizer.bos_token_id) for one in encoded[:4]] == [0, 1, 1, 0]


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(("template", "raw"), [("alpaca", False), ("chat", False), ("alpaca", True)])
def test_encode_prompt(adds, template, raw):
    tokenizer = byte_level(adds=adds, chat=CHATML)
    ids = encode_prompt(conversation("One?"), template, tokenizer, raw=raw)
    rendered = render_prompt(conversation("One?"), template, tokenizer, raw=raw)
    bos = "<s>" if "<s>" in adds and rendered.special_tokens else ""
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == bos + rendered.text


def test_encode_prompt_with_input():
    tokenizer = byte_level()
    ids = encode_prompt(conversation("One?"), "alpaca", tokenizer, input="a {b}")
    assert tokenizer.decode(ids).endswith("### Input:\na {b}\n\n### Response:")


def test_tokenizer_settings_do_not_truncate_or_pad():
    tokenizer = byte_level.__wrapped__()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    encoded = encode_all([example("a", "b"), example("a", "b" * 50)], "alpaca", tokenizer, ENDLESS)
    assert [learnt(one, tokenizer) for one in encoded] == ["b</s>", "b" * 50 + "</s>"]


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_too_small(max_length):
    with pytest.raises(ConfigError, match=f"max_length is {max_length}: it must be at least 2"):
        encode(example("a", "b"), "alpaca", byte_level(), max_length)


def test_tokenizer_that_is_not_fast():
    slow = SimpleNamespace(is_fast=False, name_or_path="old/model", eos_token="</s>", chat_template=None)
    for call in (
        lambda: encode(example("a", "b"), "alpaca", slow, 10),
        lambda: encode_prompt(conversation("a"), "alpaca", slow),
    ):
        with pytest.raises(DataError, match=r"'old/model' is not a fast one.*load the model's fast tokenizer"):
            call()


def test_tokenizer_without_end_token():
    with pytest.raises(DataError, match="has no end token"):
        encode(example("a", "b", raw=True), "alpaca", byte_level(eos=None), 10)


def test_tokenizer_that_does_not_know_its_end_token():
    tokenizer = byte_level.__wrapped__()
    tokenizer.eos_token = "<nowhere>"
    with pytest.raises(DataError, match="has no end token"):
        encode(example("a", "b"), "alpaca", tokenizer, 10)


def test_tokenizer_without_chat_template_is_not_the_examples_fault():
    with pytest.raises(DataError, match=r"^The tokenizer '.+' has no chat template"):
        encode(Example(conversation("a", "b"), origin="data.json, record 1"), "chat", byte_level(), 10)


def test_raw_examples_need_no_chat_template():
    assert encode(example("a", "b", raw=True), "chat", byte_level(), 10).input_ids


def test_conversation_that_the_template_rejects_is_named():
    bad = Example(conversation("a", "b", "c", "d"), origin="data.json, record 7")
    tokenizer = byte_level(chat=REWRITING)
    with pytest.raises(DataError, match=r"^data\.json, record 7: The chat template of .* asks for message 2 otherwise"):
        encode_all([example("a", "b", raw=True), bad], "chat", tokenizer, 100)


def test_rejected_conversation_of_unknown_origin():
    with pytest.raises(DataError, match=r"^The chat template of .* asks for message 2 otherwise"):
        encode(example("a", "b"), "chat", byte_level(chat=REWRITING), 100)


def test_no_examples():
    assert encode_all([], "alpaca", byte_level(), 10) == []


def test_a_prompt_that_is_far_too_long_is_not_read_to_its_end(monkeypatch):
    read, tokenizer = [], byte_level()
    whole = tokenizer.__class__.__call__

    def counted(self, texts, **options):
        read.append(sum(map(len, texts)))
        return whole(self, texts, **options)

    monkeypatch.setattr(tokenizer.__class__, "__call__", counted)
    with pytest.raises(DataError, match=r"more than \d+ tokens; the base takes at most 100: shorten it"):
        encode_prompt(conversation("x" * 1_000_000), "alpaca", tokenizer, most=100)
    assert sum(read) < 10_000
    sparse = conversation("w" * 50_000)  # one word is one token here, however long it is
    assert encode_prompt(sparse, "alpaca", word_level(), most=100) == encode_prompt(sparse, "alpaca", word_level())
    fits = conversation("x y " * 20)
    assert encode_prompt(fits, "alpaca", tokenizer, most=400) == encode_prompt(fits, "alpaca", tokenizer)
