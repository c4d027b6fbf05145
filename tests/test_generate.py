"""Text in, text out: sessions, greedy decoding against a loop by hand, stops, and prompt files."""

import json
import shutil

import pytest
import torch
from runs import tiny_tokenizer
from tiny import open_gates
from transformers import LlamaConfig, LlamaForCausalLM

from llama_adapter import AdapterConfig, add_adapter, save_adapter
from llama_adapter.base import load_base, load_tokenizer
from llama_adapter.data import Message, encode_prompt
from llama_adapter.errors import AdapterError, ConfigError, DataError, ModelError
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.session import default_device, load_session, plan_session
from llama_adapter.inference.writing import Prompt, read_prompts

CPU = torch.device("cpu")
GREEDY = GenerateConfig(max_new_tokens=12, temperature=0)
QUESTIONS = [Prompt.of("Name the sun"), Prompt.of("Repeat", "moon moon moon"), Prompt.of("cat")]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_adapter(base, folder, seed=1, **config):
    """An adapter with open gates, made for that base."""
    model = load_base(str(base), CPU)
    torch.manual_seed(seed)
    values = {"adapter_len": 4, "adapter_layers": 2, "template": "alpaca", "base_model_name_or_path": str(base)}
    adapter = add_adapter(model, AdapterConfig(**{**values, **config}))
    open_gates(adapter, seed, scale=4.0)
    return str(save_adapter(model, folder))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return write_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def session(base, adapter):
    return load_session(str(base), {"a": adapter}, CPU)


