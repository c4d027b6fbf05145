"""Recordings from disk: what libsndfile reads (WAV, FLAC, OGG), as mono samples at 16 kHz, every audio tower's rate."""

import io
import os

import numpy as np
from numpy.typing import NDArray

from llama_adapter.errors import DataError, MissingExtraError

SAMPLE_RATE = 16_000
MAX_SECONDS = 1800
"""Longer recordings are refused; half an hour is already 60 windows of Whisper."""
MAX_SAMPLES = MAX_SECONDS * 2 * 48_000
"""Over all channels: a few kilobytes of FLAC can claim to be gigabytes of silence."""


def read_audio(source: str | os.PathLike[str] | bytes) -> NDArray[np.float32]:
    """A recording of any rate and number of channels, from a file's path or its content.

    Returns:
        [samples] at 16 kHz, in [-1, 1] where the file's are, the mean of the channels.

    Raises:
        DataError: missing, a folder, truncated, no recording, without a sample, or above `MAX_SECONDS`.
        MissingExtraError: soundfile or soxr is not installed.
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise MissingExtraError(error.name or "soundfile", "audio", "Reading recordings") from None
    path = f"A recording of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes):
        if os.path.isdir(source):
            raise DataError(f"{path} is a folder: give the path of one recording.")
        if not os.path.exists(source):
            raise DataError(f"{path} does not exist: check the path and the folder it is relative to.")
    try:
        _check_whole(source, path)
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as sound:
            if sound.frames > MAX_SECONDS * sound.samplerate:
                raise DataError(f"{path} is longer than {MAX_SECONDS} seconds: cut it into pieces.")
            if sound.frames * sound.channels > MAX_SAMPLES:
                raise DataError(f"{path} has more than {MAX_SAMPLES} samples: convert it to mono at 16 kHz first.")
            samples = sound.read(dtype="float32", always_2d=True)  # [frames, channels]
            if len(samples) < sound.frames:
                raise DataError(f"{path} is truncated: {len(samples)} of {sound.frames} samples. Copy it again.")
            samples = soxr.resample(samples.mean(1), sound.samplerate, SAMPLE_RATE)
    except (soundfile.SoundFileError, OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
        raise DataError(
            f"{path} cannot be read as a recording ({reason.strip().rstrip('.') or 'it is damaged'}): copy it again, "
            "or convert it with: ffmpeg -i FILE -ac 1 -ar 16000 OUT.wav"
        ) from None
    if not len(samples):
        raise DataError(f"{path} holds no sample: record it again or leave it out.")
    if not np.isfinite(samples).all():
        raise DataError(f"{path} holds samples that are no numbers: record it again or leave it out.")
    return samples


def _check_whole(source: str | os.PathLike[str] | bytes, path: str) -> None:
    """Refuse a WAV file that says it is longer than it is: libsndfile would give what is there, and say nothing."""
    if isinstance(source, bytes):
        head, actual = source[:8], len(source)
    else:
        with open(source, "rb") as stream:
            head, actual = stream.read(8), os.path.getsize(source)
    claimed = int.from_bytes(head[4:], "little") + 8
    streamed = head[4:] == b"\xff\xff\xff\xff"  # written into a pipe, by somebody who could not know
    if head[:4] == b"RIFF" and not streamed and claimed > actual:
        raise DataError(f"{path} is truncated: {actual} of {claimed} bytes. Copy it again.")
