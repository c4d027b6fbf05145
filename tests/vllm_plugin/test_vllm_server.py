"""The real server, started by the command that `llama-adapter serve --backend vllm` starts, with the real client."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
from engines import apart, greedy_text, write_adapters, write_family

from llama_adapter.serving.vllm_plugin.launch import command, environment

HELLO = [{"role": "user", "content": "Name the sun"}]
CHAT = (
    "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName the sun\n\n### Response:"
)


OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager"]


@contextlib.contextmanager
def started(line, port, log, more=None):
    """A server in processes of its own, once it answers; its address."""
    surroundings = {**os.environ, **(more or {}), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(line, env=surroundings, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while not _healthy(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A base, and a folder of six adapters and a broken one."""
    base = apart(write_family, "llama", tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("experts")
    apart(write_adapters, base, folder, 6, template="alpaca")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text('{"format_version": 1}')
    return base, folder


@pytest.fixture(scope="module")
def server(experts, tmp_path_factory):
    base, folder = experts
    given, port = {name: str(folder / name) for name in ("n0", "n1")}, free_port()
    line = command(str(base), given, adapter_dir=str(folder), port=port, served_model_name="base", options=OPTIONS)
    with started(line, port, tmp_path_factory.mktemp("log") / "log", environment(str(folder))) as url:
        http = httpx.Client(base_url=url, timeout=120)
        yield SimpleNamespace(base=base, folder=folder, url=url, client=client_of(url), http=http)


def _healthy(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def alone(server, name, text, new=12):
    """What transformers says, greedily; vLLM holds half a character back at the end."""
    folder = None if name == "base" else server.folder / name
    return apart(greedy_text, server.base, folder, text, new).rstrip("\N{REPLACEMENT CHARACTER}")


def test_models_are_the_base_and_the_adapters(server):
    found = {model.id: model for model in server.client.models.list()}
    assert {"base", "n0", "n1"} <= set(found)
    assert found["n1"].parent == "base"
    assert found["n1"].root == str(server.folder / "n1")


@pytest.mark.parametrize("name", ["base", "n0", "n1", "n3"])
def test_a_chat_is_written_with_the_adapters_template_and_streams(server, name):
    options = {"model": name, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    reply = server.client.chat.completions.create(**options)
    assert reply.choices[0].message.content == alone(server, name, CHAT)
    assert reply.model == name
    parts = list(server.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed == reply.choices[0].message.content
    assert parts[-1].usage.completion_tokens == reply.usage.completion_tokens


def test_completions_with_log_probabilities(server):
    reply = server.client.completions.create(model="n1", prompt="moon", temperature=0, max_tokens=8, logprobs=1)
    assert reply.choices[0].text == alone(server, "n1", "<s>moon", 8)
    assert len(reply.choices[0].logprobs.token_logprobs) == 8
    stream = server.client.completions.create(model="n1", prompt="moon", temperature=0, max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in stream) == reply.choices[0].text


def test_a_crowd_gets_what_each_gets_alone(server):
    asked = [(f"sun {number}", name) for number in range(6) for name in ("base", "n0", "n1", "n2", "n4", "n5")]

    def ask(one):
        text, name = one
        return server.client.completions.create(model=name, prompt=text, temperature=0, max_tokens=8).choices[0].text

    single = [ask(one) for one in asked]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, asked)) == single
    assert len(set(single)) > 20


def test_an_adapter_is_found_by_name_when_it_is_asked_for(server):
    reply = server.client.completions.create(model="n5", prompt="moon", temperature=0, max_tokens=8)
    assert reply.choices[0].text == alone(server, "n5", "<s>moon", 8)
    for name in ("n9", "../n1", "..", "."):
        with pytest.raises(openai.NotFoundError):
            server.client.completions.create(model=name, prompt="moon", max_tokens=2)
    with pytest.raises(openai.BadRequestError, match="could not be loaded"):
        server.client.completions.create(model="broken", prompt="moon", max_tokens=2)


def test_loading_reloading_and_unloading(server, tmp_path):
    folder, text = tmp_path / "poet", "moon " * 20

    def load(source, **more):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(server.folder / source, folder)
        body = {"lora_name": "poet", "lora_path": str(folder), **more}
        return server.http.post("/v1/load_lora_adapter", json=body)

    def ask():
        reply = server.client.completions.create(model="poet", prompt=text, temperature=0, max_tokens=8)
        return reply.choices[0].text

    assert load("n0").status_code == 200
    assert ask() == ask() == alone(server, "n0", "<s>" + text, 8)
    assert load("n2").status_code == 400
    assert load("n2", load_inplace=True).status_code == 200
    assert ask() == ask() == alone(server, "n2", "<s>" + text, 8)
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask()
    assert load("n4").status_code == 200
    assert ask() == alone(server, "n4", "<s>" + text, 8)


def test_errors_have_openais_shape_and_our_sentence(server, tmp_path):
    shutil.copytree(server.folder / "n0", tmp_path / "wide")
    path = tmp_path / "wide" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_shape": {**values["base_shape"], "hidden_size": 64}}))
    body = {"lora_name": "wide", "lora_path": str(tmp_path / "wide")}
    reply = server.http.post("/v1/load_lora_adapter", json=body)
    assert reply.status_code == 500
    assert "was made for" in reply.json()["error"]["message"]
    for change in ({"temperature": -1}, {"max_tokens": -1}, {"messages": "Hi"}):
        options = {"model": "n0", "messages": HELLO, **change}
        with pytest.raises(openai.BadRequestError):
            server.client.chat.completions.create(**options)
    assert _healthy(server.url)


def test_lora_modules_are_all_that_is_typed(experts, tmp_path):
    base, folder = experts
    port = free_port()
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    line += [*OPTIONS, "--lora-modules", f"poet={folder / 'n0'}", f"clerk={folder / 'n1'}"]
    with started(line, port, tmp_path / "log") as url:
        for name, source in (("poet", "n0"), ("clerk", "n1"), (str(base), "base")):
            reply = client_of(url).completions.create(model=name, prompt="moon", temperature=0, max_tokens=8)
            server = SimpleNamespace(base=base, folder=folder)
            assert reply.choices[0].text == alone(server, source, "<s>moon", 8)
