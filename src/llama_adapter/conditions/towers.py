"""A tower: a frozen encoder that turns pictures, videos or recordings into the features that a condition reads."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from llama_adapter.base import first_sentence, load_any_config, quiet, resolve_model
from llama_adapter.conditions.inputs import PictureSteps, Piece, Steps
from llama_adapter.conditions.tower_families import (
    TowerFamily,
    encoder_config,
    model_class,
    resolve_depths,
    tower_family,
    tower_layers,
    tower_width,
)
from llama_adapter.errors import DataError, ModelError

CPU = torch.device("cpu")
_VOLATILE = ("_name_or_path", "architectures", "dtype", "transformers_version")


class Tower:
    """A frozen encoder with its preprocessing; `load_tower` makes one.

    B inputs, M depths, D `width`, T tokens. An input is a picture, a list of frames or a mono recording at 16 kHz;
    the frames of a video and the windows of a recording are averaged. Features are fp32, on the tower's device.

    Attributes:
        name: as it was asked for.
        width: D.
        layers: the encoder has one hidden state more.
        sense: "picture" or "audio".
        batch_size: pieces (pictures, frames, windows) of one forward.
    """

    def __init__(self, name: str, config: PretrainedConfig, model: PreTrainedModel, steps: Steps) -> None:
        self.name, self.config, self.steps = name, config, steps
        self.width, self.layers = tower_width(config), tower_layers(config)
        self.family: TowerFamily = tower_family(config)
        self.sense = self.family.sense
        self.model = model.eval().requires_grad_(False)
        self.batch_size = 16

    @torch.no_grad()  # not inference_mode: what is trained on the features must be able to save them for backward
    def features(self, inputs: Sequence[Any], depths: Sequence[int] = (-1,)) -> Tensor:
        """One vector an input and depth, [B, M, D].

        CLIP's and DINOv3's are their CLS token the way the model ends (norm, and CLIP's projection), SigLIP's come
        from its pooling head, an audio tower's are the mean of the hidden states that stand for sound.

        Raises:
            DataError: an input of another kind than this tower's, or none.
            AdapterError: no such depth.
        """
        chosen = resolve_depths(tuple(depths), self.config, self.name)
        cut = [self.steps.pieces(given) for given in inputs]
        vectors: list[Tensor] = []
        for batch, hidden_states in self._forward(cut):
            vectors += torch.stack([self._pool(hidden_states[depth], batch) for depth in chosen], 1).unbind()
        if not vectors:
            return torch.empty(0, len(chosen), self.width, device=self.model.device)
        of_inputs = torch.stack(vectors).split([len(pieces) for pieces in cut])
        return torch.stack([pieces.mean(0) for pieces in of_inputs])

    @torch.no_grad()
    def tokens(self, inputs: Sequence[Any]) -> Tensor:
        """Every token of the last hidden state, the way the model ends, [B, T, D]: CLS, registers, patches.

        Raises:
            ModelError: an audio tower.
            DataError: an input that is no picture.
        """
        if self.sense != "picture":
            raise ModelError(
                f"The tower '{self.name}' is for audio: visual prompts need a picture tower, such as CLIP."
            )
        cut = [self.steps.pieces(given) for given in inputs]
        if any(len(pieces) > 1 for pieces in cut):
            raise DataError("A visual prompt is made of one picture, not of a video: give one frame of it.")
        found = [self.family.embed(self.model, states[-1]).float() for _, states in self._forward(cut)]
        return torch.cat(found) if found else torch.empty(0, 0, self.width, device=self.model.device)

    def key(self, depths: Sequence[int] | None = None) -> str:
        """What features depend on beside the input: configuration, weights, preprocessing, depths.

        None stands for `tokens`. The name is no part of it: the same tower in another folder has the same features,
        and another one put in its place has others.
        """
        chosen = "tokens" if depths is None else str(resolve_depths(tuple(depths), self.config, self.name))
        return f"{self._fingerprint()}:{chosen}"

    def _fingerprint(self) -> str:
        known = {key: value for key, value in encoder_config(self.config).to_dict().items() if key not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
        digest.update(f"{type(self.model).__name__} {self.steps!r} {self.model.dtype}".encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            # Training moves every value: a few of each tensor tell two checkpoints apart without reading gigabytes.
            digest.update(tensor.flatten()[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _pool(self, hidden: Tensor, batch: list[Piece]) -> Tensor:
        """[N, T, W] -> [N, D], fp32."""
        if self.family.pool:
            return self.family.pool(self.model, hidden).float()
        return torch.stack([row[: piece.states].float().mean(0) for row, piece in zip(hidden, batch, strict=True)])

    def _forward(self, cut: list[list[Piece]]) -> Iterator[tuple[list[Piece], tuple[Tensor, ...]]]:
        """Batches of pieces of one shape, in their order, with all hidden states [N, T, W] of each."""
        for _, alike in groupby(chain.from_iterable(cut), key=lambda piece: piece.values.shape):
            run = list(alike)
            for start in range(0, len(run), self.batch_size):
                batch = run[start : start + self.batch_size]
                values = torch.stack([piece.values for piece in batch]).to(self.model.device, self.model.dtype)
                yield batch, self.model(values, output_hidden_states=True).hidden_states


def load_tower_config(name: str) -> PretrainedConfig:
    """A tower's configuration, checked to be of a supported family; no weights are read.

    Raises:
        ModelError: there is no such tower.
        UnsupportedModelError: its family cannot be one.
    """
    config = load_any_config(name, "tower")
    tower_family(config)
    return config


def load_tower(name: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tower:
    """The encoder on `device`, frozen; of a model with a text part only the encoder is built.

    Args:
        name: a folder, a hub name or 'bundled'.
        device: where its weights go.
        dtype: of the weights.

    Raises:
        ModelError: it is not there, is damaged or incomplete, or its preprocessing does not fit it.
        UnsupportedModelError: its family cannot be a tower.
    """
    config = load_tower_config(name)
    family = tower_family(config)
    steps = _steps(name, config, _settings(name))
    options = {"config": encoder_config(config), "dtype": dtype, "device_map": {"": device}}
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet(reports=False):
            model, info = model_class(config).from_pretrained(
                resolve_model(name, "tower"), **options, **checked, **(family.load_options or {})
            )
    except torch.OutOfMemoryError:
        raise ModelError(f"The tower '{name}' does not fit on {device} in {dtype}: use a smaller one.") from None
    except Exception as error:  # safetensors and pickle readers raise their own kinds on damaged files
        raise ModelError(f"The weights of the tower '{name}' cannot be read: {first_sentence(error)}") from None
    # transformers would go on with random numbers in their place.
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    wrong = sorted(absent - set(family.optional))
    if wrong:
        raise ModelError(
            f"The weights of the tower '{name}' do not fit its config.json: {len(wrong)} tensors are missing or of "
            f"another shape, such as {wrong[0]}. Copy it again."
        )
    return Tower(name, config, model, steps)


def _settings(name: str) -> Mapping[str, Any]:
    """What the tower's folder says about preprocessing; empty where it says nothing."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = cached_file(resolve_model(name, "tower"), file, _raise_exceptions_for_missing_entries=False)
            values = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} of the tower '{name}' cannot be read: {first_sentence(error)}") from None
        if file == "processor_config.json" and isinstance(values, dict):
            values = values.get("image_processor", values.get("feature_extractor", {}))
        if not isinstance(values, dict):
            raise ModelError(f"{file} of the tower '{name}' holds a {type(values).__name__}, not settings by name.")
        if values:
            return values
    return {}


def _steps(name: str, config: PretrainedConfig, settings: Mapping[str, Any]) -> Steps:
    encoder, family = encoder_config(config), tower_family(config)
    try:
        steps = family.steps(encoder, settings)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"a size has no {error}" if isinstance(error, KeyError) else first_sentence(error).rstrip(".")
        raise ModelError(f"preprocessor_config.json of the tower '{name}' cannot be used: {reason}.") from None
    if not isinstance(steps, PictureSteps):
        return steps
    if steps.size is None or (family.fixed_size and steps.size != (encoder.image_size,) * 2):
        found = "pictures of varying sizes" if steps.size is None else "pictures of {} x {}".format(*steps.size)
        raise ModelError(
            f"preprocessor_config.json of the tower '{name}' gives {found}, and its config.json wants "
            f"{encoder.image_size} x {encoder.image_size}: restore the two files."
        )
    return steps
