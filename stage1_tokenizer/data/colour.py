"""Conversion of an opened image file to plain sRGB or grey: eight bits, no colour profile, nothing transparent."""

import sys
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms

Background = Literal["checker"] | tuple[int, int, int]
MAX_PIXELS = 64_000_000
"""Greatest number of pixels of one file, unless an option allows more: a few kB can unpack to gigabytes."""
SQUARE = 8
"""Side of a square of the checkered background, in pixels of the file."""
BRIGHT, DARK = 255, 192
"""Grey levels of the squares of the checkered background."""
WHITE = (255, 255, 255)
DARK_BITS = 14
"""Files with 16 bits per pixel are reported if they use at most this many bits: they come out with a quarter of the
brightness or less."""


class FileWarnings:
    """Warnings about odd files that are read all the same: the first file of each kind is reported."""

    def __init__(self) -> None:
        self._reported_kinds = set[str]()

    def warn_once(self, kind: str, path: Path, text: str) -> None:
        """Print a warning about a file, unless a file of this kind was reported before."""
        if kind not in self._reported_kinds:
            self._reported_kinds.add(kind)
            name = str(path).encode(errors="backslashreplace").decode()
            print(f"warning: {name}: {text} (further files of this kind are not reported)", file=sys.stderr)


@dataclass(frozen=True)
class ReadingOptions:
    """The user's choices in how an image file becomes pixels."""

    background: Background = WHITE
    """Background under transparent pixels: a colour, or grey squares (`checker`)."""
    truncated: Literal["skip", "fill"] = "skip"
    """Treatment of a JPEG file that ends early: unreadable (`skip`), or its missing part is grey (`fill`)."""
    bits: int = 16
    """Bits that grey pixels of 16 bits use, 9..16."""
    max_pixels: int = MAX_PIXELS
    """Greatest number of pixels of a file."""
    warnings: FileWarnings = field(default_factory=FileWarnings, compare=False)


def convert_to_plain(image: Image.Image, mode: str, options: ReadingOptions, path: Path) -> Image.Image:
    """Convert a loaded image to `mode`, "L" or "RGB": 8 bits, sRGB, opaque.

    Raises:
        ValueError: the value of a white pixel is unknown, as in a file of floating-point numbers.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white
        image = Image.fromarray(_scale_16_bits(np.asarray(image), options, path))
    if image.mode == "F":
        raise ValueError("its pixels are floating point, and nothing says which value is white; store 8 or 16 bits")
    is_transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    profile = image.info.get("icc_profile")
    if is_transparent:
        image = image.convert("RGBA")
    if profile:
        image = _convert_to_srgb(image, profile, options, path)
    if is_transparent:
        image = _put_on_background(image, options, path)
    return image.convert(mode)


def _scale_16_bits(grey: NDArray[Any], options: ReadingOptions, path: Path) -> NDArray[np.uint8]:
    greatest = int(grey.max())
    if grey.min() < 0 or greatest >= 1 << 16:
        raise ValueError("its pixels are integers beyond 16 bits, and nothing says which is white; store 8 or 16 bits")
    white = (1 << options.bits) - 1
    if greatest > white:
        raise ValueError(f"its pixels are up to {greatest:,}, more than the {white:,} of data.bits {options.bits}")
    if options.bits == 16 and 0 < greatest < 1 << DARK_BITS:
        bits = max(9, greatest.bit_length())
        brightness = "nearly black" if bits < 13 else "dark"
        text = f"its pixels of 16 bits are at most {greatest:,}, so it comes out {brightness}"
        options.warnings.warn_once("bits", path, f"{text}; if white is {(1 << bits) - 1:,}, give --data.bits {bits}")
    return _table_to_8_bits(options.bits)[grey]


@lru_cache(maxsize=8)
def _table_to_8_bits(bits: int) -> NDArray[np.uint8]:
    white = (1 << bits) - 1
    return ((np.arange(1 << bits) * 510 + white) // (2 * white)).astype(np.uint8)  # rounded


def _convert_to_srgb(image: Image.Image, profile: bytes, options: ReadingOptions, path: Path) -> Image.Image:
    """Convert the colours by the file's own profile. Report a profile that cannot be used, and ignore it."""
    if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    try:
        transform = _srgb_transform(profile, image.mode)
        converted = None if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        text = f"its colour profile cannot be used ({error}), so its colours are as stored"
        options.warnings.warn_once("profile", path, text)
        return image
    return image if converted is None else converted


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile to sRGB; None for the profile of sRGB itself, where no pixel changes."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    if (ImageCms.getProfileDescription(source) or "").startswith(("sRGB IEC61966", "sRGB built-in")):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB")


def _put_on_background(image: Image.Image, options: ReadingOptions, path: Path) -> Image.Image:
    """Put an RGBA image on the background, and report an image that cannot be seen there."""
    if options.background == "checker":
        rows, columns = np.ogrid[: image.height, : image.width]
        is_odd = (rows // SQUARE + columns // SQUARE) % 2
        background = Image.fromarray(np.where(is_odd, DARK, BRIGHT).astype(np.uint8)).convert("RGBA")
    else:
        background = Image.new("RGBA", image.size, (*options.background, 255))
    composite = Image.alpha_composite(background, image)
    if ImageChops.difference(composite.convert("RGB"), background.convert("RGB")).getbbox() is None:
        options.warnings.warn_once(
            "invisible",
            path,
            "is transparent, and nothing of it can be seen over the background; --data.background takes white, black, "
            "checker or R,G,B",
        )
    return composite