@torch.no_grad()
def greedy_by_hand(session, prompt, adapter, count, template="alpaca"):
    """Whole forwards, one token at a time, without cache, padding or transformers' generate."""
    from llama_adapter import use_adapter

    ids = encode_prompt(prompt.messages, template, session.tokenizer, prompt.input)
    start = len(ids)
    with use_adapter(session.model, adapter):
        for _ in range(count):
            token = int(session.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == session.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
    return start, ids[start:], session.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def force(session, monkeypatch, script):
    """Make the model say `script`, one token id per call for each row still there, then go on with the last."""
    calls = iter(range(10**6))
    forward = session.model.lm_head.forward

    def rigged(hidden):
        logits = forward(hidden)
        step = min(next(calls), len(script) - 1)
        wanted = script[step] if isinstance(script[step], list) else [script[step]] * len(logits)
        logits = torch.zeros_like(logits)
        for row, token in enumerate(wanted):
            logits[row, :, token] = 50.0
        return logits

    monkeypatch.setattr(session.model.lm_head, "forward", rigged)


def ids_of(session, text):
    return session.tokenizer(text, add_special_tokens=False)["input_ids"]


# sessions


def test_without_a_model_name_the_adapter_s_base_is_used(base, adapter):
    session = load_session(None, {"a": adapter}, CPU)
    assert session.model.config.name_or_path == str(base)
    assert session.adapters == ["a"]
    assert not session.model.training
    assert session.answer(QUESTIONS[:1], "a", GREEDY)[0].text == (
        load_session(str(base), {"a": adapter}, CPU).answer(QUESTIONS[:1], "a", GREEDY)[0].text
    )


def test_a_given_model_name_wins_over_the_adapter_s(base, adapter, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert load_session(str(moved), {"a": adapter}, CPU).model.config.name_or_path == str(moved)


def test_an_adapter_that_names_no_base_asks_for_one(base, tmp_path):
    folder = write_adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not say which base it was made for: pass --model"):
        load_session(None, {"a": folder}, CPU)


def test_a_session_without_adapters_is_the_bare_base(base):
    session = load_session(str(base), {}, CPU)
    answer = session.answer(QUESTIONS[:1], None, GREEDY)[0]
    with torch.no_grad():
        ids = encode_prompt(QUESTIONS[0].messages, "alpaca", session.tokenizer)
        first = int(session.model(torch.tensor([ids])).logits[0, -1].argmax())
    assert answer.prompt_tokens == len(ids)
    assert answer.new_tokens == 0 or session.tokenizer.decode([first]).strip() in answer.text
    assert session.adapters == []


def test_the_adapter_changes_the_answer_and_none_is_the_base(base, session):
    with_adapter, without = (session.answer(QUESTIONS, name, GREEDY) for name in ("a", None))
    bare = load_session(str(base), {}, CPU).answer(QUESTIONS, None, GREEDY)
    assert [answer.text for answer in without] == [answer.text for answer in bare]
    assert [answer.text for answer in with_adapter] != [answer.text for answer in without]


def test_several_adapters_answer_under_their_names(base, adapter, tmp_path):
    other = write_adapter(base, tmp_path, seed=7)
    both = load_session(str(base), {"a": adapter, "b": other}, CPU)
    texts = {name: both.answer(QUESTIONS, name, GREEDY)[0].text for name in ("a", "b")}
    assert texts["a"] == load_session(str(base), {"x": adapter}, CPU).answer(QUESTIONS, "x", GREEDY)[0].text
    assert texts["b"] == load_session(str(base), {"x": other}, CPU).answer(QUESTIONS, "x", GREEDY)[0].text
    assert texts["a"] != texts["b"]


# templates


@pytest.fixture(scope="module")
def chat_base(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [("alpaca", None, "alpaca"), ("chat", None, "chat"), (None, None, "chat"), ("chat", "alpaca", "alpaca")],
)
def test_the_template_is_the_given_the_adapter_s_or_the_tokenizer_s(chat_base, tmp_path, stored, given, expected):
    folder = write_adapter(chat_base, tmp_path, template=stored)
    session = load_session(None, {"a": folder}, CPU, template=given)
    assert session.templates["a"] == session.templates[None] == expected
    answer = session.answer(QUESTIONS[:1], "a", GREEDY)[0]
    length, _, text = greedy_by_hand(session, QUESTIONS[0], "a", 12, expected)
    assert (answer.prompt_tokens, answer.text) == (length, text)


def test_without_adapter_and_chat_template_alpaca_is_used(base, chat_base):
    assert load_session(str(base), {}, CPU).templates == {None: "alpaca"}
    assert load_session(str(chat_base), {}, CPU).templates == {None: "chat"}


def test_a_chat_template_that_is_asked_for_must_be_there_before_weights_are_read(base):
    with pytest.raises(DataError, match="has no chat template: use --template alpaca"):
        plan_session(str(base), {}, "chat")


def test_adapters_keep_their_own_templates_side_by_side(chat_base, tmp_path):
    one = write_adapter(chat_base, tmp_path / "one", template="alpaca")
    two = write_adapter(chat_base, tmp_path / "two", template="chat")
    session = load_session(None, {"one": one, "two": two}, CPU)
    assert session.templates == {"one": "alpaca", "two": "chat", None: "chat"}


# answers


@pytest.mark.parametrize("prompt", QUESTIONS)
@pytest.mark.parametrize("name", ["a", None])
def test_an_answer_is_greedy_decoding_done_by_hand(session, prompt, name):
    answer = session.answer([prompt], name, GREEDY)[0]
    length, new, text = greedy_by_hand(session, prompt, name, 12)
    assert (answer.prompt_tokens, answer.new_tokens, answer.text) == (length, len(new), text)
    assert answer.finish_reason == ("length" if len(new) == 12 else "stop")


def test_batch_answers_equal_single_answers(session):
    batch = session.answer(QUESTIONS, "a", GREEDY)
    assert len({answer.prompt_tokens for answer in batch}) == 3, "the rows must need padding"
    for answer, prompt in zip(batch, QUESTIONS, strict=True):
        single = session.answer([prompt], "a", GREEDY)[0]
        assert (answer.text, answer.prompt_tokens, answer.new_tokens, answer.finish_reason) == (
            single.text, single.prompt_tokens, single.new_tokens, single.finish_reason
        )  # fmt: skip


@pytest.mark.parametrize("prompt", QUESTIONS)
def test_streamed_pieces_join_to_the_answer(session, prompt):
    pieces = []
    answer = session.answer([prompt], "a", GREEDY, on_text=pieces.append)[0]
    assert "".join(pieces).strip() == answer.text
    assert answer.text == session.answer([prompt], "a", GREEDY)[0].text
    assert all(pieces)


def test_text_streams_word_by_word_before_the_end(session, monkeypatch):
    script = ids_of(session, " sun moon cat dog")
    force(session, monkeypatch, [*script, session.tokenizer.eos_token_id])
    pieces = []
    answer = session.answer(QUESTIONS[:1], "a", GREEDY, on_text=pieces.append)[0]
    assert len(pieces) > 2
    assert "".join(pieces).strip() == answer.text == "sun moon cat dog"


def test_the_stop_token_ends_the_answer_and_is_not_part_of_it(session, monkeypatch):
    script = ids_of(session, "sun moon")
    force(session, monkeypatch, [*script, session.tokenizer.eos_token_id])
    answer = session.answer(QUESTIONS[:1], "a", GREEDY)[0]
    assert (answer.text, answer.new_tokens, answer.finish_reason) == ("sun moon", len(script), "stop")


def test_an_answer_cut_by_the_limit_says_length(session, monkeypatch):
    force(session, monkeypatch, ids_of(session, "sun"))
    answer = session.answer(QUESTIONS[:1], "a", GenerateConfig(max_new_tokens=5, temperature=0))[0]
    assert (answer.new_tokens, answer.finish_reason) == (5, "length")


def test_a_stop_as_the_very_last_token_is_a_stop(session, monkeypatch):
    script = ids_of(session, "sun moon")
    force(session, monkeypatch, [*script, session.tokenizer.eos_token_id])
    config = GenerateConfig(max_new_tokens=len(script) + 1, temperature=0)
    assert session.answer(QUESTIONS[:1], "a", config)[0].finish_reason == "stop"


def test_rows_of_a_batch_stop_each_for_itself(session, monkeypatch):
    eos, (sun,), (cat,) = session.tokenizer.eos_token_id, ids_of(session, "s"), ids_of(session, "c")
    force(session, monkeypatch, [[sun, cat, sun], [eos, cat, sun], [cat, eos], [cat]])
    answers = session.answer(QUESTIONS, "a", GenerateConfig(max_new_tokens=4, temperature=0))
    assert [answer.text for answer in answers] == ["s", "cccc", "ss"]
    assert [answer.finish_reason for answer in answers] == ["stop", "length", "stop"]
    assert [answer.new_tokens for answer in answers] == [1, 4, 2]


def test_the_base_s_own_end_tokens_stop_too(session, monkeypatch):
    (other,) = ids_of(session, "z")
    session.model.generation_config.eos_token_id = [2, other]
    force(session, monkeypatch, [*ids_of(session, "sun"), other])
    answer = session.answer(QUESTIONS[:1], "a", GREEDY)[0]
    assert (answer.text, answer.finish_reason) == ("sun", "stop")


def test_an_answer_that_stops_at_once_is_empty(session, monkeypatch):
    force(session, monkeypatch, [session.tokenizer.eos_token_id])
    pieces = []
    answer = session.answer(QUESTIONS[:1], "a", GREEDY, on_text=pieces.append)[0]
    assert (answer.text, answer.new_tokens, answer.finish_reason, pieces) == ("", 0, "stop", [])


def test_sampling_repeats_with_its_seed_and_differs_with_another(session):
    def sample(seed):
        return session.answer(QUESTIONS[:1], "a", GenerateConfig(12, temperature=2.0, top_p=1.0, seed=seed))[0].text

    texts = [sample(seed) for seed in (1, 2, 1, 3)]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 3


def test_without_a_seed_every_call_draws_anew(session):
    config = GenerateConfig(12, temperature=2.0, top_p=1.0)
    torch.manual_seed(0)
    assert len({session.answer(QUESTIONS[:1], "a", config)[0].text for _ in range(4)}) > 1


def test_a_tiny_top_p_is_greedy(session):
    greedy = session.answer(QUESTIONS[:1], "a", GREEDY)[0].text
    narrow = session.answer(QUESTIONS[:1], "a", GenerateConfig(12, temperature=1.0, top_p=1e-6, seed=0))[0].text
    assert narrow == greedy


def test_the_base_s_sampling_defaults_do_not_leak_into_ours(session):
    greedy = session.answer(QUESTIONS[:1], "a", GREEDY)[0].text
    config = session.model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 5.0, 3, 1.0
    assert session.answer(QUESTIONS[:1], "a", GREEDY)[0].text == greedy


def test_history_is_read_by_the_model(session):
    turns = (Message("user", "sun"), Message("assistant", "moon"), Message("user", "cat"))
    answer = session.answer([Prompt(turns)], "a", GREEDY)[0]
    length, _, text = greedy_by_hand(session, Prompt(turns), "a", 12)
    assert (answer.prompt_tokens, answer.text) == (length, text)
    assert length > session.answer([Prompt(turns[-1:])], "a", GREEDY)[0].prompt_tokens


# room


def test_a_prompt_longer_than_the_context_is_refused(session):
    with pytest.raises(DataError, match=r"The prompt has \d{4} tokens; the base takes at most 1023: shorten it"):
        session.answer([Prompt.of("zq" * 600)], "a", GREEDY)


def test_max_new_tokens_is_clipped_to_what_the_context_holds(session, monkeypatch):
    force(session, monkeypatch, ids_of(session, "s"))
    used = session.answer([Prompt.of("")], "a", GenerateConfig(1, temperature=0))[0].prompt_tokens
    prompt = Prompt.of("z" * (1024 - used - 3))
    answer = session.answer([prompt], "a", GenerateConfig(max_new_tokens=50, temperature=0))[0]
    assert (answer.prompt_tokens, answer.new_tokens, answer.finish_reason) == (1021, 3, "length")


# what does not fit is found before weights are read


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("llama_adapter.inference.session.load_base", lambda *_: pytest.fail("read the weights"))


def test_a_missing_base_is_found_first(adapter, no_weights):
    with pytest.raises(ModelError, match=r"./nowhere' does not exist"):
        load_session("./nowhere", {"a": adapter}, CPU)


def test_a_missing_adapter_is_found_first(base, tmp_path, no_weights):
    with pytest.raises(AdapterError, match="is not an adapter: there is nothing of that name"):
        load_session(str(base), {"a": str(tmp_path / "nowhere")}, CPU)


def test_an_adapter_for_another_base_is_found_first(adapter, tmp_path, no_weights):
    config = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="hidden_size 32 against 48"):
        load_session(str(tmp_path), {"a": adapter}, CPU)


def test_truncated_weights_of_any_adapter_are_found_first(base, adapter, tmp_path, no_weights):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(adapter, spoilt)
    path = spoilt / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="truncated"):
        load_session(str(base), {"good": adapter, "spoilt": str(spoilt)}, CPU)


