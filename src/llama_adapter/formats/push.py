"""An adapter on its way to the hub: its two files and its card, and nothing else."""

import os
import tempfile
from pathlib import Path

from torch import nn

from llama_adapter.errors import AdapterError
from llama_adapter.formats.card import CARD_FILE, card_text, moved_card, write_card
from llama_adapter.formats.hub import hub_name, said_once
from llama_adapter.formats.inspect import describe_adapter
from llama_adapter.formats.native import CONFIG_FILE, WEIGHTS_FILE, save_adapter


def push_adapter(
    source: nn.Module | str | os.PathLike[str],
    repository: str,
    name: str | None = None,
    *,
    private: bool = True,
    revision: str | None = None,
    commit_message: str = "Upload adapter with llama-adapter",
    token: str | None = None,
) -> str:
    """Put an adapter on the hub, in one commit of its configuration, its weights and its card.

    A card that the repository has already is kept.

    Args:
        source: an adapter's folder, or a model with one.
        repository: "owner/name"; it is made where needed.
        name: of the adapter on a model; by default the active one.
        private: whether a new repository is for its owner alone. A public one that exists takes False.
        revision: the branch, by default "main"; it is made where needed.
        commit_message: the commit's first line.
        token: in place of the one that `hf auth login` keeps.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: no sound adapter, no such owner, no right to write, a public repository while `private`, or no
            way to reach the hub.
    """
    _check_reachable(repository)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_adapter(source, temporary, name) if isinstance(source, nn.Module) else Path(source)
        found = describe_adapter(folder)  # nothing that load_adapter would refuse goes up
        open_repository(repository, private, token)
        files = {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
        card = folder / CARD_FILE
        if not card.is_file():
            card = Path(temporary) / CARD_FILE
            write_card(temporary, card_text(found, {}))
        files[CARD_FILE] = moved_card(card.read_bytes(), repository)
    return _commit(repository, files, revision, commit_message, token)


def open_repository(repository: str, private: bool = True, token: str | None = None) -> None:
    """Make a repository, or see that the one that is there may be written to.

    Raises:
        AdapterError: see `push_adapter`.
    """
    from huggingface_hub import HfApi

    _check_reachable(repository)
    api = HfApi(token=token)
    with said_once(f"{repository} cannot be pushed to"):
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise AdapterError(f"{repository} is public: pass --public (private=False) to publish the adapter there.")


def _check_reachable(repository: str) -> None:
    from huggingface_hub import constants

    if hub_name(repository) != (repository, None):
        raise AdapterError(f"'{repository}' is no repository: give 'owner/name'.")
    if constants.HF_HUB_OFFLINE:
        raise AdapterError(f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repository}: unset it.")


def _commit(repository: str, files: dict[str, bytes], revision: str | None, message: str, token: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with said_once(f"{repository} cannot be pushed to", revision):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if api.file_exists(repository, CARD_FILE, revision=revision):
            files = {name: content for name, content in files.items() if name != CARD_FILE}
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return str(done.commit_url)
