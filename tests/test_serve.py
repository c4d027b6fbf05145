"""The embedded server beyond what both backends do: many clients at once, what is refused, what never happens."""

import contextlib
import json
import queue
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from servers import ADMIN, serving, write_experts
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from llama_adapter.data.formats import parse_question
from llama_adapter.errors import AdapterError
from llama_adapter.inference.choice import Choice, Row
from llama_adapter.inference.config import GenerateConfig
from llama_adapter.inference.engine import Engine
from llama_adapter.inference.session import Prompt, load_session
from llama_adapter.serving.app import is_local
from llama_adapter.serving.scheduler import Scheduler, Ticket
from llama_adapter.serving.text import Written

HELLO = [{"role": "user", "content": "Name the sun"}]


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_experts(base, folder, 6)
    return folder


@pytest.fixture(scope="module")
def server(base, folder):
    adapters = {f"expert-{n}": str(folder / f"expert-{n}") for n in range(2)}
    with serving(base, adapters, adapter_dir=str(folder), admin_key="admin", max_tokens=64) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client


def alone(server, text, name, new=12):
    """What a session answers to one prompt by itself."""
    key = None if name == "base" else server.app.state.server.experts._experts[name].key
    return server.session.answer([Prompt.of(text)], key, GenerateConfig(new, 0.0))[0].text


# many at once


@pytest.mark.parametrize("count", [6, pytest.param(64, marks=pytest.mark.slow)])
def test_every_answer_of_a_crowd_is_what_it_is_alone(base, tmp_path, count):
    adapters = write_experts(base, tmp_path, count)
    with serving(base, {}, adapter_dir=str(tmp_path), max_tokens=64) as server:
        check_crowd(server, ["base", *adapters])


def check_crowd(server, names):
    rng = random.Random(0)
    words = ["sun", "moon", "cat"]
    asked = [
        (" ".join(rng.choices(words, k=rng.randint(1, 20))), name, rng.randint(1, 20))
        for name in rng.sample(3 * names, k=3 * len(names))
    ]
    client = server.client

    def ask(one):
        text, name, new = one
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=new)

    with ThreadPoolExecutor(32) as pool:
        got = [reply.choices[0].message.content for reply in pool.map(ask, asked)]
    server.settle()
    assert got == [alone(server, *one) for one in asked]
    assert len(set(got)) > 15


def test_who_leaves_takes_the_work_along(server):
    with server.http.stream(
        "POST", "/v1/chat/completions",
        json={"model": "expert-0", "messages": HELLO, "max_tokens": 64, "stream": True, "temperature": 0, "n": 4},
    ) as reply:  # fmt: skip
        next(reply.iter_lines())
    server.settle()
    experts = server.app.state.server.experts
    until = time.monotonic() + 10
    while any(expert.users for expert in experts._experts.values()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(expert.users for expert in experts._experts.values())


def test_reloading_under_one_name_changes_answers_at_once_and_disturbs_nobody(base, tmp_path):
    folders = write_experts(base, tmp_path, 2)
    with serving(base, {}, adapter_dir=str(tmp_path), admin_key="admin", max_tokens=64) as server:
        client, seen, wrong, stop = server.client, set(), [], threading.Event()

        def load(path, inplace=True):
            body = {"lora_name": "poet", "lora_path": path, "load_inplace": inplace}
            reply = server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
            assert reply.status_code == 200, reply.text

        load("expert-0", False)
        right = {}
        for name in folders:
            reply = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=12)
            right[name] = reply.choices[0].message.content
        assert right["expert-0"] != right["expert-1"]

        def ask():
            while not stop.is_set():
                reply = client.chat.completions.create(model="poet", messages=HELLO, temperature=0, max_tokens=12)
                text = reply.choices[0].message.content
                seen.add(text)
                if text not in right.values():
                    wrong.append(text)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(10):
            name = f"expert-{1 - turn % 2}"
            load(name)
            seen.clear()
            until = time.monotonic() + 20
            while right[name] not in seen:  # somebody is answered by the new version
                assert time.monotonic() < until
                time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        server.settle()
        reply = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}, headers=ADMIN)
        assert reply.status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="poet", messages=HELLO)
        server.scheduler.between_steps(lambda: None).result(5)
        assert len(server.session.adapters) == 2


