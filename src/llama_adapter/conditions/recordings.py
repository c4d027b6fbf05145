"""Recordings from disk: WAV files as mono samples at 16 kHz, the rate of every audio tower here."""

import math
import os
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_adapter.errors import DataError

SAMPLE_RATE = 16_000
MAX_SECONDS = 1800
"""Longer recordings are refused; half an hour is already 60 windows of Whisper."""
_CONVERT = "convert it with: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"


def read_audio(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """A WAV file (PCM of 8, 16, 24 or 32 bits, any rate and number of channels) as samples in [-1, 1].

    Returns:
        [samples] at 16 kHz, the mean of the channels.

    Raises:
        DataError: missing, a folder, empty, truncated, not PCM, without a sample, or above `MAX_SECONDS`.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{path} is a folder: give the path of one WAV file.")
    try:
        with wave.open(str(file), "rb") as reader:
            channels, width, rate, count = reader.getparams()[:4]
            if count == 0 or rate == 0:
                raise DataError(f"{path} holds no sample: record it again or leave it out.")
            if count > MAX_SECONDS * rate:
                raise DataError(f"{path} is longer than {MAX_SECONDS} seconds: cut it into pieces.")
            content = reader.readframes(count)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path and the folder it is relative to.") from None
    except (wave.Error, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it ends early"
        raise DataError(f"{path} is no WAV file of PCM samples ({reason}): {_CONVERT}.") from None
    if len(content) != count * channels * width:
        raise DataError(f"{path} is truncated: {len(content)} of {count * channels * width} bytes. Copy it again.")
    if width not in (1, 2, 3, 4):
        raise DataError(f"{path} has samples of {8 * width} bits: {_CONVERT}.")
    return resample(pcm(content, width).reshape(-1, channels).mean(1), rate)


def pcm(content: bytes, width: int) -> NDArray[np.float64]:
    """Little-endian PCM of `width` bytes a sample as numbers in [-1, 1); 8 bits are unsigned, the others signed."""
    if width == 1:
        return (np.frombuffer(content, np.uint8) - 128.0) / 128
    # Each sample goes to the upper bytes of a 32-bit one, which also takes care of the sign of 24 bits.
    wide = np.zeros((len(content) // width, 4), np.uint8)
    wide[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return wide.view("<i4").ravel() / 2.0**31


def resample(samples: NDArray[np.floating], rate: int) -> NDArray[np.float32]:
    """From `rate` to 16 kHz by cutting or extending the spectrum: no phase shift, nothing above either Nyquist rate.

    Args:
        samples: [n], at `rate` Hz.
        rate: at least 1.

    Returns:
        [ceil(n x 16000 / rate)].
    """
    if rate == SAMPLE_RATE:
        return samples.astype(np.float32)
    step, new_step = rate // math.gcd(rate, SAMPLE_RATE), SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE)
    # A spectrum belongs to a periodic signal: silence keeps the end from ringing into the beginning. The length must
    # be a multiple of `step`, so that both rates have a whole number of samples in it.
    blocks = math.ceil((len(samples) + rate // 20) / step)
    unit = 1 << max(0, blocks.bit_length() - 5)
    blocks = math.ceil(blocks / unit) * unit  # nearly a power of two: large factors make the transform slow
    padded = np.zeros(blocks * step)
    padded[: len(samples)] = samples
    spectrum = np.fft.rfft(padded)
    wanted = np.zeros(blocks * new_step // 2 + 1, spectrum.dtype)
    kept = min(len(spectrum), len(wanted))
    wanted[:kept] = spectrum[:kept]
    resampled = np.fft.irfft(wanted, blocks * new_step) * (new_step / step)
    return resampled[: math.ceil(len(samples) * SAMPLE_RATE / rate)].astype(np.float32)
