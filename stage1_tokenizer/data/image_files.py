"""The reader of image files: pixels that are upright, 8 bits, sRGB, opaque, and of the first frame.

It reads all formats that the installed Pillow reads, and recognises them by their content. With the extra `heic`
(pillow-heif) these include the HEIC files of phones. Only Pillow reads pixels, after our look at the header:
torchvision's decoder crashes the process on a damaged PNG. Pillow's own limits stay on beneath ours: on frames larger
than their header says, and on compressed text and colour profiles.
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
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.data.colour import MAX_PIXELS, ReadingOptions, convert_to_plain
from stage1_tokenizer.engine.errors import StorageError, UserError

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()

NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow knows but does not read itself: EPS would start another program, the others have no decoder."""
SIGNED_FORMATS = tuple(sorted(name for name, (_, accept) in Image.OPEN.items() if accept and name not in NOT_READ))
"""Formats with a signature in the first bytes. A file may have any of these formats, whatever its name is."""
FORMAT_OF_EXTENSION = {
    extension: name
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NOT_READ
}
"""The format of each extension. A format without a signature (TGA) is read only under its own extensions."""
EXTENSIONS = frozenset(FORMAT_OF_EXTENSION)
USUAL_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".ppm", ".pgm")
"""Extensions that a message names as examples."""
HEIC_EXTENSIONS = frozenset({".heic", ".heif", ".hif"}) - EXTENSIONS
"""Extensions that can be read only after pillow-heif is installed."""
INSTALL_HEIC = "install pillow-heif (the extra `heic`) to read"
RAW_EXTENSIONS = frozenset(
    {".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".x3f"}
)
"""Extensions of raw data of cameras. Most are TIFF files by their first bytes, and Pillow would read a thumbnail."""
SIGNATURE_BYTES = 32
"""Number of bytes at the beginning of a file that identify its format."""
CLEAR_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
"""First bytes that only image files have, so that even a damaged file counts as an image."""


def formats_for(name: str) -> tuple[str, ...]:
    """Return the formats to try on a file of this name."""
    own = FORMAT_OF_EXTENSION.get(os.path.splitext(name)[1].lower())
    return SIGNED_FORMATS if own is None or own in SIGNED_FORMATS else (*SIGNED_FORMATS, own)


def is_image(path: str) -> bool:
    """Return True for a file with the content of an image, judged by its first bytes and its header."""
    try:
        with open(path, "rb") as file:
            first_bytes = file.read(SIGNATURE_BYTES)
            if first_bytes.startswith(CLEAR_SIGNATURES):
                return True
            candidates = [name for name in SIGNED_FORMATS if _accepts(name, first_bytes)]
            if not candidates:
                return False
            file.seek(0)
            _raise_pillow_limit(MAX_PIXELS)
            with Image.open(file, formats=candidates) as image:
                return min(image.size) > 0
    except Exception:  # a decoder may raise any error on a file of another kind
        return False


def _accepts(name: str, first_bytes: bytes) -> bool:
    accept = Image.OPEN[name][1]
    try:
        answer = accept(first_bytes) if accept else False
    except Exception:  # some decoders read beyond the end of a short file
        return False
    return bool(answer) and not isinstance(answer, str)  # a text says that a decoder is not installed


MAX_BYTES_PER_PIXEL = 10
"""Limit of a file's size, per pixel of the pixel limit: eight bytes for four channels of 16 bits, and room for the
rest. Some decoders read a file as a whole."""
REDUCTION_MARGIN = 2
"""A JPEG is read at a half, a quarter or an eighth of its size if the result is at least this many times the wanted
size. docs/data.md has the measured difference."""
TargetSize = Callable[[int, int], tuple[int, int] | None]
"""(height, width) of an upright image -> the size that it will be scaled to; None if it is not only scaled."""
FILE_ERRORS = {errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
FILE_ERRORS |= {errno.ENXIO, errno.EINVAL, errno.EOVERFLOW}  # the last two: bad data may have a decoder seek anywhere
"""Error numbers that are the fault of a file; all others are faults of the machine."""
"""Error numbers of the system that are the file's fault. All others are the machine's: disk, network, memory."""
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image of each EXIF orientation upright."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations with which the stored height is the upright image's width."""
RAISE_LIMIT = "--data.largest_pixels raises it"
DEFAULT = ReadingOptions()
_limits = {MAX_PIXELS}
"""Pixel limits that were asked for so far in this process."""


@cache
def _raise_pillow_limit(max_pixels: int) -> None:
    """Set Pillow's limit of pixels to the largest of our limits, and silence its warning.

    Pillow has one limit for the process: it warns above the limit and refuses above twice the limit. Our own check
    refuses earlier, with a better message. The warning is silenced once and not for each image, because
    `warnings.catch_warnings` is not safe among threads.
    """
    _limits.add(max_pixels)
    Image.MAX_IMAGE_PIXELS = max(_limits)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(
    path: Path, channels: int, options: ReadingOptions = DEFAULT, target_size: TargetSize | None = None
) -> ImageArray:
    """Read a file as (h', w', channels) uint8: upright by its EXIF tag, first frame, sRGB, opaque, 16 bits scaled to 8.

    target_size: the wanted size. A JPEG much larger than this is read at a part of its size, and returned in the
        wanted size; other files are not scaled.

    Raises:
        BadImageError: the file is damaged, too large, of an unknown format, or the value of white is unknown.
        StorageError: the disk or the network fails twice, too many files are open, or no memory is left.
    """
    for _ in range(2):
        try:
            return _read_once(path, channels, options, target_size)
        except OSError as error:  # the machine's fault; a network may have been away for a moment
            reason = error.strerror
    raise StorageError(f"{path}: cannot be read ({reason}), which is a fault of the machine and not of the image")


def _read_once(path: Path, channels: int, options: ReadingOptions, target_size: TargetSize | None) -> ImageArray:
    """Read a file as `read_image` does.

    Raises:
        OSError: the machine is at fault.
    """
    formats = formats_for(path.name)
    _raise_pillow_limit(options.max_pixels)
    try:
        # Opened here: given a path, Pillow maps some formats into memory, and a file that another process shortens then
        # kills this process.
        with open(path, "rb", opener=_open_without_waiting) as file:
            _check_file(path, file, options)
            image: Image.Image = Image.open(file, formats=formats)
            if image.width * image.height > options.max_pixels:
                shape = f"{image.width}x{image.height} pixels"
                raise BadImageError(path, f"{shape} are more than the limit of {options.max_pixels:,}; {RAISE_LIMIT}")
            if image.format == "PNG":  # Pillow skips the checksums of the pixels when it loads them
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=formats)  # a verified image cannot be loaded any more
            size, box = _reduce(image, target_size)
            try:
                image.load()  # before the EXIF data is read, so that an error after this line is not about the pixels
            except OSError:
                if options.truncated != "fill" or not isinstance(image, JpegImageFile):
                    raise
                image = _complete_jpeg(file)
                size, box = _reduce(image, target_size)
                image.load()
            if getattr(image, "is_animated", False) and not isinstance(image, JpegImageFile):
                options.warnings.warn_once("frames", path, "holds several frames or pages, of which the first is read")
            plain = convert_to_plain(image, "L" if channels == 1 else "RGB", options, path)
            if size is not None:
                plain = plain.resize(size, Image.Resampling.BICUBIC, box)
            turn = TURNS.get(_orientation(image))
            pixels = np.asarray(plain if turn is None else plain.transpose(turn))
            return pixels.reshape(*pixels.shape[:2], channels)
    except UserError:  # ours, or raised by a signal handler
        raise
    except MemoryError:  # the size that a header can ask for is limited, so the file is not at fault
        raise StorageError(f"{path}: cannot be read, because the machine has no memory left") from None
    except OSError as error:
        if error.errno is None or error.errno in FILE_ERRORS:  # None: Pillow's own error about bad data
            raise BadImageError(path, _reason(error, path, options)) from None
        raise
    except Exception as error:  # a decoder may raise any error on a bad file
        raise BadImageError(path, _reason(error, path, options)) from None


def _check_file(path: Path, file: BinaryIO, options: ReadingOptions) -> None:
    """Check an open file before its pixels are read.

    Raises:
        BadImageError: it is no regular file, is empty, or has more bytes than the allowed pixels need.
    """
    status = os.fstat(file.fileno())
    size, limit = status.st_size, MAX_BYTES_PER_PIXEL * options.max_pixels
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError(path, "is not a regular file")
    if size == 0:
        raise BadImageError(path, "the file is empty")
    if size > limit:
        raise BadImageError(path, f"{size:,} bytes are more than the limit of {limit:,}; {RAISE_LIMIT}")


Box = tuple[float, float, float, float]


def _reduce(image: Image.Image, target_size: TargetSize | None) -> tuple[tuple[int, int], Box] | tuple[None, None]:
    """Have Pillow read a JPEG at a part of its size if it is much larger than wanted; call this before loading it.

    Returns:
        The (width, height) to scale the stored image to, and the box of the reduced image to take: its last column and
        row may lie partly outside the image. (None, None) if the file is not reduced.
    """
    if target_size is None or not isinstance(image, JpegImageFile):
        return None, None
    full = image.size
    is_sideways = _orientation(image) in SIDEWAYS
    target = target_size(*full) if is_sideways else target_size(*full[::-1])
    if target is None:
        return None, None
    size = target if is_sideways else target[::-1]
    drafted = image.draft(None, (REDUCTION_MARGIN * size[0], REDUCTION_MARGIN * size[1]))
    if drafted is None or image.size == full:
        return None, None
    return size, drafted[1]


def _complete_jpeg(file: BinaryIO) -> Image.Image:
    """Open a JPEG file that ends early with an end marker appended: the decoder makes the missing part grey."""
    file.seek(0)
    return Image.open(BytesIO(file.read() + b"\xff\xd9"), formats=("JPEG",))


def _open_without_waiting(name: str, flags: int) -> int:
    """Open a file. A pipe opens too, without waiting for a writer."""
    non_blocking: int = getattr(os, "O_NONBLOCK", 0)  # Windows has no such pipes
    return os.open(name, flags | non_blocking)


def _reason(error: Exception, path: Path, options: ReadingOptions) -> str:
    match error:
        case UnidentifiedImageError():
            with suppress(OSError), open(path, "rb", opener=_open_without_waiting) as file:
                if _is_heic(file.read(SIGNATURE_BYTES)):
                    return f"is a HEIC file; {INSTALL_HEIC} it"
            return "cannot be read as an image (its content is none of the formats that are read)"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"its header, or that of a frame, promises more pixels than the limit of {options.max_pixels:,}"
        case OSError(strerror=str(text)):
            return f"cannot be read ({text})"
        case ValueError() | OSError():
            return f"cannot be read as an image ({error})"
        case _:
            return f"cannot be read as an image ({type(error).__name__}: {error})"


def _is_heic(first_bytes: bytes) -> bool:
    """Return True for the first bytes of a HEIC file. Some phones name these files .jpg."""
    brands = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    return first_bytes[4:8] == b"ftyp" and first_bytes[8:12] in brands


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except UserError:
        raise
    except Exception:  # an image with damaged EXIF data is not a damaged image
        return 1
