"""Read one image file as pixels, the same whatever it holds: upright, 8 bits, sRGB, opaque, the first frame.

All that the installed Pillow decodes is read, and is known by its content. With the extra `heic` (pillow-heif) these
include the HEIC files of telephones. Pillow alone decodes (torchvision's decoder crashes the process on a damaged PNG),
after a look at the header. Pillow's own limits stay on beneath ours: on frames larger than their header says, and on
compressed text and colour profiles.
"""

import errno
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.colour import LARGEST, Decoding, to_plain
from stage1_tokenizer.data.image_batches import ImageArray
from stage1_tokenizer.engine.errors import StorageError, UserError

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()

NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow names but does not decode itself: EPS would start another program, the others have no decoder."""
SIGNED = tuple(sorted(name for name, (_, accept) in Image.OPEN.items() if accept and name not in NOT_READ))
"""Formats that a file's first bytes tell. Any file may be one of these, whatever its name is."""
BY_EXTENSION = {
    ending: name
    for ending, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NOT_READ
}
"""The format that each extension promises. Formats without a signature (TGA) are read under their own extensions."""
EXTENSIONS = frozenset(BY_EXTENSION)
USUAL = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".ppm", ".pgm")
"""Extensions that a message names as examples."""
HEIC = frozenset({".heic", ".heif", ".hif"}) - EXTENSIONS
"""Extensions that would be read if pillow-heif were installed."""
GET_HEIC = "install pillow-heif (the extra `heic`) to read it"
RAW = frozenset(
    {".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".x3f"}
)
"""Raw data of cameras. Most are TIFF files by their first bytes, and Pillow would read the thumbnail in them."""
REMAINS = ("~", ".bak", ".crdownload", ".download", ".orig", ".part", ".partial", ".swp", ".temp", ".tmp")
"""How the names of backup copies and of unfinished downloads end."""
PREFIX = 32
"""Bytes at the beginning of a file that tell its format."""
CLEAR = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
"""First bytes that no other kind of file has, so that even a damaged file is known as an image."""


def formats_for(name: str) -> tuple[str, ...]:
    """The formats to try on a file of this name."""
    promised = BY_EXTENSION.get(os.path.splitext(name)[1].lower())
    return SIGNED if promised is None or promised in SIGNED else (*SIGNED, promised)


def is_image(path: str) -> bool:
    """True for a file with the content of an image, judged by its first bytes and its header."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(PREFIX)
            if prefix.startswith(CLEAR):
                return True
            candidates = [name for name in SIGNED if _accepts(name, prefix)]
            if not candidates:
                return False
            file.seek(0)
            _limit_pillow(LARGEST)
            with Image.open(file, formats=candidates) as image:
                return min(image.size) > 0
    except Exception:  # a decoder that stumbles over a file of another kind may raise anything
        return False


def _accepts(name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[name][1]
    try:
        answer = accept(prefix) if accept else False
    except Exception:  # some look further than a short file has bytes
        return False
    return bool(answer) and not isinstance(answer, str)  # text says that a decoder is not installed


BYTES_PER_PIXEL = 10
"""Greatest size of a file per pixel of the limit: eight bytes for four channels of 16 bits, and room for the rest. Some
decoders read a file whole."""
GAP = 2
"""A JPEG is decoded at a half, a quarter or an eighth of its size where that is at least this many times the size that
is wanted. Measured on photographs and on noise, the result differs by docs/data.md's bound."""
Fit = Callable[[int, int], tuple[int, int] | None]
"""Height and width of an upright image -> those it will be scaled to; None where it is not just scaled."""
OF_THE_FILE = {errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
OF_THE_FILE |= {errno.ENXIO, errno.EINVAL, errno.EOVERFLOW}  # the last two: bad data may have a decoder seek anywhere
"""Errors of the system that are of a file. All others are the machine's: a disk, a network, its memory."""
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
TURNED = (5, 6, 7, 8)
"""Orientations with which the stored height is the upright image's width."""
RAISE_LIMIT = "--data.largest_pixels raises it"
DEFAULT = Decoding()
_limits = {LARGEST}
"""Numbers of pixels that were allowed so far in this process."""


@cache
def _limit_pillow(largest: int) -> None:
    """Have Pillow refuse what is larger than any limit of ours, and not warn before our own check refuses it.

    Pillow has one limit for the process. Above the limit it warns and above twice the limit it refuses; the warning
    would say less than our own check. It is ignored from the first image on and not for each image, since the filters
    of `catch_warnings` are not safe among threads.
    """
    _limits.add(largest)
    Image.MAX_IMAGE_PIXELS = max(_limits)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, channels: int, how: Decoding = DEFAULT, fit: Fit | None = None) -> ImageArray:
    """(h', w', channels) uint8: upright by its EXIF tag, the first frame, in sRGB, opaque, 16 bits scaled to 8.

    fit: the size that is wanted. A JPEG much larger is decoded at a part of its size, and has the size wanted then;
    other files are not scaled.

    Raises:
        BadImageError: not an image of a known format, damaged, too large, or of numbers without a known white.
        StorageError: the disk or the network it lies on fails, twice; too many files are open; the memory is spent.
    """
    for _ in range(2):
        try:
            return _read_once(path, channels, how, fit)
        except OSError as error:  # of the machine: a network may have been away for a moment
            reason = error.strerror
    raise StorageError(f"{path}: cannot be read ({reason}), which is a fault of the machine and not of the picture")


def _read_once(path: Path, channels: int, how: Decoding, fit: Fit | None) -> ImageArray:
    """Raises OSError too, where the machine is at fault."""
    formats = formats_for(path.name)
    _limit_pillow(how.largest)
    try:
        # Opened here: of a path Pillow maps some formats into memory, and a file cut off meanwhile ends the process.
        with open(path, "rb", opener=_without_waiting) as file:
            _check_file(path, file, how)
            image: Image.Image = Image.open(file, formats=formats)
            if image.width * image.height > how.largest:
                shape = f"{image.width}x{image.height} pixels"
                raise BadImageError(path, f"{shape} are more than the limit of {how.largest:,}; {RAISE_LIMIT}")
            if image.format == "PNG":  # whose pixels' checksums Pillow skips when it decodes
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=formats)  # what is verified cannot be decoded any more
            size, box = _reduce(image, fit)
            try:
                image.load()  # before its EXIF data is asked for, so that what fails after this is not the pixels
            except OSError:
                if how.truncated != "fill" or not isinstance(image, JpegImageFile):
                    raise
                image = _filled(file)
                size, box = _reduce(image, fit)
                image.load()
            if getattr(image, "is_animated", False) and not isinstance(image, JpegImageFile):
                how.remarks.add("frames", path, "holds several frames or pages, of which the first is read")
            plain = to_plain(image, "L" if channels == 1 else "RGB", how, path)
            if size is not None:
                plain = plain.resize(size, Image.Resampling.BICUBIC, box)
            turn = TURNS.get(_orientation(image))
            pixels = np.asarray(plain if turn is None else plain.transpose(turn))
            return pixels.reshape(*pixels.shape[:2], channels)
    except UserError:  # ours, or a signal's
        raise
    except MemoryError:  # what a header can promise is bounded, so this is not of the file
        raise StorageError(f"{path}: cannot be decoded, since the machine's memory is spent") from None
    except OSError as error:
        if error.errno is None or error.errno in OF_THE_FILE:  # None: Pillow's own, of bad data
            raise BadImageError(path, _reason(error, path, how)) from None
        raise
    except Exception as error:  # a decoder that stumbles over a bad file may raise anything
        raise BadImageError(path, _reason(error, path, how)) from None


