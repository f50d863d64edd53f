"""The sampling loop: the processes share the images that a folder lacks and write them, then one writes the grid."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from sampling.evaluation.npz import write_samples
from sampling.output import Output, close_output
from sampling.sampler import Progress, Sampler
from sampling.saved_images import ImageShape, arrange_grid, read_png, save_png
from stage1_tokenizer.data.order import rank_range, split_evenly
from stage1_tokenizer.engine.console import progress_bar
from stage2_prior.class_labels import assign_labels
from stage2_prior.prior import LoadedPrior

GRID = "grid.png"
SAMPLES = "samples.npz"
MOST_IN_GRID = 1024
"""Number of images in a grid at most: the first ones."""


class SampleSource(Protocol):
    """An object that makes image number i, for any i, always the same one."""

    task: str
    """Word beside the progress bar, such as "sampling"."""
    unit: str
    """Unit that the bar counts: code or image."""

    @property
    def units_per_image(self) -> int:
        """Number of units in one image."""
        ...

    def sample(self, indices: NDArray[np.int64], progress: Progress, /) -> NDArray[np.uint8]:
        """Make the images with these numbers: (n, H, W, C). `progress` is called with numbers of finished units."""
        ...


@dataclass(frozen=True)
class PriorSource:
    """Images sampled from a prior with one seed, whose classes come in turn."""

    sampler: Sampler
    class_: str | Sequence[str] | None
    """Names or labels of the classes that the images have in turn; None: all classes."""
    seed: int

    task, unit = "sampling", "code"

    @property
    def loaded(self) -> LoadedPrior:
        """The prior with its file's path and step."""
        return self.sampler.prior

    @property
    def image_shape(self) -> ImageShape:
        """Height, width and channels of one image."""
        return self.sampler.image_shape

    @property
    def units_per_image(self) -> int:
        """Number of codes that are generated for one image, those of all its candidates."""
        return self.sampler.codes_per_image * self.sampler.config.candidates

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the label (n,) of each image."""
        if self.class_ is None:
            return self.sampler.labels(indices)
        return assign_labels(self.class_, self.sampler.prior.classes, indices)

    def sample(self, indices: NDArray[np.int64], progress: Progress) -> NDArray[np.uint8]:
        """Sample the images with these numbers: (n, H, W, C)."""
        return self.sampler.images(indices, self.labels(indices), self.seed, progress)

    def settings(self) -> dict[str, object]:
        """Return what the images depend on beside the config, for settings.json."""
        return self.sampler.settings()


def make_missing(accelerator: Accelerator, source: SampleSource, out: Output, batch_size: int) -> float:
    """Make the images that a folder lacks, each process its share, and wait for all processes. Return the seconds."""
    start = time.monotonic()
    own_share = out.missing[rank_range(len(out.missing), accelerator.process_index, accelerator.num_processes)]
    with progress_bar(len(own_share) * source.units_per_image, source.unit, source.task) as progress:
        for indices in split_evenly(own_share, batch_size):
            images = source.sample(indices, progress.update)
            for index, image in zip(indices, images, strict=True):
                save_png(out.path / out.names[index], image)
    accelerator.wait_for_everyone()
    return time.monotonic() - start


@dataclass(frozen=True)
class SavedImages:
    """A sequence of PNG images in a folder, all of one shape; each is read when it is asked for."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Read image number `index`, (H, W, C). Raise BadFileError if the file is damaged or missing."""
        return read_png(self.folder / self.names[index])


def finish_samples(labels: NDArray[np.int64], out: Output) -> None:
    """Write grid.png and samples.npz from the saved images, and mark the folder as finished.

    Memory holds the images of the grid, and beyond that one image at a time.
    """
    images = SavedImages(out.path, out.names)
    save_png(out.path / GRID, arrange_grid([images[index] for index in range(min(len(images), MOST_IN_GRID))]))
    write_samples(out.path / SAMPLES, images, labels)
    close_output(out, [*out.names, GRID])
