"""A tower that a Python function makes: any frozen torch encoder, with the preprocessing that belongs to it.

`python:FILE.py:FUNCTION` or `python:package.module:FUNCTION` names a function without arguments that returns a pair, as
open_clip and CLIP's own `load` do:

    module      a `torch.nn.Module` that takes a batch of inputs [N, ...] and gives one tensor, or a list of them with
                one a depth, lowest first. Each is [N, W], one vector; [N, T, W], tokens; or [N, W, height, width],
                a feature map. Narrower ones are filled up with zeros to the widest, D.
    preprocess  a function that takes one RGB picture (PIL), or one mono recording at 16 kHz (NumPy), and gives its
                tensor [...]: the same one every time, and of the same shape for every input.

This is code, and it runs only where whoever starts a program names it. An adapter's file that does is no permission.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llama_adapter.base import first_sentence
from llama_adapter.conditions.config import (
    PYTHON,
    TOKEN_KINDS,
    AnyKind,
    ConditionConfig,
    check_digest,
    is_python,
    unnamed,
)
from llama_adapter.conditions.processors import Piece
from llama_adapter.conditions.tower_families import resolve_depths
from llama_adapter.conditions.towers import CPU, Tower
from llama_adapter.errors import AdapterError, ConfigError, DataError, LlamaAdapterError, ModelError

SCALES = 6
"""How many depths are read where nobody says which, as of other towers."""
AGAIN, BESIDE = 1e-3, 2e-2
"""How far features of one input may differ, in parts of their largest: asked twice, and beside another input."""


class PythonTower(Tower):
    """What a factory returned; see `load_python_tower`.

    Attributes:
        digest: of its weights, which an adapter that was trained with it keeps.
        has_tokens: whether its last depth has several vectors.
    """

    def __init__(self, name: str, module: nn.Module, preprocess: Callable[[Any], Any], sense: str, source: str) -> None:
        super().__init__(name, module)
        self.preprocess, self.sense, self._source = preprocess, sense, source
        self.digest = _digest(module)
        probes = [_probe(preprocess, probe, name) for probe in _probes(sense)]
        self._preprocessing = hashlib.sha256(b"".join(probe.numpy().tobytes() for probe in probes)).hexdigest()
        if len({probe.shape for probe in probes}) > 1:
            raise ModelError(f"preprocess of {name} gives inputs of unlike shapes, {_shapes(probes)}: resize to one.")
        self._shape = probes[0].shape
        states = self._try(probes[0].to(self.device, self.dtype))
        self.width, self.depths = max(_width(state) for state in states), len(states)
        self._gives = " ".join(map(_sketch, states))
        self.has_tokens = states[-1].dim() > 2
        self._square = states[-1].dim() != 4 or states[-1].shape[2] == states[-1].shape[3]

    def pieces(self, given: Any) -> list[Piece]:
        """See `Tower.pieces`."""
        wanted = Image.Image if self.sense == "picture" else np.ndarray
        parts = list(given) if isinstance(given, list | tuple) else [given]
        if not parts or not all(isinstance(part, wanted) for part in parts):
            kind = "pictures or lists of frames" if self.sense == "picture" else "recordings"
            raise DataError(f"The tower '{self.name}' takes {kind}, not this {type(given).__name__}.")
        found = [_tensor(self.preprocess(part), self.name) for part in parts]
        if unlike := [tensor for tensor in found if tensor.shape != self._shape]:
            shapes = f"{list(self._shape)} and {list(unlike[0].shape)}"
            raise ModelError(f"preprocess of {self.name} gives inputs of unlike shapes, {shapes}: resize to one.")
        return [Piece(tensor) for tensor in found]

    def hidden_states(self, values: Tensor) -> Sequence[Tensor]:
        """See `Tower.hidden_states`; each as the module gives it.

        Raises:
            ModelError: the module gave something else.
        """
        found = self.model(values)
        states = [found] if isinstance(found, Tensor) else found
        if not isinstance(states, list | tuple) or not states or not all(isinstance(s, Tensor) for s in states):
            raise ModelError(f"The module of {self.name} gives a {type(found).__name__}: return a tensor or a list.")
        wrong = [
            s for s in states
            if s.dim() not in (2, 3, 4) or len(s) != len(values) or not s.is_floating_point() or not s.numel()
        ]  # fmt: skip
        if wrong:
            raise ModelError(
                f"The module of {self.name} gives {_shapes(wrong)} for {len(values)} inputs: return [N, W], "
                "[N, tokens, W] or [N, W, height, width]."
            )
        return states

    @torch.no_grad()
    def _try(self, probe: Tensor) -> Sequence[Tensor]:
        """What the module gives for one input, which is to depend on that input alone.

        Raises:
            ModelError: it is not finite, or another the next time or beside another input.
        """
        states = self.hidden_states(probe[None])
        if not all(state.isfinite().all() for state in states):
            raise ModelError(f"The module of {self.name} gives numbers that are not finite for noise: see its weights.")
        again, beside = (
            self.hidden_states(batch) for batch in (probe[None], torch.stack([probe, torch.zeros_like(probe)]))
        )
        if _differ(states, again, AGAIN):
            raise ModelError(
                f"The module of {self.name} gives two results for one input, in evaluation mode, too: take dropout (of "
                "torch.nn.functional) and chance out, as features are computed once."
            )
        if _differ(states, [state[:1] for state in beside], BESIDE):
            raise ModelError(
                f"The module of {self.name} gives an input other features beside another one in its batch: normalise "
                "each input by itself (a batch norm with running statistics does)."
            )
        return states

    def pool(self, hidden: Tensor, batch: list[Piece]) -> Tensor:
        """See `Tower.pool`: the vector, or the mean of tokens or places."""
        found = hidden.float()
        if found.dim() > 2:
            found = found.mean((2, 3)) if found.dim() == 4 else found.mean(1)
        return self._filled(found)

    def embed(self, hidden: Tensor) -> Tensor:
        """See `Tower.embed`; places of a feature map come row by row."""
        return self._filled(hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden)

    def fingerprint(self) -> str:
        """See `Tower.fingerprint`: weights, architecture, code, and what comes of the inputs that it is tried on."""
        parts = (self.digest, repr(self.model), self._source, self._preprocessing, self._gives, self.sense)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def condition(self, kind: AnyKind, depths: Sequence[int], **settings: Any) -> ConditionConfig:
        """A condition of this kind that reads this tower; empty `depths` are up to six, evenly spread.

        Raises:
            AdapterError: it has no such hidden state, or one vector where tokens are wanted.
            ConfigError: a setting breaks its rule.
        """
        scales = min(SCALES, self.depths)
        spread = tuple(self.depths * (i + 1) // scales - 1 for i in range(scales))
        chosen = tuple(depths) or ((-1,) if kind in TOKEN_KINDS else spread)
        config = ConditionConfig(kind, self.name, self.width, chosen, tower_digest=self.digest, **settings)
        self.check(config)
        return config

    def check(self, condition: ConditionConfig) -> None:
        """Refuse a condition that this tower cannot give the features of.

        Raises:
            AdapterError: it was made for other weights, or for a depth, a width or tokens that this one lacks.
        """
        check_digest(condition, self.name, self.digest)
        if condition.tower_width != self.width:
            raise AdapterError(
                f"The adapter was made for features of width {condition.tower_width} (tower '{condition.tower}'), and "
                f"the tower '{self.name}' gives {self.width}: use the tower that it was trained with."
            )
        if condition.kind in TOKEN_KINDS and not self.has_tokens:
            raise AdapterError(
                f"condition {condition.kind} reads a picture's tokens, and the tower '{self.name}' gives one vector: "
                "let its module return [N, tokens, W] or a feature map, or take --condition image."
            )
        if condition.kind == "patches" and not self._square:
            raise AdapterError(f"The feature map of '{self.name}' is no square: let preprocess give square pictures.")
        resolve_depths(condition.depths, self.depths, self.name)

    def _filled(self, found: Tensor) -> Tensor:
        return nn.functional.pad(found, (0, self.width - found.shape[-1]))


def load_python_tower(name: str, kind: AnyKind, device: torch.device = CPU) -> PythonTower:
    """Import a factory's module, call the factory and try what it returns on two inputs.

    Args:
        name: `python:FILE.py:FUNCTION` or `python:package.module:FUNCTION`.
        kind: of the condition that will read it; "audio" asks with recordings, all others with pictures.
        device: where the module goes.

    Raises:
        ConfigError: the name is malformed, or there is no such file, module or function.
        ModelError: the code fails, or returns something else than such a pair.
    """
    where, factory = _find(name)
    try:
        found = factory()
    except LlamaAdapterError:
        raise
    except Exception as error:  # the caller's own code
        raise ModelError(f"The factory {name} failed ({type(error).__name__}): {first_sentence(error)}") from None
    pair = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    if not isinstance(pair[0], nn.Module) or not callable(pair[1]):
        raise ModelError(f"The factory {name} returns a {type(found).__name__}: return a pair, module and preprocess.")
    try:
        return PythonTower(name, pair[0].to(device), pair[1], "audio" if kind == "audio" else "picture", _code(where))
    except LlamaAdapterError:
        raise
    except Exception as error:
        raise ModelError(f"The encoder of {name} failed ({type(error).__name__}): {first_sentence(error)}") from None


def load_named_towers(
    names: Iterable[str], conditions: Iterable[ConditionConfig], device: torch.device
) -> list[PythonTower]:
    """The towers that a user named, for what some conditions take: recordings, pictures or both.

    Raises:
        ConfigError, ModelError: see `load_python_tower`.
    """
    hear = {condition.kind == "audio" for condition in conditions if is_python(condition.tower)} or {False}
    return [load_python_tower(name, "audio" if sense else "image", device) for name in names for sense in sorted(hear)]


def named_tower(condition: ConditionConfig, towers: Iterable[PythonTower]) -> PythonTower:
    """The one of `towers` that a condition was trained with.

    Raises:
        AdapterError: there is none; the sentence says how to name it.
    """
    wanted = condition.tower
    given = [tower for tower in towers if (tower.sense == "audio") == (condition.kind == "audio")]
    if not given:
        raise AdapterError(unnamed(wanted))
    same = [tower for tower in given if tower.digest == condition.tower_digest] or given
    # The same weights behind two ways of preprocessing, say: their names tell them apart, also where the file has moved
    tower = max(same, key=lambda tower: (tower.name == wanted, _function(tower.name) == _function(wanted)))
    tower.check(condition)
    return tower


def _function(name: str) -> str:
    return name.rpartition(":")[2]


def _find(name: str) -> tuple[ModuleType, Callable[[], Any]]:
    place, _, function = name.removeprefix(PYTHON).rpartition(":")
    if not is_python(name) or not place or not function.isidentifier():
        raise ConfigError(f"tower '{name}' is malformed: write python:FILE.py:FUNCTION or python:module:FUNCTION.")
    try:
        module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except Exception as error:
        raise ModelError(f"{place} cannot be imported ({type(error).__name__}): {first_sentence(error)}") from None
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ConfigError(f"{place} has no function '{function}': check the name behind the last colon of {name}.")
    return module, factory


def _from_file(place: str) -> ModuleType:
    path = Path(os.path.expanduser(place)).resolve()
    if not path.is_file():
        raise ConfigError(f"tower: there is no file {place}: check the path of python:{place}:FUNCTION.")
    key = f"llama_adapter_tower_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their module up there while it is read
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _code(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # compiled, or empty
        return ""


def _digest(module: nn.Module) -> str:
    """Of all weights, whatever they are on."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(f"{key}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _probes(sense: str) -> list[Any]:
    """A wide and a tall picture, or a short and a longer sound; the same ones every time."""
    noise = np.random.default_rng(0)
    if sense == "audio":
        return [noise.normal(0, 0.1, size).astype(np.float32) for size in (16_000, 24_000)]
    return [Image.fromarray(noise.integers(0, 255, (*size, 3), np.uint8)) for size in ((40, 80), (80, 40))]


