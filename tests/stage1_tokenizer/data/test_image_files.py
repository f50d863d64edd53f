"""Pixels of image files of all kinds, and the refusal of damaged or too large files."""

import io
import runpy
import struct
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageFile

from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.data.colour import MAX_PIXELS
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.engine.errors import BadFileError


def reread(image: Image.Image, path: Path, channels: int = 3, **options: Any) -> ImageArray:
    image.save(path, **options)
    return read_image(path, channels)


def test_an_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    """All eight ways in which a camera may be held give the same upright image."""
    upright = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    # How the camera stores what is to be turned by orientation 1, 2, ... 8 (EXIF 2.32, 4.6.4 A).
    turns = [lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud]
    turns += [lambda x: x.transpose(1, 0, 2), lambda x: np.rot90(x, 1), lambda x: np.rot90(x, 2).transpose(1, 0, 2)]
    turns += [lambda x: np.rot90(x, -1)]
    for orientation, turn in enumerate(turns, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(turn(upright)))
        assert np.array_equal(reread(stored, tmp_path / "x.png", exif=exif), upright), orientation


def test_a_wrong_exif_tag_costs_no_image(tmp_path: Path) -> None:
    """Cameras write text where the norm wants a number, and the pixels are none the worse for it."""
    page = struct.pack(">HHII", 0x0129, 2, 6, 38)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + page + b"\0\0\0\0hello\0"
    assert reread(Image.new("RGB", (9, 4)), tmp_path / "x.jpg", exif=exif).shape == (9, 4, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    """Pillow's own conversion clips all but the darkest 1/256 to white."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for channels in (1, 3):
        seen = reread(Image.fromarray(levels), tmp_path / f"x.{suffix}", channels)
        assert seen.shape == (256, 256, channels)
        assert abs(seen / 255.0 - levels[..., None] / 65535.0).max() <= 0.5 / 255 + 1e-9


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    """Colours under full transparency are arbitrary, and would appear if alpha were dropped; half shows half of it."""
    colour, alpha = np.full((2, 3, 3), (200, 0, 40), dtype=np.uint8), np.array([[0, 255, 51]] * 2, dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    expected = [[255, 255, 255], [200, 0, 40], [244, 204, 212]]
    for suffix, options in [("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {})]:
        assert abs(reread(rgba, tmp_path / f"x.{suffix}", **options)[0].astype(int) - expected).max() <= 1
    grey = reread(Image.merge("LA", [Image.new("L", (3, 2), 100), rgba.getchannel("A")]), tmp_path / "la.png", 1)
    assert grey[0, :, 0].tolist() == [255, 100, 224]
    palette = Image.fromarray(np.array([[0, 1, 2]] * 2, dtype=np.uint8), mode="P")
    palette.putpalette([200, 0, 40] * 3)
    for suffix, transparent in [("png", 1), ("gif", 1), ("png", bytes([255, 0, 51]))]:
        seen = reread(palette, tmp_path / f"p.{suffix}", transparency=transparent)
        assert seen[0, :2].tolist() == [[200, 0, 40], [255, 255, 255]]
        assert (
            abs(seen[0, 2].astype(int) - ([244, 204, 212] if isinstance(transparent, bytes) else [200, 0, 40])).max()
            <= 1
        )
    assert (reread(Image.new("RGB", (2, 2), (9, 8, 7)), tmp_path / "k.png", transparency=(9, 8, 7)) == 255).all()


def test_every_mode_becomes_the_channels_asked_for(tmp_path: Path) -> None:
    """CMYK, one bit, palettes, and animations (the first frame) are images like any other."""
    red, white = np.array([255, 0, 0]), 255
    cases: list[tuple[Image.Image, str, dict[str, Any], Any]] = [
        (Image.new("CMYK", (8, 4), (0, 255, 255, 0)), "jpg", {}, red),
        (Image.new("CMYK", (8, 4), (0, 255, 255, 0)), "tif", {}, red),
        (Image.new("1", (8, 4), 1), "png", {}, white),
        (Image.new("L", (8, 4), 77), "bmp", {}, 77),
        (Image.new("RGB", (8, 4), "red").convert("P"), "png", {}, red),
    ]
    for suffix in ("gif", "webp", "png", "tif"):
        more = {"save_all": True, "append_images": [Image.new("RGB", (8, 4), "blue")]}
        cases.append((Image.new("RGB", (8, 4), "red"), suffix, more, red))
    for image, suffix, options, expected in cases:
        seen = reread(image, tmp_path / f"x.{suffix}", **options)
        assert (seen.shape, seen.dtype.name) == ((4, 8, 3), "uint8")
        assert abs(seen.astype(int) - expected).max() <= 1, (suffix, seen[0, 0])
        grey = read_image(tmp_path / f"x.{suffix}", 1)
        assert grey.shape == (4, 8, 1)
        assert abs(grey.astype(int) - (76 if expected is red else expected)).max() <= 1


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its kilobyte of pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kilobyte may unpack to gigabytes, so the promised size is judged before any pixel is decoded."""

    def load(_: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    bomb = tmp_path / "bomb.png"
    for width, height in [(60000, 60000), (MAX_PIXELS // 8000 + 1, 8000), (1, 2_000_000_000)]:
        bomb.write_bytes(png_claiming(width, height))
        with pytest.raises(BadFileError, match=r"bomb\.png.*(limit|large)"):
            read_image(bomb, 3)


def test_an_import_leaves_pillow_as_it_is() -> None:
    """A program that only imports us keeps its own limit and warnings."""
    program = """
    import warnings
    from PIL import Image
    before = Image.MAX_IMAGE_PIXELS
    import stage1_tokenizer.data
    assert Image.MAX_IMAGE_PIXELS == before
    assert not [each for each in warnings.filters if each[2] is Image.DecompressionBombWarning]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.parametrize("action", ["error", "always"])
def test_a_large_image_is_refused_without_a_warning(
    tmp_path: Path, action: Literal["error", "always"], capfd: pytest.CaptureFixture[str]
) -> None:
    """Between our limit and Pillow's there is one message, ours, also where warnings are errors."""
    (tmp_path / "large.png").write_bytes(png_claiming(12_500, 8_000))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        fresh = runpy.run_path(read_image.__code__.co_filename)[
            "read_image"
        ]  # its filter comes before ours, as in a command
        with pytest.raises(BadFileError, match=r"large\.png: 12500x8000 pixels .* limit of 64,000,000"):
            fresh(tmp_path / "large.png", 3)
        warnings.simplefilter("error")
        with pytest.raises(BadFileError, match=r"large\.png: .* limit of 64,000,000"):
            read_image(tmp_path / "large.png", 3)
    assert capfd.readouterr().err == ""


def stored(format: str, **options: Any) -> bytes:
    """A small image of noise as a file of that format."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format, **options)
    return file.getvalue()


PNG, JPEG = stored("PNG"), stored("JPEG")
DAMAGED = {
    "empty": b"",
    "text": b"not an image",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "truncated PNG": PNG[: len(PNG) // 2],
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "flipped bit": PNG[:600] + bytes([PNG[600] ^ 1]) + PNG[601:],
    "header alone": PNG[:33],
    "format that runs an interpreter": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "format without a signature": stored("TGA"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """One bad file among thousands is found by its path; torchvision's decoder ends the process at a flipped bit."""
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(BadFileError) as caught:
        read_image(tmp_path / "bad.png", 3)
    assert str(tmp_path / "bad.png") in str(caught.value)


def test_what_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    """Folders and links to nowhere may have an image's name."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for path in tmp_path.iterdir():
        with pytest.raises(BadFileError, match=path.name):
            read_image(path, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the damage
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_damage_never_ends_in_another_error(tmp_path: Path, format: str) -> None:
    """Whatever bytes are changed, lost or added, the outcome is an image or the one error that callers expect."""
    rng, whole = np.random.default_rng(1), stored(format)
    outcomes = set()
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, min(len(content), rng.choice([60, 10_000])), size=3):
            content[place : place + rng.integers(0, 3)] = rng.bytes(int(rng.integers(0, 3)))
        (tmp_path / "x").write_bytes(content)
        try:
            image = read_image(tmp_path / "x", 3)
            outcomes.add("image")
            assert (image.ndim, image.shape[2], image.dtype.name) == (3, 3, "uint8")
        except BadFileError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_threads_leave_the_warnings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is filled by many threads, of which the last to end restored what another had set."""
    (tmp_path / "x.png").write_bytes(PNG)
    names = ("first", "second")
    inside, go = ({name: threading.Event() for name in names} for _ in range(2))
    convert = Image.Image.convert

    def wait_and_convert(image: Image.Image, mode: str) -> Image.Image:
        inside[threading.current_thread().name].set()
        go[threading.current_thread().name].wait(timeout=10)
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", wait_and_convert)
    before = list(warnings.filters)
    threads = {name: threading.Thread(target=read_image, args=(tmp_path / "x.png", 1), name=name) for name in names}
    for name in names:  # the second enters while the first is inside, and leaves after it
        threads[name].start()
        assert inside[name].wait(timeout=10)
    for name in names:
        go[name].set()
        threads[name].join()
    assert list(warnings.filters) == before
