"""The kinds of image files that are read: all that the installed Pillow decodes, known by their content.

With the extra `heic` (pillow-heif) these include the HEIC files of telephones.
"""

import os
from contextlib import suppress

from PIL import Image

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
            with Image.open(file, formats=candidates) as image:
                return min(image.size) > 0
    except Exception:  # a decoder that stumbles over a file of another kind may raise anything
        return False


def is_heic(prefix: bytes) -> bool:
    """True for the first bytes of a HEIC file, which telephones also give the ending .jpg."""
    return prefix[4:8] == b"ftyp" and prefix[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def _accepts(name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[name][1]
    try:
        answer = accept(prefix) if accept else False
    except Exception:  # some look further than a short file has bytes
        return False
    return bool(answer) and not isinstance(answer, str)  # text says that a decoder is not installed
