"""Sources of the images of an evaluation: a data set's split, a prior, a folder, a file. All give uint8 batches."""

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

from sampling.evaluation.npz import SamplesFile, open_samples
from sampling.input_images import image_paths
from sampling.output import MAY_DIFFER, build_settings, image_names, is_finished, open_output
from sampling.sampling_loop import SAMPLES, PriorSource, finish_samples, make_missing
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
"""Ending of the names of our own images that show the nearest training images."""


class ImageSource(Protocol):
    """Images that are read by their indices."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Tensor:
        """Return the images with these indices, (B, C, H, W) uint8."""
        ...


@dataclass(frozen=True)
class SplitSource:
    """Chosen images of a split, without augmentation."""

    images: ImageBatches
    chosen: Indices
    """(N,): index in the split of each image."""

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: Indices) -> Tensor:
        """Return the images with these indices, (B, C, H, W) uint8."""
        return self.images.batch(self.chosen[indices])[0]


@dataclass(frozen=True)
class FolderSource:
    """Image files of one size."""

    paths: Sequence[Path]
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Indices) -> Tensor:
        """Read images, (B, C, H, W) uint8. Raises BadFileError: one is damaged or differs in size from the first."""
        shape = read_image(self.paths[0], self.channels).shape
        images = [read_image(self.paths[index], self.channels) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != shape:
                raise BadFileError(
                    f"{self.paths[index]}: the image is {image.shape[0]}x{image.shape[1]} (height, width), but "
                    f"{self.paths[0]} is {shape[0]}x{shape[1]}; images that are measured together must have one size. "
                    "To scale and crop them to one size, give the folder as --data.kind folder --data.root"
                )
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class NpzSource:
    """The first n images (None: all) of an .npz file. Reading is fast only if the indices rise."""

    def __init__(self, file: SamplesFile, n: int | None = None) -> None:
        self._file, self._rest, self._next = file, file.batches(1), 0
        self._length = min(n or file.n, file.n)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Indices) -> Tensor:
        """Read images, (B, 3, H, W) uint8. Raises BadFileError: the file is damaged."""
        images = []
        for index in indices.tolist():
            if index < self._next:
                self._rest, self._next = self._file.batches(1), 0
            images.append(next(islice(self._rest, index - self._next, None)))
            self._next = index + 1
        return torch.cat(images)


def image_shape(source: ImageSource) -> tuple[int, int, int]:
    """Return channels, height and width of a source's images."""
    _, channels, height, width = source.read(np.arange(1)).shape
    return channels, height, width


def random_indices(n: int, total: int, seed: int) -> Indices:
    """Draw n of 0..total-1 (all if n is larger), in rising order.

    Random, because neither the first n nor every k-th is a fair choice: folders are in the order of their classes, and
    samples have the classes in turn.
    """
    if n >= total:
        return np.arange(total, dtype=np.int64)
    drawn = np.random.default_rng(derive_seed(seed, "some", total)).choice(total, n, replace=False)
    return np.sort(drawn).astype(np.int64)


def check_count(source: ImageSource, name: str) -> None:
    """Raise ConfigError if there are fewer than two images: one image has no covariance."""
    if len(source) < 2:
        raise ConfigError(f"{name}: there is {len(source)} image to measure; sets must have at least 2")


class SampleSet(NamedTuple):
    """Images to measure, and the file or folder that holds them."""

    source: ImageSource
    path: Path
    total: int
    """Number of images in the file or folder; the source may have fewer of them."""
    images_per_second: float | None = None
    """Sampling speed of all processes together; None if the images existed already."""

    @property
    def identity(self) -> str:
        """Hash of the contents of all files of the source, in their order."""
        files = self.source.paths if isinstance(self.source, FolderSource) else [self.path]
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:32]


def sample_prior(accelerator: Accelerator, prior: PriorSource, n: int, batch_size: int) -> SampleSet:
    """Sample n images of a prior into RUN/evaluation/samples-DIGEST, or use those that are there.

    They are the images that `generate.py` makes with these settings. An interrupted sampling continues.

    Raises:
        BadFileError: the folder is finished, but images are missing.
    """
    settings = build_settings(prior.sampler.config, {"n": n, "seed": prior.seed, **prior.settings()})
    compared = {key: value for key, value in settings.items() if key not in MAY_DIFFER}
    digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:8]
    folder = prior.loaded.outputs / "evaluation" / f"samples-{digest}"
    shapes = dict.fromkeys(image_names(settings), prior.image_shape)
    source = FolderSource([folder / name for name in shapes], prior.image_shape[2])
    if run_on_main(accelerator, lambda: is_finished(folder)):
        if missing := [path.name for path in source.paths if not path.is_file()]:
            raise BadFileError(
                f"{folder}: the folder is finished, but {len(missing):,} of its images are missing, the first is "
                f"{missing[0]}; delete the folder, and all images are sampled again"
            )
        accelerator.print(f"samples: {one_line(str(folder))}")
        return SampleSet(source, folder, n)
    out = open_output(accelerator, str(folder), folder.parent, settings, shapes)
    accelerator.print(f"sampling {len(out.missing)} images to {one_line(str(folder))}")
    seconds = make_missing(accelerator, prior, out, batch_size)
    run_on_main(accelerator, lambda: finish_samples(prior.labels(np.arange(n)), out))
    return SampleSet(source, folder, n, len(out.missing) / max(seconds, 1e-9) if len(out.missing) else None)


def open_images(path: Path, n: int | None, seed: int, option: str = "--samples") -> SampleSet:
    """Open n images (None: all): random ones of a folder, or the first of an .npz file of the ADM suite.

    In a folder that `generate.py` wrote, its `samples.npz` is read. option: the option that named the path, for
    messages.

    Raises:
        ConfigError: there is no such file or folder, or it has no images.
        BadFileError: the file is damaged or of another kind.
    """
    try:
        path = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ConfigError(f"{option} {describe_path(shorten(path))}: there is no such file or folder") from None
    if path.is_dir() and (path / SAMPLES).is_file():  # contains the samples in order, and not the grid too
        path = (path / SAMPLES).resolve()
    if not path.is_dir():
        file = open_samples(path)
        return SampleSet(NpzSource(file, n), path, file.n)
    paths = [found for found in image_paths(path, option) if not found.name.endswith(NEAREST)]
    if not paths:
        raise ConfigError(f"{option} {path}: the folder has no images")
    chosen = random_indices(n or len(paths), len(paths), seed)
    return SampleSet(FolderSource([paths[index] for index in chosen], channels=3), path, len(paths))


def results_folder(samples: Path) -> Path:
    """Return the folder for the results of given samples: theirs, unless it is a folder of somebody's data."""
    ours = samples.is_file() or is_marked(samples)
    return samples.parent if ours else Path("runs/evaluation")
