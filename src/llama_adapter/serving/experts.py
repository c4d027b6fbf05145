"""Adapters by the names that requests call them: loaded when they are first asked for, replaced while others answer.

A name points to one version of an adapter. Loading it anew adds a second version to the model and moves the pointer;
requests that were taken before go on with the first, which is removed with the last of them. Adapters that a request
had loaded from the directory leave the same way where there are too many, those asked longest ago first.
"""

import contextlib
import itertools
import logging
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.errors import AdapterError
from llama_adapter.formats.native import WEIGHTS_FILE
from llama_adapter.inference.session import Session
from llama_adapter.serving.scheduler import ClosingError, Scheduler
from llama_adapter.settings import unknown_name

log = logging.getLogger(__name__)
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
"""What an adapter may be called: never a path."""


class UnknownExpertError(AdapterError):
    """There is no model of that name."""


@dataclass(eq=False)
class Expert:
    """One version of an adapter, or the bare base, where `key` is None.

    Attributes:
        name: what requests call it.
        key: its name on the model.
        folder: where it was read from.
        on_demand: whether a request's name had it loaded, and will again.
        users: requests that are not done with it.
        used: the turn in which a request last named it.
        retired: whether its name points elsewhere by now.
    """

    name: str
    key: str | None
    folder: str | None = None
    on_demand: bool = False
    users: int = 0
    used: int = 0
    retired: bool = False


