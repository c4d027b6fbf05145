"""Listening: a socket before the base is read, a server until SIGTERM."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_adapter.errors import ConfigError
from llama_adapter.inference.session import Session
from llama_adapter.serving.app import create_app
from llama_adapter.serving.config import ServeConfig

log = logging.getLogger(__name__)
LAST_STEP = 10.0
"""Seconds in which a step of decoding, or the reading of an adapter, is to end when the server shuts down."""
LAST_BYTES = 2
"""Seconds in which clients are to take what they were sent last, when the server shuts down."""


def bind(config: ServeConfig) -> socket.socket:
    """Take the address.

    Raises:
        ConfigError: it is in use, or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio sends every piece at once; without, each would wait 40 ms for the last one.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except OSError:
            listening.close()
            raise
    except (OSError, UnicodeError) as error:  # a name with a part of more than 63 letters is the latter
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened on ({reason}): choose another --port, or --host."
        ) from None
    return listening


def serve(
    session: Session,
    config: ServeConfig,
    listening: socket.socket,
    base: str,
    folders: dict[str, str],
    on_start: Callable[[str], Any],
) -> None:
    """Serve on a socket until SIGTERM or Ctrl-C; running requests then have `config.drain` seconds.

    Args:
        session: answers.
        config: what is let in.
        listening: from `bind`.
        base: what the bare base is called.
        folders: of the session's adapters, by name.
        on_start: told the address.
    """
    app = create_app(session, config, base, folders)
    if len(app.state.server.experts.names()) == 1:
        where = f"{config.adapter_dir} has none" if config.adapter_dir else "none was given"
        log.warning("the bare base is served alone: no adapter is there (%s)", where)
    host, port = listening.getsockname()[:2]
    on_start(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    Draining(app, config).run(sockets=[listening])


class Draining(uvicorn.Server):
    """Goes on listening while it shuts down, so that whoever asks now is told so, until those before have ended."""

    def __init__(self, app: FastAPI, config: ServeConfig) -> None:
        super().__init__(settings(app, config))
        self._scheduler, self._drain = app.state.server.scheduler, config.drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close; a second Ctrl-C ends what still runs."""
        self._scheduler.drain(self._drain)
        until = time.monotonic() + self._drain + LAST_STEP
        while self._scheduler.alive and time.monotonic() < until:
            if self.force_exit:
                self._scheduler.drain(0)
                until = min(until, time.monotonic() + LAST_STEP)
            await asyncio.sleep(0.02)
        self.force_exit = self._scheduler.alive  # where nothing runs any more there is nothing to cut
        await super().shutdown(sockets)


def settings(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn serves an application of `create_app`."""
    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, h11_max_incomplete_event_size=64 * 1024,
        timeout_graceful_shutdown=LAST_BYTES, http=type("Http", (Impatient,), {"idle": config.idle}),
    )  # fmt: skip


class Impatient(H11Protocol):
    """HTTP of clients that send the head of a request in time: uvicorn itself waits for it for ever.

    Attributes:
        idle: seconds from connecting, or from a head's first byte, to its last.
    """

    idle: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _watch(self) -> None:
        """Close the connection later, unless the head of a request is there."""
        if self.conn.their_state is not h11.IDLE:
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(self.idle, self.transport.close)
