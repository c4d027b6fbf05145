"""The HTTP server: OpenAI's routes over one base and its adapters."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from llama_adapter.core.model import get_adapter
from llama_adapter.errors import LlamaAdapterError, TooLongError
from llama_adapter.inference.session import Session
from llama_adapter.serving.answers import Answerer, Answering
from llama_adapter.serving.config import ServeConfig
from llama_adapter.serving.experts import Experts, UnknownExpertError
from llama_adapter.serving.guard import Guard, refused
from llama_adapter.serving.metrics import Metrics
from llama_adapter.serving.page import page_response
from llama_adapter.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    ResponseRequest,
    UnloadRequest,
    error_body,
    first_fault,
)
from llama_adapter.serving.replies import (
    ResponseReply,
    chat_events,
    chat_reply,
    completion_events,
    completion_reply,
    event,
)
from llama_adapter.serving.scheduler import BusyError, ClosingError, Scheduler
from llama_adapter.serving.text import token_bytes

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
RETRY_AFTER = "2"
"""Seconds after which a refused client may ask again."""
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "The request is malformed or asks for something that is not supported."),
        (401, "Wrong or missing key."),
        (403, "Another host's name."),
        (404, "No such model."),
        (408, "The request did not come to its end."),
        (413, "The request is too large."),
        (429, "Too many requests wait."),
        (500, "A fault of the server."),
        (503, "The server is shutting down."),
        (504, "The answer took too long."),
    )
}


class Server:
    """What the routes share; made once, closed when the application ends."""

    def __init__(self, session: Session, config: ServeConfig, base: str, folders: dict[str, str]) -> None:
        self.config, self.session, self.created = config, session, int(time.time())
        self.scheduler = Scheduler(session.engine, config.max_rows, config.max_waiting)
        self.metrics = Metrics(lambda: self.scheduler.running, lambda: self.scheduler.waiting)
        self.experts = Experts(session, self.scheduler, base, folders, config.adapter_dir, config.max_adapters)
        self.answerer = Answerer(session, self.experts, self.scheduler, config, self.metrics)

    def say(self, token: int) -> bytes:
        """What a token stands for, in UTF-8."""
        return token_bytes(self.session.tokenizer, token)

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: the base, and adapters whose parent it is."""
        base = self.experts.base
        return [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "llama-adapter",
                "root": folder or name,
                "parent": None if name == base else base,
            }
            for name, folder in self.experts.names()
        ]

    def gates(self, name: str) -> dict[str, Any]:
        """An adapter's layers and act(g) of their heads.

        Raises:
            UnknownExpertError: there is no adapter of that name.
        """
        with self.experts.using(name) as expert:
            if expert.key is None:
                raise UnknownExpertError(f"'{name}' is the bare base, which has no gates: name an adapter.")
            layers = get_adapter(self.session.model, expert.key).layers
            return {"layers": list(layers), "strength": [layer.strength().tolist() for layer in layers.values()]}

    def failed(self, error: Exception) -> Response:
        """The reply to a request that failed."""
        status, kind, code = status_of(error)
        if status == 500:
            log.error("a request failed", exc_info=error)
        self.metrics.refused(status)
        message, *_ = explained(error)
        reply = refused(status, message, kind, code)
        if status in (429, 503):
            reply.headers["retry-after"] = RETRY_AFTER
        return reply

    async def reply(
        self,
        http: Request,
        streaming: bool,
        prepare: Callable[[], Answering],
        whole: Callable[[Answering], dict[str, Any]],
        stream: Callable[[Answering], AsyncIterator[str]],
    ) -> Response:
        """Answer a request; whoever leaves before the end takes the work away with him."""
        answering = await run_in_threadpool(prepare)
        try:
            answering.start()
        except BaseException:
            answering.close()
            raise
        if streaming:
            return Streamed(self._streamed(answering, stream), answering.close)
        waiting = asyncio.ensure_future(answering.finish())
        leaving = asyncio.ensure_future(gone(http))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return Response(status_code=499)
            waiting.result()
            return JSONResponse(whole(answering))
        finally:
            waiting.cancel()
            leaving.cancel()
            answering.close()

    async def _streamed(
        self, answering: Answering, stream: Callable[[Answering], AsyncIterator[str]]
    ) -> AsyncIterator[str]:
        try:
            async for text in stream(answering):
                yield text
        except Exception as error:
            if status_of(error)[0] == 500:
                log.error("a stream failed", exc_info=error)
            self.metrics.refused(status_of(error)[0])
            yield event(error_body(*explained(error)))


