"""The embedded server under load: the bare base against 1, 8 and 64 adapters, one prompt at a time, and rivals.

    python -m benchmarks.serve --shape tiny --clients 16 --json benchmarks/results/serve.json

The server runs in a process of its own, on a core of its own where there are two, with one thread; the clients in this
one. A turn is `clients` clients that each ask `--asks` questions and read the answers as they are streamed. Its rivals
answer the same questions: `Session.answer` with one prompt at a time, over 64 adapters; and `transformers serve`, with
and without continuous batching, which has no adapters and so is compared with the bare base. vLLM is not measured here:
on a CPU its LoRA runs through a fallback in plain PyTorch, which says nothing about what people run.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import torch

from benchmarks import harness, shapes
from benchmarks.harness import BenchmarkError, Contender
from llama_adapter import AdapterConfig, add_adapter, remove_adapter, save_adapter
from llama_adapter.base import load_tokenizer

WORDS = ("write", "the", "name", "of", "a", "tree", "that", "grows", "by", "water", "and", "say", "why", "it", "does")
ADAPTERS = 64
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass
class Load:
    """What a turn's clients saw: seconds to the first piece and between tokens, and tokens in all."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0


def write_world(folder: Path, setting: harness.Setting) -> tuple[str, list[str]]:
    """A base with random weights, the bundled tokenizer and a chat template; and adapters with open gates."""
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)  # random weights hardly ever say it
    shape = replace(setting.shape, vocab=len(tokenizer))
    model = shapes.build(shape, setting.device, setting.dtype, setting.options.seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = AdapterConfig(
        adapter_len=setting.shape.adapter_len, adapter_layers=setting.shape.adapter_layers, template="chat",
        base_model_name_or_path=str(folder / "base"),
    )  # fmt: skip
    names = [f"expert-{number}" for number in range(ADAPTERS)]
    for name in names:
        shapes.open_gates(add_adapter(model, config, name), setting.dtype)
        save_adapter(model, folder / "experts" / name, name)
        remove_adapter(model, name)
    return str(folder / "base"), names


def questions(seed: int, count: int) -> list[str]:
    """Of unlike length."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 48))) for _ in range(count)]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], port: int | None, cores: set[int]) -> Iterator[subprocess.Popen[str]]:
    """A process on cores of its own; with a port, once `/health` answers there.

    Raises:
        BenchmarkError: it ended, or does not answer within five minutes.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    pin: Callable[[], None] | None = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            preexec_fn=pin,
        )  # fmt: skip
        try:
            until = time.monotonic() + 300
            while port is not None:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise BenchmarkError(f"{' '.join(command[:4])} does not answer: {log.read()[-300:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


async def one_client(client: httpx.AsyncClient, model: str, asked: Sequence[str], new_tokens: int, load: Load) -> None:
    """Ask one question after the other, reading each answer as it comes."""
    for text in asked:
        body = {
            "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": new_tokens,
            "temperature": 0, "stream": True,
        }  # fmt: skip
        began, times = time.perf_counter(), []
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise BenchmarkError(f"{model}: {(await reply.aread())[:300]!r}")
            async for line in reply.aiter_lines():
                if line.startswith("data: {") and '"content"' in line:
                    times.append(time.perf_counter())
        if not times:
            raise BenchmarkError(f"{model} answered nothing")
        load.first.append(times[0] - began)
        load.between += [(times[-1] - times[0]) / max(1, new_tokens - 1)]
        load.tokens += new_tokens


def crowd(port: int, models: Sequence[str], clients: int, asks: int, new_tokens: int) -> Callable[[int], Load]:
    """A turn of so many clients; client i asks the model i of `models`, which take turns."""

    def turn(number: int) -> Load:
        load, asked = Load(), questions(number, clients * asks)

        async def all_clients() -> None:
            limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
                await asyncio.gather(
                    *(
                        one_client(client, models[i % len(models)], asked[i::clients], new_tokens, load)
                        for i in range(clients)
                    )
                )

        asyncio.run(all_clients())
        return load

    return turn


def answer_one_by_one(base: str, folder: str) -> None:
    """What the child process does: for every line of stdin, answer its questions, each alone, and print 'done'."""
    from llama_adapter.inference.config import GenerateConfig
    from llama_adapter.inference.session import Prompt, load_session

    torch.set_num_threads(1)
    names = [f"expert-{number}" for number in range(ADAPTERS)]
    session = load_session(base, {name: f"{folder}/{name}" for name in names}, "cpu")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        for number, text in enumerate(order["questions"]):
            session.answer([Prompt.of(text)], names[number % ADAPTERS], GenerateConfig(order["new_tokens"], 0.0))
        print("done", flush=True)


def one_by_one(process: subprocess.Popen[str], clients: int, asks: int, new_tokens: int) -> Callable[[int], None]:
    """A turn of the child process."""
    assert process.stdin is not None
    assert process.stdout is not None
    writing, reading = process.stdin, process.stdout
    reading.readline()

    def turn(number: int) -> None:
        writing.write(json.dumps({"questions": questions(number, clients * asks), "new_tokens": new_tokens}) + "\n")
        writing.flush()
        reading.readline()

    return turn


def parse(arguments: Sequence[str] | None = None) -> harness.Setting:
    """The options; `--turns` of each contender are interleaved."""
    made = harness.parser(__doc__.splitlines()[0])
    made.add_argument("--clients", type=int, default=16, help="clients that ask at the same time")
    made.add_argument("--asks", type=int, default=2, help="questions of each client in a turn")
    made.add_argument("--new-tokens", type=int, default=32, help="tokens of every answer")
    made.add_argument("--rivals", nargs="*", choices=["transformers"], default=["transformers"])
    return harness.Setting.of(made.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    setting = parse(arguments)
    options = setting.options
    shape, requests = (options.clients, options.asks, options.new_tokens), options.clients * options.asks
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    served, asking = ({cores[0]}, set(cores[1:])) if len(cores) > 1 else (set[int](), set[int]())
    loads: dict[str, list[Load]] = {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        base, names = write_world(Path(place), setting)
        experts = f"{place}/experts"
        if asking:
            os.sched_setaffinity(0, asking)
        port = free_port()
        ours = [sys.executable, "-m", "llama_adapter", "serve", "--model", base, "--served-model-name", "base"]
        ours += [
            "--adapter-dir",
            experts,
            "--port",
            str(port),
            "--max-rows",
            str(options.clients),
            "--precision",
            "fp32",
        ]
        stack.enter_context(running(ours, port, served))
        child = stack.enter_context(
            running([sys.executable, "-m", "benchmarks.serve", "--child", base, experts], None, served)
        )
        crowds = {"the bare base": crowd(port, ["base"], *shape)}
        for count in (1, 8, ADAPTERS):
            crowds[f"{count} adapter{'s' if count > 1 else ''}"] = crowd(port, names[:count], *shape)
        for flag in ("--no-continuous-batching", "--continuous-batching") if "transformers" in options.rivals else ():
            rival = free_port()
            command = [str(Path(sys.executable).parent / "transformers"), "serve", base, "--port", str(rival), flag]
            stack.enter_context(running([*command, "--device", "cpu", "--dtype", "float32"], rival, served))
            crowds[f"transformers serve {flag.removeprefix('--')}, bare base"] = crowd(rival, [base], *shape)

        def step(name: str) -> Callable[[int], None]:
            return lambda number: loads.setdefault(name, []).append(crowds[name](number))

        contenders = [Contender(name, step(name), optional=name.startswith("transformers")) for name in crowds]
        alone = f"one prompt at a time, {ADAPTERS} adapters"
        contenders.append(Contender(alone, one_by_one(child, *shape)))
        timings = harness.interleave(contenders, options.turns, options.warmup, setting.device, setting.budget)
    rows, content = [], {}
    for name, timing in timings.items():
        if timing.failure or not timing.seconds:
            rows.append([name, timing.failure or "not run", "-", "-", "-", "-"])
            continue
        seen = loads.get(name, [])[-len(timing.seconds) :]
        against = timings[f"{ADAPTERS} adapters"] if name == alone else timings["the bare base"]
        figures = {
            "requests_per_second": harness.spread([requests / seconds for seconds in timing.seconds]),
            "tokens_per_second": harness.spread([requests * options.new_tokens / s for s in timing.seconds]),
            "first_ms": harness.spread([1000 * s for load in seen for s in load.first]) if seen else None,
            "between_ms": harness.spread([1000 * s for load in seen for s in load.between]) if seen else None,
            "speed_against": harness.ratios(against, timing),
        }
        content[name] = figures
        forms = ("{:,.1f}", "{:,.0f}", "{:,.0f}", "{:,.1f}", "{:.2f}")
        rows.append([name, *(harness.with_range(one, form) for one, form in zip(figures.values(), forms, strict=True))])
    head = ("who answers", "requests/s", "tokens/s", "first piece, ms", "a token, ms", "speed: bare base = 1")
    title = f"{options.clients} clients, {options.new_tokens} tokens an answer, one thread ({options.shape}, fp32)"
    print(harness.table(title, head, rows))
    print(f"The speed of one prompt at a time is against that of {ADAPTERS} adapters served together.")
    content["machine"] = harness.machine(setting.device)
    harness.write_section(options.json, "serve", content)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        answer_one_by_one(*sys.argv[2:4])
    else:
        harness.run(main)
