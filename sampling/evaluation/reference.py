"""What samples are compared with: the features of a data set's split, or of pictures or moments that a file holds.

    runs/references/cifar10-train-efficientnet_lite0-1f2e3d4c.safetensors     mean, covariance, features, indices

A split's are computed once and kept on disk. The file's header says what they follow from (data, count, extractor and
the hash of its weights, resize), its name is made from that, and it is used again only where all of it is the same.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Measuring
from sampling.evaluation.moments import Moments
from sampling.evaluation.npz import holds_moments, open_samples, read_moments, write_moments
from sampling.evaluation.sources import NpzSource, Source, SplitSource, given, size_of
from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.open_data import OpenData, open_data
from stage1_tokenizer.engine.checkpoint import read_tensors, write_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.files import file_sha256
from stage1_tokenizer.engine.launch import run_on_main

FORMAT = "1"
KEPT = 50_000
"""Images whose features are kept: all of them in the usual reference sets (of 1,280 numbers each, 256 MB)."""
SPLITS = ("train", "validation")
"""Names of references that are splits of the data set."""
Provenance = dict[str, Any]


class Reference(NamedTuple):
    """One side of a comparison."""

    moments: Moments
    features: Tensor | None
    """(n, D) float32 of the kept pictures; None where only moments are known."""
    indices: Tensor | None
    """(n,) int64, rising: which pictures of the source those are."""
    provenance: Provenance
    """What all of this follows from."""
    size: tuple[int, int] | None
    """Height and width of the pictures; None where only moments are known."""


def provenance_of(data: Provenance, number: int, extractor: Extractor) -> Provenance:
    """What features follow from. data: kind, split, identity and all else that decides the pictures."""
    weights = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "resize": extractor.resize}
    weights |= {name: version(name) for name in ("torch", "torchvision")}
    tree: Provenance = json.loads(json.dumps({"format": FORMAT, "data": data, "pictures": number, **weights}))
    return tree


def load_or_measure(measuring: Measuring, source: Source, provenance: Provenance, name: str) -> Reference:
    """The features of a source: from a kept file, if one was made from just this, else computed into it."""
    accelerator, dimension = measuring.accelerator, measuring.extractor.dimension
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
    path = measuring.references / f"{name}-{digest}.safetensors"
    # One process looks, so that all do the same.
    if run_on_main(accelerator, lambda: _read(path, provenance, dimension, size_of(source)) is not None):
        found = _read(path, provenance, dimension, size_of(source))
        if found is None:
            raise BadFileError(f"{path}: was there, and cannot be read by every process; is the disk sound?")
        accelerator.print(f"reference: {path}")
        return found
    features = measuring.features(source, "reference", KEPT)
    moments = features.moments
    tensors = {
        "mean": torch.from_numpy(moments.mean),
        "covariance": torch.from_numpy(np.ascontiguousarray(moments.covariance)),
        "features": features.features,
        "indices": features.indices,
    }
    header = {"kind": "reference", "format": FORMAT, "provenance": json.dumps(provenance)}
    run_on_main(accelerator, lambda: write_tensors(path, tensors, header))
    run_on_main(accelerator, lambda: write_moments(path.with_suffix(".npz"), moments))  # for published tools
    accelerator.print(f"reference: {path} (kept for the next evaluation)")
    return Reference(moments, features.features, features.indices, provenance, size_of(source))


def reference_of_file(measuring: Measuring, path: Path) -> Reference:
    """What an .npz file of the ADM suite holds: pictures (`arr_0`), or the moments `mu` and `sigma` of features that
    must have been this extractor's, for the file does not say whose they are.

    Raises:
        ConfigError: there is no such file.
        BadFileError: it is damaged or holds neither, or moments of another number of features.
    """
    check_reference(str(path))
    says = {"file": path.name, "sha256": file_sha256(path)}
    if holds_moments(path):  # and no pictures, which say more
        moments = read_moments(path)
        extractor = measuring.extractor
        if len(moments.mean) != extractor.dimension:
            raise BadFileError(
                f"{path}: has moments of {len(moments.mean)} features, but {extractor.name} has {extractor.dimension}"
            )
        return Reference(
            moments, None, None, {"data": {**says, "holds": "mu and sigma"}, "pictures": moments.count}, None
        )
    source = NpzSource(open_samples(path))
    return reference_of_source(measuring, source, {**says, "holds": "pictures"})


def reference_of_source(measuring: Measuring, source: Source, says: Provenance) -> Reference:
    """Measure a reference that is not kept. says: what the pictures are."""
    features = measuring.features(source, "reference", KEPT)
    provenance = provenance_of(says, len(source), measuring.extractor)
    return Reference(features.moments, features.features, features.indices, provenance, size_of(source))


def check_reference(name: str) -> None:
    """Raises ConfigError unless it is train, validation, or a file or folder that is there."""
    try:
        found = name in SPLITS or Path(name).exists()
    except OSError:  # a name that no file can have
        found = False
    if not found:
        raise ConfigError(
            f"reference {describe_path(shorten(name))}: there is no such file or folder; give train, validation, an "
            ".npz or a folder of pictures"
        )


def _read(path: Path, provenance: Provenance, dimension: int, size: tuple[int, int]) -> Reference | None:
    """What `load_or_measure` wrote; None where it is not there, damaged, or of something else."""
    if not path.is_file():
        return None
    try:
        tensors, header = read_tensors(path)
        found = json.loads(header.get("provenance", "null"))
    except (BadFileError, ValueError, RecursionError) as error:
        print(f"{error}; it is made anew")
        return None
    shapes = {"mean": (dimension,), "covariance": (dimension, dimension)}
    whole = tensors.keys() == {"mean", "covariance", "features", "indices"} and all(
        tensors[key].shape == shape for key, shape in shapes.items()
    )
    if not whole or found != provenance:
        return None
    moments = Moments(int(provenance["pictures"]), tensors["mean"].numpy(), tensors["covariance"].numpy())
    return Reference(moments, tensors["features"], tensors["indices"], provenance, size)


@dataclass
class DataSet:
    """Both splits of the data, each read when it is first asked for. What was found is said once."""

    config: DataConfig
    whole: str | None = None
    """The folder of which all images are the validation split; None: the splits are those of the training."""
    _splits: dict[Split, ImageBatches] = field(default_factory=dict)

    def image_batches(self, split: Split) -> ImageBatches:
        """One split."""
        if split not in self._splits:
            self._splits[split] = self._opened.image_batches(split, seed=0)
        return self._splits[split]

    @cached_property
    def _opened(self) -> OpenData:
        return open_data(self.config)

    def source(self, split: Split) -> SplitSource:
        """All of one split."""
        pictures = self.image_batches(split)
        return SplitSource(pictures, np.arange(len(pictures), dtype=np.int64))

    def described(self, split: Split) -> dict[str, Any]:
        """What decides its pictures, which are looked at in their plain view."""
        tree = remove_marked(type(self.config), self.config.tree(), Mark.FREE, Mark.PATH, Mark.VIEW)
        identity = self._opened.splits[split].identity
        shown = "all images of the folder" if self.whole is not None else split
        return tree | {"split": shown} | ({"identity": identity} if identity else {})

    def reference(self, measuring: Measuring, name: str) -> Reference:
        """Features of the split `train` or `validation`, those kept from before where they are there."""
        split: Split = "train" if name == "train" else "validation"
        source = self.source(split)
        provenance = provenance_of(self.described(split), len(source), measuring.extractor)
        return load_or_measure(measuring, source, provenance, f"{self.config.kind}-{split}-{measuring.kind}")


def reference_named(measuring: Measuring, name: str, data: DataSet | None) -> Reference:
    """Return the reference that is called `name`: a split of the data set, a folder of pictures, or an .npz file.

    Raises:
        ConfigError: there is no such split, folder or file, or no picture in it.
        BadFileError: the file or a picture is damaged, or the folder's pictures have several sizes.
    """
    if name in SPLITS:
        assert data is not None, "the configuration asks for one where a split is the reference"
        return data.reference(measuring, name)
    if not Path(name).is_dir():
        return reference_of_file(measuring, Path(name))
    found = given(Path(name), None, measuring.seed, "--reference")
    says = {"folder": found.where.name, "identity": found.identity, "holds": "pictures"}
    return reference_of_source(measuring, found.source, says)
