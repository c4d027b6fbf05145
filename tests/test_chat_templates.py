"""Chat templates with the constructs that model families publish, in texts of our own (tests/chat_templates)."""

import re
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
from data_helpers import byte_level, conversation, example

from llama_adapter.data import (
    IGNORE,
    Example,
    Message,
    encode_all,
    encode_prompt,
    encode_records,
    render,
    render_prompt,
)
from llama_adapter.data.chat_templates import without_thought
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.evaluation.instructions import normalise

FOLDER = Path(__file__).parent / "chat_templates"
IM, EOT, TURN = "<|im_end|>", "<|eot_id|>", "<end_of_turn>"
EMPTY = "<think>\n\n</think>\n\n"
CLOSE = "\n</think>\n\n"
TAKES_TURNS = "take turns|must alternate|must go"
# What stands around an answer in the tokens that are learnt, and why a system message or two answers in a row fail.
FAMILIES = {
    "qwen2": ("", IM, "", ""),
    "qwen2_5_tools": ("", IM, "", ""),
    "llama2": (" ", " </s>", "", TAKES_TURNS),
    "llama3": ("", EOT, "", ""),
    "llama3_2": ("", EOT, "", ""),
    "mistral_v1": ("", "</s>", TAKES_TURNS, TAKES_TURNS),
    "mistral_v3": (" ", "</s>", "", TAKES_TURNS),
    "mixtral": (" ", "</s>", "", TAKES_TURNS),
    "gemma2": ("", TURN, "No system role here", TAKES_TURNS),
    "gemma3": ("", TURN, "", TAKES_TURNS),
    "smolvlm_parts": (" ", "<end_of_utterance>", "", ""),
    "phi3": ("", "<|end|>", "", ""),
    "phi4": ("", IM, "", ""),
    "zephyr": ("", "</s>", "", ""),
    "stablelm": ("", "<|endoftext|>", "", ""),
    "deepseek_r1": (CLOSE, "<|end_of_sentence|>", "", ""),
    "deepseek_r1_first": ("", "<|end_of_sentence|>", "", ""),
    "deepseek_v3_1": ("", "<|end_of_sentence|>", "", ""),
    "qwq": (CLOSE, IM, "", ""),
    "qwen3": (EMPTY, IM, "", ""),
    "qwen3_thinking": (CLOSE, IM, "", ""),
    "granite3": ("", "<|end_of_text|>", "", ""),
    "command_r": ("", "<|END_OF_TURN_TOKEN|>", "", TAKES_TURNS),
    "olmo2": ("", "</s>", "", "asks for message 3 otherwise"),
    "smollm2": ("", IM, "", ""),
    "smollm3": ("", IM, "", ""),
    "gpt_oss": ("<|channel|>final<|message|>", "<|return|>", "", ""),
    "ernie4_5": ("", "</s>", "", ""),
    "glm4": ("", "</s>", "", ""),
    "glm4_5": ("\n<think></think>\n", "</s>", "", ""),
    "exaone3_5": ("", "[|endofturn|]", "", ""),
    "exaone_deep": ("\n</thought>\n\n", "[|endofturn|]", "", ""),
    "exaone4": ("", "[|endofturn|]", "", ""),
    "hunyuan": ("", "<|eos|>", "", ""),
    "twice_bos": ("", EOT, "", ""),
    "vicuna": (" ", "</s>", "", ""),
}
UNCLOSED = {"glm4", "glm4_5"}
ODD = {"needs_system", "needs_tools"}
LONG = 1 << 20
THOUGHT = "<think>\nplan\n</think>\n\nBlue."
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


@cache
def tokenizer_of(name: str):
    source = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = byte_level.__wrapped__(chat=source)
    special = set(re.findall(r"<\|\w+\|>|\[\|endofturn\|\]|<\w+_of_\w+>", source))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def learnt(text, tokenizer) -> str:
    return tokenizer.decode([label for label in text.labels if label != IGNORE], clean_up_tokenization_spaces=False)


def encoded(name, whole, **options):
    return encode_all([whole], "chat", tokenizer_of(name), LONG, **options)


def test_every_template_is_tried():
    assert {path.stem for path in FOLDER.glob("*.jinja")} == {*FAMILIES, *ODD}


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize(
    "turns", [("Sky?", "Blue."), ("Sky?", "Blue.", "Sea?", "Green."), ("Z", "Z", "Z", "Z", "Z", "Z")]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_learnt_behind_the_prompt_that_asks_for_it(name, turns, system):
    before, after, no_system, _ = FAMILIES[name]
    tokenizer, whole = tokenizer_of(name), example(*turns, system=system)
    if system and no_system:
        with pytest.raises(DataError, match=no_system):
            encoded(name, whole)
        return
    texts = encoded(name, whole)
    answers = [f"{before}{answer}{after}" for answer in turns[1::2]]
    if name in UNCLOSED:  # the template closes no turn: the end token is learnt behind the last answer alone
        answers = [answer.removesuffix(after) for answer in answers[:-1]] + answers[-1:] if len(texts) == 1 else answers
    assert "".join(learnt(text, tokenizer) for text in texts) == "".join(answers)
    assert not any(text.merged for text in texts)
    for number, message in enumerate(whole.messages):
        if message.role == "assistant":
            prompt = encode_prompt(whole.messages[:number], "chat", tokenizer)
            hosts = [t for t in texts if t.input_ids[: len(prompt)] == prompt and t.labels[len(prompt)] != IGNORE]
            assert hosts, f"no text has answer {number} behind the prompt that asks for it"


@pytest.mark.parametrize("name", FAMILIES)
def test_two_answers_in_a_row_train_or_are_refused_with_the_templates_reason(name):
    reason = FAMILIES[name][3]
    whole = Example((*conversation("Sky?", "Blue."), Message("assistant", "Still.")), origin="d.jsonl, record 2")
    if reason:
        with pytest.raises(DataError, match=rf"^d\.jsonl, record 2: .*({reason})"):
            encoded(name, whole)
    else:
        assert learnt(encoded(name, whole)[-1], tokenizer_of(name)).endswith(FAMILIES[name][1])


def test_records_that_a_template_refuses_are_counted():
    good, bad = example("Sky?", "Blue."), Example(conversation("a", "b", system="c"), origin="d.jsonl, record 2")
    skipped: list[str] = []
    records = encode_records([good, bad, good], "chat", tokenizer_of("gemma2"), LONG, skipped=skipped)
    assert len(records) == 2
    assert len(skipped) == 1
    assert "d.jsonl, record 2: " in skipped[0]
    assert "No system role here" in skipped[0]


@pytest.mark.parametrize("name", ["deepseek_r1", "qwq", "qwen3_thinking"])
def test_thought_behind_a_prompt_that_opens_one(name):
    for answer in (THOUGHT, THOUGHT.replace("<think>\n", "")):
        (text,) = encoded(name, example("Sky?", answer))
        assert learnt(text, tokenizer_of(name)) == f"plan\n</think>\n\nBlue.{FAMILIES[name][1]}"


@pytest.mark.parametrize("name", ["deepseek_r1", "qwq", "qwen3_thinking"])
def test_thought_beside_the_text(name):
    asked, answer = Message("user", "Sky?"), Message("assistant", "Blue.", extra={"reasoning_content": "plan"})
    (text,) = encoded(name, Example((asked, answer)))
    assert learnt(text, tokenizer_of(name)) == f"plan\n</think>\n\nBlue.{FAMILIES[name][1]}"


def test_thought_that_the_template_takes_out_is_put_back():
    (text,) = encoded("deepseek_r1_first", example("Sky?", THOUGHT))
    assert learnt(text, tokenizer_of("deepseek_r1_first")) == THOUGHT + "<|end_of_sentence|>"


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "qwen3_thinking", "qwq", "glm4_5"])
def test_every_turns_thought_is_learnt_though_later_prompts_do_not_show_it(name):
    thoughts = ("<think>\nfirst\n</think>\n\nBlue.", "<think>\nsecond\n</think>\n\nGreen.")
    texts = encoded(name, example("Sky?", thoughts[0], "Sea?", thoughts[1]))
    tokenizer = tokenizer_of(name)
    assert ["first" in learnt(text, tokenizer) for text in texts] == [True, False]
    assert ["second" in learnt(text, tokenizer) for text in texts] == [False, True]
    assert "first" not in tokenizer.decode(texts[1].input_ids)