def test_adapters_beyond_the_most_leave_when_nobody_asks_them(base, tmp_path):
    names = list(write_experts(base, tmp_path, 14))
    rng = random.Random(0)
    with serving(
        base, {"kept": str(tmp_path / "expert-0")}, adapter_dir=str(tmp_path), max_adapters=3, max_rows=8
    ) as server:
        experts, session = server.app.state.server.experts, server.session

        def ask(name):
            reply = server.client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=8)
            return reply.choices[0].message.content

        def loaded():
            server.scheduler.between_steps(lambda: None).result(10)
            return set(experts._experts) - {"base", "kept"}

        expected = {name: ask(name) for name in names}
        assert len(set(expected.values())) > 10
        assert loaded() == set(names[-3:])
        ask(names[-3])  # no longer the one that was asked longest ago
        ask(names[0])
        assert loaded() == {names[-3], names[-1], names[0]}
        asked = rng.choices([*names, "kept"], k=120)
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, asked)) == [expected[name.replace("kept", names[0])] for name in asked]
        server.settle()
        with experts.using(names[0]), experts.using(names[1]), experts.using(names[2]), experts.using(names[3]):
            assert loaded() == set(names[:4])  # those in use stay
        assert loaded() == set(names[:3])
        assert len(session.adapters) == len(session.templates) - 1 == 4
        assert len(session.engine.slots.lengths) <= 32
        assert {model.id for model in server.client.models.list()} == {"base", "kept", *names}


def test_a_full_line_is_refused_and_a_late_request_ended(base, folder):
    with serving(base, {}, adapter_dir=str(folder), max_rows=1, max_waiting=1, max_tokens=512) as server:
        client = server.client

        def ask(_):
            try:
                return client.chat.completions.create(model="base", messages=HELLO, max_tokens=512, seed=1)
            except openai.APIStatusError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, range(8)))
        refused = [reply for reply in replies if isinstance(reply, openai.RateLimitError)]
        assert refused
        assert refused[0].response.headers["retry-after"]
        assert any(not isinstance(reply, Exception) for reply in replies)
    with serving(base, {}, deadline=0.02, max_tokens=880) as server, pytest.raises(openai.APIStatusError) as caught:
        server.client.chat.completions.create(model="base", messages=HELLO, max_tokens=880, temperature=0)
    assert caught.value.status_code == 504


def test_a_fault_in_one_request_ends_that_request_alone(server, monkeypatch):
    session, rows = server.session, server.session.rows
    broken = torch.full((1, 7), 0.5)  # a condition of no width that fits

    def sabotaged(prompts, names, config):
        found = rows(prompts, names, config)
        if "tree" in prompts[0].messages[0].content:
            object.__setattr__(found[0], "condition", broken)
        return found

    monkeypatch.setattr(session, "rows", sabotaged)
    client = server.client

    def ask(text):
        try:
            messages = [{"role": "user", "content": text}]
            return client.chat.completions.create(model="expert-0", messages=messages, temperature=0, max_tokens=12)
        except openai.InternalServerError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, ["sun", "tree", "moon"] * 4))
    monkeypatch.undo()
    for text, reply in zip(["sun", "tree", "moon"] * 4, replies, strict=True):
        if text == "tree":
            assert isinstance(reply, openai.InternalServerError)
            assert "its log says" in str(reply)
        else:
            assert reply.choices[0].message.content == alone(server, text, "expert-0")
    assert server.http.get("/health").status_code == 200


