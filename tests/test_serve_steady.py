"""The server over time: a soak, and a death in the middle of fifty streams.

`LLAMA_ADAPTER_SOAK=3600 LLAMA_ADAPTER_SOAK_PAUSE=2 pytest tests/test_serve_steady.py -k soak -s` soaks for an hour,
each client waiting up to so many seconds between two requests, and prints what it saw.
"""

import gc
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import pytest
from runs import write_base
from servers import ADMIN, serving, write_experts

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "Name the sun"}]
SECONDS = float(os.environ.get("LLAMA_ADAPTER_SOAK", "30"))
PAUSE = float(os.environ.get("LLAMA_ADAPTER_SOAK_PAUSE", "0"))


def resident():
    """MiB of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to see its memory")
def test_a_soak_leaves_memory_slots_and_adapters_as_they_were(tmp_path):
    base = write_base(tmp_path / "base")
    names = list(write_experts(base, tmp_path / "experts", 12))
    rng, stop = random.Random(0), threading.Event()
    counts = {"answered": 0, "left": 0, "refused": 0, "reloaded": 0}
    lock = threading.Lock()

    def count(what):
        with lock:
            counts[what] += 1

    with serving(
        base, {}, adapter_dir=str(tmp_path / "experts"), admin_key="admin", max_rows=8, max_waiting=16, max_adapters=4
    ) as server:

        def ask(client):
            name = rng.choice(["base", *names])
            body = {"model": name, "messages": HELLO, "max_tokens": rng.randint(1, 40), "n": rng.randint(1, 2)}
            if rng.random() < 0.1:
                body = {**body, "temperature": 9}
            if rng.random() < 0.3:
                with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
                    for _ in zip(reply.iter_lines(), range(rng.randint(0, 4)), strict=False):
                        pass
                count("left")
                return
            status = client.post("/v1/chat/completions", json=body).status_code
            assert status in (200, 400, 429)
            count("answered" if status == 200 else "refused")

        def work():
            with httpx.Client(base_url=server.url, timeout=600) as client:
                while not stop.is_set():
                    ask(client)
                    stop.wait(rng.uniform(0, PAUSE))

        def reload():
            with httpx.Client(base_url=server.url, timeout=600, headers=ADMIN) as client:
                while not stop.wait(0.3):
                    name = rng.choice(names[:4])  # the others come and go as they are asked
                    body = {"lora_name": name, "lora_path": name, "load_inplace": True}
                    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
                    count("reloaded")

        with ThreadPoolExecutor(13) as pool:
            tasks = [pool.submit(work) for _ in range(12)] + [pool.submit(reload)]
            seen = []
            for _ in range(4):
                wait(tasks, SECONDS / 4, FIRST_COMPLETED)  # one that has ended has failed
                if any(task.done() for task in tasks):
                    break
                seen.append(resident())
                print(f"{len(seen) * SECONDS / 4:.0f} s: {seen[-1]:.1f} MiB, {counts}", flush=True)
            stop.set()
            for task in tasks:
                task.result()
        server.settle()
        server.scheduler.between_steps(lambda: None).result(10)
        server.scheduler.between_steps(server.session.engine.slots.drop_removed).result(10)
        slots = server.session.engine.slots
        experts = server.app.state.server.experts
        assert len(server.session.adapters) <= 8
        assert all(expert.users == 0 for expert in experts._experts.values())
        assert len(slots.of) <= 8
        assert len(set(slots.free)) == len(slots.free)
        taken = {slot for slot, _ in slots.of.values()}
        assert not taken & set(slots.free)
        assert len(taken) + len(slots.free) + 1 == len(slots.lengths)  # and the base's
    assert min(counts.values()) > 5
    assert seen[-1] < seen[0 if SECONDS >= 3600 else 1] * 1.02


def digests(folder):
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.*"))}


def started(base, folder, port):
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_adapter", "serve", "--model", str(base), "--adapter-dir", str(folder),
         "--port", str(port), "--max-rows", "64", "--served-model-name", "base"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return process
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError("the server does not start")


def test_killed_in_the_middle_of_fifty_streams_it_comes_back_unharmed(tmp_path):
    base = write_base(tmp_path / "base")
    write_experts(base, tmp_path / "experts", 4)
    before = digests(tmp_path / "experts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = started(base, tmp_path / "experts", port)
    seen = threading.Semaphore(0)

    def listen(number):
        body = {"model": f"expert-{number % 4}", "messages": HELLO, "max_tokens": 800, "temperature": 0, "stream": True}
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
                for _ in reply.iter_lines():
                    seen.release()
            return "ended"
        except httpx.TransportError as error:
            return type(error).__name__

    def answer():
        body = {"model": "expert-1", "messages": HELLO, "max_tokens": 12, "temperature": 0}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        return reply.json()["choices"][0]["message"]["content"]

    try:
        expected = answer()
        with ThreadPoolExecutor(50) as pool:
            streams = [pool.submit(listen, number) for number in range(50)]
            for _ in range(200):
                assert seen.acquire(timeout=60)
            process.kill()
            ends = [stream.result(timeout=60) for stream in streams]
        assert sum(end != "ended" for end in ends) > 25
        assert digests(tmp_path / "experts") == before
        process.wait(10)
        process = started(base, tmp_path / "experts", port)
        assert answer() == expected
    finally:
        process.kill()
        process.wait(10)
