"""OpenAI's own client against a server, the same for both backends: vLLM's where vLLM is installed, else ours.

`make test` runs it for the embedded server, `make test-vllm` for `llama-adapter serve --backend vllm`.
"""

import contextlib
import importlib.util
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
from engines import apart, first_scores, greedy_text, write_adapters, write_family
from running import OPTIONS, client_of, free_port, healthy, started
from transformers import AutoTokenizer

VLLM = importlib.util.find_spec("vllm") is not None
HELLO = [{"role": "user", "content": "Name the sun"}]
CHAT = (
    "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName the sun\n\n### Response:"
)
NAMES = [f"n{number}" for number in range(6)]


def at_peace(function, *args, **kwargs):
    """What a function of `engines` gives where vLLM has not rewritten transformers."""
    return apart(function, *args, **kwargs) if "vllm" in sys.modules else function(*args, **kwargs)


@contextlib.contextmanager
def embedded(base, given, folder):
    from servers import serving

    with serving(base, given, adapter_dir=str(folder), admin_key="admin", max_tokens=128) as server:
        yield server.url


@contextlib.contextmanager
def vllm(base, given, folder, log):
    from llama_adapter.serving.vllm_plugin.launch import command, environment

    port = free_port()
    line = command(str(base), given, adapter_dir=str(folder), port=port, served_model_name="base", options=OPTIONS)
    with started(line, port, log, environment(str(folder))) as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A base, n0 and n1, which were named at the start, and n2 to n5 and a broken one, which lie in the directory."""
    base = at_peace(write_family, "llama", tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("experts")
    at_peace(write_adapters, base, folder, len(NAMES), template="alpaca")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text('{"format_version": 1}')
    given = {name: str(folder / name) for name in NAMES[:2]}
    log = tmp_path_factory.mktemp("log") / "log"
    backend = vllm(base, given, folder, log) if VLLM else embedded(base, given, folder)
    with backend as url, client_of(url, "admin") as client:
        yield SimpleNamespace(base=base, folder=folder, url=url, client=client)


@pytest.fixture
def client(server):
    return server.client


def alone(server, name, text, new=12):
    """What transformers says, greedily."""
    return shown(at_peace(greedy_text, server.base, None if name == "base" else server.folder / name, text, new))


def shown(text):
    """A text without what servers treat unlike: half a character at its end, blanks at both ends of a chat."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").strip()


# models