# what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "poet"}, "no model 'poet'"),
        ({"model": "../expert-0"}, "no model"),
        ({"messages": []}, "'messages' is empty: give at least one."),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must end with a user message"),
        ({"messages": [{"role": "system", "content": "a"}]}, "must end with a user message"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "must end with a user message"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages.0.content': "),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "'messages.0.content.0.type': "),
        ({"messages": [{"role": "user", "content": "a", "list[a]": 1}]}, "'messages.0.list[a]' is not supported"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "at most 64: ask for fewer"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"n": 9}, "at most 8"),
        ({"n": 2.5}, "n"),
        ({"top_k": 5}, "'top_k' is not supported"),
        ({"tools": [{"type": "function"}]}, "'tools' is not supported here: leave it out"),
        ({"logit_bias": {"5": 1}}, "'logit_bias' is not supported here: leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"stop": ["a"] * 5}, "'stop': List should have at most 4 items, not 5."),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"model": "\ud800"}, ""),
        ({"\ud800": 1}, ""),
        ({"messages": [{"role": "user", "content": "sun " * 2000}]}, "tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_openais_shape(server, change, says):
    body = {"model": "expert-0", "messages": HELLO, **change}
    headers = {"content-type": "application/json"}
    reply = server.http.post("/v1/chat/completions", content=json.dumps(body).encode(), headers=headers)
    assert reply.status_code in (400, 404), reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(("words", "new"), [(2000, 4), (50_000, 4), (5, 64)])
def test_whatever_is_too_long_for_the_context_has_openais_code(server, words, new):
    body = {"model": "expert-0", "prompt": " ".join(["sun"] * words), "max_tokens": new}
    if words == 5:  # a prompt that fits, and no room for the answer
        body["prompt"] = [5] * 1000
    reply = server.http.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded"), reply.text


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        ("completions", {"prompt": ["a"] * 65}, "'prompt': List should have at most 64 items"),
        ("completions", {"prompt": [5, -1]}, "'prompt.1': Input should be greater than or equal to 0"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": []}]},
            "'messages.0.content' is empty: give at least one.",
        ),
    ],
)
def test_of_a_value_of_several_kinds_the_one_that_is_meant_says_what_is_wrong(server, url, body, says):
    reply = server.http.post(f"/v1/{url}", json={"model": "expert-0", **body})
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "url", ["http://example.org/a.png", "file:///etc/passwd", "data:image/png;base64,@@", "data:,x"]
)
def test_nothing_is_fetched(server, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"model": "expert-0", "messages": [{"role": "user", "content": [part]}]}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "data: URI" in reply.json()["error"]["message"] or "base64" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "messages.0.content.0"


@pytest.mark.parametrize(("name", "says"), [("expert-0", "trained on text alone"), ("base", "cannot look at files")])
def test_who_is_blind_does_not_look_at_pictures(server, name, says):
    part = {"type": "image_url", "image_url": {"url": "DATA:image/png;Base64,aGVsbG8="}}
    body = {"model": name, "messages": [{"role": "user", "content": [part]}]}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_bodies_that_are_no_json_or_too_large(base):
    headers = {"content-type": "application/json"}
    with serving(base, {}, max_body=1000) as server:
        for body in (b"", b"{", b"[1,2", b'"a"', b"null", b"[" * 900, b"\xff\xfe", b'{"model": NaN}', b"9" * 900):
            reply = server.http.post("/v1/chat/completions", content=body, headers=headers)
            assert reply.status_code == 400, body
            assert reply.json()["error"]["type"] == "invalid_request_error"
        assert server.http.post("/v1/completions", content=b"x" * 1001, headers=headers).status_code == 413

        def pieces():
            for _ in range(100):
                yield b" " * 100

        assert server.http.post("/v1/completions", content=pieces(), headers=headers).status_code == 413


def test_a_fault_leaves_its_connection_open(server, monkeypatch):
    monkeypatch.setattr(server.session, "rows", lambda *asked: 1 / 0)
    body = {"model": "base", "messages": HELLO}
    ports = set()
    for _ in range(3):
        reply = server.http.post("/v1/chat/completions", json=body)
        ports.add(reply.extensions["network_stream"].get_extra_info("client_addr"))
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
    assert len(ports) == 1


def test_keys(base):
    with serving(base, {}, api_keys=("one", "two"), admin_key="admin") as server:

        def status(path, key=None, method="GET"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return server.http.request(method, path, headers=headers, json={} if method == "POST" else None).status_code

        assert status("/health") == status("/ready") == status("/") == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert [status(path), status(path, "three"), status(path, "on")] == [401, 401, 401]
            assert [status(path, "one"), status(path, "two"), status(path, "admin")] == [200, 200, 200]
        load = "/v1/load_lora_adapter"
        assert [status(load, key, "POST") for key in (None, "one", "admin")] == [401, 401, 400]
        refusals = [server.http.request(method, path, headers={"Authorization": "Bearer one"}) for method, path in
                    (("POST", load), ("POST", "/v1/unload_lora_adapter"))]  # fmt: skip
        assert all("takes the admin key" in reply.json()["error"]["message"] for reply in refusals)
    with serving(base, {}) as server:
        assert server.http.post("/v1/load_lora_adapter", json={}, headers=ADMIN).status_code == 404


@pytest.mark.parametrize("keys", [{}, {"api_keys": ("one",), "admin_key": "admin"}])
def test_no_other_spelling_of_a_path_opens_administration(base, folder, keys):
    with serving(base, {}, adapter_dir=str(folder), **keys) as server:
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": "expert-0"}),
            ("/v1/unload_lora_adapter", {"lora_name": "poet"}),
        ):
            spellings = [f"{path}%{byte:02x}" for byte in (*range(48), 0x7F, 0x85, 0xA0)]
            for spelling in (*spellings, f"/{path}", f"/.{path}", f"{path};", path.upper(), path.replace("_", "%5F")):
                reply = server.http.post(spelling, json=body, headers={"Authorization": "Bearer one"})
                assert reply.status_code in (307, 401, 404), spelling
        assert [name for name, _ in server.app.state.server.experts.names() if name == "poet"] == []


