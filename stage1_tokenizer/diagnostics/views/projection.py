"""Projections of vectors on two or three dimensions: principal components or UMAP."""

import importlib.util
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.engine.errors import ConfigError

ProjectionKind = Literal["pca", "umap"]


class Pca(NamedTuple):
    """Principal components of a set of vectors."""

    mean: Tensor
    """(d,)"""
    axes: Tensor
    """(d, components), orthonormal; a zero column where the vectors have no further dimension that varies."""
    explained: Tensor
    """(components,), share of the variance along each axis."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Project vectors (..., d) to (..., components)."""
        return (vectors.double() - self.mean) @ self.axes


def pca(vectors: Tensor, components: int) -> Pca:
    """Compute the principal components of vectors (N, d), in float64.

    The largest entry of each axis is positive: a decomposition leaves the sign open, but the same vectors must give the
    same image.
    """
    mean = vectors.double().mean(dim=0)
    centred = vectors.double() - mean
    # The covariance is (d, d), however many vectors there are; a decomposition of the vectors would be (N, d).
    variances, axes = torch.linalg.eigh(centred.T @ centred / max(1, len(vectors)))  # ascending
    variances, axes = variances.flip(0).clamp_min(0.0), axes.flip(1)
    total = float(variances.sum())
    is_used = variances > 1e-12 * max(total, 1e-30)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))  # (1, d)
    axes = axes * largest.sign() * is_used
    missing = max(0, components - axes.shape[1])
    return Pca(
        mean,
        torch.nn.functional.pad(axes, (0, missing))[:, :components],
        torch.nn.functional.pad(variances * is_used / max(total, 1e-30), (0, missing))[:components],
    )


def check_projection(kind: ProjectionKind) -> None:
    """Raise ConfigError if the projection is UMAP and the package is not installed."""
    if kind == "umap" and importlib.util.find_spec("umap") is None:
        raise ConfigError(
            "--projection umap: the package umap-learn is not installed; install it with "
            "`pip install 'tessera-images[umap]'` (in a checkout: `pip install -e '.[umap]'`), or use --projection pca"
        )


def umap(vectors: Tensor, seed: int) -> Tensor:
    """Project vectors (N, d) to (N, 2) with UMAP."""
    from umap import UMAP  # noqa: PLC0415 (an optional extra, and slow to import)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns that a seed means one thread
        neighbours = min(15, len(vectors) - 1)
        projected = UMAP(n_neighbors=neighbours, random_state=seed % 2**32, init="pca").fit_transform(vectors.numpy())
    return torch.from_numpy(projected).double()
