"""Do samples repeat training images? The nearest ones of each, counted and shown.

samples      -> nearest training image, in pixels and in features
validation   -> the same: how near pictures lie that cannot have been learned by heart
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from sampling.evaluation.intervals import Interval, share_interval
from sampling.evaluation.nearest import Memorised, Nearest, Neighbours, memorised, nearest
from sampling.evaluation.protocol import Measuring
from sampling.evaluation.results import Figure
from sampling.evaluation.sources import Source, some
from sampling.picture_files import rows_of
from stage1_tokenizer.data.order import share as share_of
from stage1_tokenizer.engine.console import counted

SHARE = 0.01
"""Of held-out pictures, the nearest one per cent sets what is near."""
NEIGHBOURS_SHOWN = 3
"""Training images that are shown beside a sample."""
SHOWN = 8
"""Samples in each half of the picture."""
BATCH = 256


class Copies(NamedTuple):
    """What was found of n samples."""

    figures: list[Figure]
    picture: NDArray[np.uint8]
    """(H, W, C): the samples nearest to training images, by pixels and then by features, each with its neighbours."""
    says: str


def is_grey(samples: Source) -> bool:
    """Whether the first pictures' channels are equal."""
    pictures = samples.read(np.arange(min(len(samples), SHOWN)))
    return bool((pictures == pictures[:, :1]).all())


def look_for_copies(
    measuring: Measuring,
    samples: Source,
    training: Source,
    training_features: Tensor,
    held_out: Source,
    n: int,
    mirrored: bool,
    trained_on: int,
) -> Copies:
    """Compare n samples, and as many held-out pictures, with training images, whose features are (M, D).

    trained_on: how many training images there are, of which these may be a random part.
    """
    accelerator = measuring.accelerator
    looked_at = samples.read(some(n, len(samples), measuring.seed))
    known = held_out.read(some(n, len(held_out), measuring.seed))
    looked_at = looked_at[:, : known.shape[1]]  # an .npz file has three equal channels of grey pictures
    together, split = torch.cat([looked_at, known]), len(looked_at)
    mine = share_of(len(together), accelerator.process_index, accelerator.num_processes)
    found = nearest(
        together[mine.start : mine.stop],
        _batches(training),
        measuring.extractor,
        NEIGHBOURS_SHOWN,
        training_features,
        mirrored,
    )
    found = _joined(gather_object([found]))
    rows, figures = [], []
    for name, unit, neighbours in (("pixels", "of 255", found.pixels), ("features", "1 - cosine", found.features)):
        ours = Neighbours(neighbours.indices[:split], neighbours.distances[:split])
        theirs = Neighbours(neighbours.indices[split:], neighbours.distances[split:])
        counted = memorised(ours, theirs, SHARE)
        figures.append(_figure(name, unit, ours.distances[:, 0], theirs.distances[:, 0], counted))
        for index in ours.distances[:, 0].argsort()[:SHOWN].tolist():
            row = [looked_at[index], *training.read(ours.indices[index].numpy())]
            rows.append([picture.permute(1, 2, 0).numpy() for picture in row])
    says = (
        f"{split:,} samples and {len(known):,} held-out pictures, drawn at random, each beside {len(training):,} of "
        f"{trained_on:,} training images; a sample counts where it is nearer to one than all but "
        f"{counted.expected:.1%} of the held-out pictures are, or is the same"
    )
    says += "; training mirrors images, so mirrored ones are compared in pixels too" if mirrored else ""
    return Copies(figures, rows_of(_halves(rows)), says)


def _figure(name: str, unit: str, ours: Tensor, theirs: Tensor, counted: Memorised) -> Figure:
    """distances to the nearest training image: of samples (n,), of held-out pictures (m,)."""
    share = counted.counted.double()
    low, high = share_interval(counted.count, len(share))
    note = (
        f"{counted.count:,} of {len(share):,}, {counted.expected:.1%} expected of new pictures; median distance "
        f"{float(ours.median()):.3g} ({unit}), of held-out ones {float(theirs.median()):.3g}"
    )
    if name == "pixels":
        note += f"; exact copies: {int((ours == 0).sum()):,}"
    label = f"nearer to training than held-out, {name}"
    interval = Interval(100 * low, 100 * high)
    return Figure(f"memorised_{name}", label, 100 * float(share.mean()), interval, "%", "lower", note)


def _batches(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    starts = range(0, len(source), BATCH)
    for start in counted(starts, len(starts), "batch", "training images"):
        indices = np.arange(start, min(start + BATCH, len(source)), dtype=np.int64)
        yield source.read(indices), torch.from_numpy(indices)


def _joined(parts: list[Nearest]) -> Nearest:
    """What the processes found, one after another."""

    def joined(each: list[Neighbours]) -> Neighbours:
        return Neighbours(torch.cat([it.indices for it in each]), torch.cat([it.distances for it in each]))

    return Nearest(joined([part.pixels for part in parts]), joined([part.features for part in parts]))


def _halves(rows: list[list[NDArray[np.uint8]]]) -> list[list[NDArray[np.uint8]]]:
    """By pixels on the left, by features on the right, with a gap."""
    half = len(rows) // 2
    gap = np.full_like(rows[0][0], 128)
    return [[*left, gap, *right] for left, right in zip(rows[:half], rows[half:], strict=True)]
