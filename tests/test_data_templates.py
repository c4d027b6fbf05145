import pytest
from data_helpers import (
    CHAT_TEMPLATES,
    CHATML,
    COUNTING,
    GEMMA,
    LLAMA2,
    PLAIN,
    QWEN3,
    REWRITING,
    byte_level,
    conversation,
    example,
)
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.data import Message, check_template, render_prompt
from llama_adapter.data import render as render_all
from llama_adapter.data.templates import Rendered
from llama_adapter.errors import ConfigError, DataError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName it.\n\n### Input:\na sky\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nName it.\n\n### Response:"
)


def render(whole, template, tokenizer) -> Rendered:
    """The one text of an example."""
    (text,) = render_all(whole, template, tokenizer)
    return text


def responses(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.responses]


def test_alpaca_text_without_input():
    rendered = render(example("Name it.", "Blue."), "alpaca", byte_level())
    start = len(WITHOUT_INPUT)
    assert rendered == Rendered(WITHOUT_INPUT + "Blue.", ((start, start + 5),), True, False)


def test_alpaca_text_with_input():
    assert render(example("Name it.", "Blue.", input="a sky"), "alpaca", byte_level()).text == WITH_INPUT + "Blue."


def test_alpaca_several_turns():
    conversation_ = example("One?", "1", "Two?", "2", input="more", system="Count.")
    rendered = render(conversation_, "alpaca", byte_level())
    assert rendered.text == (
        "Count.\n\n### Instruction:\nOne?\n\n### Response:1</s>"
        "\n\n### Instruction:\nTwo?\n\n### Input:\nmore\n\n### Response:2"
    )
    assert responses(rendered) == ["1</s>", "2"]


def test_alpaca_does_not_close_a_response_twice():
    rendered = render(example("One?", "1</s>", "Two?", "2</s>"), "alpaca", byte_level())
    assert responses(rendered) == ["1</s>", "2</s>"]
    assert rendered.ends_with_eos


def test_alpaca_joins_user_messages_in_a_row():
    messages = (Message("user", "One?"), Message("user", "Or two?"))
    assert "### Instruction:\nOne?\n\nOr two?\n\n### Response:" in render_prompt(messages, "alpaca", byte_level()).text


def test_alpaca_refuses_two_answers_in_a_row():
    messages = (*conversation("One?", "1"), Message("assistant", "2"), Message("user", "x"))
    with pytest.raises(DataError, match="Two assistant messages follow each other"):
        render_prompt(messages, "alpaca", byte_level())


@pytest.mark.parametrize("text", ["{input}", "{instruction} {0} {", "%s {{x}}", "{% raise %}\\1"])
@pytest.mark.parametrize("chat", [None, *CHAT_TEMPLATES.values()])
def test_braces_survive(text, chat):
    rendered = render(example(text, text, input=text), "chat" if chat else "alpaca", byte_level(chat=chat))
    assert rendered.text.count(text) == 3


def test_raw_is_verbatim():
    rendered = render(example("a {b} ", "\nc ", raw=True), "chat", byte_level())
    assert rendered == Rendered("a {b} \nc ", ((6, 9),), True, False)
    assert render_prompt(conversation("a {b} "), "chat", byte_level(), raw=True) == Rendered("a {b} ", (), True, False)


def test_raw_that_closes_itself():
    assert render(example("a", "b</s>", raw=True), "alpaca", byte_level()).ends_with_eos


@pytest.mark.parametrize(
    ("name", "expected", "closed"),
    [
        ("chatml", ["One<|im_end|>", "Two<|im_end|>"], True),
        ("llama3", ["One<|eot|>", "Two<|eot|>"], True),
        ("llama2", [" One </s>", " Two </s>"], True),
        ("gemma", ["One<|eot|>", "Two<|eot|>"], True),
        ("plain", ["One", "Two"], False),
    ],
)
def test_chat_responses(name, expected, closed):
    tokenizer = byte_level(chat=CHAT_TEMPLATES[name])
    rendered = render(example("first", "One", "second", "Two"), "chat", tokenizer)
    assert responses(rendered) == expected
    assert rendered.text.endswith(expected[-1])
    assert rendered.ends_with_eos is closed
    assert rendered.special_tokens is False


@pytest.mark.parametrize("answer", ["hi", "think", "assistant", "end", "s", "im_end", "a", "\n\nx", "user"])
def test_chat_response_that_also_occurs_elsewhere(answer):
    rendered = render(example(answer, answer, answer, answer), "chat", byte_level(chat=CHATML))
    assert responses(rendered) == [f"{answer}<|im_end|>"] * 2


def test_chat_answer_that_later_turns_rewrite_is_a_text_of_its_own():
    thought = "<think>\nhm\n</think>\n\n"
    first, last = render_all(example("a", thought + "b", "c", "d"), "chat", byte_level(chat=QWEN3))
    assert first.text == f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{thought}b<|im_end|>"
    assert responses(first) == [thought + "b<|im_end|>"]
    assert "assistant\nb<|im_end|>\n<|im_start|>user\nc" in last.text
    assert responses(last) == ["<think>\n\n</think>\n\nd<|im_end|>"]


def test_chat_trimmed_answer():
    rendered = render(example("a", "  b \n"), "chat", byte_level(chat=CHAT_TEMPLATES["llama3"]))
    assert responses(rendered) == ["b<|eot|>"]


