"""From codes or noise to files, and where files are: decoding in chunks of one size, the folder, the PNGs, the grid."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stage1_tokenizer.data.decode import EXTENSIONS
from stage1_tokenizer.data.pictures import to_uint8
from stage1_tokenizer.errors import ConfigError, StorageError

DECODE_CHUNK = 16
"""Pictures are decoded in chunks of just this many, the last one filled up: with another batch size, convolutions
round differently, and now and then a pixel of the same picture would differ by one level."""


@torch.inference_mode()
def to_pictures(decode: Callable[[Tensor], Tensor], inputs: Tensor, larger: int = 1) -> NDArray[np.uint8]:
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


def open_folder(given: str | None, run: Path, accelerator: Accelerator, name: str = "generated") -> Path:
    """The folder to write to, made by the main process: the one given, or a new numbered one in the run's folder.

    Raises:
        ConfigError: the one given holds something already, or is a file.
        StorageError: it cannot be made.
    """
    if given is not None:
        out = Path(given)
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out}: is a file, not a folder")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out}: is not empty, and nothing is written over; choose another folder")
    else:
        number = 1
        while (run / name / f"{number:03d}").exists():
            number += 1
        out = run / name / f"{number:03d}"
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"--out {out}: cannot be made ({error.strerror})") from None
    accelerator.wait_for_everyone()
    return out


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """picture (H, W, C) uint8; the file appears whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(temporary, format="PNG")
    temporary.replace(path)


def read_png(path: Path) -> NDArray[np.uint8]:
    """What `save_png` wrote: (H, W, C) uint8."""
    with Image.open(path) as image:
        picture = np.asarray(image)
    return picture if picture.ndim == 3 else picture[:, :, None]


def grid_of(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, H, W, C) -> one picture, as square as n allows, row by row, two grey pixels between them."""
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


def picture_paths(source: Path, option: str) -> list[Path]:
    """The file itself, or the pictures in a folder and those below it.

    Raises:
        ConfigError: neither exists, or there are none; `option` is named.
    """
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS) if source.is_dir() else []
    if not found:
        reason = "holds no pictures" if source.is_dir() else "there is no such file or folder"
        raise ConfigError(f"{option} {source}: {reason} (looked for {', '.join(sorted(EXTENSIONS))})")
    return found
