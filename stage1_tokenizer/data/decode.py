"""One image file -> pixels, the same whatever the file holds: upright, eight bits, on white, the first frame.

Pillow alone decodes (torchvision's decoder crashes the process on a damaged PNG), after a look at the header.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from stage1_tokenizer.data.pictures import Picture
from stage1_tokenizer.errors import BadFileError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
LARGEST = 64_000_000
"""Pixels. A file whose header promises more is refused before it is decoded: a few kB can unpack to gigabytes."""

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright."""

# Pillow's own limits are higher, and the first of them only a warning, which is not safe to silence among threads.
Image.MAX_IMAGE_PIXELS = None


def decode(path: Path, channels: int) -> Picture:
    """(h', w', channels) uint8: upright by its EXIF tag, the first frame, 16 bits scaled to 8, alpha laid over white.

    Raises:
        BadFileError: not an image of a known format, damaged, or too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                size = f"{image.width}x{image.height} pixels"
                raise BadFileError(f"{path}: {size} are more than the limit of {LARGEST:,}")
            turn = TURNS.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            pixels = np.asarray(_to_mode(upright, "L" if channels == 1 else "RGB"))
            return pixels.reshape(*pixels.shape[:2], channels)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise BadFileError(f"{path}: cannot be read as an image ({error})") from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (ValueError, TypeError, SyntaxError, struct.error):  # damaged EXIF data do not make a damaged picture
        return 1


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        grey = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert(mode)
