"""Pictures, videos and recordings of every sort, and the sentence for each that cannot be used."""

import io
import os
import re
import struct
import sys
import wave
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

from llama_adapter.conditions import pictures
from llama_adapter.conditions.pictures import read_picture, read_video
from llama_adapter.conditions.recordings import MAX_SAMPLES, MAX_SECONDS, SAMPLE_RATE, read_audio
from llama_adapter.errors import ConfigError, DataError, MissingExtraError

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def corners(picture):
    """Colours of the four corners, clockwise from the upper left."""
    right, bottom = picture.width - 1, picture.height - 1
    return [picture.getpixel(place) for place in ((0, 0), (right, 0), (right, bottom), (0, bottom))]


def marked(width=6, height=4):
    """A black picture with a red upper-left and a blue upper-right corner."""
    picture = Image.new("RGB", (width, height))
    picture.putpixel((0, 0), RED)
    picture.putpixel((width - 1, 0), BLUE)
    return picture


def encoded(picture, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


# pictures that can be read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_give_the_pixels_back(tmp_path, kind):
    path = tmp_path / "picture"
    path.write_bytes(encoded(marked(), kind))
    for source in (path, str(path), path.read_bytes()):
        found = read_picture(source)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(marked()))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000"])
def test_lossy_formats_come_close(kind):
    smooth = Image.linear_gradient("L").convert("RGB")
    found = read_picture(encoded(smooth, kind))
    assert np.abs(np.asarray(found, int) - np.asarray(smooth, int)).max() <= 8


@pytest.mark.parametrize(
    ("orientation", "upper_left"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (6, 3), (7, 2), (8, 1)]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied(orientation, upper_left, kind):
    """`upper_left` is the stored corner, clockwise, that comes to lie there; 5 to 8 swap the sides."""
    stored = Image.new("RGB", (6, 4))
    colours = [RED, (0, 255, 0), BLUE, (255, 255, 0)]
    for colour, place in zip(colours, ((0, 0), (5, 0), (5, 3), (0, 3)), strict=True):
        stored.putpixel(place, colour)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_picture(encoded(stored, kind, exif=exif))
    assert found.size == ((4, 6) if orientation >= 5 else (6, 4))
    assert corners(found)[0] == colours[upper_left]
    mirrored = orientation in (2, 4, 5, 7)
    step = -1 if mirrored else 1
    assert corners(found) == [colours[(upper_left + step * i) % 4] for i in range(4)]


def test_damaged_exif_does_not_spoil_a_sound_picture():
    content = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert read_picture(content).size == (8, 8)


def test_transparency_lies_on_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 51)])
    found = np.asarray(read_picture(encoded(rgba)))[0]
    assert found.tolist() == [[255, 255, 255], [255, 0, 0], [255, 204, 204]]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 0), (0, 255)])
    assert np.asarray(read_picture(encoded(grey)))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes(kind):
    palette = marked().convert("P", palette=Image.Palette.ADAPTIVE)
    assert corners(read_picture(encoded(palette, kind))) == [RED, BLUE, (0, 0, 0), (0, 0, 0)]
    red = next(index for colour, index in palette.palette.colors.items() if colour[:3] == RED)
    assert corners(read_picture(encoded(palette, kind, transparency=red)))[:2] == [WHITE, BLUE]


def test_one_colour_of_an_rgb_picture_declared_transparent():
    assert corners(read_picture(encoded(marked(), transparency=RED)))[:2] == [WHITE, BLUE]


def test_greyscale_and_black_and_white():
    assert corners(read_picture(encoded(Image.new("L", (2, 2), 77))))[0] == (77, 77, 77)
    assert corners(read_picture(encoded(Image.new("1", (2, 2), 1))))[0] == WHITE


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 100, 257 * 100 + 129, 65535]], np.uint16)
    found = np.asarray(read_picture(encoded(Image.fromarray(values), kind)))[0, :, 0]
    assert found.tolist() == [0, 100, 101, 255]


def test_a_transparent_value_of_16_bits_is_paper(tmp_path):
    picture = Image.fromarray(np.array([[0, 257 * 100]], np.uint16))
    picture.save(tmp_path / "a.png", transparency=0)
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 100]


def test_big_endian_16_bits():
    content = encoded(Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 257 * 3, 65535)), "TIFF")
    assert np.asarray(read_picture(content))[0, :, 0].tolist() == [3, 255]


def test_cmyk():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert corners(read_picture(content))[0] == RED


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert corners(read_picture(content))[0] == RED