@pytest.mark.parametrize("path", ["..", ".", "", "/etc", "../../x", "expert-0/..", "a\0b", "link"])
def test_adapters_come_from_inside_the_directory(base, tmp_path, path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write_experts(base, inside, 1)
    write_experts(base, outside, 1)
    (inside / "link").symlink_to(outside / "expert-0")
    with serving(base, {}, adapter_dir=str(inside), admin_key="admin") as server:
        body = {"lora_name": "poet", "lora_path": path}
        reply = server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
        assert reply.status_code == 400
        reply = server.http.post("/v1/load_lora_adapter", json={**body, "lora_path": "gone"}, headers=ADMIN)
        assert "gone is no folder that is there" in reply.json()["error"]["message"]
        body = {"lora_name": path, "lora_path": "expert-0"}
        if path != "link":
            assert server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 400
        assert server.http.post("/v1/chat/completions", json={"model": "link", "messages": HELLO}).status_code == 404


def test_other_hosts_names_are_not_answered(server):
    assert server.http.get("/health", headers={"host": "evil.example"}).status_code == 403
    for host in ("localhost:1234", "LOCALHOST", "[::1]:80", "[::1]"):
        assert server.http.get("/health", headers={"host": host}).status_code == 200
    assert server.http.get("/health", headers={"host": "localhost.evil.example:80"}).status_code == 403
    body = {"model": "base", "prompt": "sun", "max_tokens": 1}
    asked = [
        server.http.post("/v1/completions", json=body, headers={"origin": origin}).status_code
        for origin in ("https://evil.example", "null", "http://localhost:3000")
    ]
    assert asked == [403, 403, 200]


@pytest.mark.parametrize(
    ("host", "local"),
    [("LocalHost", True), ("127.0.0.2", True), ("127.1", True), ("::1", True), ("0:0:0:0:0:0:0:1", True),
     ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("a" * 70, False)],
)  # fmt: skip
def test_this_machines_own_address_is_known_however_it_is_written(host, local):
    assert is_local(host) == local


def test_metrics_count_by_adapter(server):
    server.client.chat.completions.create(model="expert-1", messages=HELLO, max_tokens=3, temperature=0)
    text = server.http.get("/metrics").text
    assert 'llama_adapter_requests_total{model="expert-1",outcome="done"}' in text
    assert "llama_adapter_running_rows 0.0" in text


# text as it comes


class Letters:
    """One letter a token; 200 and up are the bytes of an accented one."""

    def __call__(self, tokens):
        return bytes(t if t < 128 else (0xC3, 0xA9)[t - 200] for t in tokens).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("tokens", "stops", "strip", "expected", "reason"),
    [
        ("hello", (), True, "hello", "length"),
        ("  hi  ", (), True, "hi", "length"),
        ("  hi  ", (), False, "  hi  ", "length"),
        ("a b\n\nc", ("\n\n",), True, "a b", "stop"),
        ("a STO", ("STOP",), True, "a STO", "length"),
        ("a STOP", ("STOP",), True, "a", "stop"),
        ("a SSTOPx", ("STOP",), False, "a S", "stop"),
        ("xyz", ("yz", "xyz"), False, "", "stop"),
    ],
)
def test_text_never_takes_back_what_it_gave(tokens, stops, strip, expected, reason):
    written, before = Written(Letters(), stops=stops, strip=strip), ""
    for letter in tokens:
        ended = written.add(Choice(ord(letter)))
        assert written.text.startswith(before)
        before = written.text
        if ended:
            break
    assert (written.finish(), written.reason) == (expected, reason)


