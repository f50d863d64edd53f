"""The .npz files of the ADM suite (guided-diffusion's evaluator), so that published tools can measure our samples.

    samples      arr_0 (N, H, W, 3) uint8
    reference    mu (D,), sigma (D, D); files of other tools may also hold mu_s, sigma_s, arr_0

An .npz file is a zip archive of .npy files. Nothing in it is unpickled, and each size in a header is compared with the
number of bytes before memory is allocated.
"""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from sampling.evaluation.moments import Moments
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.engine.files import open_atomic

LARGEST_SIDE = 4096
"""Largest height or width of an image, in pixels."""
LARGEST_DIMENSION = 8192
"""Largest number of features D: their covariance takes 512 MB."""
LARGEST_ARRAY = 2**33
"""Largest size in bytes of an array that `read_array` reads whole."""
AT_ONCE = 2**25
"""Bytes read at once; a single image may have more."""
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError),
    *(SyntaxError, TypeError, tokenize.TokenError, MemoryError),  # raised for a header that is not a Python literal
)
"""Exceptions of zipfile and numpy for damaged files."""


class ImageList(Protocol):
    """An array (N, H, W, C), or an object that reads image number i, (H, W, C), at [i]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def write_samples(path: Path, images: ImageList, labels: NDArray[np.int64] | None = None) -> None:
    """Write N images as `arr_0`, and labels (N,) as `labels`. One image at a time is in memory.

    images: uint8 (H, W, 3), (H, W, 1) or (H, W); a grey image is written with three equal channels.

    Raises:
        ValueError: there are no images, or their types or shapes differ.
        StorageError: the file cannot be written.
    """
    count = len(images)
    shape = np.shape(images[0]) if count else ()
    height, width, _ = shape if len(shape) == 3 else (*shape, 1)

    def rgb_images() -> Iterator[NDArray[np.uint8]]:
        for index in range(count):
            image = np.asarray(images[index])
            if image.dtype != np.uint8 or image.shape != shape or shape[2:] not in ((), (1,), (3,)):
                raise ValueError(
                    f"image {index} is {image.dtype} {image.shape}; samples are uint8 (H, W, 3 or 1), all of one shape"
                )
            yield np.broadcast_to(image.reshape(height, width, -1), (height, width, 3))

    members = {"arr_0": _Member((count, height, width, 3), np.dtype(np.uint8), rgb_images())}
    _write(path, members if labels is None else members | {"labels": _whole(labels)})


def write_moments(path: Path, moments: Moments) -> None:
    """Write mu and sigma in float64, and the count of images, which other tools ignore. Raises StorageError."""
    arrays: dict[str, NDArray[Any]] = {"mu": moments.mean, "sigma": moments.covariance}
    if moments.count is not None:
        arrays["count"] = np.asarray(moments.count, dtype=np.int64)
    _write(path, {name: _whole(array) for name, array in arrays.items()})


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays under their names. Raises StorageError."""
    _write(path, {name: _whole(array) for name, array in arrays.items()})


