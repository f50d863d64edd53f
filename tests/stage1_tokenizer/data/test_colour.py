"""Colour profiles, backgrounds, bits, files that end early, and large JPEGs decoded at a part of their size."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.colour import ReadingOptions
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import resize, target_size
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.engine.errors import BadFileError, ConfigError


def swapped_profile() -> bytes:
    """sRGB with its red and green primaries exchanged: the conversion to sRGB exchanges the channels."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = data[green : green + 4], data[red : red + 4]
    return bytes(data.replace(b"\0s\0R\0G\0B", b"\0o\0t\0h\0r"))


def test_a_colour_profile_is_obeyed(tmp_path: Path) -> None:
    """With another profile the numbers change and the colours stay; with sRGB's own, or none, the numbers stay."""
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    for name, profile in [("none", None), ("srgb", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())]:
        red.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert read_image(tmp_path / f"{name}.png", 3)[0, 0].tolist() == [200, 30, 30]
    for mode in ("RGB", "RGBA"):
        red.convert(mode).save(tmp_path / "swapped.png", icc_profile=swapped_profile())
        seen = read_image(tmp_path / "swapped.png", 3)[0, 0].astype(int)
        assert abs(seen - [30, 200, 30]).max() <= 3, seen


def test_a_damaged_profile_costs_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The colours are as stored, and it is said once."""
    how = ReadingOptions()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / f"{name}.png", icc_profile=b"no profile" * 30)
        assert read_image(tmp_path / f"{name}.png", 3, how)[0, 0].tolist() == [200, 30, 30]
    assert capsys.readouterr().err.count("colour profile cannot be used") == 1


@pytest.mark.parametrize(
    ("given", "seen"), [("white", [255] * 3), ("black", [0] * 3), ("10, 20,30", [10, 20, 30]), ("checker", [255] * 3)]
)
def test_transparent_pixels_show_the_background(tmp_path: Path, given: str, seen: list[int]) -> None:
    """White on transparent is seen on any other background than white."""
    pixels = np.full((20, 20, 4), 255, np.uint8)
    pixels[:, :10, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "x.png")
    config = FolderConfig.from_tree({"root": str(tmp_path), "background": given, "validation_share": 0})
    image = read_image(tmp_path / "x.png", 3, config.reading_options)
    assert image[0, 0].tolist() == seen
    assert image[0, 15].tolist() == [255] * 3
    assert (len(np.unique(image[:, :10, 0])) > 1) == (given == "checker")


def test_a_background_is_a_colour() -> None:
    """The message names the forms."""
    for given in ("green", "1,2", "1,2,256", "1,2,x", ""):
        with pytest.raises(ConfigError, match="white, black, checker, or R,G,B"):
            FolderConfig.from_tree({"root": "x", "background": given})


def test_what_cannot_be_seen_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """White on transparent, and alpha 0 everywhere, come out plain white: a warning with the way out."""
    pixels = np.full((9, 9, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "white.png")
    Image.new("RGBA", (9, 9), (200, 0, 0, 0)).save(tmp_path / "alpha0.png")
    Image.new("RGBA", (9, 9), (200, 0, 0, 9)).save(tmp_path / "fine.png")
    for name, is_said in [("white", True), ("alpha0", True), ("fine", False)]:
        read_image(tmp_path / f"{name}.png", 3, ReadingOptions())
        assert ("--data.background" in capsys.readouterr().err) == is_said
    read_image(tmp_path / "white.png", 3, ReadingOptions((0, 0, 0)))
    assert not capsys.readouterr().err


def test_few_bits_are_said_and_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 bits in 16 come out nearly black: the warning names the option, with which they fill the range."""
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "x.png")
    dark = read_image(tmp_path / "x.png", 1, ReadingOptions())
    said = capsys.readouterr().err
    bits = int(re.search(r"--data\.bits (\d+)", said).group(1))  # type: ignore[union-attr]
    assert (dark.max(), bits, "nearly black" in said) == (16, 12, True)
    scaled = read_image(tmp_path / "x.png", 1, ReadingOptions(bits=bits))[..., 0]
    assert abs(scaled / 255.0 - levels / 4095.0).max() <= 0.5 / 255 + 1e-9
    assert not capsys.readouterr().err
    with pytest.raises(BadImageError, match=r"4,095, more than the 1,023 of data\.bits 10"):
        read_image(tmp_path / "x.png", 1, ReadingOptions(bits=10))


