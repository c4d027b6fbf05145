"""From pictures and recordings to the tensors that a tower takes, with Pillow and numpy alone.

An input becomes pieces: a picture is one, a video one a frame, a recording one a window. A tower averages over them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, WhisperFeatureExtractor

from llama_adapter.conditions.recordings import SAMPLE_RATE
from llama_adapter.errors import DataError

WINDOW_SECONDS = 30
"""Longer recordings are cut: Whisper has no positions for more, and wav2vec2's memory grows with the square."""
WHISPER_STRIDE = 320
"""Samples that one of Whisper's hidden states stands for: 160 from the spectrogram, times 2 from its convolution."""
MAX_ASPECT = 32
"""Before its shortest edge is resized, a longer strip is cut to this: what lies beyond would be cropped anyway."""


@dataclass(frozen=True)
class Piece:
    """What one row of a tower's batch is.

    Attributes:
        values: [3, height, width], [mel bins, frames] or [samples], fp32.
        states: how many of the hidden states that come out stand for something; None stands for all of them.
    """

    values: Tensor
    states: int | None = None


class Steps(Protocol):
    """How one kind of input is cut up; its `repr` is a part of the tower's identity."""

    def pieces(self, given: Any) -> list[Piece]:
        """At least one piece.

        Raises:
            DataError: it is not an input of this kind.
        """


