"""The embedded server against what nobody would send: its own schema's examples, and bodies that break it."""

import json
import random
import string
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import schemathesis
from runs import write_base
from servers import serving, write_experts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of schemathesis itself
]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STATUSES = {200, 400, 401, 403, 404, 405, 413, 422, 429, 503, 504}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    base = write_base(folder / "base")
    adapters = write_experts(base, folder / "experts", 2)
    with serving(base, adapters, max_tokens=8, max_waiting=64, deadline=20.0) as running:
        yield running


def test_the_server_keeps_its_own_schema(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/models", "/health", "/metrics", *PATHS} <= {operation.path for operation in operations}
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=100, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        def check(case):
            # a model that is not there, or roles out of order, are refused though the schema cannot say so
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

        check()


COMMON = {
    "model": "expert-0", "temperature": 0, "top_p": 1, "stream": False, "user": "me",
}  # fmt: skip
CHOICES = {"n": 1, "seed": 0, "stop": None, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0}
GOOD = {
    "/v1/chat/completions": {
        **COMMON, **CHOICES, "messages": [{"role": "user", "content": "Name the sun"}], "max_tokens": 2,
    },
    "/v1/completions": {**COMMON, **CHOICES, "prompt": "sun", "max_tokens": 2},
    "/v1/responses": {**COMMON, "input": "sun", "max_output_tokens": 2},
}  # fmt: skip


def odd_value(rng, depth=0):
    """Anything JSON can say, and numbers and texts at the edges."""
    kinds = [
        lambda: None, lambda: rng.random() < 0.5, lambda: rng.choice([-1, 0, 1, 2**31, 2**63, -(2**70), 10**300]),
        lambda: rng.choice([0.0, -0.0, 1e308, -1e-308, 0.5, 2.5]),
        lambda: "".join(rng.choices(string.printable + "\0äß\u2028\U0001f600", k=rng.randint(0, 12))),
        lambda: rng.choice(["base", "expert-0", "../x", "data:image/png;base64,AAAA", "user", "assistant", "\ud83d"]),
    ]  # fmt: skip
    if depth < 3:
        kinds += [
            lambda: [odd_value(rng, depth + 1) for _ in range(rng.randint(0, 3))],
            lambda: {
                rng.choice(["role", "content", "type", "text", "image_url", "url", "a"]): odd_value(rng, depth + 1)
                for _ in range(rng.randint(0, 3))
            },
        ]
    return rng.choice(kinds)()


def odd_body(rng, path):
    body = {key: value for key, value in GOOD[path].items() if rng.random() < 0.9}
    for _ in range(rng.randint(0, 2)):
        body[rng.choice([*GOOD[path], "tools", "response_format", "stream_options", "logit_bias", "x"])] = odd_value(
            rng
        )
    text = json.dumps(body)
    if rng.random() < 0.2:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(["", "{", "]", "NaN", "\\ud83d", '"', "1e999", "\0"]) + text[place + 1 :]
    content = text.encode("utf-8", "surrogatepass")
    return content if rng.random() < 0.95 else rng.randbytes(rng.randint(0, 40))


def test_ten_thousand_odd_bodies_meet_no_fault_and_no_hang(server):
    rng = random.Random(0)
    paths = [rng.choice(PATHS) for _ in range(10_000)]
    bodies = [odd_body(rng, path) for path in paths]

    def post(path, body):
        reply = server.http.post(path, content=body, headers={"content-type": "application/json"}, timeout=30)
        assert reply.status_code in STATUSES, (path, body, reply.text)
        if reply.status_code != 200:
            error = reply.json()["error"]
            assert all(error[key] for key in ("message", "type")), body
        elif body.find(b'"stream": true') < 0:
            assert reply.json()["object"], body
        return reply.status_code

    with ThreadPoolExecutor(4) as clients:  # one alone would wait for each answer
        seen = Counter(clients.map(post, paths, bodies))
    server.settle()
    assert seen[200] > 1000
    assert seen[400] > 2000