def test_a_truncated_jpeg_is_skipped_or_filled(tmp_path: Path) -> None:
    """With `fill` the rows that are there are those of the whole file, and the rest is grey."""
    scene = smooth(96, 128)
    scene.save(tmp_path / "whole.jpg", quality=90)
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BadImageError):
        read_image(tmp_path / "cut.jpg", 3)
    whole, filled = (
        read_image(tmp_path / "whole.jpg", 3),
        read_image(tmp_path / "cut.jpg", 3, ReadingOptions(truncated="fill")),
    )
    assert np.array_equal(whole[:40], filled[:40])
    assert filled[-8:].std() < 1
    (tmp_path / "cut.jpg").write_bytes(data[:200])
    with pytest.raises(BadImageError):
        read_image(tmp_path / "cut.jpg", 3, ReadingOptions(truncated="fill"))


def test_the_limit_of_pixels_can_be_raised(tmp_path: Path) -> None:
    """It names the option; one that is lower refuses more."""
    Image.new("L", (50, 40)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 1, ReadingOptions(max_pixels=2000)).shape == (40, 50, 1)
    with pytest.raises(BadImageError, match=r"50x40 pixels.*limit of 1,999; --data\.largest_pixels"):
        read_image(tmp_path / "x.png", 1, ReadingOptions(max_pixels=1999))


def smooth(height: int, width: int) -> Image.Image:
    """An image with the spectrum of a photograph (1/f)."""
    rng, planes = np.random.default_rng(0), []
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / np.maximum(frequency, 1 / max(height, width))
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(128 + 50 * (plane - plane.mean()) / plane.std())
    return Image.fromarray(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "short"), [((24, 24), None), ((24, 40), None), ((24, 24), 31), ((64, 64), None)])
def test_a_large_jpeg_is_the_same_at_a_part_of_its_size(
    tmp_path: Path, orientation: int, size: tuple[int, int], short: int | None
) -> None:
    """However a camera was held, the pixels differ by 1.5 levels on average and by ten at most."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(403, 601).save(tmp_path / "x.jpg", exif=exif, quality=92)
    whole = resize(read_image(tmp_path / "x.jpg", 3), size, short).astype(int)
    reduced = read_image(
        tmp_path / "x.jpg", 3, target_size=lambda height, width: target_size(height, width, size, short)
    )
    assert reduced.shape == whole.shape
    assert np.array_equal(resize(reduced, size, short), reduced)
    assert abs(reduced - whole).mean() <= 1.5
    assert abs(reduced - whole).max() <= 10


def test_bad_files_count_over_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bad file of a hundred is 1 %, wherever it falls; above the share every bad file is listed, of both splits."""
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    for i in range(100):
        (tmp_path / f"{i}.png").write_bytes(good.getvalue())
    names = {
        split: [item.name for item in opened(tmp_path).splits[split]._items]  # type: ignore[attr-defined]
        for split in ("train", "validation")
    }
    bad_list = tmp_path / "run" / "bad.txt"
    for split, cache in (("validation", "memory"), ("train", "none")):
        (tmp_path / names[split][0]).write_bytes(b"bad")
        data = opened(tmp_path, cache=cache)
        for each in ("train", "validation"):
            data.image_batches(each, 0).batch(np.arange(len(data.splits[each])))
        (tmp_path / names[split][0]).write_bytes(good.getvalue())
    bad = [*names["train"][:7], *names["validation"][:3]]
    for name in bad:
        (tmp_path / name).write_bytes(b"bad")
    for cache in ("memory", "none"):
        bad_list.unlink(missing_ok=True)
        with pytest.raises(BadFileError, match="10 of 100 images cannot be read"):
            opened(tmp_path, cache=cache).image_batches("train", 0, bad_list=bad_list).batch(np.arange(20))
        assert {Path(line.split("\t")[0]).name for line in bad_list.read_text().splitlines()} == set(bad)


def opened(root: Path, **options: str) -> OpenData:
    return OpenData(FolderConfig.from_tree({"root": str(root), "image_size": 8, **options}))