def test_half_a_letter_waits_for_the_other_half():
    written = Written(Letters())
    seen = [(written.add(Choice(token)), written.text)[1] for token in (97, 200, 201, 98)]
    assert seen == ["a", "a", "aé", "aéb"]
    torn = Written(Letters())
    torn.add(Choice(200))
    assert torn.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_that_waits_with_half_a_letter_ends_the_answer_at_its_end():
    written = Written(lambda tokens: "".join("a.\N{REPLACEMENT CHARACTER}" for _ in tokens), stops=(".",))
    assert not written.add(Choice(0))
    assert (written.finish(), written.reason) == ("a", "stop")


@pytest.mark.parametrize(
    ("before", "expected"), [((), "7 8"), ((5, 6), " 7 8"), ((5, 200), "\N{REPLACEMENT CHARACTER} 8")]
)
def test_text_goes_on_from_the_tokens_before_it(before, expected):
    def decode(tokens):  # as sentencepiece: the first blank is left out; 200 and 201 are half a letter each
        return " ".join(map(str, tokens)).replace("200 201", "é").replace("200", "\N{REPLACEMENT CHARACTER}")

    written = Written(decode, strip=False, before=before)
    for token in (7, 8) if 200 not in before else (200, 8):
        written.add(Choice(token))
    assert written.finish() == expected


def test_a_completion_keeps_the_blank_that_parts_it_from_its_prompt(server, monkeypatch):
    tokenizer = server.session.tokenizer
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **_: " ".join(map(str, tokens)))
    options = {"model": "base", "temperature": 0, "max_tokens": 3, "prompt": [5, 6]}
    text = server.client.completions.create(**options).choices[0].text
    assert text == "".join(f" {token}" for token in text.split())
    assert server.client.completions.create(echo=True, **options).choices[0].text == f"5 6{text}"
    parts = server.client.completions.create(echo=True, stream=True, **options)
    assert "".join(part.choices[0].text for part in parts) == f"5 6{text}"


def test_draining_ends_what_runs_and_takes_no_more(base):
    with serving(base, {}, max_tokens=512) as server:
        replies = []
        ask = threading.Thread(
            target=lambda: replies.append(
                server.client.completions.create(model="base", prompt="sun", max_tokens=200, temperature=0)
            )
        )
        ask.start()
        until = time.monotonic() + 20
        while not server.scheduler.running and time.monotonic() < until:
            time.sleep(0.005)
        closing = threading.Thread(target=server.scheduler.close, args=(20.0,))
        closing.start()
        while server.scheduler.alive:
            time.sleep(0.001)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        late = server.http.post("/v1/completions", json={"model": "base", "prompt": "sun"})
        assert late.status_code == 503
        ask.join()
        closing.join()
        assert replies[0].usage.completion_tokens == 200


class ByteFallback:
    """As Llama's tokenizer: a run of bytes is text as a whole, or not at all; 256 is the letter a."""

    def __call__(self, tokens):
        parts, run = [], b""
        for token in [*tokens, None]:
            if token is not None and token < 256:
                run += bytes([token])
                continue
            try:
                parts.append(run.decode())
            except UnicodeDecodeError:
                parts.append("\N{REPLACEMENT CHARACTER}" * len(run))
            run = b""
            parts.append("" if token is None else "a")
        return "".join(parts)


def test_characters_that_are_several_tokens_follow_each_other():
    text = "😀😀éa😀é"
    tokens = [256 if letter == "a" else byte for letter in text for byte in letter.encode()]
    written = Written(ByteFallback())
    for token in tokens:
        written.add(Choice(token))
        assert text.startswith(written.text)
    assert written.finish() == text


def test_what_ordinary_clients_send_is_taken(client):
    nothing = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None, "refusal": None}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "name": "kim", "content": "Name the sun"},
        {"role": "assistant", "content": "sun", **nothing},
        {"role": "user", "content": [{"type": "text", "text": "And the moon"}]},
    ]
    reply = client.chat.completions.create(
        model="base", messages=messages, max_tokens=2, tools=[], response_format={"type": "text"}, metadata={},
        parallel_tool_calls=True, reasoning_effort="none", function_call="none", stop=[], logit_bias={}, audio=None,
        stream=True, stream_options={"include_usage": False, "include_obfuscation": False},
    )  # fmt: skip
    assert [part.choices[0].finish_reason for part in reply][-1] in ("stop", "length")
    options = {"include_obfuscation": False}
    events = client.responses.create(
        model="base", input="sun", max_output_tokens=2, stream=True, stream_options=options
    )
    assert [event.type for event in events][-1] in ("response.completed", "response.incomplete")


