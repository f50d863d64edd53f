"""Images inside the page: data URIs of limited size with alternative text, and sprites (many patches in one image)."""

import base64
import io
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.data.image_batches import to_uint8
from stage1_tokenizer.diagnostics.report.markup import Markup, tag

LOSSLESS, GRID_LOSSLESS = 40_000, 150_000
"""Bytes up to which one image, and a grid of images, is stored as PNG; larger ones are stored as JPEG."""
BYTES_PER_PIXEL = 0.3
"""Bytes of a JPEG per pixel, at most. Photographs meet this at the first or second of the QUALITIES; noise does not at
any, and is scaled down."""
QUALITIES = (88, 75, 55, 35)
LARGEST_SIDE = 1600
"""Pixels of an image's longer side on the page, at most."""
LARGEST_AREA = 600_000
"""Pixels of an image on the page, at most."""
BRIGHTEST = 0.5
"""The absolute error that is drawn brightest, as a share of the range of values."""
PATCH_SIDE = 16
"""Pixels of a patch's side, at most."""
PATCHES_ACROSS = 32
"""Patches in a row of a sprite image."""
PATCHES_AREA = LARGEST_AREA // 2
"""Pixels of a sprite image, at most; it is always lossless."""
STOPS = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float64)
"""The colour map `inferno` (van der Walt and Smith) at six evenly spaced levels."""


def pixels(image: Tensor) -> ImageArray:
    """Convert an image (C, H, W) in [-1, 1] to (H, W, C) uint8."""
    array: ImageArray = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return array


def data_uri(array: ImageArray, lossless: int = LOSSLESS) -> str:
    """Encode an image (H, W, C) or (H, W) uint8, scaled down to fit a page, as a data URI.

    lossless: bytes up to which it is a PNG; otherwise it is a JPEG, if that is smaller.
    """
    image = Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    area = image.width * image.height
    image = _shrunk(image, min(1.0, LARGEST_SIDE / max(image.size), (LARGEST_AREA / area) ** 0.5))
    data, kind = _encoded(image, "PNG", optimize=True), "png"
    if len(data) > lossless:
        smaller = _small_jpeg(image)
        data, kind = (smaller, "jpeg") if len(smaller) < len(data) else (data, kind)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _small_jpeg(image: Image.Image) -> bytes:
    most = max(LOSSLESS / 2, BYTES_PER_PIXEL * image.width * image.height)
    while True:
        for quality in QUALITIES:
            data = _encoded(image, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
            if len(data) <= most:
                return data
        image = _shrunk(image, 0.7)


def _shrunk(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1.0:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def img(array: ImageArray, alt: str, scale: float = 1.0, class_: str | None = None, lossless: int = LOSSLESS) -> Markup:
    """Return an <img> of an image (H, W, C) uint8, shown at `scale` times its size where the page is wide enough."""
    height, width = array.shape[:2]
    sharpness = "sharp" if scale >= 1.0 else "smooth"
    return tag(
        "img",
        src=data_uri(array, lossless),
        alt=alt,
        width=max(1, round(width * scale)),
        height=max(1, round(height * scale)),
        class_=f"{sharpness} {class_}" if class_ else sharpness,
    )


def enlargement(side: int, wanted: int) -> float:
    """Return the factor that brings `side` pixels near to `wanted`: a whole number, or less than 1."""
    return wanted // side if side <= wanted else wanted / side


def grid(array: ImageArray, alt: str, wanted: int = 680) -> Markup:
    """Return an <img> of a grid of images (H, W, C) uint8, about `wanted` pixels wide and enlarged 4 times at most."""
    return img(array, alt, min(4.0, enlargement(array.shape[1], wanted)), lossless=GRID_LOSSLESS)


def fitted(images: Tensor, side: int) -> Tensor:
    """Scale images (N, C, H, W) down, by averaging, to at most `side` pixels a side."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1.0:
        return images
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return torch.nn.functional.interpolate(images, size=size, mode="area")


def tiled(images: Tensor, columns: int) -> ImageArray:
    """Join images (N, C, H, W) in [-1, 1] into one image without gaps, row by row; the rest of the last row is grey."""
    rows = -(-len(images) // columns)
    filler = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    whole = rearrange(torch.cat([images, filler]), "(r c) C H W -> C (r H) (c W)", c=columns)
    return pixels(whole)


def heat(error: Tensor) -> ImageArray:
    """Colour an error map (H, W) in 0..1 as (H, W, 3) uint8: black for 0, brightest from BRIGHTEST on."""
    stops = np.linspace(0.0, 1.0, len(STOPS))
    level: NDArray[np.float64] = (error / BRIGHTEST).clamp(0, 1).double().cpu().numpy()
    return np.stack([np.interp(level, stops, STOPS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)


class Sprites(NamedTuple):
    """Patches of codes in one image, which a CSS class has as its background."""

    name: str
    """The CSS class."""
    indices: dict[int, int]
    """The patch's number in the image, by code."""
    rows: int
    style: Markup
    """The <style> element that defines the class."""

    def position(self, code: int) -> str:
        """Return the CSS background-position that shows a code's patch."""
        row, column = divmod(self.indices[code], PATCHES_ACROSS)
        down = 100 * row / (self.rows - 1) if self.rows > 1 else 0
        return f"{100 * column / (PATCHES_ACROSS - 1):.4g}% {down:.5g}%"

    def patch(self, code: int, alt: str) -> Markup:
        """Return an element that shows a code's patch."""
        style = f"background-position:{self.position(code)}"
        return tag("span", role="img", aria_label=alt, class_=f"patch {self.name}", style=style)


def sprites_of(name: str, codes: list[int], patches: Tensor) -> Sprites:
    """Build the sprites of codes from their patches (n, C, f, g) in [-1, 1], for the first codes that fit in."""
    small = fitted(patches, PATCH_SIDE)
    room = PATCHES_AREA // (small.shape[2] * small.shape[3])
    codes, small = codes[:room], small[:room]
    rows = -(-len(codes) // PATCHES_ACROSS)
    ratio = f"{small.shape[3]} / {small.shape[2]}"
    uri = data_uri(tiled(small, PATCHES_ACROSS), lossless=sys.maxsize)
    style = Markup(
        f"<style>.{name}{{background-image:url({uri});"
        f"background-size:{100 * PATCHES_ACROSS}% {100 * rows}%;aspect-ratio:{ratio}}}</style>"
    )
    return Sprites(name, {code: index for index, code in enumerate(codes)}, rows, style)
