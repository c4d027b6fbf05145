"""`ServeConfig`: where the server listens, and what it lets in."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from llama_adapter.settings import Count, Place, Positive, check

MIB = 1 << 20


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, and what it lets in.

    Attributes:
        host, port: the address; port 0 takes a free one.
        api_keys: whoever asks shows one of them as `Authorization: Bearer KEY`; empty asks for none.
        admin_key: for loading and unloading adapters; None switches that off.
        adapter_dir: folder whose subfolders are adapters by name, loaded when they are first asked for.
        max_adapters: of those, how many stay loaded while no request uses them.
        max_rows: answers that are written side by side.
        max_waiting: answers that may wait for a place; more are refused with 429.
        max_tokens: longest answer.
        max_choices: largest `n`.
        max_body: largest request, in bytes.
        max_files: pictures, recordings and videos of one request.
        idle: seconds that a client may be silent before its request has come; its connection is closed then.
        deadline: seconds after which a request ends, done or not.
        drain: seconds that running requests have to end after SIGTERM.

    Raises:
        ConfigError: values break their rules; every one of them is named.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    adapter_dir: Place | None = None
    max_adapters: Count = 64
    max_rows: Count = 32
    max_waiting: Count = 256
    max_tokens: Count = 1024
    max_choices: Count = 8
    max_body: Count = 16 * MIB
    max_files: Count = 8
    idle: Positive = 20.0
    deadline: Positive = 600.0
    drain: Positive = 30.0

    def __post_init__(self) -> None:
        check(self)
