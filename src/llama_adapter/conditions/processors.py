"""From pictures and recordings to the tensors that a tower takes, by transformers' own processors.

An input becomes pieces: a picture is one, a video one a frame, a recording one a window. A tower averages over them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

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


def picture_pieces(processor: Any, config: PretrainedConfig, given: Image.Image | Sequence[Image.Image]) -> list[Piece]:
    """One for a picture, one a frame for a video.

    Args:
        processor: an image processor of transformers.
        config: the encoder's.
        given: what it is about.

    Raises:
        DataError: it is no picture and no list of them.
    """
    frames = [given] if isinstance(given, Image.Image) else given
    if not isinstance(frames, list | tuple) or not all(isinstance(frame, Image.Image) for frame in frames):
        raise DataError(
            f"A picture tower takes pictures or lists of frames, not a {type(given).__name__}: "
            "open files with read_picture or read_video."
        )
    if not frames:
        raise DataError("A video without a frame has no features: leave it out.")
    by_edge = bool(getattr(processor, "do_resize", False)) and bool((processor.size or {}).get("shortest_edge"))
    found = []
    for frame in frames:  # one by one, as decoded frames are far larger than what becomes of them
        picture = without_ends(frame.convert("RGB")) if by_edge else frame.convert("RGB")
        found.append(Piece(processor(picture, return_tensors="pt")["pixel_values"][0].float()))
    return found


def without_ends(picture: Image.Image) -> Image.Image:
    """The middle of a strip; other pictures as they are."""
    width, height = (min(side, MAX_ASPECT * min(picture.size)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def wave_pieces(processor: Any, config: PretrainedConfig, given: NDArray[np.floating]) -> list[Piece]:
    """Samples for wav2vec2, one a window, normalised over the whole recording; see `picture_pieces`."""
    shortest, stride = 1, 1  # what the convolutions need to give anything; silence fills up to it
    for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
        shortest, stride = shortest + (kernel - 1) * stride, stride * step
    samples = processor(checked_samples(given), sampling_rate=SAMPLE_RATE, return_tensors="np").input_values[0]
    samples = np.pad(samples, (0, max(0, shortest - len(samples))))  # theirs would count in the mean and the variance
    return [Piece(torch.from_numpy(window)) for window in windows(samples, WINDOW_SECONDS * SAMPLE_RATE)]


def mel_pieces(processor: Any, config: PretrainedConfig, given: NDArray[np.floating]) -> list[Piece]:
    """Log-mel spectrograms for Whisper, one a window; see `picture_pieces`.

    Each is filled up with silence, and the states that stand for it are not counted.
    """
    longest = config.max_source_positions * WHISPER_STRIDE
    found = []
    for window in windows(checked_samples(given), longest):
        mel = processor(window, max_length=longest, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]
        found.append(Piece(torch.from_numpy(mel), math.ceil(len(window) / WHISPER_STRIDE)))
    return found


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
