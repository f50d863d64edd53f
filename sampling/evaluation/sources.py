"""The pictures of an evaluation: of a data set's split, a prior, a folder or a file. All give uint8 batches."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sampling.evaluation import npz
from sampling.evaluation.npz import open_samples
from sampling.output import NOT_COMPARED, Output, image_names, is_finished, open_output, settings_of
from sampling.sampling_loop import SAMPLES, PriorSource, assemble, make_missing
from sampling.saved_images import image_paths
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.files import file_sha256
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.engine.lock import is_marked
from stage1_tokenizer.engine.seeds import derive_seed

Indices = NDArray[np.int64]
NEAREST = "-nearest.png"
"""How the names of our own pictures of nearest training images end."""


class Source(Protocol):
    """Images with numbers."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Tensor:
        """(B, C, H, W) uint8."""
        ...


@dataclass(frozen=True)
class SplitSource:
    """Some pictures of a split, in their plain view."""

    pictures: ImageBatches
    chosen: Indices
    """(N,): which."""

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: Indices) -> Tensor:
        return self.pictures.batch(self.chosen[indices])[0]


@dataclass(frozen=True)
class FolderSource:
    """Files of pictures, all of one size."""

    paths: Sequence[Path]
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Indices) -> Tensor:
        """Raises BadFileError where one is damaged or of another size than the first."""
        shape = read_image(self.paths[0], self.channels).shape
        pictures = [read_image(self.paths[index], self.channels) for index in indices]
        for index, picture in zip(indices, pictures, strict=True):
            if picture.shape != shape:
                raise BadFileError(
                    f"{self.paths[index]}: is {picture.shape[0]}x{picture.shape[1]} (height, width), but "
                    f"{self.paths[0]} is {shape[0]}x{shape[1]}; pictures that are measured together have one size. A "
                    "data set is scaled and cropped to one: name the folder as --data.kind folder --data.root"
                )
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class NpzSource:
    """Pictures of an .npz file, which can only be read from its beginning on: cheap as long as the numbers rise."""

    def __init__(self, file: npz.Samples, n: int | None = None) -> None:
        """n: only the first n."""
        self._file, self._rest, self._next = file, file.batches(1), 0
        self._length = min(n or file.n, file.n)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Indices) -> Tensor:
        """Raises BadFileError where the file is damaged."""
        pictures = []
        for index in indices.tolist():
            if index < self._next:
                self._rest, self._next = self._file.batches(1), 0
            pictures.append(next(islice(self._rest, index - self._next, None)))
            self._next = index + 1
        return torch.cat(pictures)


def size_of(source: Source) -> tuple[int, int]:
    """Height and width of its pictures."""
    height, width = source.read(np.arange(1)).shape[2:]
    return height, width


def some(n: int, of: int, seed: int) -> Indices:
    """n of 0..of-1 (all where n is larger), drawn at random, rising. Neither the first nor every k-th would do: folders
    are in the order of their classes, and samples have the classes in turn."""
    if n >= of:
        return np.arange(of, dtype=np.int64)
    drawn = np.random.default_rng(derive_seed(seed, "some", of)).choice(of, n, replace=False)
    return np.sort(drawn).astype(np.int64)


def check_set(source: Source, what: str) -> None:
    """Raises ConfigError: there are fewer than two pictures, and one has no spread."""
    if len(source) < 2:
        raise ConfigError(f"{what}: there is {len(source)} picture to measure, and sets are of at least 2")


class Samples(NamedTuple):
    """Images to be measured."""

    source: Source
    where: Path
    per_second: float | None
    """Images made in a second, by all processes together; None where they were there already."""
    of: int
    """How many there are, of which these may be some."""

    @property
    def identity(self) -> str:
        """A hash of the contents of all files that these are read from, in their order."""
        files = self.source.paths if isinstance(self.source, FolderSource) else [self.where]
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:32]


def sampled(accelerator: Accelerator, source: PriorSource, n: int, batch_size: int) -> Samples:
    """n pictures of a prior, in RUN/evaluation/samples-DIGEST: the same as `generate.py` would make, an interrupted
    making goes on, and pictures that are there are used again."""
    settings = settings_of(source.sampler.config, {"n": n, "seed": source.seed, **source.settings()})
    told = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    folder = source.loaded.path.parent / "evaluation" / f"samples-{digest}"
    wanted = dict.fromkeys(image_names(settings), source.image_shape)
    found = FolderSource([folder / name for name in wanted], source.image_shape[2])
    if run_on_main(accelerator, lambda: is_finished(folder)):
        if gone := [path.name for path in found.paths if not path.is_file()]:
            raise BadFileError(
                f"{folder}: was finished, but {len(gone):,} of its pictures are gone, {gone[0]} first; delete it, "
                "and all are made again"
            )
        accelerator.print(f"samples: {one_line(str(folder))}")
        return Samples(found, folder, None, n)
    out: Output = open_output(accelerator, str(folder), folder.parent, settings, wanted)
    accelerator.print(f"sampling {len(out.missing)} pictures to {one_line(str(folder))}")
    seconds = make_missing(accelerator, source, out, batch_size)
    run_on_main(accelerator, lambda: assemble(source.labels(np.arange(n)), out))
    return Samples(found, folder, len(out.missing) / max(seconds, 1e-9) if len(out.missing) else None, n)


def given(path: Path, n: int | None, seed: int, option: str = "--samples") -> Samples:
    """n pictures (None: all), drawn at random in a folder, or the first of an .npz file as the ADM suite has them.

    option: the one that they were given with, for errors to name.

    Raises:
        ConfigError: there are none.
        BadFileError: the file is damaged or of another kind.
    """
    try:
        path = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ConfigError(f"{option} {describe_path(shorten(path))}: there is no such file or folder") from None
    if path.is_dir():
        written = path / SAMPLES  # by generate.py: just its samples, in their order, and not its grid too
        if written.is_file():
            return given(written, n, seed, option)
        return _folder(path, n, seed, option)
    file = open_samples(path)
    return Samples(NpzSource(file, n), path, None, file.n)


def folder_of_results(samples: Path) -> Path:
    """The folder for what was measured of given samples: beside them where that changes nobody's data."""
    ours = samples.is_file() or is_marked(samples)
    return samples.parent if ours else Path("runs/evaluation")


def _folder(path: Path, n: int | None, seed: int, option: str) -> Samples:
    paths = [file for file in image_paths(path, option) if not file.name.endswith(NEAREST)]  # which we wrote
    if not paths:
        raise ConfigError(f"{option} {path}: holds no pictures")
    chosen = some(n or len(paths), len(paths), seed)
    return Samples(FolderSource([paths[place] for place in chosen], channels=3), path, None, len(paths))
