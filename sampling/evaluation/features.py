"""Features of many images, collected in batches: the moments of all, and the features themselves of some."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sampling.evaluation.extractors.base import Extracted, Extractor
from sampling.evaluation.moments import Moments, RunningMoments
from sampling.evaluation.results import machine_name, versions
from sampling.evaluation.sources import ImageSource, Indices, check_count
from stage1_tokenizer.data.order import rank_range
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.seeds import draw_uniforms


class Features:
    """Collected features of a set of images.

    Batches may come in any order and on any number of processes: an image's index and the seed alone decide if its
    features are kept. So the choice is fair even for a data set sorted by class.
    """

    def __init__(self, dimension: int, keep: int | None, seed: int = 0) -> None:
        """keep: number of images whose features are kept; None: all."""
        self._dimension, self._keep, self._seed = dimension, keep, seed
        self._running = RunningMoments(dimension)
        # Parts of three columns: indices (n,), features (n, D), logits (n, classes) or (n, 0) without classes.
        self._parts: list[list[Tensor]] = [[], [], []]
        self._rows = 0

    def add(self, extracted: Extracted, indices: Tensor | None = None) -> None:
        """Add a batch.

        indices: (B,), the images' indices, each once over all processes; None: the next ones.
        """
        features = extracted.features.detach().float().cpu()
        if indices is None:
            indices = torch.arange(self._running.count, self._running.count + len(features))
        self._running.add(features.numpy())
        logits = features[:, :0] if extracted.logits is None else extracted.logits.detach().float().cpu()
        for parts, part in zip(self._parts, (indices.long().cpu(), features, logits), strict=True):
            parts.append(part)
        self._rows += len(features)
        if self._keep is not None and self._rows > 2 * self._keep:
            self._columns()

    def merge_over(self, accelerator: Accelerator) -> None:
        """Merge the features of all processes, in the order of the indices. Afterwards all processes have all."""
        if accelerator.num_processes > 1:
            self._parts = [[_gather_rows(accelerator, column)] for column in self._columns()]
            counts = accelerator.gather(torch.tensor([self._running.count], device=accelerator.device)).tolist()
            means = accelerator.gather(torch.from_numpy(self._running.mean)[None].to(accelerator.device))
            scatters = accelerator.gather(torch.from_numpy(self._running.scatter)[None].to(accelerator.device))
            self._running = RunningMoments(self._dimension)
            for count, mean, scatter in zip(counts, means.cpu(), scatters.cpu(), strict=True):
                self._running.combine(count, mean.numpy(), scatter.numpy())
        self._columns()

    @property
    def count(self) -> int:
        """Number of images added."""
        return self._running.count

    @property
    def moments(self) -> Moments:
        """Moments of all images added, kept or not. Raises ValueError: there are fewer than two."""
        return self._running.moments()

    @property
    def indices(self) -> Tensor:
        """(n,) int64, rising: indices of the kept images."""
        return self._columns()[0]

    @property
    def features(self) -> Tensor:
        """(n, D) float32: features of the kept images, at most `keep`, by rising index."""
        return self._columns()[1]

    @property
    def logits(self) -> Tensor | None:
        """(n, classes) float32: logits of the kept images; None if the extractor has no classes."""
        logits = self._columns()[2]
        return logits if logits.shape[1] else None

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce the parts to the `keep` rows with the lowest random numbers, by rising index, and return them."""
        if not self._parts[0]:
            self._parts = [[torch.empty(0, dtype=torch.int64)], [torch.empty(0, self._dimension)], [torch.empty(0, 0)]]
        indices, features, logits = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in self._parts)
        order = np.argsort(indices.numpy(), kind="stable")
        if self._keep is not None and len(order) > self._keep:
            numbers = indices.numpy()[order]
            drawn = draw_uniforms(self._seed, "kept features", np.zeros_like(numbers), numbers, 1)[:, 0]
            order = order[np.sort(np.argsort(drawn, kind="stable")[: self._keep])]
        if not np.array_equal(order, np.arange(len(indices))):
            chosen = torch.from_numpy(order)
            indices, features, logits = indices[chosen], features[chosen], logits[chosen]
        self._parts = [[indices], [features], [logits]]
        self._rows = len(indices)
        return indices, features, logits


@dataclass(frozen=True)
class Evaluator:
    """The means of one evaluation: processes, extractor, batch size, seed."""

    accelerator: Accelerator
    optional_extractor: Extractor | None
    """The extractor; None for extractor.kind none."""
    kind: str
    """Kind of the extractor, for file names."""
    batch_size: int
    references: Path
    """Folder in which the features of references are kept."""
    seed: int

    @property
    def extractor(self) -> Extractor:
        """The extractor, for evaluations that cannot do without."""
        assert self.optional_extractor is not None, "the configuration allows extractor.kind none for tokenizers only"
        return self.optional_extractor

    def extract(self, source: ImageSource, name: str, keep: int | None = None, logits: bool = False) -> Features:
        """Return the features of all images of a source. Each is computed by one process; all processes get all.

        name: of the images, for the progress bar and messages.
        keep: number of images whose features are kept beside the moments of all; None: all.
        logits: keep the logits too.

        Raises:
            ConfigError: there are fewer than two images, which have no covariance.
        """
        check_count(source, name)
        features = Features(self.extractor.dimension, keep)
        batches = own_batches(self.accelerator, len(source), self.batch_size)
        with progress_bar(sum(map(len, batches)), "image", name) as progress:
            for indices in batches:
                extracted = self.extractor(source.read(indices))
                features.add(extracted if logits else extracted._replace(logits=None), torch.from_numpy(indices))
                progress.update(len(indices))
        features.merge_over(self.accelerator)
        return features

    def protocol(self) -> Mapping[str, Any]:
        """Return the part of a protocol that all evaluations have."""
        used: Mapping[str, Any] = {"extractor": "none"}
        extractor = self.optional_extractor
        if extractor is not None:
            weights = f"sha256 {extractor.sha256}"
            used = {"extractor": extractor.name, "extractor weights": weights, "resize": extractor.resize}
        return {
            **used,
            "seed": self.seed,
            "intervals": "95 %, over the images measured: means by bootstrap, others by a jackknife of 20 groups",
            "processes": self.accelerator.num_processes,
            "machine": machine_name(self.accelerator.device),
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def own_batches(accelerator: Accelerator, count: int, batch_size: int) -> list[Indices]:
    """Return this process's share of 0..count-1, in batches; process 0 has the first share."""
    own = np.asarray(rank_range(count, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _gather_rows(accelerator: Accelerator, own: Tensor) -> Tensor:
    """Return the rows of all processes in their order; each process may have another number of rows."""
    shapes = accelerator.gather(torch.tensor([list(own.shape) + [0] * (2 - own.dim())], device=accelerator.device))
    rows = shapes[:, 0].tolist()
    if own.dim() > 1 and not own.shape[1]:
        # A process without images does not know the number of classes.
        own = own.new_zeros(len(own), int(shapes[:, 1].max()))
    padded = own.new_zeros(max(rows), *own.shape[1:])
    padded[: len(own)] = own
    gathered = accelerator.gather(padded[None].to(accelerator.device)).cpu()
    return torch.cat([part[:n] for part, n in zip(gathered, rows, strict=True)])
