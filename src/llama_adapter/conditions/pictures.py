"""Pictures and videos from disk: upright RGB, or one sentence that names the file and says what is wrong with it."""

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from llama_adapter.errors import ConfigError, DataError

MAX_PIXELS = 100_000_000
"""A picture above this is refused by its header, before anything is decoded: 300 MB as RGB."""
MAX_FILM_PIXELS = 1_000_000_000
"""The same for all frames of an animation: a frame is made of those before it, and half a kilobyte may claim many."""
WORKING_SIDE = 2048
"""A larger shortest side is shrunk to this: towers look at a few hundred pixels."""
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is read. Not everything Pillow opens: EPS, for one, would start Ghostscript on whatever the file holds."""
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
"""Files with other suffixes in a folder of frames are passed over."""

Source = str | os.PathLike[str] | bytes
"""The path of a file, or the content of one."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def read_picture(source: Source) -> Image.Image:
    """A picture as upright RGB: EXIF rotation applied, transparency on white, the first frame of several.

    Args:
        source: a file's path, or its content.

    Raises:
        DataError: missing, empty, truncated, no picture, a folder, or above `MAX_PIXELS`.
    """
    with _opened(source) as image:
        if min(image.size) > WORKING_SIDE:
            image.draft("RGB", (WORKING_SIDE, WORKING_SIDE))  # JPEG alone can decode at a fraction of its size
        return _upright_rgb(image)


def read_video(source: Source, max_frames: int = 16) -> list[Image.Image]:
    """The frames of a folder of pictures, in the order of their names, or of an animated GIF, WebP or PNG.

    Args:
        source: the folder or file, or the file's content.
        max_frames: of more frames, this many are taken, evenly spaced, the first and the last among them.

    Returns:
        At least one RGB picture.

    Raises:
        DataError: a folder without pictures, a frame that `read_picture` refuses, or a file that is no picture, or of
            more than `MAX_FILM_PIXELS`.
        ConfigError: `max_frames` is below 1.
    """
    if max_frames < 1:
        raise ConfigError(f"max_frames is {max_frames}; it must be at least 1.")
    if not isinstance(source, bytes) and Path(source).is_dir():
        paths = sorted((path for path in Path(source).iterdir() if _is_frame(path)), key=_natural)
        if not paths:
            raise DataError(f"{source} holds no picture: give a folder of frames, such as 0001.jpg, 0002.jpg.")
        return [read_picture(paths[i]) for i in _evenly(len(paths), max_frames)]
    hint = "split a film into frames first (ffmpeg -i FILM FOLDER/%05d.jpg) and give the folder"
    with _opened(source, hint) as image:
        frames, count = [], getattr(image, "n_frames", 1)
        if count * image.width * image.height > MAX_FILM_PIXELS:
            raise _too_large_a_film(source, f"{count} frames of {image.width} x {image.height} pixels")
        for i in _evenly(count, max_frames):
            image.seek(i)
            frames.append(_upright_rgb(image))
        return frames


class _UnknownWhiteError(Exception):
    """Raised where the file's name is not at hand."""

    def __init__(self, values: str) -> None:
        super().__init__(f"holds {values} values, whose white is unknown: save it with 8 or 16 bits a channel.")


@contextmanager
def _opened(source: Source, hint: str = "save it as PNG or JPEG") -> Iterator[Image.Image]:
    """The picture with its size checked; whatever fails inside the block becomes one sentence."""
    name = _name_of(source)
    try:
        _check_file(source, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and of sizes, which are checked here
            with Image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source, formats=PICTURE_FORMATS
            ) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise _too_large(name, f"{width} x {height} pixels")
                yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise _refusal(name, error, hint) from None


def _check_file(source: Source, name: str) -> None:
    if isinstance(source, bytes):
        if not source:
            raise DataError(f"{name} is empty: give the content of a picture file.")
        return
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{name} is a folder: give the path of one picture.")
    if not path.exists():
        raise DataError(f"{name} does not exist: check the path and the folder it is relative to.")
    if not path.is_file():
        raise DataError(f"{name} is no file: give the path of one picture.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty (0 bytes): copy it again or leave it out.")


def _refusal(name: str, error: Exception, hint: str) -> DataError:
    if isinstance(error, _UnknownWhiteError):
        return DataError(f"{name} {error}")
    if isinstance(error, UnidentifiedImageError):
        return DataError(f"{name} is no picture in a known format ({', '.join(PICTURE_FORMATS)}): {hint}.")
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(name, "far larger than a picture should be")
    if isinstance(error, OSError) and error.strerror:  # the system's; decoders raise OSError with a text alone
        return DataError(f"{name} cannot be opened ({error.strerror}): check the path and who may read it.")
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return DataError(f"{name} is damaged or truncated ({reason}): copy it again or leave it out.")


def _too_large(name: str, size: str) -> DataError:
    return DataError(f"{name} is {size}; at most {MAX_PIXELS // 1_000_000} million pixels are read: shrink it first.")


def _too_large_a_film(source: Source, size: str) -> DataError:
    return DataError(
        f"{_name_of(source)} has {size}; at most {MAX_FILM_PIXELS // 1_000_000} million pixels are read in all: give a "
        "folder of fewer or smaller frames, or shrink it first."
    )


def _name_of(source: Source) -> str:
    return f"A picture of {len(source)} bytes" if isinstance(source, bytes) else _shortened(os.fspath(source))


def _shortened(path: str) -> str:
    """A record may have a whole picture as text where a path should be."""
    return path if len(path) <= 200 else f"{path[:60]}... ({len(path)} characters)"


def _upright_rgb(image: Image.Image) -> Image.Image:
    """RGB of the current frame, turned as its EXIF says, and no larger than it has to be."""
    image.load()  # before its orientation is read: some formats turn the picture themselves and say so no more
    orientation = _UPRIGHT.get(_orientation(image))
    image = _rgb(image)
    shortest = min(image.size)
    if shortest > WORKING_SIDE:
        width, height = (round(side * WORKING_SIDE / shortest) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image if orientation is None else image.transpose(orientation)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata raises whatever its first wrong byte meets, and the picture may be sound
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise _UnknownWhiteError("floating-point")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        transparent = image.info.get("transparency")  # of a PNG, one value: on white paper as that of others
        return _from_16_bits(values if transparent is None else np.where(values == transparent, 0xFFFF, values))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        return paper.convert("RGB")
    return image.convert("RGB")  # always a copy: the file behind `image` is closed soon


def _from_16_bits(values: np.ndarray) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns nearly every 16-bit picture white.
    if values.min() < 0 or values.max() > 0xFFFF:
        raise _UnknownWhiteError("32-bit")
    scaled = np.rint(values.astype(np.float32) / 257)  # 65535 = 255 x 257
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _is_frame(path: Path) -> bool:
    return path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _evenly(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