def read_array(path: Path, name: str, kinds: str, dimensions: int) -> NDArray[Any]:
    """Read an array of integers or texts.

    kinds: numpy's letters of the allowed types, e.g. "iu". dimensions: the number of dimensions.

    Raises:
        BadFileError: the file is damaged, or the array is missing, too large, or has another type or dimensions.
    """
    with _opened(path) as archive, _member(path, archive, name) as (file, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in kinds or len(shape) != dimensions or size > LARGEST_ARRAY:
            raise BadFileError(
                f"{path}: {name} is {dtype} {shorten(shape)}, {size:,} bytes; it must have {dimensions} dimensions of "
                f"{'text' if 'U' in kinds else 'integers'}, and at most {LARGEST_ARRAY:,} bytes"
            )
        return np.frombuffer(_read_exactly(path, file, size), dtype=dtype).reshape(shape)


def holds_moments(path: Path) -> bool:
    """Return True if the file has mu and sigma and no images. Raises BadFileError: the file is damaged."""
    with _opened(path) as archive:
        names = set(archive.namelist())
    return {"mu.npy", "sigma.npy"} <= names and "arr_0.npy" not in names


def read_moments(path: Path) -> Moments:
    """Read mu and sigma, and the count if the file has one.

    Raises:
        BadFileError: the file is damaged, an array is missing or has another type or shape or a number that is not
            finite, or sigma is not a covariance.
    """
    with _opened(path) as archive:
        mean = _numbers(path, archive, "mu", 1)
        if not 1 <= len(mean) <= LARGEST_DIMENSION:
            raise BadFileError(f"{path}: mu has {len(mean)} numbers; this version reads 1 to {LARGEST_DIMENSION}")
        covariance = _numbers(path, archive, "sigma", 2, (len(mean), len(mean)))
        count = int(_numbers(path, archive, "count", 0)) if "count.npy" in archive.namelist() else None
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-4 * scale or covariance.diagonal().min() < -1e-4 * scale:
        raise BadFileError(f"{path}: sigma is not a covariance: it is not symmetric, or a variance is negative")
    return Moments(count, mean, covariance)


@dataclass(frozen=True)
class SamplesFile:
    """An .npz file of images. Each reading opens the file anew."""

    path: Path
    n: int
    height: int
    width: int

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Read all images in order, as uint8 (B, 3, H, W); at most one batch is in memory.

        Raises:
            BadFileError: the file is damaged; `open_samples` checks the header only.
        """
        size = self.height * self.width * 3
        at_once = min(batch_size, max(1, AT_ONCE // size))
        with _opened(self.path) as archive, _member(self.path, archive, "arr_0") as (file, _, _):
            for start in range(0, self.n, at_once):
                count = min(at_once, self.n - start)
                images = torch.frombuffer(_read_exactly(self.path, file, count * size), dtype=torch.uint8)
                yield images.view(count, self.height, self.width, 3).permute(0, 3, 1, 2).contiguous()


def open_samples(path: Path) -> SamplesFile:
    """Read the header of `arr_0`.

    Raises:
        BadFileError: the file is damaged, or `arr_0` is missing or has another type, shape or number of bytes.
    """
    with _opened(path) as archive, _member(path, archive, "arr_0") as (_, shape, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise BadFileError(f"{path}: arr_0 is {dtype} {shorten(shape)}; samples must be uint8 (N, H, W, 3)")
        if max(shape[1:3]) > LARGEST_SIDE:
            raise BadFileError(
                f"{path}: the images are {shape[1]}x{shape[2]}; this version reads at most {LARGEST_SIDE} a side"
            )
        return SamplesFile(path, *shape[:3])


class _Member(NamedTuple):
    """An array to write, in consecutive parts in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[NDArray[Any]]


def _whole(array: NDArray[Any]) -> _Member:
    return _Member(array.shape, array.dtype, (array,))


class _Unseekable:
    """A file without `seek`, so that zipfile writes an entry's size and checksum after the entry."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush, self.close = file.write, file.flush, file.close


def _write(path: Path, members: Mapping[str, _Member]) -> None:
    """Write arrays as numpy.savez does, but atomically, and equal arrays as equal bytes."""
    with open_atomic(path) as whole, zipfile.ZipFile(_Unseekable(whole), "w") as archive:
        for name, member in members.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                header = {"descr": npy.dtype_to_descr(member.dtype), "fortran_order": False, "shape": member.shape}
                npy.write_array_header_1_0(file, header)
                for part in member.parts:
                    file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; errors while it is open become a BadFileError too."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGED as error:
        raise BadFileError(f"{path}: is damaged or not an .npz file ({shorten(error)})") from None


@contextmanager
def _member(
    path: Path, archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """Open an array: its file, placed after the header, its shape and its type.

    Raises:
        BadFileError: there is no such array, or it cannot be read, or its size is not that of its bytes.
    """
    names = archive.namelist()
    if f"{name}.npy" not in names:
        raise BadFileError(f"{path}: has no array {name}; it holds {shorten(', '.join(names) or 'nothing')}")
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadFileError(f"{path}: {name} has a compression that .npz files do not use; save the file with numpy")
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise BadFileError(f"{path}: {name} has .npy version {version}; this version reads 1 and 2")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise BadFileError(f"{path}: {name} holds objects or is in Fortran order; save numbers in C order")
        promised, there = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
        if promised != there or min(shape, default=0) < 0:
            raise BadFileError(
                f"{path}: {name} is {dtype} {shorten(shape)}, {promised:,} bytes, but the file has {there:,}"
            )
        yield file, shape, dtype


def _numbers(
    path: Path, archive: zipfile.ZipFile, name: str, dimensions: int, wanted: tuple[int, ...] | None = None
) -> NDArray[np.float64]:
    """Read an array of finite numbers in float64; wanted: its shape. Raises BadFileError."""
    with _member(path, archive, name) as (file, shape, dtype):
        fits = len(shape) == dimensions and (wanted is None or shape == wanted)
        if dtype.kind not in "fiu" or not fits or math.prod(shape) > LARGEST_DIMENSION**2:
            raise BadFileError(
                f"{path}: {name} is {dtype} {shorten(shape)}; it must be numbers {wanted or ''}".rstrip()
            )
        data = _read_exactly(path, file, math.prod(shape) * dtype.itemsize)
        array = np.frombuffer(data, dtype=dtype).reshape(shape).astype(np.float64)
    if not np.isfinite(array).all():
        raise BadFileError(f"{path}: {name} has numbers that are not finite")
    return array


def _read_exactly(path: Path, file: IO[bytes], size: int) -> bytearray:
    """Read `size` bytes into writable memory. Raises BadFileError: the file has fewer."""
    data = bytearray()
    while len(data) < size and (part := file.read(min(size - len(data), AT_ONCE))):
        data += part
    if len(data) < size:
        raise BadFileError(f"{path}: is damaged: it ends within an array")
    return data