def test_tokens_are_reported_by_their_bytes(client):
    ask = {"temperature": 1.9, "max_tokens": 48, "seed": 3}
    reply = client.chat.completions.create(model="base", messages=HELLO, logprobs=True, **ask)
    content = reply.choices[0].logprobs.content
    written = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert written.strip() == reply.choices[0].message.content
    assert any(token.token == "\N{REPLACEMENT CHARACTER}" for token in content)
    assert all(bytes(t.bytes) != "\N{REPLACEMENT CHARACTER}".encode() for t in content)
    found = client.completions.create(model="base", prompt="sun", logprobs=20, **ask).choices[0].logprobs
    assert all(len(top) == 20 for top in found.top_logprobs)  # no two look alike
    assert found.text_offset == sorted(found.text_offset)


@pytest.mark.parametrize("seed", range(4))
def test_a_text_offset_is_where_the_text_has_the_token(client, seed):
    ask = {"model": "base", "prompt": ["sun", "moon"], "temperature": 1.9, "max_tokens": 48, "seed": seed}
    ask["logprobs"] = 0
    for choice in client.completions.create(**ask).choices:
        found, text = choice.logprobs, choice.text
        assert len(found.text_offset) == len(found.tokens)
        for token, at in zip(found.tokens, found.text_offset, strict=True):
            half = token.startswith("bytes:")  # and special tokens are not part of the text
            assert half or token in ("<s>", "<pad>", "</s>") or text.startswith(token, at)
        torn = [at for token, at in zip(found.tokens, found.text_offset, strict=True) if token.startswith("bytes:")]
        assert sum(text[at] == "\N{REPLACEMENT CHARACTER}" for at in torn) > 5
        parts = [part.choices[0] for part in client.completions.create(**ask, stream=True)]
        mine = [part.logprobs for part in parts if part.index == choice.index and part.logprobs]
        assert [at for part in mine for at in part.text_offset] == found.text_offset
        assert [token for part in mine for token in part.tokens] == found.tokens