@pytest.mark.parametrize(("kind", "width"), [("JPEG", 99), ("PNG", 100)])  # JPEG goes through an eighth, 105 x 53
def test_large_pictures_are_shrunk(monkeypatch, kind, width):
    monkeypatch.setattr(pictures, "WORKING_SIDE", 50)
    large = Image.new("RGB", (840, 420))
    ImageDraw.Draw(large).rectangle((420, 0, 840, 420), fill="white")
    found = read_picture(encoded(large, kind))
    assert found.size == (width, 50)
    assert corners(found) == [(0, 0, 0), WHITE, WHITE, (0, 0, 0)]


# pictures that cannot


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    content = encoded(noise, kind)
    path = tmp_path / "cut.img"
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.img is (damaged or truncated \(.+\)|no picture in a known format)"):
        read_picture(path)


def test_every_refusal_is_a_sentence_with_the_name(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.jpg").write_text("I am no picture, whatever my name says")
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "wide.tif")
    for name, sentence in {
        "missing.png": "does not exist: check the path and the folder it is relative to.",
        "empty.png": "is empty (0 bytes): copy it again or leave it out.",
        "words.jpg": "is no picture in a known format (JPEG, PNG,",
        "drawing.eps": "is no picture in a known format",
        "folder.png": "is a folder: give the path of one picture.",
        "float.tif": "holds floating-point values, whose white is unknown",
        "wide.tif": "holds 32-bit values, whose white is unknown",
    }.items():
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / name} {sentence}")):
            read_picture(tmp_path / name)
    with pytest.raises(
        DataError, match=r"^data:image/png;base64,A{38}\.\.\. \(\d+ characters\) cannot be opened \(File name"
    ):
        read_picture("data:image/png;base64," + "A" * 5000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is no file: give the path of one picture"):
        read_picture(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"^A picture of 0 bytes is empty"):
        read_picture(b"")
    with pytest.raises(DataError, match=r"^A picture of 5 bytes is no picture"):
        read_picture(b"12345")


@pytest.mark.parametrize(("width", "height"), [(11_000, 10_000), (1, 100_000_001), (60_000, 60_000)])
def test_a_huge_picture_is_refused_by_its_header(width, height):
    """A few bytes that claim to be gigabytes: nothing may be decoded to find out."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    with pytest.raises(DataError, match="at most 100 million pixels are read: shrink it first"):
        read_picture(content)


# videos


def folder_of_frames(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"frame{i}.png")
    return folder


def test_frames_of_a_folder_in_natural_order(tmp_path):
    folder = folder_of_frames(tmp_path / "film", 12)
    (folder / "notes.txt").write_text("passed over")
    (folder / ".hidden.png").write_text("passed over too")
    assert [frame.getpixel((0, 0))[0] for frame in read_video(folder)] == list(range(12))


@pytest.mark.parametrize(("most", "expected"), [(1, [0]), (2, [0, 11]), (4, [0, 4, 7, 11]), (99, list(range(12)))])
def test_many_frames_are_thinned_evenly(tmp_path, most, expected):
    folder = folder_of_frames(tmp_path / "film", 12)
    assert [frame.getpixel((0, 0))[0] for frame in read_video(folder, most)] == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation(tmp_path, kind):
    colours = [RED, (0, 255, 0), BLUE]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "animation"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    for source in (path, path.read_bytes()):
        assert [corners(frame)[0] for frame in read_video(source)] == colours
    assert [corners(frame)[0] for frame in read_video(path, 2)] == [RED, BLUE]


def test_a_still_picture_is_a_video_of_one_frame():
    assert len(read_video(encoded(marked()))) == 1


def test_an_animation_that_claims_more_than_can_be_decoded_is_refused_at_once():
    frame = b"\x21\xf9\x04\x08\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    head = b"GIF89a" + struct.pack("<HHBBB", 9999, 9999, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    with pytest.raises(DataError, match=r"of 480 bytes has 20 frames of 9999 x 9999 .* at most 1000 million"):
        read_video(head + 20 * frame + b"\x3b")
    assert len(read_video(head.replace(struct.pack("<H", 9999), struct.pack("<H", 9)) + 20 * frame + b"\x3b")) == 16


def test_videos_that_cannot_be_read(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(DataError, match="none holds no picture: give a folder of frames"):
        read_video(tmp_path / "none")
    with pytest.raises(DataError, match=r"film.mp4 is no picture in a known format .* \(ffmpeg -i FILM"):
        read_video(tmp_path / "film.mp4")
    with pytest.raises(DataError, match="gone does not exist"):
        read_video(tmp_path / "gone")
    with pytest.raises(ConfigError, match="max_frames is 0; it must be at least 1"):
        read_video(folder_of_frames(tmp_path / "film", 1), 0)
    (tmp_path / "film" / "frame1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"frame1\.png is empty"):
        read_video(tmp_path / "film")


# recordings


def wav(path, samples, rate=SAMPLE_RATE, width=2, channels=1):
    """Write floats in [-1, 1], [n] or [n, channels], as PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        whole = np.rint(np.asarray(samples).ravel() * (2 ** (8 * width - 1) - 1)).astype(np.int64)
        if width == 1:
            content = (whole + 128).astype(np.uint8).tobytes()
        else:
            content = b"".join(int(value).to_bytes(width, "little", signed=True) for value in whole)
        file.writeframes(content)
    return path


def tone(hertz, rate, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_sample(tmp_path, width):
    samples = tone(440, SAMPLE_RATE, 0.05)
    found = read_audio(wav(tmp_path / "a.wav", samples, width=width))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=1.5 / 2 ** min(8 * width - 1, 23))


def test_extremes_keep_their_sign(tmp_path):
    for width in (1, 2, 3, 4):
        found = read_audio(wav(tmp_path / "a.wav", [1.0, -1.0, 0.0], width=width))
        np.testing.assert_allclose(found, [1, -1, 0], atol=0.01)


def test_channels_are_averaged(tmp_path):
    samples = np.stack([tone(440, SAMPLE_RATE), -tone(440, SAMPLE_RATE), tone(880, SAMPLE_RATE)], 1)
    found = read_audio(wav(tmp_path / "a.wav", samples, channels=3))
    np.testing.assert_allclose(found, samples.mean(1), atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 44_101])