class Streamed(StreamingResponse):
    """Server-sent events; whatever happens to the connection, `close` is called when it ends."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._close = close

    async def __call__(self, *connection: Any) -> None:
        """Send all of it."""
        try:
            await super().__call__(*connection)
        finally:
            self._close()


async def gone(http: Request) -> None:
    """Return when the client has closed its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(session: Session, config: ServeConfig, base: str, folders: dict[str, str]) -> FastAPI:
    """The application.

    Args:
        session: answers; the server owns it from now on.
        config: what is let in.
        base: what the bare base is called.
        folders: of the session's adapters, by name.
    """
    server = Server(session, config, base, folders)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(server.scheduler.close, config.drain)

    app = FastAPI(
        title="llama-adapter", docs_url=None, redoc_url=None, lifespan=lifespan, responses=DOCUMENTED,
        description="OpenAI's interface to one base and its adapters; adapters are model names.",
    )  # fmt: skip
    app.state.server = server
    hosts = (*LOOPBACK, config.host.lower()) if is_local(config.host) else ()
    app.add_middleware(
        Guard,
        api_keys=config.api_keys,
        admin_key=config.admin_key,
        max_body=config.max_body,
        idle=config.idle,
        hosts=hosts,
        failed=server.failed,
    )
    add_errors(app, server)
    add_answers(app, server)
    add_house(app, server)
    return app


def is_local(host: str) -> bool:
    """Whether this machine alone can reach what listens on `host`, however that is written."""
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError):  # `bind` says what is wrong with it
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def add_answers(app: FastAPI, server: Server) -> None:
    """Routes that write text."""
    answerer = server.answerer

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation by its adapter's template."""
        return await server.reply(
            http,
            request.streaming,
            lambda: answerer.chat(request),
            lambda answering: chat_reply(request, answering, server.say),
            lambda answering: chat_events(request, answering, server.say),
        )

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Go on with a text as it is, without a template."""
        return await server.reply(
            http,
            request.streaming,
            lambda: answerer.complete(request),
            lambda answering: completion_reply(request, answering, server.say),
            lambda answering: completion_events(request, answering, server.say),
        )

    @app.post("/v1/responses")
    async def responses(request: ResponseRequest, http: Request) -> Response:
        """Answer a conversation; nothing is stored."""
        return await server.reply(
            http,
            request.streaming,
            lambda: answerer.chat(request),
            lambda answering: ResponseReply(request, answering).body(),
            lambda answering: ResponseReply(request, answering).events(),
        )


def add_house(app: FastAPI, server: Server) -> None:
    """Routes about the server and its adapters."""
    experts = server.experts

    @app.get("/v1/models")
    def models() -> Response:
        """The base and its adapters."""
        return JSONResponse({"object": "list", "data": server.models()})

    @app.get("/v1/models/{model:path}")
    def model(model: str) -> Response:
        """One of them."""
        found = [entry for entry in server.models() if entry["id"] == model]
        if not found:
            raise UnknownExpertError(f"There is no model '{model[:128]}'.")
        return JSONResponse(found[0])

    @app.post("/v1/load_lora_adapter")
    def load(request: LoadRequest) -> Response:
        """Load an adapter from the adapter directory, or load it anew."""
        experts.load(request.lora_name, experts.allowed(request.lora_path), request.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload(request: UnloadRequest) -> Response:
        """Take an adapter away."""
        experts.unload(request.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether requests are answered."""
        return Response(status_code=200 if server.scheduler.alive else 503)

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """Whether new requests are taken."""
        return Response(status_code=200 if server.scheduler.open else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Prometheus' text format."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/gates/{model:path}")
    async def gates(model: str) -> Response:
        """How far each head of an adapter's layers has opened: layers (L) and act(g), [L, heads]."""
        return JSONResponse(await run_in_threadpool(server.gates, model))

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        """The page."""
        return page_response()


def explained(error: BaseException) -> tuple[str, str, None, str | None]:
    """(message, type, parameter, code) of an error as a client may see it."""
    status, kind, code = status_of(error)
    message = "Something went wrong in the server; its log says what." if status == 500 else str(error)
    return message, kind, None, code


def status_of(error: BaseException) -> tuple[int, str, str | None]:
    """(status, type, code) of an error."""
    if isinstance(error, UnknownExpertError):
        return 404, "not_found_error", "model_not_found"
    if isinstance(error, BusyError):
        return 429, "rate_limit_error", "rate_limit_exceeded"
    if isinstance(error, ClosingError):
        return 503, "service_unavailable_error", None
    if isinstance(error, TimeoutError):
        return 504, "timeout_error", None
    if isinstance(error, TooLongError):
        return 400, "invalid_request_error", "context_length_exceeded"
    if isinstance(error, LlamaAdapterError):
        return 400, "invalid_request_error", None
    return 500, "server_error", None


def add_errors(app: FastAPI, server: Server) -> None:
    """Every error in OpenAI's shape."""

    async def failed(request: Request, error: Exception) -> Response:
        return server.failed(error)

    async def malformed(request: Request, error: Any) -> Response:
        server.metrics.refused(400)
        message, param = first_fault(error.errors())
        body = error_body(message.encode("utf-8", "replace").decode(), "invalid_request_error")
        body["error"]["param"] = param.encode("utf-8", "replace").decode()[:200] or None
        return JSONResponse(body, 400)

    async def http_error(request: Request, error: Any) -> Response:
        server.metrics.refused(error.status_code)
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        reply = refused(error.status_code, str(error.detail), kind)
        reply.headers.update(error.headers or {})
        return reply

    handlers: dict[Any, Callable[..., Awaitable[Response]]] = {
        LlamaAdapterError: failed, TimeoutError: failed,
        RequestValidationError: malformed, HTTPException: http_error,
    }  # fmt: skip
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
