"""How a server ends: those who are being answered have their time, and those who come now are told."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from servers import serving, write_experts

from llama_adapter.serving import run

LONG = {"model": "expert-0", "prompt": "sun", "max_tokens": 600, "temperature": 0}


def asked(url, **changes):
    """The status and body of a request, or the last event of a stream."""
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, **changes}, timeout=60) as reply:
        lines = [line for line in reply.iter_lines() if line]
    return reply.status_code, lines[-1]


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_experts(base, folder, 1)
    return folder


@pytest.fixture
def process(base, folder):
    """A server that writes one answer at a time; what it said last is read from its log."""
    command = ["serve", "--model", str(base), "--adapter-dir", str(folder), "--port", "0", "--max-rows", "1"]
    running = subprocess.Popen(
        [sys.executable, "-m", "llama_adapter", *command], stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    line = next(line for line in running.stderr if line.startswith("listening on "))
    running.url = line.split()[-1]
    yield running
    running.kill()
    running.communicate()


def busy(pool, url, count):
    """Requests of which one is being answered and the others wait."""
    asking = [pool.submit(asked, url, stream=number % 2 == 0) for number in range(count)]
    until = time.monotonic() + 30
    while f"waiting_rows {count - 1}.0" not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.01)
    return asking


def test_who_was_there_is_answered_and_who_comes_late_is_told_so(process):
    with ThreadPoolExecutor(3) as pool:
        asking = busy(pool, process.url, 3)
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while httpx.get(f"{process.url}/ready").status_code != 503:
            assert time.monotonic() < until
        assert httpx.get(f"{process.url}/health").status_code == 200
        late = httpx.post(f"{process.url}/v1/completions", json=LONG)
        assert late.status_code == 503
        assert late.headers["retry-after"]
        assert late.json()["error"]["type"] == "service_unavailable_error"
        found = [asking[number].result() for number in range(3)]
    assert [status for status, _ in found] == [200, 200, 200]
    assert found[0][1] == found[2][1] == "data: [DONE]"
    assert '"completion_tokens":600' in found[1][1]
    assert process.wait(20) == -signal.SIGTERM
    assert process.stderr.read() == ""


def test_a_second_interrupt_ends_what_runs_and_tells_the_clients(process):
    with ThreadPoolExecutor(3) as pool:
        asking = busy(pool, process.url, 3)
        process.send_signal(signal.SIGINT)
        while httpx.get(f"{process.url}/ready").status_code != 503:
            pass
        process.send_signal(signal.SIGINT)
        found = [asking[number].result() for number in range(3)]
    assert [status for status, _ in found] == [200, 503, 200]  # streams had begun
    assert all("shutting down" in text for _, text in found)
    assert process.wait(20) == 130
    assert process.stderr.read() == "Stopped.\n"


def test_what_is_not_done_in_time_ends_with_a_clean_error(base, folder):
    found = []
    with serving(base, {}, adapter_dir=str(folder), drain=0.3, max_rows=1) as server:
        asking = [
            threading.Thread(target=lambda stream=stream: found.append(asked(server.url, stream=stream)))
            for stream in (False, True, False)
        ]
        for thread in asking:
            thread.start()
        until = time.monotonic() + 20
        while server.scheduler.running + server.scheduler.waiting < 3:
            assert time.monotonic() < until
            time.sleep(0.005)
    for thread in asking:
        thread.join()
    assert sorted(status for status, _ in found) == [200, 503, 503]
    assert all("shutting down" in text for _, text in found)


def test_a_step_that_never_ends_does_not_keep_the_server(base, monkeypatch):
    monkeypatch.setattr(run, "LAST_STEP", 0.2)
    go_on = threading.Event()
    try:
        with serving(base, {}, drain=0.1) as server:
            server.scheduler.between_steps(lambda: go_on.wait(60))
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert server.scheduler.alive
    finally:
        go_on.set()
