"""Where the pictures of an evaluation come from: a data set's split, or a folder of samples. All give uint8 batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sampling.evaluation.extractors.base import Extracted, Extractor
from sampling.evaluation.features import Features
from sampling.evaluation.npz import Samples
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.order import share
from stage1_tokenizer.data.pictures import Pictures
from stage1_tokenizer.engine.console import bar
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.seeds import derive_seed

Indices = NDArray[np.int64]


class Source(Protocol):
    """Pictures with numbers."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Tensor:
        """(B, C, H, W) uint8."""
        ...


@dataclass(frozen=True)
class SplitSource:
    """Some pictures of a split, in their plain view."""

    pictures: Pictures
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

    def __init__(self, file: Samples, n: int | None = None) -> None:
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


def my_batches(accelerator: Accelerator, number: int, batch_size: int) -> list[Indices]:
    """This process's share of 0..number-1, in batches; the shares are in the order of the processes."""
    mine = np.asarray(share(number, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def check_set(source: Source, what: str) -> None:
    """Raises ConfigError: there are fewer than two pictures, and one has no spread."""
    if len(source) < 2:
        raise ConfigError(f"{what}: there is {len(source)} picture to measure, and sets are of at least 2")


def features_of(
    accelerator: Accelerator,
    source: Source,
    extractor: Extractor,
    batch_size: int,
    keep: int | None,
    what: str,
    logits: bool = False,
) -> Features:
    """The features of all pictures of a source, each computed once over all processes and known to all afterwards.

    keep: of how many pictures the features themselves are kept beside their moments; None: of all.
    logits: keep these too.

    Raises:
        ConfigError: there are fewer than two pictures, and one has no spread.
    """
    check_set(source, what)
    features = Features(extractor.dimension, keep)
    batches = my_batches(accelerator, len(source), batch_size)
    with bar(sum(map(len, batches)), "picture", what) as shown:
        for indices in batches:
            extracted = extractor(source.read(indices))
            features.add(extracted if logits else without_logits(extracted), torch.from_numpy(indices))
            shown.update(len(indices))
    features.merge_over(accelerator)
    return features


def without_logits(extracted: Extracted) -> Extracted:
    """A thousand numbers a picture that only a class score is made from."""
    return extracted._replace(logits=None)