@pytest.mark.parametrize("name", ["exaone4", "deepseek_v3_1"])
def test_thought_behind_a_prompt_that_closes_it_is_refused(name):
    with pytest.raises(DataError, match=r"asks for message 2 otherwise|closes the thought"):
        encoded(name, example("Sky?", THOUGHT))


def test_thought_that_a_template_does_not_know_is_refused():
    messages = (Message("user", "Sky?"), Message("assistant", "Blue.", extra={"reasoning_content": "plan"}))
    with pytest.raises(DataError, match="leaves out the thought of message 2"):
        encoded("llama3", Example(messages))


def test_channel_of_a_thought():
    messages = (Message("user", "Sky?"), Message("assistant", "Blue.", extra={"thinking": "plan"}))
    (text,) = encoded("gpt_oss", Example(messages))
    assert learnt(text, tokenizer_of("gpt_oss")) == (
        "<|channel|>analysis<|message|>plan<|end|><|start|>assistant<|channel|>final<|message|>Blue.<|return|>"
    )


@pytest.mark.parametrize("name", ["llama3_2", "granite3", "smollm3", "gpt_oss"])
def test_date_is_the_one_that_is_told(name):
    day = datetime(2024, 2, 3, 4, 5, 6)
    expected = {"llama3_2": "03 Feb 2024", "granite3": "February 03, 2024", "smollm3": "03 February 2024"}
    (text,) = encoded(name, example("Sky?", "Blue."), now=day)
    assert expected.get(name, "2024-02-03") in tokenizer_of(name).decode(text.input_ids)
    today = render_prompt(conversation("Sky?"), "chat", tokenizer_of(name)).text
    assert str(datetime.now().year) in today


@pytest.mark.parametrize("code", ["%d %b %Y", "%Y-%m-%d %H:%M:%S", "%A, %B %-d", "%I:%M %p", "100%% %j", "%D", "%F %T"])
def test_dates_are_written_as_by_strftime(code):
    day = datetime(2026, 1, 5, 0, 4, 9)
    tokenizer = byte_level.__wrapped__(chat="\n{{ strftime_now('" + code + "') }}{{ messages[0].content }}")
    assert render_prompt(conversation("x"), "chat", tokenizer, now=day).text == "\n" + day.strftime(code) + "x"


def test_tools_and_calls():
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "", extra={"tool_calls": [CALL]}),
        Message("tool", "sunny", extra={"tool_call_id": "abcdefghi"}),
        Message("assistant", "Sun."),
    )
    expected = {
        "qwen2_5_tools": '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>',
        "llama3_2": '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>',
        "mistral_v3": '"id": "abcdefghi"}]</s>',
    }
    for name, call in expected.items():
        whole = Example(messages, tools=(TOOL,))
        text = "".join(learnt(text, tokenizer_of(name)) for text in encoded(name, whole))
        assert call in text
        assert text.endswith("Sun." + FAMILIES[name][1])
        (*_, last) = encoded(name, whole)
        prompt = encode_prompt(messages[:-1], "chat", tokenizer_of(name), tools=(TOOL,))
        assert last.input_ids[: len(prompt)] == prompt


def test_tools_that_a_template_does_not_write_are_refused():
    with pytest.raises(DataError, match="does not write 'tools'"):
        encoded("llama3", Example(conversation("a", "b"), tools=(TOOL,)))
    calls = Message("assistant", "", extra={"tool_calls": [CALL]})
    with pytest.raises(DataError, match="leaves out the tool calls of message 2"):
        encoded("llama3", Example((Message("user", "a"), calls, Message("assistant", "b"))))
    with pytest.raises(DataError, match="tools can only be written by a chat template: use --template chat"):
        render(Example(conversation("a", "b"), tools=(TOOL,)), "alpaca", byte_level())