def _check_file(path: Path, file: BinaryIO, how: Decoding) -> None:
    """Raises BadImageError where an open file is none, is empty, or has more bytes than the pixels allowed need."""
    status = os.fstat(file.fileno())
    size, limit = status.st_size, BYTES_PER_PIXEL * how.largest
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError(path, "is not a regular file")
    if size == 0:
        raise BadImageError(path, "the file is empty")
    if size > limit:
        raise BadImageError(path, f"{size:,} bytes are more than the limit of {limit:,}; {RAISE_LIMIT}")


Box = tuple[float, float, float, float]


def _reduce(image: Image.Image, fit: Fit | None) -> tuple[tuple[int, int], Box] | tuple[None, None]:
    """Have a JPEG that is not yet loaded decoded at a part of its size, if it is much larger than what is wanted.

    Returns the width and height to scale it to, as it is stored, and the part of the reduced image to take: its last
    column and row may lie partly outside the image.
    """
    if fit is None or not isinstance(image, JpegImageFile):
        return None, None
    full = image.size
    turned = _orientation(image) in TURNED
    target = fit(*full) if turned else fit(*full[::-1])
    if target is None:
        return None, None
    size = target if turned else target[::-1]
    drafted = image.draft(None, (GAP * size[0], GAP * size[1]))
    if drafted is None or image.size == full:
        return None, None
    return size, drafted[1]


def _filled(file: BinaryIO) -> Image.Image:
    """A JPEG file that ends early, with the mark of its end: the decoder makes grey of what is missing."""
    file.seek(0)
    return Image.open(BytesIO(file.read() + b"\xff\xd9"), formats=("JPEG",))


def _without_waiting(name: str, flags: int) -> int:
    """Opens a file; a pipe too, without waiting for somebody to write into it."""
    not_blocking: int = getattr(os, "O_NONBLOCK", 0)  # Windows has no such pipes
    return os.open(name, flags | not_blocking)


def _reason(error: Exception, path: Path, how: Decoding) -> str:
    match error:
        case UnidentifiedImageError():
            with suppress(OSError), open(path, "rb", opener=_without_waiting) as file:
                if _is_heic(file.read(PREFIX)):
                    return f"is a HEIC file; {GET_HEIC}"
            return "cannot be read as an image (its content is none of the formats that are read)"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"its header, or that of a frame, promises more pixels than the limit of {how.largest:,}"
        case OSError(strerror=str(text)):
            return f"cannot be read ({text})"
        case ValueError() | OSError():
            return f"cannot be read as an image ({error})"
        case _:
            return f"cannot be read as an image ({type(error).__name__}: {error})"


def _is_heic(prefix: bytes) -> bool:
    """True for the first bytes of a HEIC file, which telephones also give the ending .jpg."""
    return prefix[4:8] == b"ftyp" and prefix[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except UserError:
        raise
    except Exception:  # damaged EXIF data do not make a damaged picture
        return 1
