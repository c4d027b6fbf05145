"""The hub's client, with a sentence for everything that can fail there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_adapter.base import first_sentence
from llama_adapter.errors import AdapterError

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")


def hub_name(text: str) -> tuple[str, str | None] | None:
    """Repository and revision of "owner/name" or "owner/name@revision"; None for any other text."""
    found = _NAME.fullmatch(text)
    return None if found is None else (found[1], found[2])


def download(repository: str, revision: str | None, files: list[str]) -> Path:
    """The folder in the hub's cache with those of these files that a repository has.

    Raises:
        AdapterError: there is no such repository or revision, or the hub cannot be reached and the cache has none.
    """
    from huggingface_hub import snapshot_download

    with said_once(f"{repository} is not an adapter: there is no folder of that name, and the hub gave none", revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))


@contextmanager
def said_once(failed: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into `failed` and the reason.

    Raises:
        AdapterError: what went wrong, and what to do next.
    """
    from huggingface_hub.errors import RevisionResolutionError

    try:
        yield
    except (OSError, ValueError, RuntimeError, RevisionResolutionError) as error:
        raise AdapterError(f"{failed} ({_reason(error, revision)}).") from None
    except Exception as error:  # of the HTTP client that huggingface_hub happens to use: connections, timeouts
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise AdapterError(f"{failed} (the hub cannot be reached: {first_sentence(error)[:-1]}).") from None


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one file of several
        error = error.__cause__
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision '{revision or constants.DEFAULT_REVISION}': give a branch, a tag or a commit"
    if isinstance(error, GatedRepoError):
        return "access to it is restricted: ask for it on its page, then log in with 'hf auth login'"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "the hub wants to know who asks: log in with 'hf auth login', or set HF_TOKEN"
    if status == 403:
        return "your token may not do that: make one with write access to it, and log in with 'hf auth login'"
    if status == 404:
        return "there is no such repository, or it is private: check the name, and log in with 'hf auth login'"
    if status is not None and (status == 429 or status >= 500):
        return f"the hub answers {status}: try again later"
    if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
        return "the hub cannot be reached: check the path, or the connection"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache has it not: unset it, or download it before"
    return first_sentence(error)[:-1]
