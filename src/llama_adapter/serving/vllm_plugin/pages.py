"""Routes of ours on vLLM's server: a plugin of its group `vllm.endpoint_plugins`, which `VLLM_PLUGINS` has to name.

The page at `/`, the gates of adapters, and `/v1/models` with those that are loaded when a request first names them.
"""

import contextlib
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ModelCard
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.lora.utils import get_adapter_absolute_path

from llama_adapter.base import load_config
from llama_adapter.core.families import shape_of
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.serving.guard import HEADERS, refused, wrong_key
from llama_adapter.serving.page import page_response
from llama_adapter.serving.vllm_plugin.folders import is_ours, read_servable
from llama_adapter.serving.vllm_plugin.resolver import FolderResolver


class Pages:
    """See `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = "llama_adapter"
    required_tasks = ("generate",)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing: the routes read vLLM's own state."""

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; one that vLLM has is replaced."""
        args = app.state.args
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        lock = AuthenticationMiddleware(app, keys)  # vLLM itself guards what begins with /v1 alone
        directory = os.environ.get("LLAMA_ADAPTER_DIR") if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING else None
        names = Catalogue(app, args.model, directory)

        @app.get("/", include_in_schema=False)
        def page() -> Response:
            """The page, with the headers that the embedded server gives it."""
            reply = page_response()
            reply.raw_headers.extend(HEADERS)
            return reply

        @app.get("/v1/models")
        async def models() -> Response:
            """The base and its adapters."""
            return JSONResponse({"object": "list", "data": await names.cards()})

        @app.get("/v1/models/{model:path}")
        async def model(model: str) -> Response:
            """One of them."""
            found = [card for card in await names.cards() if card["id"] == model]
            return JSONResponse(found[0]) if found else nobody(model)

        @app.get("/gates/{model:path}")
        async def gates(model: str, request: Request) -> Response:
            """Layers (L) of an adapter and act(g) of their heads, [L, heads], as its files have them."""
            if keys and not lock.verify_token(request.headers):
                return wrong_key()
            found = [card for card in await names.cards() if card["id"] == model]
            return await run_in_threadpool(gates_of, found[0]) if found else nobody(model)


def nobody(model: str) -> Response:
    """The reply where there is no model of that name."""
    return refused(404, f"There is no model '{model[:128]}'.", "not_found_error", "model_not_found")


class Catalogue:
    """What can be asked for: vLLM's own models, and adapters of a directory that it loads when they are asked for."""

    def __init__(self, app: FastAPI, model: str, directory: str | None) -> None:
        self.state, self.resolver, self.shape = app.state, None, {}
        if directory is not None:
            self.resolver, self.shape = FolderResolver(Path(directory)), shape_of(load_config(model))

    async def cards(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists."""
        shown = await self.state.openai_serving_models.show_available_models()
        found: list[dict[str, Any]] = shown.model_dump()["data"]
        taken, base = {card["id"] for card in found}, found[0]["id"]
        for name, folder in (await run_in_threadpool(self.servable)).items():
            if name not in taken:
                found.append(ModelCard(id=name, root=str(folder), parent=base).model_dump())
        return found

    def servable(self) -> dict[str, Path]:
        """The adapters of the directory that vLLM can serve on this base, by name."""
        found: dict[str, Path] = {}
        if self.resolver is None:
            return found
        for name in sorted(path.name for path in self.resolver.folder.iterdir()):
            folder = self.resolver.find(name)
            if folder is not None:
                with contextlib.suppress(LlamaAdapterError):  # whoever asks for it is told why
                    read_servable(folder, self.shape)
                    found[name] = folder
        return found


def gates_of(card: dict[str, Any]) -> Response:
    """The gates of a model that `cards` has."""
    if card["parent"] is None:
        return refused(404, f"'{card['id']}' is the bare base, which has no gates: name an adapter.", "not_found_error")
    folder = get_adapter_absolute_path(card["root"])
    if not is_ours(folder):
        return refused(404, f"'{card['id']}' is LoRA, which has no gates: name another adapter.", "not_found_error")
    try:
        layers = describe_adapter(folder)["layers"]
    except LlamaAdapterError as error:
        return refused(400, str(error), "invalid_request_error")
    return JSONResponse(
        {"layers": [layer["layer"] for layer in layers], "strength": [layer["gates"] for layer in layers]}
    )