def _probe(preprocess: Callable[[Any], Any], probe: Any, name: str) -> Tensor:
    first, second = (_tensor(preprocess(probe.copy()), name) for _ in range(2))
    if not torch.equal(first, second):
        raise ModelError(
            f"preprocess of {name} gives two results for one input: take random crops and flips out, as features are "
            "computed once."
        )
    return first


def _tensor(found: Any, name: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise ModelError(f"preprocess of {name} gives a {type(found).__name__}: return a tensor.")
    return found.detach().cpu()


def _width(state: Tensor) -> int:
    return state.shape[1 if state.dim() == 4 else -1]


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)


def _sketch(state: Tensor) -> str:
    """A few figures that code in whichever file cannot change unseen; rounded, as devices differ in the last digits."""
    found = state.float().flatten().cpu()
    ramp = torch.linspace(1, 2, len(found))
    return " ".join(f"{part.mean():.3g}" for part in (found.abs(), found.relu() * ramp, found.abs() * ramp))


def _differ(states: Sequence[Tensor], others: Sequence[Tensor], most: float) -> bool:
    """Whether two results differ by more than `most` of their largest number, or in their shape."""
    if [state.shape for state in states] != [other.shape for other in others]:
        return True
    pairs = [(state.float(), other.float()) for state, other in zip(states, others, strict=True)]
    return any(bool((a - b).abs().max() > most * torch.maximum(a.abs(), b.abs()).max()) for a, b in pairs)
