"""The files of the ADM suite (guided-diffusion's evaluator), so that published tools can be run on our samples.

    samples      arr_0 (N, H, W, 3) uint8
    reference    mu (D,), sigma (D, D); those of other tools may hold mu_s, sigma_s, arr_0 beside them

An .npz is a zip archive of .npy files. Nothing in it is unpickled, and what it says of sizes is compared with its bytes
before memory is taken.
"""

import io
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
"""Pixels of a picture's side."""
LARGEST_DIMENSION = 8192
"""Of features: their covariance takes 512 MB."""
AT_ONCE = 2**25
"""Bytes of pictures that are read at a time, where a picture has fewer."""
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError),
    *(SyntaxError, TypeError, tokenize.TokenError, MemoryError),  # of a header that is no literal of Python
)
"""What zipfile and numpy raise for files that are not what they should be."""


class Pictures(Protocol):
    """An array (N, H, W, C), or pictures (H, W, C) that are read one by one, each when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def write_samples(path: Path, pictures: Pictures, labels: NDArray[np.int64] | None = None) -> None:
    """Write N pictures (H, W, 3), or (H, W, 1) or (H, W), which get three equal channels; labels (N,) beside them.

    One picture at a time is in memory.

    Raises:
        ValueError: there are none, or pictures of another type or shape.
        StorageError: they cannot be written.
    """
    number = len(pictures)
    shape = np.shape(pictures[0]) if number else ()
    height, width, _ = shape if len(shape) == 3 else (*shape, 1)

    def rows() -> Iterator[NDArray[np.uint8]]:
        for index in range(number):
            picture = np.asarray(pictures[index])
            if picture.dtype != np.uint8 or picture.shape != shape or shape[2:] not in ((), (1,), (3,)):
                raise ValueError(f"samples are uint8 (H, W, 3 or 1), all of one shape, not {picture.dtype} {shape}")
            yield np.broadcast_to(picture.reshape(height, width, -1), (height, width, 3))

    members = {"arr_0": _Member((number, height, width, 3), np.dtype(np.uint8), rows())}
    _write(path, members if labels is None else members | {"labels": _whole(labels)})


def write_moments(path: Path, moments: Moments) -> None:
    """mu and sigma in float64, and the count of pictures, which other tools pass over. Raises StorageError."""
    arrays: dict[str, NDArray[Any]] = {"mu": moments.mean, "sigma": moments.covariance}
    if moments.count is not None:
        arrays["count"] = np.asarray(moments.count, dtype=np.int64)
    _write(path, {name: _whole(array) for name, array in arrays.items()})


def holds_moments(path: Path) -> bool:
    """Whether a file has mu and sigma, and no pictures beside them. Raises BadFileError: damaged."""
    with _opened(path) as archive:
        names = set(archive.namelist())
    return {"mu.npy", "sigma.npy"} <= names and "arr_0.npy" not in names


def read_moments(path: Path) -> Moments:
    """mu and sigma, and the count where the file has one.

    Raises:
        BadFileError: damaged, without them, of other types or shapes, not finite, or sigma is no covariance.
    """
    with _opened(path) as archive:
        mean = _array(path, archive, "mu", 1)
        if not 1 <= len(mean) <= LARGEST_DIMENSION:
            raise BadFileError(f"{path}: mu has {len(mean)} numbers; this version reads 1 to {LARGEST_DIMENSION}")
        covariance = _array(path, archive, "sigma", 2, (len(mean), len(mean)))
        count = int(_array(path, archive, "count", 0)) if "count.npy" in archive.namelist() else None
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-4 * scale or covariance.diagonal().min() < -1e-4 * scale:
        raise BadFileError(f"{path}: sigma is no covariance: not symmetric, or with negative variances")
    return Moments(count, mean, covariance)


@dataclass(frozen=True)
class Samples:
    """A file of pictures, opened anew for each reading."""

    path: Path
    n: int
    height: int
    width: int

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All pictures in their order, as (B, 3, H, W) uint8; no more than a batch of them is in memory.

        Raises:
            BadFileError: the file is damaged where it was not looked at before.
        """
        size = self.height * self.width * 3
        at_once = min(batch_size, max(1, AT_ONCE // size))
        with _opened(self.path) as archive, _member(self.path, archive, "arr_0") as (file, _, _):
            for start in range(0, self.n, at_once):
                count = min(at_once, self.n - start)
                pictures = torch.frombuffer(_exactly(self.path, file, count * size), dtype=torch.uint8)
                yield pictures.view(count, self.height, self.width, 3).permute(0, 3, 1, 2).contiguous()


def open_samples(path: Path) -> Samples:
    """Look at the header of arr_0.

    Raises:
        BadFileError: damaged, no such array, of another type or shape, or its size is not that of its bytes.
    """
    with _opened(path) as archive, _member(path, archive, "arr_0") as (_, shape, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise BadFileError(f"{path}: arr_0 is {dtype} {shorten(shape)}, samples are uint8 (N, H, W, 3)")
        if max(shape[1:3]) > LARGEST_SIDE:
            raise BadFileError(f"{path}: pictures of {shape[1]}x{shape[2]}; at most {LARGEST_SIDE} a side are read")
        return Samples(path, *shape[:3])


class _Member(NamedTuple):
    """An array to be written, in parts that follow one another in memory's usual order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[NDArray[Any]]


def _whole(array: NDArray[Any]) -> _Member:
    return _Member(array.shape, array.dtype, (array,))


class _Forward(io.RawIOBase):
    """A file that zipfile cannot seek in, so that it writes an entry's size and checksum behind the entry."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)


def _write(path: Path, members: Mapping[str, _Member]) -> None:
    """Write arrays as numpy.savez does, but whole or not at all, and equal arrays as equal bytes."""
    with open_atomic(path) as whole, zipfile.ZipFile(_Forward(whole), "w") as archive:
        for name, member in members.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                header = io.BytesIO()
                described = {"descr": npy.dtype_to_descr(member.dtype), "fortran_order": False, "shape": member.shape}
                npy.write_array_header_1_0(header, described)
                file.write(header.getvalue())
                for part in member.parts:
                    file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Raises BadFileError, also for what goes wrong while it is open."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGED as error:
        raise BadFileError(f"{path}: is damaged or is not an .npz file ({shorten(error)})") from None


@contextmanager
def _member(
    path: Path, archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """An array's file behind its header, its shape and its type. Raises BadFileError: none, or not of its size."""
    names = archive.namelist()
    if f"{name}.npy" not in names:
        raise BadFileError(f"{path}: has no array {name}, but {shorten(', '.join(names) or 'nothing')}")
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadFileError(f"{path}: {name} is compressed in a way that no .npz is")
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise BadFileError(f"{path}: {name} is of version {version} of .npy; versions 1 and 2 are read")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise BadFileError(f"{path}: {name} holds objects or lies in Fortran's order; neither is read")
        promised, there = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
        if promised != there or min(shape, default=0) < 0:
            raise BadFileError(f"{path}: {name} of {dtype} {shorten(shape)} would be {promised:,} bytes, not {there:,}")
        yield file, shape, dtype


def _array(
    path: Path, archive: zipfile.ZipFile, name: str, dimensions: int, wanted: tuple[int, ...] | None = None
) -> NDArray[np.float64]:
    """Numbers, of the wanted shape, in float64. Raises BadFileError."""
    with _member(path, archive, name) as (file, shape, dtype):
        fits = len(shape) == dimensions and (wanted is None or shape == wanted)
        if dtype.kind not in "fiu" or not fits or math.prod(shape) > LARGEST_DIMENSION**2:
            raise BadFileError(f"{path}: {name} is {dtype} {shorten(shape)}, should be numbers {wanted or ''}".rstrip())
        data = _exactly(path, file, math.prod(shape) * dtype.itemsize)
        array = np.frombuffer(data, dtype=dtype).reshape(shape).astype(np.float64)
    if not np.isfinite(array).all():
        raise BadFileError(f"{path}: {name} holds numbers that are not finite")
    return array


def _exactly(path: Path, file: IO[bytes], size: int) -> bytearray:
    """So many bytes, in memory that may be written to. Raises BadFileError: there are fewer."""
    data = bytearray()
    while len(data) < size and (part := file.read(min(size - len(data), AT_ONCE))):
        data += part
    if len(data) < size:
        raise BadFileError(f"{path}: is damaged: it ends before its arrays do")
    return data