class Experts:
    """Which names there are, and which adapter each stands for.

    Args:
        session: answers; its own adapters are there from the start.
        scheduler: loads and removes between two steps of decoding.
        base: what the bare base is called.
        folders: where the session's adapters came from, by name.
        directory: whose subfolders are adapters by name; None: no others than those loaded.
        most: adapters of the directory that stay loaded while no request uses them.
    """

    def __init__(
        self, session: Session, scheduler: Scheduler, base: str, folders: dict[str, str], directory: str | None = None,
        most: int = 64,
    ) -> None:  # fmt: skip
        self.session, self.scheduler, self.base, self.most = session, scheduler, base, most
        self.directory = None if directory is None else Path(os.path.expanduser(directory)).resolve()
        self._lock = threading.Lock()
        self._loading: dict[str, tuple[str, Future[Expert]]] = {}
        self._versions, self._turns = itertools.count(1), itertools.count(1)
        self._experts = {base: Expert(base, None)}
        for name in session.adapters:
            self._experts[name] = Expert(name, name, folders.get(name))

    def names(self) -> list[tuple[str, str | None]]:
        """Every name that can be asked for, the base first, with the folder it is read from."""
        with self._lock:
            known = {name: expert.folder for name, expert in self._experts.items()}
        found: list[Path] = []
        if self.directory is not None:
            with contextlib.suppress(OSError):  # it may have been moved away since: what is loaded still answers
                found = sorted(self.directory.iterdir())
        for folder in found:
            if NAME.fullmatch(folder.name) and self._inside(folder.name) is not None:
                known.setdefault(folder.name, str(folder))
        return list(known.items())

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Expert]:
        """The adapter of a name, which stays on the model until the block ends. Blocks while it is loaded.

        Raises:
            UnknownExpertError: there is none.
            AdapterError: its folder is damaged or made for another base.
        """
        with self._lock:
            expert = self._experts.get(name)
            if expert is not None:
                self._enter(expert)
        if expert is None:
            folder = self._inside(name) if NAME.fullmatch(name) else None
            if folder is None:
                known = [known for known, _ in self.names()]
                raise UnknownExpertError(
                    f"There is {unknown_name('model', name, known)}".replace("is unknown", "is no")
                )
            expert = self.load(name, str(folder), replace=False, on_demand=True)
        try:
            yield expert
        finally:
            self._leave(expert)

    def load(self, name: str, folder: str, replace: bool, on_demand: bool = False) -> Expert:
        """Read an adapter and let `name` point to it; what answers meanwhile is the version before.

        Args:
            name: what requests will call it.
            folder: where it lies.
            replace: whether the name may be taken.
            on_demand: it is for a request, which is counted as one of its users.

        Raises:
            AdapterError: the name is malformed or taken, or the folder is damaged or made for another base.
        """
        if not NAME.fullmatch(name):
            raise AdapterError(f"Adapter name {name[:140]!r} is malformed: use letters, digits, '.', '_' and '-' only.")
        if name == self.base:
            raise AdapterError(f"'{name}' is what the bare base is called: choose another name.")
        with self._lock:
            if name in self._experts and not replace:
                if on_demand:
                    return self._enter(self._experts[name])
                raise AdapterError(f"There is an adapter '{name}' already: unload it first, or pass load_inplace.")
            from_where, waiting = self._loading.get(name, (folder, None))
            if waiting is None:
                mine: Future[Expert] = Future()
                self._loading[name] = folder, mine
        if waiting is not None:
            failed = waiting.exception() is not None
            if failed and on_demand and from_where == folder:
                waiting.result()
            with self._lock:
                if on_demand and not failed and not waiting.result().retired:
                    return self._enter(waiting.result())
            return self.load(name, folder, replace, on_demand)
        try:
            expert = self._load(name, folder, on_demand)
        except BaseException as error:
            with self._lock:
                del self._loading[name]
            mine.set_exception(error)
            raise
        with self._lock:
            before = self._experts.get(name)
            self._experts[name] = expert
            if on_demand:
                self._enter(expert)
            del self._loading[name]
        mine.set_result(expert)
        if before is not None:
            self._retire(before)
        self._put_out()
        return expert

    def unload(self, name: str) -> None:
        """Take a name away; requests that have its adapter keep it until they end.

        Raises:
            AdapterError: there is none of that name, or it is the base.
        """
        with self._lock:
            expert = self._experts.get(name)
            if expert is None or expert.key is None:
                loaded = [known for known, found in self._experts.items() if found.key is not None]
                raise UnknownExpertError(f"There is no adapter '{name[:140]}' to unload; loaded: {', '.join(loaded)}.")
            del self._experts[name]
        self._retire(expert)

    def allowed(self, folder: str) -> str:
        """A folder that a request may have loaded: inside the adapter directory, links followed.

        Raises:
            AdapterError: it is elsewhere, or there is no such directory.
        """
        if self.directory is None:
            raise AdapterError("The server has no --adapter-dir, and loads adapters from nowhere else.")
        real = Path(os.path.realpath(self.directory / folder)) if "\0" not in folder else self.directory
        if not real.is_relative_to(self.directory) or real == self.directory:
            raise AdapterError(f"{folder[:200]!r} is not inside the server's --adapter-dir: put the adapter there.")
        return str(real)

    def _inside(self, name: str) -> Path | None:
        """The folder of a name in the adapter directory, or None."""
        if self.directory is None:
            return None
        folder = Path(os.path.realpath(self.directory / name))  # unlike resolve, it takes links that go in a circle
        with contextlib.suppress(OSError):  # not readable for us
            if folder.is_relative_to(self.directory) and (folder / "adapter_config.json").is_file():
                return folder
        return None

    def _load(self, name: str, folder: str, on_demand: bool) -> Expert:
        if not os.path.isdir(folder):
            raise AdapterError(f"{folder} is no folder that is there: give that of an adapter.")
        if not os.path.isfile(os.path.join(folder, WEIGHTS_FILE)):  # other formats may be pickles
            raise AdapterError(f"{folder} has no {WEIGHTS_FILE}: run 'llama-adapter convert' on it, and serve that.")
        key = f"{name}.v{next(self._versions)}"
        while key in self.session.adapters:
            key = f"{name}.v{next(self._versions)}"
        self.scheduler.between_steps(lambda: self.session.add(key, folder)).result()
        return Expert(name, key, os.path.abspath(folder), on_demand)

    def _enter(self, expert: Expert) -> Expert:
        """Count one more user; under the lock."""
        expert.users += 1
        expert.used = next(self._turns)
        return expert

    def _put_out(self) -> None:
        """Retire adapters that nobody uses and any request can have back, while there are more than may stay."""
        with self._lock:
            loaded = [expert for expert in self._experts.values() if expert.on_demand]
            idle = sorted((expert for expert in loaded if not expert.users), key=lambda expert: expert.used)
            leaving = idle[: max(0, len(loaded) - self.most)]
            for expert in leaving:
                del self._experts[expert.name]
        for expert in leaving:
            self._retire(expert)

    def _retire(self, expert: Expert) -> None:
        with self._lock:
            expert.retired = True
            done = expert.users == 0
        if done:
            self._remove(expert)

    def _leave(self, expert: Expert) -> None:
        with self._lock:
            expert.users -= 1
            idle, retired = expert.users == 0, expert.retired
        if idle and retired:
            self._remove(expert)
        elif idle:
            self._put_out()

    def _remove(self, expert: Expert) -> None:
        key: Any = expert.key
        with contextlib.suppress(ClosingError):
            self.scheduler.between_steps(lambda: self.session.remove(key)).add_done_callback(_log_fault)


def _log_fault(done: "Future[None]") -> None:
    if (error := done.exception()) is not None:
        log.error("an adapter could not be removed", exc_info=error)
