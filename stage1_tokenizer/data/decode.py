"""One image file -> pixels, the same whatever the file holds: upright, eight bits, on white, the first frame.

Pillow alone decodes (torchvision's decoder crashes the process on a damaged PNG), after a look at the header. Its own
limits stay on beneath ours: on frames larger than their header says, and on compressed text and colour profiles.
"""

import errno
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from stage1_tokenizer.data.bad_files import PictureError
from stage1_tokenizer.data.pictures import Picture
from stage1_tokenizer.errors import StorageError, UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
LARGEST = 64_000_000
"""Pixels. A file whose header promises more is refused before it is decoded: a few kB can unpack to gigabytes."""
LARGEST_FILE = 10 * LARGEST
"""Bytes: eight for a pixel of four channels and 16 bits, and room for the rest. Some decoders read a file whole."""
OF_THE_FILE = frozenset(
    {
        None,  # Pillow's own, of bad data
        errno.EINVAL,  # bad data may have a decoder seek anywhere
        errno.EOVERFLOW,
        errno.ENOENT,
        errno.ELOOP,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.EACCES,
        errno.EPERM,
        errno.ENXIO,
    }
)
"""What the system says of a file that cannot be read. All else is the machine's: a disk, a network, its memory."""

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
BITS_16_TO_8 = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
"""0..65535 -> 0..255, rounded."""

# Above it Pillow warns and above twice it refuses, before our own check; the warning would say less than that check.
# Ignored once and for all, since the filters of `catch_warnings` are not safe among threads.
Image.MAX_IMAGE_PIXELS = LARGEST
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(path: Path, channels: int) -> Picture:
    """(h', w', channels) uint8: upright by its EXIF tag, the first frame, 16 bits scaled to 8, alpha laid over white.

    Raises:
        PictureError: not an image of a known format, damaged, too large, or of numbers without a known white.
        StorageError: the disk or the network it lies on fails, twice; too many files are open; the memory is spent.
    """
    try:
        return _decode(path, channels)
    except OSError:  # of the machine: a network may have been away for a moment
        pass
    try:
        return _decode(path, channels)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror}), which is a fault of the machine and not of the picture"
        ) from None


def _decode(path: Path, channels: int) -> Picture:
    """Raises OSError too, where the machine is at fault."""
    try:
        # Opened here: of a path Pillow maps some formats into memory, and a file cut off meanwhile ends the process.
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise PictureError(path, "is not a regular file")
            if size == 0:
                raise PictureError(path, "the file is empty")
            if size > LARGEST_FILE:
                raise PictureError(path, f"{size:,} bytes are more than the limit of {LARGEST_FILE:,}")
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > LARGEST:
                shape = f"{image.width}x{image.height} pixels"
                raise PictureError(path, f"{shape} are more than the limit of {LARGEST:,}")
            if image.format == "PNG":  # whose pixels' checksums Pillow skips when it decodes
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=FORMATS)  # what is verified cannot be decoded any more
            image.load()  # so that what fails after this is not the pixels
            turn = TURNS.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            pixels = np.asarray(_to_mode(upright, "L" if channels == 1 else "RGB"))
            return pixels.reshape(*pixels.shape[:2], channels)
    except UserError:  # ours, or a signal's
        raise
    except MemoryError:  # what a header can promise is bounded, so this is not of the file
        raise StorageError(f"{path}: cannot be decoded, since the machine's memory is spent") from None
    except OSError as error:
        if error.errno in OF_THE_FILE:
            raise PictureError(path, _reason(error)) from None
        raise
    except Exception as error:  # a decoder that stumbles over a bad file may raise anything
        raise PictureError(path, _reason(error)) from None


def _without_waiting(name: str, flags: int) -> int:
    """Opens a file; a pipe too, without waiting for somebody to write into it."""
    not_blocking: int = getattr(os, "O_NONBLOCK", 0)  # Windows has no such pipes
    return os.open(name, flags | not_blocking)


def _reason(error: Exception) -> str:
    match error:
        case UnidentifiedImageError():
            return f"cannot be read as an image (none of {', '.join(FORMATS)})"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"its header, or that of a frame, promises more pixels than the limit of {LARGEST:,}"
        case OSError(strerror=str(text)):
            return f"cannot be read ({text})"
        case ValueError() | OSError():
            return f"cannot be read as an image ({error})"
        case _:
            return f"cannot be read as an image ({type(error).__name__}: {error})"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except UserError:
        raise
    except Exception:  # damaged EXIF data do not make a damaged picture
        return 1


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        image = Image.fromarray(_from_16_bits(np.asarray(image)))
    if image.mode == "F":
        raise ValueError("its pixels are floating point, and nothing says which value is white; store 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert(mode)


def _from_16_bits(grey: NDArray[Any]) -> Picture:
    if grey.min() < 0 or grey.max() >= len(BITS_16_TO_8):
        raise ValueError("its pixels are integers beyond 16 bits, and nothing says which is white; store 8 or 16 bits")
    return BITS_16_TO_8[grey]
