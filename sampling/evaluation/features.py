"""Features of any number of pictures, collected batch by batch: moments of all of them, and some kept as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sampling.evaluation.extractors.base import Extracted, Extractor
from sampling.evaluation.moments import Array, Moments, RunningMoments, combined
from sampling.evaluation.results import described_machine, now, versions
from sampling.evaluation.sources import Indices, Source, check_set
from stage1_tokenizer.data.order import rank_range
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.seeds import draw_uniforms


class Features:
    """What is added may come in any order and on any number of processes: which pictures are kept depends on their
    index and the seed alone, so it is a fair choice also where a data set is sorted by class."""

    def __init__(self, dimension: int, keep: int | None, seed: int = 0) -> None:
        """keep: of how many pictures the features themselves are kept; None: of all."""
        self._dimension, self._keep, self._seed = dimension, keep, seed
        self._running = RunningMoments(dimension)
        # Beside each other: indices (n,), features (n, D), logits (n, classes) or (n, 0) where there are none.
        self._kept: list[list[Tensor]] = [[], [], []]
        self._waiting = 0

    def add(self, extracted: Extracted, indices: Tensor | None = None) -> None:
        """A batch. indices (B,): of the pictures among all, each once over all processes; None: the next ones."""
        features = extracted.features.detach().float().cpu()
        if indices is None:
            indices = torch.arange(self._running.count, self._running.count + len(features))
        self._running.add(features.numpy())
        logits = features[:, :0] if extracted.logits is None else extracted.logits.detach().float().cpu()
        for kept, part in zip(self._kept, (indices.long().cpu(), features, logits), strict=True):
            kept.append(part)
        self._waiting += len(features)
        if self._keep is not None and self._waiting > 2 * self._keep:
            self._choose()

    def merge_over(self, accelerator: Accelerator) -> None:
        """Put together what all processes have, in the order of the indices; all of them have it afterwards."""
        if accelerator.num_processes > 1:
            self._choose()
            self._kept = [[_gathered(accelerator, part[0])] for part in self._kept]
            counts = accelerator.gather(torch.tensor([self._running.count], device=accelerator.device)).tolist()
            means = accelerator.gather(torch.from_numpy(self._running.mean)[None].to(accelerator.device))
            scatters = accelerator.gather(torch.from_numpy(self._running.scatter)[None].to(accelerator.device))
            parts = [RunningMoments(self._dimension) for _ in counts]
            for part, count, mean, scatter in zip(parts, counts, means.cpu(), scatters.cpu(), strict=True):
                part.combine(count, mean.numpy(), scatter.numpy())
            self._running = combined(parts, self._dimension)
        self._choose()

    @property
    def count(self) -> int:
        """How many pictures were added."""
        return self._running.count

    @property
    def moments(self) -> Moments:
        """Of all pictures added, kept or not. Raises ValueError: fewer than two."""
        return self._running.moments()

    @property
    def mean(self) -> Array:
        """(D,) float64, of all pictures added."""
        return self._running.mean

    @property
    def covariance(self) -> Array:
        """(D, D) float64, unbiased, of all pictures added."""
        return self.moments.covariance

    @property
    def indices(self) -> Tensor:
        """(n,) int64, rising: which pictures were kept."""
        return self._chosen()[0]

    @property
    def features(self) -> Tensor:
        """(n, D) float32: of the kept pictures, n at most `keep`, by rising index."""
        return self._chosen()[1]

    @property
    def logits(self) -> Tensor | None:
        """(n, classes) float32 beside the features; None where the extractor has no classes."""
        logits = self._chosen()[2]
        return logits if logits.shape[1] else None

    def _chosen(self) -> list[Tensor]:
        self._choose()
        return [part[0] for part in self._kept]

    def _choose(self) -> None:
        """Leave those `keep` whose drawn numbers are the lowest."""
        if not self._kept[0]:
            self._kept = [
                [torch.empty(0, dtype=torch.int64)],
                [torch.empty(0, self._dimension)],
                [torch.empty(0, 0)],
            ]
        indices, features, logits = (torch.cat(part) if len(part) > 1 else part[0] for part in self._kept)
        order = np.argsort(indices.numpy(), kind="stable")
        if self._keep is not None and len(order) > self._keep:
            numbers = indices.numpy()[order]
            drawn = draw_uniforms(self._seed, "kept features", np.zeros_like(numbers), numbers, 1)[:, 0]
            order = order[np.sort(np.argsort(drawn, kind="stable")[: self._keep])]
        if not np.array_equal(order, np.arange(len(indices))):
            chosen = torch.from_numpy(order)
            indices, features, logits = indices[chosen], features[chosen], logits[chosen]
        self._kept = [[indices], [features], [logits]]
        self._waiting = len(indices)


@dataclass(frozen=True)
class Measuring:
    """One way to measure pictures: the extractor, the processes and the seed."""

    accelerator: Accelerator
    network: Extractor | None
    """The extractor, as far as there is one."""
    kind: str
    """The extractor's, for names of files."""
    batch_size: int
    references: Path
    """Folder in which a reference's features are kept."""
    seed: int

    @property
    def extractor(self) -> Extractor:
        """The extractor, which all but a tokenizer's evaluation need."""
        assert self.network is not None, "the configuration allows extractor.kind none for a tokenizer alone"
        return self.network

    def features(self, source: Source, what: str, keep: int | None = None, logits: bool = False) -> Features:
        """The features of all pictures of a source, each computed once over all processes and known to all afterwards.

        keep: of how many pictures the features themselves are kept beside their moments; None: of all.
        logits: keep these too.

        Raises:
            ConfigError: there are fewer than two pictures, and one has no spread.
        """
        check_set(source, what)
        features = Features(self.extractor.dimension, keep)
        batches = my_batches(self.accelerator, len(source), self.batch_size)
        with progress_bar(sum(map(len, batches)), "picture", what) as shown:
            for indices in batches:
                extracted = self.extractor(source.read(indices))
                features.add(extracted if logits else without_logits(extracted), torch.from_numpy(indices))
                shown.update(len(indices))
        features.merge_over(self.accelerator)
        return features

    def stated(self) -> Mapping[str, Any]:
        """The part of a protocol that is the same for all evaluations."""
        used: Mapping[str, Any] = {"extractor": "none"}
        if self.network is not None:
            weights = f"sha256 {self.network.sha256}"
            used = {"extractor": self.network.name, "extractor weights": weights, "resize": self.network.resize}
        return {
            **used,
            "seed": self.seed,
            "intervals": "95 %, over the pictures measured: means by bootstrap, others by a jackknife of 20 groups",
            "processes": self.accelerator.num_processes,
            "machine": described_machine(self.accelerator.device),
            "versions": versions(),
            "date": now(),
        }


def my_batches(accelerator: Accelerator, number: int, batch_size: int) -> list[Indices]:
    """This process's share of 0..number-1, in batches; the shares are in the order of the processes."""
    mine = np.asarray(rank_range(number, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def without_logits(extracted: Extracted) -> Extracted:
    """A thousand numbers a picture that only a class score is made from."""
    return extracted._replace(logits=None)


def _gathered(accelerator: Accelerator, mine: Tensor) -> Tensor:
    """The rows of all processes, one process's after another's; they may have different numbers of them."""
    shapes = accelerator.gather(torch.tensor([list(mine.shape) + [0] * (2 - mine.dim())], device=accelerator.device))
    rows = shapes[:, 0].tolist()
    wide = mine if mine.dim() == 1 else mine.new_zeros(len(mine), int(shapes[:, 1].max()))
    if mine.dim() > 1 and mine.shape[1]:
        wide = mine  # a process without pictures does not know how many classes there are
    padded = wide.new_zeros(max(rows), *wide.shape[1:])
    padded[: len(wide)] = wide
    every = accelerator.gather(padded[None].to(accelerator.device)).cpu()
    return torch.cat([part[:n] for part, n in zip(every, rows, strict=True)])
