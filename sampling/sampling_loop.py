"""Many pictures into a folder: those that it lacks, shared by all processes; then a grid and an .npz file of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from sampling.evaluation.npz import write_samples
from sampling.output import Output, close_output
from sampling.sampler import Sampler
from sampling.saved_images import Shape, grid_of, read_png, save_png
from stage1_tokenizer.data.order import rank_range, split_evenly
from stage1_tokenizer.engine.console import progress_bar
from stage2_prior.class_labels import assign_labels
from stage2_prior.prior import LoadedPrior

GRID = "grid.png"
SAMPLES = "samples.npz"
MOST_IN_GRID = 1024


class Source(Protocol):
    """Makes pictures by their numbers."""

    doing: str
    """The word beside the progress bar."""
    unit: str
    """The unit that the bar counts."""

    @property
    def units_per_image(self) -> int: ...

    def sample(self, indices: NDArray[np.int64], progress: Callable[[int], object], /) -> NDArray[np.uint8]:
        """The pictures of these numbers, (n, H, W, C); `progress` is called with a number of units that are done."""
        ...


@dataclass(frozen=True)
class PriorSource:
    """A prior, and which pictures are drawn from it."""

    sampler: Sampler
    class_: str | Sequence[str] | None
    """Names or numbers of the classes that the pictures have in turn; None: all classes."""
    seed: int

    doing, unit = "sampling", "code"

    @property
    def loaded(self) -> LoadedPrior:
        return self.sampler.prior

    @property
    def image_shape(self) -> Shape:
        return self.sampler.image_shape

    @property
    def units_per_image(self) -> int:
        return self.sampler.codes_per_image * self.sampler.config.candidates

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The label of each picture (n,)."""
        if self.class_ is None:
            return self.sampler.labels(indices)
        return assign_labels(self.class_, self.sampler.prior.classes, indices)

    def sample(self, indices: NDArray[np.int64], progress: Callable[[int], object]) -> NDArray[np.uint8]:
        return self.sampler.images(indices, self.labels(indices), self.seed, progress)

    def settings(self) -> dict[str, object]:
        """The entries that settings.json has beside the configuration."""
        return self.sampler.settings()


def make_missing(accelerator: Accelerator, source: Source, out: Output, batch_size: int) -> float:
    """Make the pictures that a folder lacks, each process its share, and wait for all. Returns the seconds it took."""
    began = time.monotonic()
    mine = out.missing[rank_range(len(out.missing), accelerator.process_index, accelerator.num_processes)]
    shown = progress_bar(len(mine) * source.units_per_image, source.unit, source.doing)
    for indices in split_evenly(mine, batch_size):
        pictures = source.sample(indices, shown.update)
        for index, picture in zip(indices, pictures, strict=True):
            save_png(out.path / out.names[index], picture)
    shown.close()
    accelerator.wait_for_everyone()
    return time.monotonic() - began


@dataclass(frozen=True)
class SavedImages:
    """Pictures of one shape in a folder, each read when it is asked for."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Picture number `index`, (H, W, C). Raises BadFileError where it is damaged or not there."""
        return read_png(self.folder / self.names[index])


def assemble(labels: NDArray[np.int64], out: Output) -> None:
    """Write the grid (of very many pictures, the first ones) and the .npz of all, and say that they are finished.

    The pictures of the grid are in memory, and of the others one at a time.
    """
    pictures = SavedImages(out.path, out.names)
    save_png(out.path / GRID, grid_of([pictures[index] for index in range(min(len(pictures), MOST_IN_GRID))]))
    write_samples(out.path / SAMPLES, pictures, labels)
    close_output(out, [*out.names, GRID])
