"""From codes or noise to files, and where files are: decoding in chunks of one size, the PNGs, the grid."""

import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.folder.scan import FOLDER, OUR_ENDINGS, find_images, png_mark
from stage1_tokenizer.data.image_batches import to_uint8
from stage1_tokenizer.data.image_files import USUAL_EXTENSIONS, read_image
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.files import write_file

DECODE_CHUNK = 16
"""Images are decoded in chunks of just this many, the last one filled up: with another batch size, convolutions
round differently, and now and then a pixel of the same picture would differ by one level."""
Shape = tuple[int, int, int]
"""Height, width and channels of a picture."""
SHOWN = 10
"""Bad files that an error names."""
DAMAGED = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on a file that is not a whole picture, or not there."""


@torch.inference_mode()
def to_images(decode: Callable[[Tensor], Tensor], inputs: Tensor, larger: int = 1) -> NDArray[np.uint8]:
    """Codes or noise (n, ...), decoded to images (n, C, H, W) in [-1, 1] -> pictures (n, H, W, C) uint8.

    larger: how many times the trained size they are; that many fewer are decoded at once.
    """
    pixels = in_chunks(lambda chunk: to_uint8(decode(chunk)).cpu(), inputs, max(1, DECODE_CHUNK // larger))
    return pixels.permute(0, 2, 3, 1).numpy()


def in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """A function of rows, applied to just `size` of them at a time, the last ones filled up: (n, ...) -> (n, ...)."""
    chunks = []
    for chunk in torch.split(inputs, size):
        filled = torch.cat([chunk, chunk.new_zeros(size - len(chunk), *chunk.shape[1:])])
        chunks.append(function(filled)[: len(chunk)])
    return torch.cat(chunks)


def shape_of(picture: NDArray[np.uint8]) -> Shape:
    """Of a picture (H, W, C)."""
    height, width, channels = picture.shape
    return height, width, channels


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """picture (H, W, C) uint8; the file appears whole or not at all. Not flushed to disk: there may be many. A picture
    of several is marked as ours, for it may lie in a folder that is read as data one day.

    Raises:
        StorageError: no space, or no permission.
    """
    encoded = BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(
        encoded, format="PNG", pnginfo=png_mark() if path.name.endswith(OUR_ENDINGS) else None
    )
    write_file(path, encoded.getbuffer(), flush=False)


def read_png(path: Path) -> NDArray[np.uint8]:
    """What `save_png` wrote: (H, W, C) uint8. Raises BadFileError where it is damaged or not there."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            picture = np.asarray(image)
    except DAMAGED as error:
        raise BadFileError(f"{path}: cannot be read again ({error})") from None
    return picture if picture.ndim == 3 else picture[:, :, None]


def is_whole(path: Path, shape: Shape) -> bool:
    """Whether `save_png` has written a picture of this shape there, and all of it."""
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            expected = ((shape[1], shape[0]), "L" if shape[2] == 1 else "RGB")
            if (image.size, image.mode) != expected or not _has_whole_chunks(data):
                return False
            image.load()
    except DAMAGED:
        return False
    return True


def _has_whole_chunks(data: bytes) -> bool:
    """Whether a PNG's chunks, each with its checksum, follow one another up to the last one, and end there. A decoder
    stops when it has all pixels, and does not look."""
    place = 8  # behind the signature
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if data[place + 4 : place + 8] == b"IEND":
            return end == len(data)
        place = end
    return False


def grid_of(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """n pictures (H, W, C) -> one picture, as square as n allows, row by row, two grey pixels between them."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    return rows_of([list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)])


def rows_of(rows: list[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Rows of pictures (h, w, C) of any sizes -> one picture, each in the top left of a cell that holds the largest."""
    height = max(picture.shape[0] for row in rows for picture in row)
    width = max(picture.shape[1] for row in rows for picture in row)
    columns, channels = max(map(len, rows)), rows[0][0].shape[2]
    grid = np.full((len(rows) * (height + 2) + 2, columns * (width + 2) + 2, channels), 128, dtype=np.uint8)
    for down, row in enumerate(rows):
        for right, picture in enumerate(row):
            top, left = down * (height + 2) + 2, right * (width + 2) + 2
            grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return grid


def image_paths(source: Path, option: str) -> list[Path]:
    """The file itself, or the pictures in a folder and those below it; links may lead anywhere.

    Raises:
        ConfigError: neither exists, or there are none; `option` is named.
        BadFileError: a folder cannot be listed.
    """
    if source.is_file():
        return [source]
    files = find_images(source, "anywhere") if source.is_dir() else ()
    found = sorted(source / name for name, reason in files if reason != FOLDER)
    if not found:
        reason = "holds no pictures" if source.is_dir() else "there is no such file or folder"
        raise ConfigError(
            f"{option} {describe_path(source)}: {reason} (looked for {', '.join(USUAL_EXTENSIONS)} and all "
            "others that Pillow reads, by content)"
        )
    return found


def readable(paths: list[Path], channels: int) -> tuple[list[Path], list[str]]:
    """Those of the files that can be decoded, and what is wrong with each of the others."""

    def complaint(path: Path) -> str | None:
        try:
            read_image(path, channels)
        except BadFileError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=4) as threads:  # Pillow releases the interpreter's lock while it decodes
        found = list(threads.map(complaint, paths))
    good = [path for path, each in zip(paths, found, strict=True) if each is None]
    return good, [each for each in found if each is not None]


def unreadable(complaints: list[str]) -> BadFileError:
    """The error that says what is wrong with files, of many the first ones."""
    more = [f"and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
    return BadFileError("\n  ".join([*map(one_line, complaints[:SHOWN]), *more]))
