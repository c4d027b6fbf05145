"""From files to the condition of a batch: read, encode with the frozen tower, keep the features, ask the adapter."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.conditions.cache import FeatureCache
from llama_adapter.conditions.config import TOKEN_KINDS, AnyKind, ConditionConfig, Kind, is_python
from llama_adapter.conditions.modules import Condition
from llama_adapter.conditions.pictures import read_picture, read_video
from llama_adapter.conditions.python_towers import PythonTower, named_tower
from llama_adapter.conditions.recordings import read_audio
from llama_adapter.conditions.tower_families import check_tower, spread_depths, tower_width
from llama_adapter.conditions.towers import Tower, load_tower, load_tower_config
from llama_adapter.errors import DataError

READERS: dict[AnyKind, Callable[[Any], Any]] = {
    "image": read_picture,
    "patches": read_picture,
    "visual_prompt": read_picture,
    "audio": read_audio,
    "video": read_video,
}


def condition_config(
    kind: Kind, tower: str | PythonTower, depths: Sequence[int] = (), **settings: Any
) -> ConditionConfig:
    """A condition for a tower, whose width is read from its configuration.

    Args:
        kind: what is perceived.
        tower: folder, hub name or 'bundled'; or one that Python code made.
        depths: hidden states that are pooled; empty takes up to six, evenly spread (`TOKEN_KINDS`: the last).
        settings: other fields of `ConditionConfig`.

    Raises:
        ModelError, UnsupportedModelError: there is no such tower.
        AdapterError: the tower does not fit the kind, or has no such hidden state.
        ConfigError: a setting breaks its rule.
    """
    if isinstance(tower, PythonTower):
        return tower.condition(kind, depths, **settings)
    encoder = load_tower_config(tower)
    chosen = tuple(depths) or ((-1,) if kind in TOKEN_KINDS else spread_depths(encoder))
    config = ConditionConfig(kind, tower, tower_width(encoder), chosen, **settings)
    check_tower(config, encoder, tower)
    return config


class Perception:
    """The senses of an adapter: its frozen tower, and features already computed.

    Args:
        config: the adapter's condition.
        device: where the tower runs.
        cache: folder in which features are kept between runs; None keeps them in memory.
        most: how many are kept in memory, the last ones; None keeps all.
        others: perceptions of other adapters; one with the same tower lends it.
        towers: those of Python code that the user named; no other code is run.

    Raises:
        ModelError, UnsupportedModelError: there is no such tower, or it is damaged.
        AdapterError: the tower has another width or fewer layers than the adapter was made for, or is Python code
            and not among `towers`.
    """

    def __init__(
        self,
        config: ConditionConfig,
        device: torch.device,
        cache: str | Path | None = None,
        most: int | None = None,
        others: Iterable["Perception"] = (),
        towers: Sequence[PythonTower] = (),
    ) -> None:
        self.config = config
        self.tower: Tower = _tower(config, device, others, towers)
        depths = None if config.kind in TOKEN_KINDS else config.depths
        # One file is several inputs: of an animation a picture is the first frame, and a video all of them
        key = f"{self.tower.key(depths)}:{READERS[config.kind].__name__}"
        self.cache = FeatureCache(cache, key, most=most)

    def features(self, files: Sequence[str | bytes]) -> list[Tensor]:
        """Features of each file, on the CPU; what was computed before is not computed again.

        Raises:
            DataError: a file that is missing, damaged or of another kind; the message names it.
        """
        return self.cache.get_many(files, self._encode)

    def prepare(self, files: Sequence[str | bytes]) -> None:
        """Compute the features of all files that a run will need.

        Raises:
            DataError: as `features`.
        """
        self.cache.fill(files, self._encode)

    def condition(self, module: Condition, rows: Sequence[Sequence[str | bytes]]) -> Tensor:
        """The condition of each row, given the files of each: [B, hidden] or [B, K, hidden].

        Raises:
            DataError: as `features`.
        """
        device = next(module.parameters()).device
        found = self.features([file for files in rows for file in files])
        scales = len(self.config.depths)  # one token would do as well for a visual prompt of no picture
        features = torch.stack(found) if found else torch.empty(0, scales, self.tower.width)
        owner = torch.tensor([i for i, files in enumerate(rows) for _ in files], dtype=torch.int64)
        return module(features.to(device), owner.to(device), len(rows))

    def _encode(self, files: list[str | bytes]) -> Tensor:
        inputs = [READERS[self.config.kind](file) for file in files]
        by_tokens = self.config.kind in TOKEN_KINDS
        found = self.tower.tokens(inputs) if by_tokens else self.tower.features(inputs, self.config.depths)
        if not found.isfinite().all():  # one such row would make every gradient of its batch nothing
            file = next(file for file, row in zip(files, found, strict=True) if not row.isfinite().all())
            name = f"a file of {len(file)} bytes" if isinstance(file, bytes) else file
            raise DataError(
                f"The tower '{self.config.tower}' gives features of {name} that are not finite: leave the file out, or "
                "take a tower of fp32."
            )
        return found


def _tower(
    config: ConditionConfig, device: torch.device, others: Iterable[Perception], towers: Sequence[PythonTower]
) -> Tower:
    if is_python(config.tower):
        return named_tower(config, towers)
    check_tower(config, load_tower_config(config.tower), config.tower)
    lent = next((other.tower for other in others if other.config.tower == config.tower), None)
    return load_tower(config.tower, device) if lent is None else lent
