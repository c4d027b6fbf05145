"""What stands before the routes: keys, sizes, headers."""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from llama_adapter.serving.protocol import error_body

OPEN = ("/", "/health", "/ready")
"""Paths that need no key: the page asks for one itself."""
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """ASGI middleware: who may ask, how much, and safe headers on every reply.

    Args:
        app: what is guarded.
        api_keys: one of them opens everything but administration; empty asks for none.
        admin_key: opens administration, and the rest; None closes administration.
        max_body: largest request, in bytes.
        idle: seconds to wait for each piece of a request.
        hosts: values of the `Host` header that are answered, port aside, and of `Origin`; empty takes any. Keeps web
            pages from reaching a server on this machine, be it under a name of theirs.
        failed: the reply to a request that ended by an exception.
    """

    def __init__(
        self, app: Any, api_keys: Sequence[str], admin_key: str | None, max_body: int, idle: float,
        hosts: Sequence[str], failed: Callable[[Exception], Response],
    ) -> None:  # fmt: skip
        self.failed = failed
        self.app, self.max_body, self.hosts = app, max_body, tuple(hosts)
        self.idle = idle
        self._too_large = f"The request has more than {max_body} bytes."
        self._too_slow = f"The rest of the request did not come within {idle:g} seconds."
        self.keys, self.admin = [key.encode() for key in api_keys], admin_key and admin_key.encode()

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        if scope["method"] == "HEAD":  # GET's head; uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        started = False

        async def reply(message: Any) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in HEADERS if pair[0] not in present)]
            await send(message)

        refusal = self.refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, reply)
            return
        seen, whole = 0, False

        async def counted() -> Any:
            nonlocal seen, whole
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(self.idle):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, self._too_slow, {"connection": "close"}) from None
            seen, whole = seen + len(message.get("body", b"")), not message.get("more_body", False)
            if seen > self.max_body:
                raise HTTPException(413, self._too_large)
            return message

        try:
            await self.app(scope, counted, reply)
        except Exception as error:
            if started:
                raise
            # Raised further, it would close the connection, and with it end the client's next request
            await self.failed(error)(scope, receive, reply)

    def refusal(self, scope: Any) -> JSONResponse | None:
        """The answer to a request that is not let in."""
        headers = dict(scope["headers"])
        host = named(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts and host not in self.hosts:
            return refused(403, f"This server does not answer for host '{host[:100]}'.", "invalid_request_error")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self.hosts and origin and named(origin.partition("://")[2]) not in self.hosts:
            return refused(403, f"Pages of '{origin[:100]}' may not use this server.", "invalid_request_error")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body:
            return refused(413, self._too_large, "invalid_request_error")
        path = scope["path"]
        if not path.isprintable():  # routes are matched by patterns, whose end a line break may follow
            return refused(404, "Not Found", "not_found_error")
        admin = path in ADMIN
        if admin and self.admin is None:
            return refused(
                404, "Loading adapters is switched off: start the server with an admin key.", "not_found_error"
            )
        if path in OPEN or not (self.keys or admin):
            return None
        word, _, shown = headers.get(b"authorization", b"").partition(b" ")
        allowed = [*(() if admin else self.keys), *([self.admin] if self.admin else [])]
        matches = [hmac.compare_digest(shown.strip(), key) for key in allowed]  # all of them: no early way out
        if word.lower() == b"bearer" and any(matches):
            return None
        return wrong_key(admin)


def named(authority: str) -> str:
    """The host of `host:port`, in small letters; "-" where there is none."""
    return re.sub(r":\d*$", "", authority).lower() or "-"


def refused(status: int, message: str, kind: str, code: str | None = None) -> JSONResponse:
    """A reply in OpenAI's error shape."""
    safe = message.encode("utf-8", "replace").decode()
    return JSONResponse(error_body(safe, kind, code=code), status)


def wrong_key(admin: bool = False) -> JSONResponse:
    """The reply to whoever shows no key that is let in."""
    rule = "loading adapters takes the admin key" if admin else "a key is asked for"
    message = f"Wrong or missing key: {rule}. Send 'Authorization: Bearer KEY'."
    reply = refused(401, message, "authentication_error", "invalid_api_key")
    reply.headers["www-authenticate"] = "Bearer"
    return reply
