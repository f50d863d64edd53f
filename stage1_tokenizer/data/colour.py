"""The pixels of a decoded file as plain sRGB or grey: eight bits, no profile, nothing transparent."""

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
LARGEST = 64_000_000
"""Pixels of one file, unless an option allows more: a few kB can unpack to gigabytes."""
SQUARE = 8
"""Side of a square of the checkered background, in pixels of the file."""
BRIGHT, DARK = 255, 192
"""The grey levels of its squares."""
WHITE = (255, 255, 255)
SEEN_BITS = 14
"""Pixels of 16 bits that use no more than this many are reported: they come out with a quarter of the brightness."""
FROM_16_BITS = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
"""0..65535 -> 0..255, rounded."""


class Remarks:
    """What is odd about files that are read all the same: the first file of each kind is reported."""

    def __init__(self) -> None:
        self._made = set[str]()

    def add(self, kind: str, path: Path, text: str) -> None:
        """Warn of a file, unless one of this kind was reported already."""
        if kind not in self._made:
            self._made.add(kind)
            name = str(path).encode(errors="backslashreplace").decode()
            print(f"warning: {name}: {text} (further files of this kind are not reported)", file=sys.stderr)


@dataclass(frozen=True)
class Decoding:
    """How files become pixels, where that is a choice."""

    background: Background = WHITE
    """What transparent pixels lie over: a colour, or a checkered grey."""
    truncated: Literal["skip", "fill"] = "skip"
    """A JPEG file that ends early is unreadable, or its missing part is grey."""
    bits: int = 16
    """Bits that pixels of 16 bits use, 9..16."""
    largest: int = LARGEST
    """Pixels of a file that are decoded at most."""
    remarks: Remarks = field(default_factory=Remarks, compare=False)


def to_plain(image: Image.Image, mode: str, how: Decoding, path: Path) -> Image.Image:
    """Convert a decoded image to `mode`, "L" or "RGB".

    Raises:
        ValueError: nothing says which value of its pixels is white.
    """
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        image = Image.fromarray(_from_16_bits(np.asarray(image), how, path))
    if image.mode == "F":
        raise ValueError("its pixels are floating point, and nothing says which value is white; store 8 or 16 bits")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    profile = image.info.get("icc_profile")
    if transparent:
        image = image.convert("RGBA")
    if profile:
        image = _to_srgb(image, profile, how, path)
    if transparent:
        image = _over_background(image, how, path)
    return image.convert(mode)


def _from_16_bits(grey: NDArray[Any], how: Decoding, path: Path) -> NDArray[np.uint8]:
    greatest = int(grey.max())
    if grey.min() < 0 or greatest >= 1 << 16:
        raise ValueError("its pixels are integers beyond 16 bits, and nothing says which is white; store 8 or 16 bits")
    if how.bits == 16:
        used = greatest.bit_length()
        if 0 < used <= SEEN_BITS:
            bits, shown = max(9, used), "nearly black" if used < 13 else "dark"
            text = f"its pixels of 16 bits are at most {greatest:,}, so it comes out {shown}"
            how.remarks.add("bits", path, f"{text}; if white is {(1 << bits) - 1:,}, give --data.bits {bits}")
        return FROM_16_BITS[grey]
    white = (1 << how.bits) - 1
    if greatest > white:
        raise ValueError(f"its pixels are up to {greatest:,}, more than the {white:,} of data.bits {how.bits}")
    table = ((np.arange(1 << how.bits) * 510 + white) // (2 * white)).astype(np.uint8)  # rounded
    return table[grey]


def _to_srgb(image: Image.Image, profile: bytes, how: Decoding, path: Path) -> Image.Image:
    """Convert the colours by the file's own profile. One that cannot be used is reported and left out of account."""
    if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    try:
        transform = _transform(profile, image.mode)
        converted = None if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        how.remarks.add("profile", path, f"its colour profile cannot be used ({error}), so its colours are as stored")
        return image
    return image if converted is None else converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None where the profile is sRGB itself, whose pixels stay as they are."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    if (ImageCms.getProfileDescription(source) or "").startswith(("sRGB IEC61966", "sRGB built-in")):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB")


def _over_background(image: Image.Image, how: Decoding, path: Path) -> Image.Image:
    """Lay an RGBA image over the background. Where nothing of it can be seen then, this is reported."""
    if how.background == "checker":
        rows, columns = np.ogrid[: image.height, : image.width]
        odd = (rows // SQUARE + columns // SQUARE) % 2
        under = Image.fromarray(np.where(odd, DARK, BRIGHT).astype(np.uint8)).convert("RGBA")
    else:
        under = Image.new("RGBA", image.size, (*how.background, 255))
    laid = Image.alpha_composite(under, image)
    if ImageChops.difference(laid.convert("RGB"), under.convert("RGB")).getbbox() is None:
        how.remarks.add(
            "invisible",
            path,
            "is transparent, and nothing of it can be seen over the background; --data.background takes white, black, "
            "checker or R,G,B",
        )
    return laid