def test_chat_turn_is_not_closed_by_the_next_bos():
    # The template forgets the end token; what follows an answer is the BOS of the next turn.
    tokenizer = byte_level(chat=LLAMA2.replace(" {{ eos_token }}", ""))
    assert responses(render(example("a", "b", "c", "d"), "chat", tokenizer)) == [" b", " d"]


def test_chat_input_is_a_line_of_the_last_user_message():
    rendered = render(example("a", "b", "c", "d", input="e"), "chat", byte_level(chat=PLAIN))
    assert rendered.text == "user: a\nassistant: b\nuser: c\ne\nassistant: d"


def test_chat_template_whose_history_differs_when_it_asks():
    first, last = render_all(example("a", "b", "c", "d"), "chat", byte_level(chat=COUNTING))
    assert first.text == "1 turns\nuser: a\nassistant: b"
    assert last.text == "3 turns\nuser: a\nassistant: b\nuser: c\nassistant: d"
    assert responses(first) + responses(last) == ["b", "d"]


def test_chat_template_that_asks_otherwise_than_it_writes():
    with pytest.raises(DataError) as caught:
        render_all(example("a", "b", "c", "d"), "chat", byte_level(chat=REWRITING))
    assert "asks for message 2 otherwise than it writes it (the prompt for it ends in" in str(caught.value)
    assert "change the record or use --template alpaca" in str(caught.value)


def test_chat_template_whose_later_text_depends_on_the_answer():
    counting = PLAIN.replace("{{ m.content }}\n", "{{ m.content }} ({{ m.content | length }})\n")
    with pytest.raises(DataError, match="does not write message 2 as it is"):
        render(example("a", "four"), "chat", byte_level(chat=counting))


def test_chat_turn_is_closed_by_special_tokens_only():
    # An ordinary added token after the answer does not end it; neither does a blank.
    tokenizer = byte_level.__wrapped__(chat=PLAIN.replace("{{ m.content }}", "{{ m.content }}<note>"))
    tokenizer.add_tokens(["<note>"])
    rendered = render(example("a", "b"), "chat", tokenizer)
    assert responses(rendered) == ["b"]
    assert not rendered.ends_with_eos


def test_chat_turn_is_closed_by_an_end_token_chosen_later():
    tokenizer = byte_level.__wrapped__(chat=PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ eos_token }}"))
    assert responses(render(example("a", "b"), "chat", tokenizer)) == ["b</s>"]
    tokenizer.eos_token = "!"
    assert responses(render(example("a", "b"), "chat", tokenizer)) == ["b!"]


def test_chat_template_that_loses_answers():
    lossy = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not write message 2 as it is"):
        render(example("a", "b"), "chat", byte_level(chat=lossy))


def test_chat_template_that_refuses_a_role():
    with pytest.raises(
        DataError, match=r"rejects the conversation \(System role not supported; its roles: system, user\): change"
    ):
        render(example("a", "b", system="c"), "chat", byte_level(chat=GEMMA))


def test_chat_template_that_refuses_an_order():
    messages = conversation("a") + conversation("b")
    with pytest.raises(DataError, match=r"rejects the conversation \(Roles must alternate; its roles: user, user\)"):
        render_prompt(messages, "chat", byte_level(chat=GEMMA))


def test_chat_template_with_a_fault_of_its_own():
    with pytest.raises(DataError, match=r"rejects the conversation \(.*str.*\)"):
        render(example("a", "b"), "chat", byte_level(chat="{{ 1 + 'x' }}"))


@pytest.mark.parametrize(
    "call",
    [
        lambda tokenizer: check_template("chat", tokenizer),
        lambda tokenizer: render_all(example("a", "b"), "chat", tokenizer),
        lambda tokenizer: render_prompt(conversation("a"), "chat", tokenizer),
    ],
)
def test_tokenizer_without_chat_template(call):
    with pytest.raises(DataError, match=r"'.+' has no chat template: use --template alpaca"):
        call(byte_level())


def test_unknown_template():
    with pytest.raises(ConfigError, match="The template 'vicuna' is unknown: choose alpaca or chat"):
        render(example("a", "b"), "vicuna", byte_level())


def test_tokenizer_without_end_token():
    with pytest.raises(DataError, match="has no end token: set its eos_token"):
        render(example("a", "b"), "alpaca", byte_level(eos=None))


@pytest.mark.parametrize("messages", [(), conversation("a", "b")])
def test_prompt_must_end_with_a_question(messages):
    with pytest.raises(DataError, match="A prompt must end with a user message"):
        render_prompt(messages, "alpaca", byte_level())


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(
    turns=st.integers(1, 3).flatmap(lambda n: st.lists(texts, min_size=2 * n, max_size=2 * n)),
    system=st.none() | texts,
    input=st.just("") | texts,
    chat=st.sampled_from([None, *CHAT_TEMPLATES.values()]),
)
def test_prompt_is_the_beginning_of_the_example(turns, system, input, chat):
    system = None if chat in (GEMMA, LLAMA2) else system
    whole = example(*turns, system=system, input=input)
    template = "chat" if chat else "alpaca"
    tokenizer = byte_level(chat=chat)
    texts = render_all(whole, template, tokenizer)
    prompt = render_prompt(whole.messages[:-1], template, tokenizer, input=input)
    assert texts[-1].text[: texts[-1].responses[-1][0]] == prompt.text
    assert prompt.responses == ()
    assert prompt.special_tokens == texts[-1].special_tokens
    assert sum(len(rendered.responses) for rendered in texts) == len(turns) // 2
