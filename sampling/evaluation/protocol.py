"""How one evaluation measures, what it states of that, and the data set that it compares with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Features
from sampling.evaluation.reference import (
    SPLITS,
    Reference,
    load_or_measure,
    provenance_of,
    reference_of_file,
    reference_of_source,
)
from sampling.evaluation.results import described_machine, now, versions
from sampling.evaluation.samples import given
from sampling.evaluation.sources import Source, SplitSource, features_of
from stage1_tokenizer.config.marks import Mark, without_marked
from stage1_tokenizer.data import DataConfig, OpenData, open_data
from stage1_tokenizer.data.pictures import Pictures, Split
from stage1_tokenizer.engine.given_weights import sha256_of
from stage1_tokenizer.perceptual import PerceptualConfig


@dataclass(frozen=True)
class Measuring:
    """With what features are made, and by whom."""

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

    def features(self, source: Source, what: str, logits: bool = False) -> Features:
        """Of all pictures of a source."""
        return features_of(self.accelerator, source, self.extractor, self.batch_size, None, what, logits)

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


def described_lpips(config: PerceptualConfig) -> str:
    """Which LPIPS it is."""
    given = f"backbone of sha256 {sha256_of(Path(config.weights))}" if config.weights else "torchvision's backbone"
    return f"version 0.1, {config.net}, {given}"


@dataclass
class DataSet:
    """Both splits of the data, each read when it is first asked for. What was found is said once."""

    config: DataConfig
    whole: str | None = None
    """The folder of which all images are the validation split; None: the splits are those of the training."""
    _splits: dict[Split, Pictures] = field(default_factory=dict)

    def pictures(self, split: Split) -> Pictures:
        """One split."""
        if split not in self._splits:
            self._splits[split] = self._opened.pictures(split, seed=0)
        return self._splits[split]

    @cached_property
    def _opened(self) -> OpenData:
        return open_data(self.config)

    def source(self, split: Split) -> SplitSource:
        """All of one split."""
        pictures = self.pictures(split)
        return SplitSource(pictures, np.arange(len(pictures), dtype=np.int64))

    def described(self, split: Split) -> dict[str, Any]:
        """What decides its pictures, which are looked at in their plain view."""
        tree = without_marked(type(self.config), self.config.tree(), Mark.FREE, Mark.PATH, Mark.VIEW)
        identity = self._opened.images(split).identity
        shown = "all images of the folder" if self.whole is not None else split
        return tree | {"split": shown} | ({"identity": identity} if identity else {})

    def reference(self, measuring: Measuring, name: str) -> Reference:
        """Features of the split `train` or `validation`, those kept from before where they are there."""
        accelerator, extractor, batch_size = measuring.accelerator, measuring.extractor, measuring.batch_size
        split: Split = "train" if name == "train" else "validation"
        source = self.source(split)
        provenance = provenance_of(self.described(split), len(source), extractor)
        label = f"{self.config.kind}-{split}-{measuring.kind}"
        return load_or_measure(accelerator, source, extractor, provenance, measuring.references, label, batch_size)


def reference_named(measuring: Measuring, name: str, data: DataSet | None) -> Reference:
    """Return the reference that is called `name`: a split of the data set, a folder of pictures, or an .npz file.

    Raises:
        ConfigError: there is no such split, folder or file, or no picture in it.
        BadFileError: the file or a picture is damaged, or the folder's pictures have several sizes.
    """
    if name in SPLITS:
        assert data is not None, "the configuration asks for one where a split is the reference"
        return data.reference(measuring, name)
    accelerator, extractor, batch_size = measuring.accelerator, measuring.extractor, measuring.batch_size
    if not Path(name).is_dir():
        return reference_of_file(accelerator, Path(name), extractor, batch_size)
    found = given(Path(name), None, measuring.seed, "--reference")
    says = {"folder": found.where.name, "identity": found.identity, "holds": "pictures"}
    return reference_of_source(accelerator, found.source, says, extractor, batch_size)