@pytest.mark.parametrize(("name", "reason"), [("needs_system", "A system message must"), ("needs_tools", "NoneType")])
def test_templates_that_need_what_a_record_lacks(name, reason):
    with pytest.raises(DataError, match=reason):
        encoded(name, example("Sky?", "Blue."))


def test_template_that_needs_a_system_message():
    (text,) = encoded("needs_system", example("Sky?", "Blue.", system="Be kind."))
    assert learnt(text, tokenizer_of("needs_system")) == "Blue.<|im_end|>"


def test_bos_stands_as_often_as_the_template_writes_it():
    for name, count in (("twice_bos", 2), ("llama3", 1), ("qwen2", 0)):
        tokenizer = byte_level.__wrapped__(adds="<s> $A", chat=(FOLDER / f"{name}.jinja").read_text())
        (text,) = encode_all([example("Sky?", "Blue.")], "chat", tokenizer, LONG)
        assert text.input_ids.count(tokenizer.bos_token_id) == count


def test_answer_with_weight_0_is_read_and_not_learnt():
    messages = (Message("user", "a"), Message("assistant", "x", 0), Message("user", "b"), Message("assistant", "y"))
    for template in ("chat", "alpaca"):
        (text,) = encode_all([Example(messages)], template, tokenizer_of("qwen2"), LONG)
        assert learnt(text, tokenizer_of("qwen2")) == ("y<|im_end|>" if template == "chat" else "y</s>")
        assert "x" in tokenizer_of("qwen2").decode(text.input_ids)


def test_tokens_across_the_edge_of_an_answer_are_counted():
    tokenizer = byte_level.__wrapped__(
        chat="{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.role }}:", "{{ m.role }}: ")
    (text,) = encode_all([example("Sky?", "the cat")], "chat", tokenizer, LONG)
    prompt = encode_prompt(conversation("Sky?"), "chat", tokenizer)
    assert text.merged is (text.input_ids[: len(prompt)] != prompt) is True


def test_list_of_named_templates():
    tokenizer = byte_level.__wrapped__()
    first = "{{ messages[0].content }}"
    tokenizer.chat_template = {"default": first, "tool_use": first + "{{ tools }}"}
    assert render_prompt(conversation("x"), "chat", tokenizer).text == "x"
    assert "weather" in render_prompt(conversation("x"), "chat", tokenizer, tools=(TOOL,)).text
    tokenizer.chat_template = {"rag": "", "tool_use": ""}
    with pytest.raises(ConfigError, match=r"several chat templates \(rag, tool_use\) and none named 'default'"):
        render_prompt(conversation("x"), "chat", tokenizer)


def test_template_that_is_no_jinja_is_nobodys_record():
    tokenizer = byte_level.__wrapped__(chat="{% for m in messages %}")
    with pytest.raises(ConfigError, match="is no Jinja"):
        encode_records([example("a", "b")], "chat", tokenizer, LONG, skipped=[])


@pytest.mark.parametrize(
    "text", [THOUGHT, "plan\n</think>\n\nBlue.", "\n</think>\n\nBlue.", "[THINK]a[/THINK]Blue.", "Blue."]
)
def test_answer_without_its_thought(text):
    assert without_thought(text) == "Blue."
    assert normalise(text) == "blue"


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("{% if m.role != 'system' %}", r"leaves out message 1 \(system\)"),
        ("{% if m.role != 'assistant' %}", r"leaves out message 3 \(assistant\)"),
        ("{% if loop.last %}", r"leaves out message 1 \(system\)"),
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused(left_out, words):
    template = "{% for m in messages %}" + left_out + "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    talk = conversation("Hm?", "Oh.", "And?", system="Be brief.")
    with pytest.raises(DataError, match=words):
        render_prompt(talk, "chat", byte_level(chat=template))


def test_what_a_template_only_changes_is_not_left_out():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim | tojson }}\n{% endfor %}"
    prompt = render_prompt(conversation(' "Hm?" ', system="Be\nbrief."), "chat", byte_level(chat=template))
    assert prompt.text == 'system: "Be\\nbrief."\nuser: "\\"Hm?\\""\n'
