"""What vLLM's own command starts with adapters of ours; what both backends do is in `test_serve_client`."""

import json
import shutil
import sys

import httpx
import openai
import pytest
from engines import apart, greedy_text, write_adapters, write_family
from running import OPTIONS, client_of, free_port, healthy, started


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A base and two adapters."""
    base, folder = apart(write_family, "llama", tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("experts")
    apart(write_adapters, base, folder)
    return base, folder


@pytest.fixture(scope="module")
def url(experts, tmp_path_factory):
    base, folder = experts
    port = free_port()
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    line += [*OPTIONS, "--lora-modules", f"poet={folder / 'n0'}", f"clerk={folder / 'n1'}"]
    more = {
        "VLLM_API_KEY": "secret", "VLLM_PLUGINS": "llama_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }  # fmt: skip
    with started(line, port, tmp_path_factory.mktemp("log") / "log", more) as url:
        yield url


def test_lora_modules_are_all_that_is_typed(experts, url):
    base, folder = experts
    for name, source in (("poet", "n0"), ("clerk", "n1"), (str(base), None)):
        client = client_of(url, "secret")
        reply = client.completions.create(model=name, prompt="moon", temperature=0, max_tokens=8)
        expected = apart(greedy_text, base, source and folder / source, "<s>moon", 8)
        assert reply.choices[0].text == expected.rstrip("\N{REPLACEMENT CHARACTER}")


def test_who_shows_no_key_gets_the_page_and_nothing_else(url):
    assert httpx.get(url).status_code == 200
    for path in ("/gates/poet", "/v1/models", "/v1/models/poet"):
        assert [
            httpx.get(url + path, headers={"Authorization": f"Bearer {key}"}).status_code for key in ("wrong", "secret")
        ] == [401, 200]
        assert httpx.get(url + path).status_code == 401


def test_a_foreign_adapter_is_refused_with_our_sentence(experts, url, tmp_path):
    shutil.copytree(experts[1] / "n0", tmp_path / "wide")
    path = tmp_path / "wide" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_shape": {**values["base_shape"], "hidden_size": 64}}))
    with pytest.raises(openai.InternalServerError, match="was made for"):
        client_of(url, "secret").post(
            "/load_lora_adapter",
            body={"lora_name": "wide", "lora_path": str(tmp_path / "wide")},
            cast_to=httpx.Response,
        )
    assert healthy(url)
