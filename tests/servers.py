"""A server in a thread, on a tiny base with adapters whose gates are open."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import torch
from runs import write_base
from tiny import open_gates

from llama_adapter import AdapterConfig, add_adapter, remove_adapter, save_adapter
from llama_adapter.base import load_base
from llama_adapter.inference.session import Session, load_session
from llama_adapter.serving.app import create_app
from llama_adapter.serving.config import ServeConfig
from llama_adapter.serving.run import Draining, bind

ADMIN = {"Authorization": "Bearer admin"}


def write_experts(base: Path, folder: Path, count: int) -> dict[str, str]:
    """Adapters of unlike length and layers, by name."""
    found = {}
    model = load_base(str(base), torch.device("cpu"))
    for number in range(count):
        torch.manual_seed(number)
        config = AdapterConfig(
            adapter_len=2 + number % 4, adapter_layers=1 + number % 3, template="alpaca",
            base_model_name_or_path=str(base),
        )  # fmt: skip
        open_gates(add_adapter(model, config), number, scale=4.0)
        found[f"expert-{number}"] = str(save_adapter(model, folder / f"expert-{number}"))
        remove_adapter(model)
    return found


@dataclass
class Running:
    """A running server and ways to talk to it."""

    url: str
    session: Session
    app: object
    client: openai.OpenAI
    http: httpx.Client

    @property
    def scheduler(self):
        return self.app.state.server.scheduler

    def settle(self) -> None:
        """Wait until nothing runs or waits."""
        until = time.monotonic() + 30
        while self.scheduler.running or self.scheduler.waiting:
            assert time.monotonic() < until, "the server does not come to rest"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(base: Path, adapters: dict[str, str], **changes) -> Iterator[Running]:
    """Serve for the body of the block."""
    session = load_session(str(base), adapters, torch.device("cpu"))
    config = replace(ServeConfig(port=0, drain=5.0), **changes)
    listening = bind(config)
    app = create_app(session, config, "base", adapters)
    server = Draining(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            yield Running(url, session, app, client, http)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def written(folder: Path) -> Path:
    """A tiny base."""
    return write_base(folder)
