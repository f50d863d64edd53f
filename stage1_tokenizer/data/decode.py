"""One image file -> pixels, decoded by Pillow alone (torchvision crashes on a damaged PNG), after a look at the header."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stage1_tokenizer.data.pictures import Picture
from stage1_tokenizer.errors import BadFileError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
LARGEST = 64_000_000
"""Pixels. A file whose header promises more is refused before it is decoded: a few kB can unpack to gigabytes."""


def decode(path: Path, channels: int) -> Picture:
    """(h', w', channels) uint8: upright by its EXIF tag, the first frame, 16 bits scaled to 8, alpha laid over white.

    Raises:
        BadFileError: not an image of a known format, damaged, or too large.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the lower one
            if image.width * image.height > LARGEST:
                raise BadFileError(
                    f"{path}: {image.width}x{image.height} pixels are more than the limit of {LARGEST:,}"
                )
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_to_mode(upright, "L" if channels == 1 else "RGB")).reshape(
                upright.height, upright.width, channels
            )
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise BadFileError(f"{path}: cannot be read as an image ({error})") from None


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        grey = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert(mode)