def test_a_text_offset_is_that_of_the_text_behind_the_prompts_last_tokens():
    written = Written(Letters(), strip=False, before=(97, 98, 99, 100, 101), stops=("xz",))
    for token in (32, 200, 201, 120, 121, 200, 65, 200):
        written.add(Choice(token))
    assert written.finish() == " éxy\N{REPLACEMENT CHARACTER}A\N{REPLACEMENT CHARACTER}"
    assert written.starts == [0, 1, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/v1/models", 200), ("/x", 404), ("/v1/responses", 405)]
)
def test_a_head_is_that_of_get(server, path, status):
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port), timeout=20) as line:
        lines = [f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n" for method in ("HEAD", "GET")]
        line.sendall((lines[0] + "\r\n" + lines[1] + "Connection: close\r\n\r\n").encode())
        head, got = b"".join(iter(lambda: line.recv(65536), b"")).split(b"HTTP/1.1 ")[1:]
    assert head.startswith(str(status).encode())
    assert head.endswith(b"\r\n\r\n")
    lengths = [re.search(rb"content-length: (\d+)", reply)[1] for reply in (head, got)]
    assert lengths[0] == lengths[1]


def test_a_broken_link_in_the_directory_breaks_nothing_else(base, tmp_path):
    inside = tmp_path / "in"
    write_experts(base, inside, 1)
    (inside / "loop").symlink_to("loop")
    with serving(base, {}, adapter_dir=str(inside), admin_key="admin") as server:
        assert sorted(model.id for model in server.client.models.list()) == ["base", "expert-0"]
        with pytest.raises(openai.NotFoundError):
            server.client.chat.completions.create(model="loop", messages=HELLO)
        body = {"lora_name": "poet", "lora_path": "loop"}
        assert server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 400
        inside.rename(tmp_path / "away")
        assert [model.id for model in server.client.models.list()] == ["base"]


def test_who_leaves_the_line_makes_room_in_it_at_once(server):
    scheduler, ends = server.scheduler, []
    release = threading.Event()
    scheduler.between_steps(release.wait)  # nobody joins meanwhile
    rows = server.session.rows([Prompt.of("sun")], [None], GenerateConfig(400, 0.0))

    def ticket(count, seconds):
        return Ticket(rows * count, lambda number, choice: False, ends.append, time.monotonic() + seconds)

    first, wide, late, left = ticket(1, 60), ticket(32, 60), ticket(1, 0), ticket(1, 60)
    for one in (first, wide, late, left):
        scheduler.submit(one)
    scheduler.cancel(left)
    release.set()
    until = time.monotonic() + 20
    while not first.members or not ends:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert isinstance(ends[0], TimeoutError)
    assert tuple(scheduler._waiting) == (wide,)
    scheduler.cancel(wide)
    scheduler.cancel(first)
    server.settle()


def test_a_long_prompt_is_read_while_others_are_answered_and_can_be_let_go(server, monkeypatch):
    monkeypatch.setattr("llama_adapter.serving.scheduler.PIECE", 8)
    config, scheduler, session = GenerateConfig(100, 0.0), server.scheduler, server.session
    long, short = (session.rows([Prompt.of(text)], ["expert-0"], config)[0] for text in ("moon " * 500, "sun"))
    expected = [session.engine.generate([row])[0] for row in (long, short)]
    assert len(long.tokens) > 500
    order, ends = [], queue.Queue()

    def submit(name, row, seconds=60):
        def take(_, choice):
            order.append((name, choice.token))
            return False

        ticket = Ticket([row], take, ends.put, time.monotonic() + seconds)
        scheduler.submit(ticket)
        return ticket

    submit("long", long)
    while not scheduler.running:
        time.sleep(0.001)
    submit("short", short)  # waits until the long prompt is read
    assert [ends.get(timeout=30) for _ in range(2)] == [None, None]
    assert [[token for who, token in order if who == name] for name in ("long", "short")] == expected
    order.clear()
    running = submit("short", replace(short, max_new_tokens=600, stops=frozenset()))
    while not order:
        time.sleep(0.001)
    left, late = submit("left", long), submit("late", long, seconds=0.2)
    while not left.members:
        time.sleep(0.001)
    before = len(order)
    while len(order) < before + 5:  # the stream goes on
        time.sleep(0.001)
    assert {name for name, _ in order} == {"short"}
    scheduler.cancel(left)
    assert isinstance(ends.get(timeout=30), TimeoutError)
    assert not late.open
    assert {name for name, _ in order} == {"short"}  # neither was read to its end
    assert running.open
    scheduler.cancel(running)
    server.settle()


def test_clients_that_fall_silent_are_let_go(base):
    with serving(base, {}, idle=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")

        def said(*pieces, pause=0.0):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                with contextlib.suppress(OSError):
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)
                began = time.monotonic()
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
                return answer, time.monotonic() - began

        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        assert said(b"")[0] == said(b"POST /v1")[0] == b""
        answer, seconds = said(*(bytes([letter]) for letter in head[:20]), pause=0.05)  # a letter now and then
        assert (answer, seconds < 1) == (b"", True)
        answer, seconds = said(head + b"content-length: 40\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not come within 0.3 seconds" in answer
        assert seconds < 3
        body = json.dumps({"model": "base", "prompt": "sun", "max_tokens": 200, "temperature": 0}).encode()
        one, two = body[:20], body[20:]
        whole = head + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
        assert said(whole + one, two, pause=0.2)[0].startswith(b"HTTP/1.1 200")


def test_a_row_beyond_the_trained_length_of_a_scaled_rotation_stands_alone():
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config.max_position_embeddings, config.initializer_range = 16, 0.5
    torch.manual_seed(0)
    engine = Engine(AutoModelForCausalLM.from_config(config).eval())
    rows = [Row(list(range(3, 3 + n)), max_new_tokens=new) for n, new in ((4, 11), (30, 30), (5, 9), (6, 10), (20, 20))]
    alone = [engine.generate([row])[0] for row in rows]
    assert engine.generate(rows) != alone  # side by side they disturb each other
    scheduler, ends, got = Scheduler(engine, 8, 8), queue.Queue(), [[] for _ in rows]
    for number, row in enumerate(rows):

        def take(_, choice, answer=got[number]):
            answer.append(choice.token)
            return False

        scheduler.submit(Ticket([row], take, ends.put, time.monotonic() + 60))
    assert [ends.get(timeout=30) for _ in rows] == [None] * 5
    scheduler.close(5)
    assert got == alone


# the other backend


def test_vllm_takes_the_place_of_this_process_with_everything_said(base, folder, tmp_path, monkeypatch, capsys):
    from llama_adapter.cli import main

    started = []

    def gone(*given):
        started.append(given)
        raise SystemExit(0)

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object() if name == "vllm" else None)
    (tmp_path / "key").write_text("secret\n")
    words = ["serve", "--backend", "vllm", "--model", str(base), "-a", f"poet={folder / 'expert-0'}", "--port", "0"]
    monkeypatch.setattr("os.execve", gone)
    with pytest.raises(SystemExit):
        main([*words, "--precision", "fp32", "--api-key-file", str(tmp_path / "key"), "--max-rows", "4"])
    ((program, line, environment),) = started
    text = " ".join(line)
    assert program == line[0]
    assert f"--model {base}" in text
    assert f"--lora-modules poet={folder / 'expert-0'}" in text
    assert "--port 0" in text
    assert "--dtype float32 --max-num-seqs 4" in text
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in text
    for flag, value in (("--deadline", "5"), ("--max-tokens", "7"), ("--template", "alpaca")):
        with pytest.raises(SystemExit) as ended:
            main([*words, flag, value])
        assert ended.value.code == 2
        assert f"{flag} has no effect with --backend vllm: leave it out" in capsys.readouterr().err


def test_a_missing_vllm_is_one_sentence(base, monkeypatch, capsys):
    from llama_adapter.cli import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--backend", "vllm", "--model", str(base)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(
        "--backend vllm needs 'vllm', which is not installed: pip install 'llama-adapter[vllm]'.\n"
    )