def test_a_malformed_name_is_found_first(base, adapter, no_weights):
    with pytest.raises((AdapterError, ConfigError), match="my poet"):
        load_session(str(base), {"my poet": adapter}, CPU)


def test_a_base_without_tokenizer_is_found_first(base, adapter, tmp_path, no_weights):
    shutil.copy(base / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be read"):
        load_session(str(tmp_path), {"a": adapter}, CPU)


def test_damaged_base_weights_are_one_sentence(base, adapter, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(base, spoilt)
    path = spoilt / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"The weights of .*spoilt' cannot be read: ") as error:
        load_session(str(spoilt), {"a": adapter}, CPU)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_be_read_is_one_sentence(base, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(base, spoilt)
    (spoilt / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"The tokenizer of .*spoilt' cannot be read: "):
        load_tokenizer(str(spoilt))


def test_the_default_device_is_the_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_device() == CPU
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert default_device() == found


# prompt files


def test_text_files_hold_one_instruction_a_line(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("  Name a colour.\n\n\tÜber den See?\r\n", encoding="utf-8")
    assert read_prompts(str(path)) == [Prompt.of("Name a colour."), Prompt.of("Über den See?")]


RECORDS = [
    ({"instruction": "a", "input": "b", "output": "ignored"}, Prompt.of("a", "b")),
    ({"instruction": "a", "input": None}, Prompt.of("a")),
    ({"prompt": "p"}, Prompt.of("p")),
    ({"messages": [{"role": "user", "content": "q"}]}, Prompt.of("q")),
    (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "what it answers"},
            ]
        },
        Prompt((Message("system", "s"), Message("user", "q"))),
    ),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSON", ".ndjson"])
def test_record_files_hold_instructions_prompts_or_messages(tmp_path, suffix):
    path = tmp_path / f"questions{suffix}"
    records = [record for record, _ in RECORDS]
    as_lines = suffix in (".jsonl", ".ndjson")
    path.write_text("\n".join(map(json.dumps, records)) if as_lines else json.dumps(records))
    assert read_prompts(str(path)) == [prompt for _, prompt in RECORDS]


@pytest.mark.parametrize(
    "record",
    [
        {},
        "text",
        None,
        {"instruction": "  "},
        {"instruction": 3},
        {"output": "x"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": ["hello"]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "robot", "content": "x"}, {"role": "user", "content": "y"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        {"instruction": "a", "input": 5},
        {"instruction": "a", "input": ["b"]},
    ],
)
def test_a_record_that_asks_nothing_is_named_by_its_number(tmp_path, record):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"instruction": "fine"}, record]))
    with pytest.raises(DataError, match=r"questions.json, record 2"):
        read_prompts(str(path))


