"""Images as arrays and PNG files: decode to uint8, write and read PNG files, arrange many images in one."""

import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stage1_tokenizer.data.folder.scan import OUR_ENDINGS, png_mark
from stage1_tokenizer.data.image_batches import to_uint8
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.files import write_file

DECODE_CHUNK = 16
"""Number of images that are decoded at once, always; the last chunk is filled up. Convolutions round differently at
another batch size, and then a pixel of the same image may differ by one level."""
ImageShape = tuple[int, ...]
"""Height, width and channels of an image."""
GAP = 2
"""Grey pixels around and between the images of a grid."""
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
"""Errors that Pillow raises on a damaged or missing file."""


@torch.inference_mode()
def decode_in_chunks(decode: Callable[[Tensor], Tensor], inputs: Tensor, times_larger: int = 1) -> NDArray[np.uint8]:
    """Decode codes or noise (n, ...) to images (n, H, W, C) uint8.

    decode: inputs (m, ...) -> images (m, C, H, W) in [-1, 1]. times_larger: the number of pixels of an image relative
    to the trained size; the chunks are that much smaller, so that memory does not grow.
    """
    pixels = apply_in_chunks(lambda chunk: to_uint8(decode(chunk)).cpu(), inputs, max(1, DECODE_CHUNK // times_larger))
    return pixels.permute(0, 2, 3, 1).numpy()


def apply_in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """Apply a function to `size` rows at a time, the last chunk filled up with zeros: (n, ...) -> (n, ...)."""
    chunks = []
    for chunk in torch.split(inputs, size):
        filled_up = torch.cat([chunk, chunk.new_zeros(size - len(chunk), *chunk.shape[1:])])
        chunks.append(function(filled_up)[: len(chunk)])
    return torch.cat(chunks)


def save_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image (H, W, C) uint8. The file appears complete or not at all; it is not flushed to disk, because there
    may be many. A grid of images (known by its name) is marked as ours, so that no training reads it as data.

    Raises:
        StorageError: no space, or no permission.
    """
    encoded = BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(
        encoded, format="PNG", pnginfo=png_mark() if path.name.endswith(OUR_ENDINGS) else None
    )
    write_file(path, encoded.getbuffer(), flush=False)


def read_png(path: Path) -> NDArray[np.uint8]:
    """Read a file that `save_png` wrote: (H, W, C) uint8.

    Raises:
        BadFileError: the file is damaged or missing.
    """
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            image = np.asarray(opened)
    except UNREADABLE as error:
        raise BadFileError(f"{path}: cannot be read again ({error})") from None
    return image if image.ndim == 3 else image[:, :, None]


def is_complete_png(path: Path, shape: ImageShape) -> bool:
    """Return True if the file is an undamaged PNG image of this shape, to its last byte."""
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            expected = ((shape[1], shape[0]), "L" if shape[2] == 1 else "RGB")
            if (image.size, image.mode) != expected or not _has_complete_chunks(data):
                return False
            image.load()
    except UNREADABLE:
        return False
    return True


def _has_complete_chunks(data: bytes) -> bool:
    """Return True if all chunks of a PNG have the right checksum and the last one ends the data. Pillow stops reading
    when it has all pixels, so it would not notice."""
    start = 8  # after the signature
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if data[start + 4 : start + 8] == b"IEND":
            return end == len(data)
        start = end
    return False


def arrange_grid(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Arrange n images (H, W, C) row by row in one image, as square as n allows."""
    columns = int(np.ceil(np.sqrt(len(images))))
    return arrange_rows([list(images[start : start + columns]) for start in range(0, len(images), columns)])


def arrange_rows(rows: list[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Arrange rows of images (h, w, C) of any sizes in one image. All cells have the size of the largest image, and
    each image lies at the top left of its cell."""
    height = max(image.shape[0] for row in rows for image in row) + GAP
    width = max(image.shape[1] for row in rows for image in row) + GAP
    columns, channels = max(map(len, rows)), rows[0][0].shape[2]
    grid = np.full((len(rows) * height + GAP, columns * width + GAP, channels), 128, dtype=np.uint8)
    for row_number, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = row_number * height + GAP, column * width + GAP
            grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid
