"""References that samples are compared with: the features of a data set's split, or of images or moments in a file.

    runs/references/cifar10-train-efficientnet_lite0-1f2e3d4c.safetensors     mean, covariance, features, indices

The features of a split are computed once and kept on disk. The file's header states everything they depend on (data,
count, extractor and the hash of its weights, resize), and its name has a hash of that. The file is used again only if
all of it is equal.
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
from sampling.evaluation.features import Evaluator
from sampling.evaluation.moments import Moments
from sampling.evaluation.npz import holds_moments, open_samples, read_moments, write_moments
from sampling.evaluation.sources import ImageSource, NpzSource, SplitSource, image_shape, open_images
from stage1_tokenizer.config.field_facts import Mark, remove_marked
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.base import SPLITS, Split
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.open_data import OpenData, open_data
from stage1_tokenizer.engine.checkpoint import read_tensors, write_tensors
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.files import file_sha256
from stage1_tokenizer.engine.launch import run_on_main

FORMAT = "1"
KEPT = 50_000
"""Largest number of images whose features are kept: all of the usual reference sets (1,280 features each: 256 MB)."""
Provenance = dict[str, Any]
"""Everything that features depend on, as a JSON tree."""


class Reference(NamedTuple):
    """The images that samples are compared with, as moments and features."""

    moments: Moments
    features: Tensor | None
    """(n, D) float32: features of the kept images; None if only moments are known."""
    indices: Tensor | None
    """(n,) int64, rising: indices in the source of the kept images."""
    provenance: Provenance
    size: tuple[int, int] | None
    """Height and width of the images; None if only moments are known."""


def features_provenance(data: Provenance, count: int, extractor: Extractor) -> Provenance:
    """Return the provenance of features. data: everything that the images depend on, as kind, split and identity."""
    weights = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "resize": extractor.resize}
    weights |= {name: version(name) for name in ("torch", "torchvision")}
    tree: Provenance = json.loads(json.dumps({"format": FORMAT, "data": data, "pictures": count, **weights}))
    return tree


def measure_reference(evaluator: Evaluator, source: ImageSource, data: Provenance) -> Reference:
    """Compute the reference of a source. data: as for `features_provenance`."""
    features = evaluator.extract(source, "reference", KEPT)
    provenance = features_provenance(data, len(source), evaluator.extractor)
    return Reference(features.moments, features.features, features.indices, provenance, image_shape(source)[1:])


def load_or_measure(evaluator: Evaluator, source: ImageSource, data: Provenance, name: str) -> Reference:
    """Return the reference of a source: from its kept file, or computed and kept in runs/references/NAME-DIGEST."""
    accelerator, dimension, size = evaluator.accelerator, evaluator.extractor.dimension, image_shape(source)[1:]
    provenance = features_provenance(data, len(source), evaluator.extractor)
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
    path = evaluator.references / f"{name}-{digest}.safetensors"
    # The main process decides for all, because they must do the same.
    if run_on_main(accelerator, lambda: _read_reference(path, provenance, dimension, size) is not None):
        kept = _read_reference(path, provenance, dimension, size)
        if kept is None:
            raise BadFileError(
                f"{path}: the main process could read this file, but another one could not; check the disk"
            )
        accelerator.print(f"reference: {path}")
        return kept
    reference = measure_reference(evaluator, source, data)
    assert reference.features is not None
    assert reference.indices is not None
    tensors = {
        "mean": torch.from_numpy(reference.moments.mean),
        "covariance": torch.from_numpy(np.ascontiguousarray(reference.moments.covariance)),
        "features": reference.features,
        "indices": reference.indices,
    }
    header = {"kind": "reference", "format": FORMAT, "provenance": json.dumps(provenance)}
    run_on_main(accelerator, lambda: write_tensors(path, tensors, header))
    run_on_main(accelerator, lambda: write_moments(path.with_suffix(".npz"), reference.moments))  # for published tools
    accelerator.print(f"reference: {path} (kept for the next evaluation)")
    return reference


def npz_reference(evaluator: Evaluator, path: Path) -> Reference:
    """Return the reference in an .npz file of the ADM suite: images (`arr_0`), or without these mu and sigma.

    mu and sigma must be moments of this extractor's features; the file does not state the extractor.

    Raises:
        ConfigError: there is no such file.
        BadFileError: the file is damaged, holds neither, or holds moments of another number of features.
    """
    check_reference(str(path))
    data = {"file": path.name, "sha256": file_sha256(path)}
    if not holds_moments(path):
        return measure_reference(evaluator, NpzSource(open_samples(path)), {**data, "holds": "pictures"})
    moments, extractor = read_moments(path), evaluator.extractor
    if len(moments.mean) != extractor.dimension:
        raise BadFileError(
            f"{path}: has moments of {len(moments.mean)} features, but {extractor.name} has {extractor.dimension}; "
            "give moments of the same extractor, or images"
        )
    provenance = {"data": {**data, "holds": "mu and sigma"}, "pictures": moments.count}
    return Reference(moments, None, None, provenance, None)


def check_reference(name: str) -> None:
    """Raise ConfigError unless the name is train or validation, or a file or folder exists there."""
    try:
        exists = name in SPLITS or Path(name).exists()
    except OSError:  # the name is too long for a file
        exists = False
    if not exists:
        raise ConfigError(
            f"reference {describe_path(shorten(name))}: there is no such file or folder; give train, validation, "
            "an .npz or a folder of images"
        )


def _read_reference(path: Path, provenance: Provenance, dimension: int, size: tuple[int, int]) -> Reference | None:
    """Read a kept reference; None: the file is missing, damaged, or has another provenance."""
    if not path.is_file():
        return None
    try:
        tensors, header = read_tensors(path)
        stated = json.loads(header.get("provenance", "null"))
    except (BadFileError, ValueError, RecursionError) as error:
        print(f"{error}; the reference is computed again")
        return None
    shapes = {"mean": (dimension,), "covariance": (dimension, dimension)}
    if tensors.keys() != {*shapes, "features", "indices"} or stated != provenance:
        return None
    if any(tensors[key].shape != shape for key, shape in shapes.items()):
        return None
    moments = Moments(int(provenance["pictures"]), tensors["mean"].numpy(), tensors["covariance"].numpy())
    return Reference(moments, tensors["features"], tensors["indices"], provenance, size)


@dataclass
class DataSet:
    """The splits of a data set. Each is read when it is first asked for."""

    config: DataConfig
    whole: str | None = None
    """Folder whose images all belong to the validation split; None: the splits are those of the training."""
    _splits: dict[Split, ImageBatches] = field(default_factory=dict)

    def image_batches(self, split: Split) -> ImageBatches:
        """Return a split."""
        if split not in self._splits:
            self._splits[split] = self._opened.image_batches(split, seed=0)
        return self._splits[split]

    @cached_property
    def _opened(self) -> OpenData:
        return open_data(self.config)

    def source(self, split: Split) -> SplitSource:
        """Return all images of a split as a source."""
        images = self.image_batches(split)
        return SplitSource(images, np.arange(len(images), dtype=np.int64))

    def provenance(self, split: Split) -> Provenance:
        """Return everything that a split's images depend on; they are used without augmentation."""
        tree = remove_marked(type(self.config), self.config.tree(), Mark.FREE, Mark.PATH, Mark.NOT_EVALUATED)
        identity = self._opened.splits[split].identity
        name = "all images of the folder" if self.whole is not None else split
        return tree | {"split": name} | ({"identity": identity} if identity else {})

    def reference(self, evaluator: Evaluator, split: Split) -> Reference:
        """Return the reference of a split, kept or computed."""
        name = f"{self.config.kind}-{split}-{evaluator.kind}"
        return load_or_measure(evaluator, self.source(split), self.provenance(split), name)


def load_reference(evaluator: Evaluator, name: str, data: DataSet | None) -> Reference:
    """Return the reference that --reference names: a split of the data set, a folder of images, or an .npz file.

    Raises:
        ConfigError: there is no such split, folder or file, or it has no images.
        BadFileError: the file or an image is damaged, or the folder's images have several sizes.
    """
    if name in SPLITS:
        assert data is not None, "the configuration requires a data set for this"
        return data.reference(evaluator, "train" if name == "train" else "validation")
    if not Path(name).is_dir():
        return npz_reference(evaluator, Path(name))
    images = open_images(Path(name), None, evaluator.seed, "--reference")
    data_facts = {"folder": images.path.name, "identity": images.identity, "holds": "pictures"}
    return measure_reference(evaluator, images.source, data_facts)