def test_models_are_the_base_and_every_adapter(server, client):
    found = {model.id: model for model in client.models.list()}
    assert set(found) - {"broken"} == {"base", *NAMES}
    assert found["base"].parent is None
    for name in NAMES:
        assert (found[name].parent, found[name].root) == ("base", str(server.folder / name))
        assert client.models.retrieve(name).root == found[name].root
    for name in ("n9", "../n1"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


# text


@pytest.mark.parametrize("name", ["base", "n0", "n1", "n3"])
def test_a_chat_is_written_with_the_adapters_template_and_streams(server, client, name):
    options = {"model": name, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    reply = client.chat.completions.create(**options)
    text = reply.choices[0].message.content
    assert shown(text) == alone(server, name, CHAT)
    assert (reply.model, reply.object) == (name, "chat.completion")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert 1 <= reply.usage.completion_tokens <= 12
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == reply.choices[0].finish_reason
    counts = [(use.prompt_tokens, use.completion_tokens) for use in (parts[-1].usage, reply.usage)]
    assert counts[0] == counts[1]
    assert parts[-1].choices == []
    quiet = client.chat.completions.create(**options, stream=True)
    assert all(part.usage is None for part in quiet)


def test_a_developer_speaks_as_the_system(client):
    def ask(role):
        messages = [{"role": role, "content": "Be brief."}, *HELLO]
        return client.chat.completions.create(model="n1", messages=messages, temperature=0, max_tokens=12)

    one, two = ask("developer"), ask("system")
    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.usage == two.usage


def test_completions_go_on_with_the_text_as_it_is(server, client):
    options = {"model": "n1", "temperature": 0, "max_tokens": 8}
    reply = client.completions.create(prompt=["moon", "sun "], logprobs=2, **options)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [shown(choice.text) for choice in reply.choices] == [
        alone(server, "n1", f"<s>{text}", 8) for text in ("moon", "sun ")
    ]
    for choice in reply.choices:
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 8
        assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
        tops = zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
        found = [(max(top.values()), one) for top, one in tops if len(top) == 2]  # in vLLM some tokens look alike
        assert found
        assert [most for most, _ in found] == pytest.approx([one for _, one in found], abs=1e-4)
    parts = list(
        client.completions.create(prompt="moon", stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(part.choices[0].text for part in parts if part.choices) == reply.choices[0].text
    assert parts[-1].usage.completion_tokens == 8


def test_a_prompt_may_be_tokens_and_be_echoed(server, client):
    tokenizer = AutoTokenizer.from_pretrained(server.base)
    options = {"model": "n1", "temperature": 0, "max_tokens": 8}
    one, two = (tokenizer(text).input_ids for text in ("moon", "sun "))
    texts = [choice.text for choice in client.completions.create(prompt=["moon", "sun "], **options).choices]
    reply = client.completions.create(prompt=one, **options)
    assert reply.choices[0].text == texts[0]
    assert reply.usage.prompt_tokens == len(one)
    assert [choice.text for choice in client.completions.create(prompt=[one, two], **options).choices] == texts
    echoed = client.completions.create(prompt=["moon", "sun "], echo=True, **options)
    assert [choice.text for choice in echoed.choices] == ["moon" + texts[0], "sun " + texts[1]]
    echoed = client.completions.create(prompt=one, echo=True, **options)
    assert [choice.text for choice in echoed.choices] == ["<s>moon" + texts[0]]
    drawn = client.completions.create(prompt=one, echo=True, n=2, seed=1, **{**options, "temperature": 1})
    assert [choice.text.startswith("<s>moon") for choice in drawn.choices] == [True, True]
    parts = client.completions.create(prompt="moon", echo=True, stream=True, **options)
    assert "".join(part.choices[0].text for part in parts if part.choices) == "moon" + texts[0]
    for prompt in ([10**6], [-1], [[1, 2], []], [1, "a"]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt=prompt, **options)


def test_an_adapter_is_found_by_name_when_it_is_asked_for(server, client):
    reply = client.completions.create(model="n5", prompt="moon", temperature=0, max_tokens=8)
    assert shown(reply.choices[0].text) == alone(server, "n5", "<s>moon", 8)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="broken", prompt="moon", max_tokens=2)


def test_log_probabilities_are_the_models_own(server, client):
    options = {"model": "n0", "messages": HELLO, "temperature": 0, "max_tokens": 6, "logprobs": True}
    content = client.chat.completions.create(**options, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 6
    expected = at_peace(first_scores, server.base, server.folder / "n0", CHAT, 3)
    assert [top.logprob for top in content[0].top_logprobs[:3]] == pytest.approx(expected, abs=1e-4)
    assert content[0].logprob == pytest.approx(expected[0], abs=1e-4)
    assert all(token.bytes == list(token.token.encode()) for token in content if "\ufffd" not in token.token)
    parts = client.chat.completions.create(**options, top_logprobs=3, stream=True)
    streamed = [token for part in parts if part.choices and part.choices[0].logprobs
                for token in part.choices[0].logprobs.content]  # fmt: skip
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=1e-4)


def test_responses_are_text_in_text_out(server, client):
    options = {"model": "n0", "temperature": 0, "max_output_tokens": 12, "store": False}
    reply = client.responses.create(input="Name the sun", **options)
    assert shown(reply.output_text) == alone(server, "n0", CHAT)
    chat = client.chat.completions.create(model="n0", messages=HELLO, temperature=0, max_tokens=12)
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens,
    )  # fmt: skip
    events = list(client.responses.create(input=HELLO, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert shown(events[-1].response.output_text) == shown(reply.output_text)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == events[-1].response.output_text


# settings


def test_seeds_repeat_and_choices_differ(client):
    def ask(seed, n=3):
        reply = client.chat.completions.create(
            model="n0", messages=HELLO, temperature=1.5, max_tokens=12, n=n, seed=seed
        )
        assert [choice.index for choice in reply.choices] == list(range(n))
        return [choice.message.content for choice in reply.choices]

    first = ask(7)
    assert ask(7) == first
    assert ask(7, 1) == first[:1]
    assert len(set(first)) == 3
    assert ask(8) != first


def test_a_stop_string_ends_the_answer_before_it(client):
    options = {"model": "n1", "prompt": "moon", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[6:9]
    reply = client.completions.create(**options, stop=[stop, "never"])
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == reply.choices[0].text


@pytest.mark.parametrize("name", ["base", "n2"])
def test_penalties_keep_an_answer_from_repeating_itself(client, name):
    def tokens(**penalty):
        reply = client.completions.create(
            model=name, prompt="sun", temperature=0, max_tokens=100, logprobs=0, **penalty
        )
        return reply.choices[0].logprobs.tokens

    plain = tokens()
    assert len(set(tokens(presence_penalty=2))) > len(set(plain))
    assert len(set(tokens(frequency_penalty=2))) > len(set(plain))


# many at once


def test_a_crowd_gets_what_each_gets_alone(server, client):
    asked = [(f"sun {number}", name) for number in range(5) for name in ("base", *NAMES)]

    def ask(one):
        text, name = one
        return client.completions.create(model=name, prompt=text, temperature=0, max_tokens=8).choices[0].text

    single = [ask(one) for one in asked]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, asked)) == single
    assert len(set(single)) > 20


# adapters that come and go


def test_loading_reloading_and_unloading(server, client):
    folder, text = server.folder / "poems", "moon " * 20

    def post(path, **body):
        return client.post(f"/{path}", body=body, cast_to=httpx.Response)

    def load(source, **more):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(server.folder / source, folder)
        return post("load_lora_adapter", lora_name="poet", lora_path=str(folder), **more)

    def ask():
        return shown(client.completions.create(model="poet", prompt=text, temperature=0, max_tokens=8).choices[0].text)

    assert "poet" in load("n0").text
    assert ask() == ask() == alone(server, "n0", "<s>" + text, 8)
    assert client.models.retrieve("poet").root == str(folder)
    with pytest.raises(openai.BadRequestError, match="already"):
        load("n2")
    load("n2", load_inplace=True)
    assert ask() == ask() == alone(server, "n2", "<s>" + text, 8)
    assert "poet" in post("unload_lora_adapter", lora_name="poet").text
    for again in (ask, lambda: post("unload_lora_adapter", lora_name="poet")):
        with pytest.raises(openai.NotFoundError):
            again()
    load("n4")
    assert ask() == alone(server, "n4", "<s>" + text, 8)
    post("unload_lora_adapter", lora_name="poet")
    shutil.rmtree(folder)


# what is refused


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "n9"}, 404),
        ({"model": "../n1"}, 404),
        ({"model": ".."}, 404),
        ({"messages": "Hi"}, 400),
        ({"messages": [{"content": "Hi"}]}, 400),
        ({"messages": [{"role": "system", "content": "Hi"}]}, 400),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, 400),
        ({"messages": [{"role": "assistant", "content": "Hi"}, *HELLO]}, 400),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, 400),
        ({"messages": [{"role": "user", "content": "sun " * 2000}]}, 400),
        ({"max_tokens": -1}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"max_tokens": "many"}, 400),
        ({"n": 0}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": "hot"}, 400),
        ({"top_p": 0}, 400),
        ({"top_p": 1.5}, 400),
        ({"presence_penalty": 3}, 400),
        ({"top_logprobs": 2}, 400),
        ({"logprobs": True, "top_logprobs": 10**4}, 400),
        ({"stream_options": {"include_usage": True}}, 400),
        ({"stop": ""}, 400),
        ({"tools": [{"type": "function"}]}, 400),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_openais_shape(server, client, change, status):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "n0", "messages": HELLO, "max_tokens": 4, **change})
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["message"]
    assert healthy(server.url)


# the page


def test_the_page_and_the_gates_it_draws(server, client):
    page = httpx.get(server.url)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert [page.headers[name] for name in ("x-content-type-options", "x-frame-options", "referrer-policy")] == [
        "nosniff", "DENY", "no-referrer",
    ]  # fmt: skip
    from llama_adapter.formats.inspect import describe_adapter

    for name in ("n0", "n4"):
        layers = describe_adapter(server.folder / name)["layers"]
        found = httpx.get(f"{server.url}/gates/{name}").json()
        assert found["layers"] == [layer["layer"] for layer in layers]
        for row, layer in zip(found["strength"], layers, strict=True):
            assert row == pytest.approx(layer["gates"], abs=1e-6)
    for name in ("base", "n9", "../n0"):
        reply = httpx.get(f"{server.url}/gates/{name}")
        assert reply.status_code == 404
        if name != "../n0":  # which a client makes /n0 of
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
