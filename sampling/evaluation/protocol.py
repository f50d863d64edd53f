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
from sampling.evaluation.reference import Reference, load_or_measure, provenance_of, reference_of_file
from sampling.evaluation.results import described_machine, now, versions
from sampling.evaluation.sources import Source, SplitSource, features_of
from stage1_tokenizer.data import DataConfig, OpenData, open_data
from stage1_tokenizer.data.pictures import Pictures, Split
from stage1_tokenizer.given_weights import sha256_of
from stage1_tokenizer.perceptual import PerceptualConfig
from stage1_tokenizer.run_config import DATA_PATHS

CHANGE_NOTHING = ("cache", "workers", "download", "bad_share", "flip", "random_crop", "links", *DATA_PATHS)
"""Keys of the data that change no picture in its plain view."""


@dataclass(frozen=True)
class Measuring:
    """With what features are made, and by whom."""

    accelerator: Accelerator
    extractor: Extractor
    kind: str
    """The extractor's, for names of files."""
    batch_size: int
    references: Path
    """Folder in which a reference's features are kept."""
    seed: int

    def features(self, source: Source, what: str, logits: bool = False) -> Features:
        """Of all pictures of a source."""
        return features_of(self.accelerator, source, self.extractor, self.batch_size, None, what, logits)

    def stated(self) -> Mapping[str, Any]:
        """The part of a protocol that is the same for all evaluations."""
        return {
            "extractor": self.extractor.name,
            "extractor weights": f"sha256 {self.extractor.sha256}",
            "resize": self.extractor.resize,
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
        tree = {key: value for key, value in self.config.tree().items() if key not in CHANGE_NOTHING}
        identity = self._opened.images(split).identity
        return tree | {"split": split} | ({"identity": identity} if identity else {})

    def reference(self, measuring: Measuring, name: str) -> Reference:
        """Features of the split `train` or `validation`, those kept from before where they are there; or of an .npz
        file. Errors are those of `reference_of_file`."""
        accelerator, extractor, batch_size = measuring.accelerator, measuring.extractor, measuring.batch_size
        if name not in ("train", "validation"):
            return reference_of_file(accelerator, Path(name), extractor, batch_size)
        split: Split = "train" if name == "train" else "validation"
        source = self.source(split)
        provenance = provenance_of(self.described(split), len(source), extractor)
        label = f"{self.config.kind}-{split}-{measuring.kind}"
        return load_or_measure(accelerator, source, extractor, provenance, measuring.references, label, batch_size)