def test_prompt_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    for name, message in {
        "nowhere.txt": r"nowhere.txt cannot be read \(No such file",
        "folder": r"folder is a folder without data files",
        "latin.txt": r"latin.txt cannot be read \(it is not UTF-8 text\)",
        "blank.txt": r"blank.txt is empty: write one instruction a line",
        "broken.jsonl": r"broken.jsonl is not JSON \(line 2",
        "nowhere.json": r"nowhere.json does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("probe", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_auto_is_bf16_on_a_cpu_that_computes_in_it_and_the_log_says_so(base, monkeypatch, caplog, probe):
    caplog.set_level("INFO", "llama_adapter")
    monkeypatch.setattr(torch.cpu, probe, lambda: True)
    assert load_session(str(base), {}, CPU).model.dtype == torch.bfloat16
    assert load_session(str(base), {}, CPU, "fp32").model.dtype == torch.float32
    assert caplog.messages == [f"base: {base} on cpu in bfloat16", f"base: {base} on cpu in float32"]


def test_auto_is_fp32_on_a_cpu_without_bf16_or_where_torch_cannot_tell(base, monkeypatch):
    assert load_base(str(base), CPU).dtype == torch.float32
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe)
    assert load_base(str(base), CPU).dtype == torch.float32


def test_adapters_of_another_number_than_prompts_are_refused(session):
    for names in (["a"], ["a", None, "a"]):
        with pytest.raises(AdapterError, match=f"Got {len(names)} adapters for 2 prompts"):
            session.answer([Prompt.of("sun"), Prompt.of("moon")], names, GREEDY)
    with pytest.raises(AdapterError, match="unknown adapter 'zz'"):
        session.answer([Prompt.of("sun")], "zz", GREEDY)
    assert session.answer([], "a", GREEDY) == []
