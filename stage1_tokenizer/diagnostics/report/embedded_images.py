"""Images within the page: as data URIs, no larger than a page needs, and with words for those who do not see them; and
many small patches in one image, of which each element shows its own."""

import base64
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stage1_tokenizer.data.image_batches import ImageArray, to_uint8
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.diagnostics.report.markup import Markup, tag

LOSSLESS, GRID = 40_000, 150_000
"""Bytes up to which a picture, or a grid of them, stays lossless."""
PER_PIXEL = 0.3
"""Bytes: others are JPEG, in the best of these qualities that needs no more, or else smaller. Photographs come to this
in the first one or two; noise would make a page of any size."""
QUALITIES = (88, 75, 55, 35)
LARGEST_SIDE = 1600
LARGEST_AREA = 600_000
"""Pixels of a picture on the page."""
BRIGHTEST = 0.5
"""The absolute error, as a share of the whole range of values, that is drawn brightest."""
PATCH_SIDE = 16
"""Pixels of a patch, at most."""
PATCHES_ACROSS = 32
PATCHES_AREA = LARGEST_AREA // 2
"""Pixels of all patches of a kind, which are lossless."""


def pixels(image: Tensor) -> ImageArray:
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8."""
    picture: ImageArray = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return picture


def data_uri(picture: ImageArray, lossless: int = LOSSLESS) -> str:
    """A picture (H, W, C) or (H, W) uint8 of any size, scaled down where it is too large for a page, and lossless
    where it is then of no more than so many bytes."""
    image = Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)
    area = image.width * image.height
    image = _shrunk(image, min(1.0, LARGEST_SIDE / max(image.size), (LARGEST_AREA / area) ** 0.5))
    data, kind = _encoded(image, "PNG", optimize=True), "png"
    if len(data) > lossless:
        smaller = _small_jpeg(image)
        data, kind = (smaller, "jpeg") if len(smaller) < len(data) else (data, kind)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _small_jpeg(image: Image.Image) -> bytes:
    most = max(LOSSLESS / 2, PER_PIXEL * image.width * image.height)
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


def img(
    picture: ImageArray, alt: str, scale: float = 1.0, class_: str | None = None, lossless: int = LOSSLESS
) -> Markup:
    """A picture as an element, `scale` times its size where the page is wide enough."""
    height, width = picture.shape[:2]
    sharp = "sharp" if scale >= 1.0 else "smooth"
    return tag(
        "img",
        src=data_uri(picture, lossless),
        alt=alt,
        width=max(1, round(width * scale)),
        height=max(1, round(height * scale)),
        class_=f"{sharp} {class_}" if class_ else sharp,
    )


def enlargement(side: int, wanted: int) -> float:
    """How many times a picture of `side` pixels is enlarged to come near to `wanted`: a whole number where it is."""
    return wanted // side if side <= wanted else wanted / side


def read(path: Path) -> ImageArray:
    """A picture file, (H, W, 3).

    Raises:
        UserError: it is no picture, or one that is too large to decode.
    """
    return read_image(path, 3)


def grid(picture: ImageArray, alt: str, wanted: int = 680) -> Markup:
    """A grid of pictures as an element of about `wanted` pixels, but not enlarged beyond recognition."""
    return img(picture, alt, min(4.0, enlargement(picture.shape[1], wanted)), lossless=GRID)


def fitted(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W), scaled down by averaging where they are larger than `side`."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1.0:
        return images
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return torch.nn.functional.interpolate(images, size=size, mode="area")


def sheet(images: Tensor, columns: int) -> ImageArray:
    """Images (N, C, H, W) in [-1, 1] as one picture without gaps, row by row; what is left over is grey."""
    rows = -(-len(images) // columns)
    filler = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    whole = rearrange(torch.cat([images, filler]), "(r c) C H W -> C (r H) (c W)", c=columns)
    return pixels(whole)


STOPS = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float64)
"""The colour map `inferno` (van der Walt and Smith), at six places."""


def heat(error: Tensor) -> ImageArray:
    """(H, W) in 0..1 -> (H, W, 3): black for 0, bright for BRIGHTEST, ever lighter between."""
    places = np.linspace(0.0, 1.0, len(STOPS))
    level: NDArray[np.float64] = (error / BRIGHTEST).clamp(0, 1).double().cpu().numpy()
    return np.stack([np.interp(level, places, STOPS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)


class Sprites(NamedTuple):
    """Patches of some codes."""

    name: str
    """The class of the elements."""
    places: dict[int, int]
    """Of each code that is there."""
    rows: int
    style: Markup

    def position(self, code: int) -> str:
        """As CSS has it, in per cent of what the picture is larger than the element."""
        row, column = divmod(self.places[code], PATCHES_ACROSS)
        down = 100 * row / (self.rows - 1) if self.rows > 1 else 0
        return f"{100 * column / (PATCHES_ACROSS - 1):.4g}% {down:.5g}%"

    def patch(self, code: int, alt: str) -> Markup:
        """An element that shows a code's patch."""
        place = f"background-position:{self.position(code)}"
        return tag("span", role="img", aria_label=alt, class_=f"patch {self.name}", style=place)


def sprites_of(name: str, codes: list[int], patches: Tensor) -> Sprites:
    """codes and their patches (n, C, f, g) in [-1, 1], as many as there is room for."""
    small = fitted(patches, PATCH_SIDE)
    room = PATCHES_AREA // (small.shape[2] * small.shape[3])
    codes, small = codes[:room], small[:room]
    rows = -(-len(codes) // PATCHES_ACROSS)
    picture = sheet(small, PATCHES_ACROSS)
    ratio = f"{small.shape[3]} / {small.shape[2]}"
    style = Markup(
        f"<style>.{name}{{background-image:url({data_uri(picture, lossless=sys.maxsize)});"
        f"background-size:{100 * PATCHES_ACROSS}% {100 * rows}%;aspect-ratio:{ratio}}}</style>"
    )
    return Sprites(name, {code: place for place, code in enumerate(codes)}, rows, style)
