"""What keeps vLLM's prefix cache from handing out keys and values that an adapter's older content made.

vLLM tells cached blocks apart by an adapter's name and path. Here the content's digest is added, as the engine's
process saw it when the adapter was loaded, and a number that grows whenever an adapter is replaced in place: a request
that was hashed before such a replacement and computed after it then has blocks that nobody finds again.
"""

import threading
from collections.abc import Callable
from typing import Any

from llama_adapter.errors import AdapterError
from llama_adapter.serving.vllm_plugin.folders import folder_digest, is_ours


class Salts:
    """The salts of one engine's process, by a LoRA request's number and path; any of its threads may ask.

    Args:
        locate: a request's path -> a folder on this machine.
    """

    def __init__(self, locate: Any) -> None:
        self.locate = locate
        self._lock = threading.Lock()
        self._salts: dict[tuple[int, str], str | None] = {}
        self._turns: dict[int, int] = {}

    def of(self, request: Any) -> str | None:
        """The salt of a request's adapter; None where it is not ours."""
        key = (request.lora_int_id, request.lora_path)
        with self._lock:
            if key not in self._salts:
                self._salts[key] = self._made(request, self.content(request))
            return self._salts[key]

    def content(self, request: Any) -> str | None:
        """Digest of what lies in a request's folder now; None where it is not ours."""
        folder = self.locate(request.lora_path)
        return folder_digest(folder) if is_ours(folder) else None

    def loading(self, request: Any, load: Callable[[], Any], drop: Callable[[], Any]) -> Any:
        """Run `load`, which reads the request's adapter in every worker, and keep the salt of what they read.

        Raises:
            AdapterError: the files changed meanwhile; as the workers may have read unlike contents, `drop` has then
                taken the adapter from all of them.
        """
        before = self.content(request)
        try:
            done = load()
        finally:
            changed = self._changed(request, before)
            if changed:
                self.forget(request.lora_int_id)
                drop()
        if changed:
            raise AdapterError(f"{request.lora_path} changed while it was loaded: load it again.")
        key = (request.lora_int_id, request.lora_path)
        with self._lock:
            if key in self._salts and not request.load_inplace:
                return done  # the workers have it, and read nothing
            if request.load_inplace:
                self._turns[request.lora_int_id] = self._turns.get(request.lora_int_id, 0) + 1
            self._salts[key] = self._made(request, before)
        return done

    def forget(self, number: int) -> None:
        """The adapter of this number was taken from the workers: what comes next is another."""
        with self._lock:
            self._turns[number] = self._turns.get(number, 0) + 1
            self._salts = {key: salt for key, salt in self._salts.items() if key[0] != number}

    def _changed(self, request: Any, before: str | None) -> bool:
        try:
            return self.content(request) != before
        except AdapterError:
            return True

    def _made(self, request: Any, content: str | None) -> str | None:
        turn = self._turns.get(request.lora_int_id, 0)
        return content if content is None or not turn else f"{content}-{request.lora_int_id}-{turn}"