@dataclass(frozen=True)
class PictureSteps:
    """Resize, centre crop, scale to [0, 1] and normalise, in that order.

    Attributes:
        resize: length of the shortest edge, or (height, width), or None for not at all.
        crop: (height, width) around the centre, padded with black where there is less, or None.
        resample: one of Pillow's filters.
        scale: what values of 0 to 255 are multiplied by.
        mean: of the three channels.
        std: of the three channels.
        scale_first: resize numbers instead of bytes, so that nothing is rounded in between (DINOv3).
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC
    scale: float = 1 / 255
    scale_first: bool = False

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out, or None where that depends on the picture."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def pieces(self, given: Image.Image | Sequence[Image.Image]) -> list[Piece]:
        """One for a picture, one a frame for a video; see `Steps`."""
        frames = [given] if isinstance(given, Image.Image) else given
        if not isinstance(frames, list | tuple) or not all(isinstance(frame, Image.Image) for frame in frames):
            raise DataError(
                f"A picture tower takes pictures or lists of frames, not a {type(given).__name__}: "
                "open files with read_picture or read_video."
            )
        if not frames:
            raise DataError("A video without a frame has no features: leave it out.")
        return [Piece(self.tensor(frame)) for frame in frames]

    def tensor(self, picture: Image.Image) -> Tensor:
        """[3, height, width] of one picture."""
        picture = self._without_ends(picture.convert("RGB"))
        if self.scale_first:
            values = np.asarray(picture, np.float32) * np.float32(self.scale)
            channels = [self._resized(Image.fromarray(channel)) for channel in np.moveaxis(values, 2, 0)]
            values = np.stack([np.asarray(channel, np.float32) for channel in channels], axis=2)
        else:
            values = np.asarray(self._resized(picture), np.float32) * np.float32(self.scale)
        if self.crop is not None:
            values = centre_crop(values, self.crop)
        normal = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))

    def _resized(self, picture: Image.Image) -> Image.Image:
        if self.resize is None:
            return picture
        if isinstance(self.resize, tuple):
            height, width = self.resize
        else:
            shortest = min(picture.size)
            width, height = (int(self.resize * side / shortest) for side in picture.size)
        return picture.resize((width, height), Image.Resampling(self.resample))

    def _without_ends(self, picture: Image.Image) -> Image.Image:
        short, long = sorted(picture.size)
        if not isinstance(self.resize, int) or long <= MAX_ASPECT * short:
            return picture
        width, height = (min(side, MAX_ASPECT * short) for side in picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))


def centre_crop(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The middle `size` = (height, width) of [H, W, C], with zeros around it where the picture is smaller."""
    lacking = [max(0, wanted - has) for wanted, has in zip(size, values.shape, strict=False)]
    values = np.pad(values, [(-(-side // 2), side // 2) for side in lacking] + [(0, 0)])
    top, left = ((has - wanted) // 2 for wanted, has in zip(size, values.shape, strict=False))
    return values[top : top + size[0], left : left + size[1]]


def with_settings(steps: PictureSteps, values: Mapping[str, Any]) -> PictureSteps:
    """`steps` with what a preprocessor_config.json says in place of the defaults; what it leaves out stays.

    Raises:
        KeyError, TypeError, ValueError: a value of another form than such files have.
    """
    values = {key: value for key, value in values.items() if value is not None}
    found: dict[str, Any] = {}
    if "size" in values:
        found["resize"] = _edge_or_size(values["size"], square=steps.crop is None)
    if "crop_size" in values:
        found["crop"] = _edge_or_size(values["crop_size"], square=True)
    if not values.get("do_resize", True):
        found["resize"] = None
    if not values.get("do_center_crop", True):
        found["crop"] = None
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in values:
            found[ours] = tuple(float(value) for value in values[theirs])
            if len(found[ours]) != 3:
                raise ValueError(f"{theirs} has {len(found[ours])} values instead of 3")
    if "resample" in values:
        found["resample"] = int(Image.Resampling(values["resample"]))
    if "rescale_factor" in values:
        found["scale"] = float(values["rescale_factor"])
    if not values.get("do_rescale", True):
        found["scale"] = 1.0
    if not values.get("do_normalize", True):
        found["mean"], found["std"] = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return replace(steps, **found)


def _edge_or_size(value: int | Mapping[str, int], square: bool) -> int | tuple[int, int]:
    if isinstance(value, Mapping):
        return int(value["shortest_edge"]) if "shortest_edge" in value else (int(value["height"]), int(value["width"]))
    return (int(value), int(value)) if square else int(value)  # files from before sizes had names


@dataclass(frozen=True)
class WaveSteps:
    """Raw samples for wav2vec2, one window after the other, never padded against each other.

    Attributes:
        shortest: samples below which the tower's convolutions have nothing to give; silence fills up to it.
        normalise: to zero mean and unit variance over the recording.
    """

    shortest: int
    normalise: bool = True

    @classmethod
    def of(cls, config: PretrainedConfig, settings: Mapping[str, Any]) -> "WaveSteps":
        """For a wav2vec2 configuration and its preprocessor_config.json."""
        reach, stride = 1, 1
        for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
            reach, stride = reach + (kernel - 1) * stride, stride * step
        return cls(reach, bool(settings.get("do_normalize", True)))

    def pieces(self, given: NDArray[np.floating]) -> list[Piece]:
        """One a window; see `Steps`."""
        samples = checked_samples(given)
        if self.normalise:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        if len(samples) < self.shortest:
            samples = np.pad(samples, (0, self.shortest - len(samples)))
        return [Piece(torch.from_numpy(window)) for window in windows(samples, WINDOW_SECONDS * SAMPLE_RATE)]


@dataclass(frozen=True)
class MelSteps:
    """Log-mel spectrograms for Whisper, one a window, each filled up with silence.

    Attributes:
        bins: of the mel scale.
        positions: hidden states of a window; Whisper has 1500 for 30 seconds.
    """

    bins: int
    positions: int

    def pieces(self, given: NDArray[np.floating]) -> list[Piece]:
        """One a window; the states that stand for the silence behind it are not counted. See `Steps`."""
        found = []
        for window in windows(checked_samples(given), self.positions * WHISPER_STRIDE):
            mel = self._extractor(window, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]
            found.append(Piece(torch.from_numpy(mel), math.ceil(len(window) / WHISPER_STRIDE)))
        return found

    @cached_property
    def _extractor(self) -> WhisperFeatureExtractor:
        extractor = WhisperFeatureExtractor(feature_size=self.bins)
        extractor.n_samples = self.positions * WHISPER_STRIDE
        return extractor


def checked_samples(given: NDArray[np.floating]) -> NDArray[np.float32]:
    """[samples] fp32, at least one.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(given, np.ndarray) or given.ndim != 1 or not len(given):
        what = f"an array of shape {given.shape}" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
        raise DataError(f"An audio tower takes mono samples at 16 kHz, not {what}: open files with read_audio.")
    return given.astype(np.float32)


def windows(samples: NDArray[np.float32], longest: int) -> list[NDArray[np.float32]]:
    """`samples` in as few parts of at most `longest` as there can be, of equal length, so that none is a mere rest."""
    return np.array_split(samples, math.ceil(len(samples) / longest))