# what a chat is read as


@pytest.mark.parametrize("given", [None, "raw"])
def test_an_adapter_that_comes_later_is_asked_as_one_from_the_start(base, folder, given):
    session = load_session(str(base), {"first": str(folder / "expert-0")}, torch.device("cpu"), template=given)
    session.add("later", str(folder / "expert-0"))
    assert session.templates["later"] == session.templates["first"] == (given or "alpaca")
    asked = [session.answer([Prompt.of("Name the sun")], name, GenerateConfig(8, 0.0)) for name in ("first", "later")]
    assert asked[0][0].prompt_tokens == asked[1][0].prompt_tokens
    assert asked[0][0].text == asked[1][0].text


def test_a_conversation_is_read_as_records_are(server):
    """The same messages in a file of training data or prompts make the same text."""
    for messages in (
        [{"role": "system", "content": ""}, *HELLO],
        [{"role": "developer", "content": " \n"}, *HELLO],
        [{"role": "system", "content": [{"type": "text", "text": ""}]}, *HELLO],
        [{"role": "user", "content": [{"type": "text", "text": "Name"}, {"type": "text", "text": " the sun"}]}],
        [{"role": "system", "content": "Be"}, *HELLO, {"role": "assistant", "content": "no"}, *HELLO],
    ):
        prompt = Prompt.before(parse_question({"messages": messages}))
        expected = server.session.answer([prompt], "expert-0", GenerateConfig(12, 0.0))[0]
        options = {"model": "expert-0", "max_tokens": 12, "temperature": 0}
        found = server.client.chat.completions.create(messages=messages, **options)
        assert found.usage.prompt_tokens == expected.prompt_tokens
        assert found.choices[0].message.content == expected.text


@pytest.mark.parametrize(
    ("roles", "says"),
    [("su", None), ("ssu", "A system message may only come first, and once"), ("usu", "may only come first"),
     ("au", "starts with an assistant's message"), ("uaau", "Two assistant messages follow each other")],
)  # fmt: skip
def test_what_is_wrong_with_a_conversation_is_said(server, roles, says):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "sun"} for role in roles]
    body = {"model": "expert-0", "messages": messages, "max_tokens": 1}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, says in reply.text if says else None) == ((400, True) if says else (200, None))


def test_who_asks_for_an_adapter_does_not_hear_that_another_folder_was_broken(base, folder, monkeypatch):
    with serving(base, {}, adapter_dir=str(folder), admin_key="admin") as server:
        experts, begun, go_on = server.app.state.server.experts, threading.Event(), threading.Event()
        read = experts._load

        def slow(name, place, on_demand):
            if place == "broken":
                begun.set()
                assert go_on.wait(20)
                raise AdapterError("broken")
            return read(name, place, on_demand)

        monkeypatch.setattr(experts, "_load", slow)
        with ThreadPoolExecutor(2) as pool:
            loading = pool.submit(experts.load, "expert-2", "broken", replace=True)
            assert begun.wait(20)
            body = {"model": "expert-2", "messages": HELLO, "max_tokens": 1}
            asking = pool.submit(server.http.post, "/v1/chat/completions", json=body)
            time.sleep(0.2)
            go_on.set()
            assert asking.result().status_code == 200
            assert isinstance(loading.exception(), AdapterError)