def test_a_tone_stays_the_tone_at_16_kilohertz(tmp_path, rate):
    found = read_audio(wav(tmp_path / "a.wav", tone(1000, rate), rate))
    assert abs(len(found) - SAMPLE_RATE // 2) <= 1
    expected = tone(1000, SAMPLE_RATE)
    inside = slice(800, 7200)  # a tone that starts or stops is not one
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-3)


def test_what_16_kilohertz_cannot_hold_is_removed_not_folded(tmp_path):
    high = read_audio(wav(tmp_path / "a.wav", tone(11_000, 44_100), 44_100))  # would come back as 5 kHz
    assert np.abs(high[800:7200]).max() < 2e-3


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_other_formats(tmp_path, kind, subtype):
    samples = tone(440, 22_050)
    soundfile.write(tmp_path / "a.bin", np.stack([samples, samples], 1), 22_050, format=kind, subtype=subtype)
    found = read_audio(tmp_path / "a.bin")
    assert found.dtype == np.float32
    assert len(found) == SAMPLE_RATE // 2
    np.testing.assert_allclose(found[800:7200], tone(440, SAMPLE_RATE)[800:7200], atol=0.02 if kind == "OGG" else 2e-3)


def test_a_recording_written_into_a_pipe(tmp_path):
    """ffmpeg cannot know the length in advance, and says the largest number."""
    content = bytearray(wav(tmp_path / "a.wav", tone(440, SAMPLE_RATE)).read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(content)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), tone(440, SAMPLE_RATE), atol=1e-4)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_recordings_need_an_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"needs '{package}', which is not installed: pip install 'llama-adapter\[audio\]'"
    ):
        read_audio(wav(tmp_path / "a.wav", tone(440, SAMPLE_RATE)))


def test_recordings_that_cannot_be_read(tmp_path):
    whole = wav(tmp_path / "whole.wav", tone(440, SAMPLE_RATE)).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header.wav").write_bytes(whole[:30])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "words.wav").write_text("no sound")
    wav(tmp_path / "silent.wav", [])
    wav(tmp_path / "instant.wav", [0.5], 44_100)  # a third of a sample at 16 kHz
    wav(tmp_path / "long.wav", np.zeros(MAX_SECONDS + 1), rate=1, width=1)
    soundfile.write(tmp_path / "nan.wav", np.full(99, np.nan), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "wide.flac", np.zeros((MAX_SAMPLES // 8 + 1, 8), np.int16), 384_000)
    soundfile.write(tmp_path / "cut.flac", tone(440, SAMPLE_RATE), SAMPLE_RATE)
    content = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    for name, sentence in {
        "missing.wav": "does not exist: check the path",
        "cut.wav": f"is truncated: {len(whole) // 2} of {len(whole)} bytes. Copy it again.",
        "header.wav": "is truncated: ",
        "empty.wav": "cannot be read as a recording (Format not recognised): copy it again, or convert it with: ffmpeg",
        "words.wav": "cannot be read as a recording (Format not recognised)",
        "silent.wav": "holds no sample",
        "instant.wav": "holds no sample",
        "long.wav": f"is longer than {MAX_SECONDS} seconds: cut it into pieces.",
        "nan.wav": "holds samples that are no numbers",
        "wide.flac": f"has more than {MAX_SAMPLES} samples: convert it to mono at 16 kHz first.",
        "cut.flac": "cannot be read as a recording (",
    }.items():
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / name} {sentence}")):
            read_audio(tmp_path / name)
    with pytest.raises(DataError, match="is a folder: give the path of one recording"):
        read_audio(tmp_path)
