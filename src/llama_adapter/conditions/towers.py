"""A tower: a frozen encoder that turns pictures, videos or recordings into the features that a condition reads."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, PretrainedConfig, PreTrainedModel
from transformers.models.auto.feature_extraction_auto import get_feature_extractor_config

# Not from transformers itself, whose 5.17 hands out a stand-in that asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor, get_image_processor_config

from llama_adapter.base import first_sentence, load_any_config, quiet, resolve_model
from llama_adapter.conditions.processors import Piece
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
    """A frozen encoder with its preprocessing; `load_tower` and `python_towers.load_python_tower` make one.

    B inputs, M depths, D `width`, T tokens, N pieces. An input is a picture, a list of frames or a mono recording at
    16 kHz; the frames of a video and the windows of a recording are averaged. Features are fp32, on the tower's device.

    Attributes:
        name: as it was asked for.
        model: the encoder.
        width: D.
        depths: how many hidden states it gives.
        sense: "picture" or "audio".
        batch_size: pieces (pictures, frames, windows) of one forward.
    """

    width: int
    depths: int
    sense: str

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model.eval().requires_grad_(False)
        self.batch_size = 16
        first = next(chain(model.parameters(), model.buffers()), torch.zeros(0))
        self.device, self.dtype = first.device, first.dtype if first.is_floating_point() else torch.float32

    def pieces(self, given: Any) -> list[Piece]:
        """What the encoder takes of one input: at least one piece.

        Raises:
            DataError: an input of another kind than this tower's.
        """
        raise NotImplementedError

    def hidden_states(self, values: Tensor) -> Sequence[Tensor]:
        """Every depth of a batch of pieces, lowest first."""
        raise NotImplementedError

    def pool(self, hidden: Tensor, batch: list[Piece]) -> Tensor:
        """One vector a piece, [N, D], fp32."""
        raise NotImplementedError

    def embed(self, hidden: Tensor) -> Tensor:
        """Every token of the last hidden state, [N, T, D]."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """What features depend on beside the input and the depths."""
        raise NotImplementedError

    @torch.no_grad()  # not inference_mode: what is trained on the features must be able to save them for backward
    def features(self, inputs: Sequence[Any], depths: Sequence[int] = (-1,)) -> Tensor:
        """One vector an input and depth, [B, M, D].

        CLIP's and DINOv3's are their CLS token the way the model ends (norm, and CLIP's projection), SigLIP's come
        from its pooling head, an audio tower's are the mean of the hidden states that stand for sound.

        Raises:
            DataError: an input of another kind than this tower's, or none.
            AdapterError: no such depth.
        """
        chosen = resolve_depths(tuple(depths), self.depths, self.name)
        cut = [self.pieces(given) for given in inputs]
        vectors: list[Tensor] = []
        for batch, hidden_states in self._forward(cut):
            vectors += torch.stack([self.pool(hidden_states[depth], batch) for depth in chosen], 1).unbind()
        if not vectors:
            return torch.empty(0, len(chosen), self.width, device=self.device)
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
        cut = [self.pieces(given) for given in inputs]
        if any(len(pieces) > 1 for pieces in cut):
            raise DataError("A visual prompt is made of one picture, not of a video: give one frame of it.")
        found = [self.embed(states[-1]).float() for _, states in self._forward(cut)]
        return torch.cat(found) if found else torch.empty(0, 0, self.width, device=self.device)

    def key(self, depths: Sequence[int] | None = None) -> str:
        """What features depend on beside the input: configuration, weights, preprocessing, depths.

        None stands for `tokens`. The name is no part of it: the same tower in another folder has the same features,
        and another one put in its place has others.
        """
        chosen = "tokens" if depths is None else str(resolve_depths(tuple(depths), self.depths, self.name))
        return f"{self.fingerprint()}:{chosen}"

    def _forward(self, cut: list[list[Piece]]) -> Iterator[tuple[list[Piece], Sequence[Tensor]]]:
        """Batches of pieces of one shape, in their order, with all hidden states of each."""
        for _, alike in groupby(chain.from_iterable(cut), key=lambda piece: piece.values.shape):
            run = list(alike)
            for start in range(0, len(run), self.batch_size):
                batch = run[start : start + self.batch_size]
                values = torch.stack([piece.values for piece in batch]).to(self.device, self.dtype)
                yield batch, self.hidden_states(values)


class PretrainedTower(Tower):
    """An encoder of transformers, of a family of `tower_families.TOWERS`; `load_tower` makes one."""

    def __init__(self, name: str, config: PretrainedConfig, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(name, model)
        self.config, self.processor = config, processor
        self.width, self.depths = tower_width(config), tower_layers(config) + 1
        self.family: TowerFamily = tower_family(config)
        self._encoder = encoder_config(config)
        self.sense = self.family.sense

    def pieces(self, given: Any) -> list[Piece]:
        """See `Tower.pieces`."""
        return self.family.pieces(self.processor, self._encoder, given)

    def hidden_states(self, values: Tensor) -> Sequence[Tensor]:
        """See `Tower.hidden_states`; each is [N, T, W]."""
        return self.model(values, output_hidden_states=True).hidden_states

    def pool(self, hidden: Tensor, batch: list[Piece]) -> Tensor:
        """See `Tower.pool`."""
        if self.family.pool:
            return self.family.pool(self.model, hidden).float()
        return torch.stack([row[: piece.states].float().mean(0) for row, piece in zip(hidden, batch, strict=True)])

    def embed(self, hidden: Tensor) -> Tensor:
        """See `Tower.embed`."""
        return self.family.embed(self.model, hidden)

    def fingerprint(self) -> str:
        """See `Tower.fingerprint`."""
        known = {key: value for key, value in self._encoder.to_dict().items() if key not in _VOLATILE}
        settings = json.dumps([known, self.processor.to_dict()], sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode())
        digest.update(f"{type(self.model).__name__} {self.dtype}".encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            # Training moves every value: a few of each tensor tell two checkpoints apart without reading gigabytes.
            digest.update(tensor.flatten()[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()


def load_tower_config(name: str) -> PretrainedConfig:
    """A tower's configuration, checked to be of a supported family; no weights are read.

    Raises:
        ModelError: there is no such tower.
        UnsupportedModelError: its family cannot be one.
    """
    config = load_any_config(name, "tower")
    tower_family(config)
    return config


def load_tower(name: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> PretrainedTower:
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
    processor = _load_processor(name, config)
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
    return PretrainedTower(name, config, model, processor)


def _load_processor(name: str, config: PretrainedConfig) -> Any:
    """transformers' processor as the tower's folder has it, or its family's; it gives what the encoder takes."""
    family, encoder = tower_family(config), encoder_config(config)
    picture = family.sense == "picture"
    probes: list[Any] = [np.zeros(400, np.float32)]
    if picture:
        probes = [Image.new("RGB", size) for size in ((400, 200), (200, 400))]
    try:
        with quiet(reports=False):
            processor = _read_processor(resolve_model(name, "tower"), family, encoder)
            shapes = {
                tuple(piece.values.shape) for probe in probes for piece in family.pieces(processor, encoder, probe)
            }
    except Exception as error:  # processors raise whatever their first wrong setting meets
        raise ModelError(
            f"preprocessor_config.json of the tower '{name}' cannot be used: {first_sentence(error)} "
            "Restore it, or take it away for the settings of the tower's family."
        ) from None
    wanted = family.input_shape(encoder) if family.input_shape else None
    if wanted and (len(shapes) > 1 or (family.fixed_size and wanted not in shapes)):
        found = "inputs of varying sizes" if len(shapes) > 1 else f"inputs of {_times(*shapes)}"
        raise ModelError(
            f"preprocessor_config.json of the tower '{name}' gives {found}, and its config.json wants "
            f"{_times(wanted)}: restore the two files."
        )
    return processor


def _read_processor(folder: str, family: TowerFamily, encoder: PretrainedConfig) -> Any:
    picture = family.sense == "picture"
    settings = get_image_processor_config(folder) if picture else get_feature_extractor_config(folder)
    named = settings.keys() & {"image_processor_type", "feature_extractor_type"}
    if named and not family.own_processor:
        if picture:  # by Pillow, so that features do not depend on whether torchvision is installed
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    default = family.processor(encoder)
    told = {key: value for key, value in settings.items() if value is not None and key not in named}
    return type(default)(**{**default.to_dict(), **told}) if told else default


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
