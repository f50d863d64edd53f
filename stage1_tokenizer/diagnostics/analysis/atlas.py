"""The codebook atlas in figures: which codes are used, what they look like on average, and which are their nearest."""

import json
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

CHUNK = 1024
"""Codes whose distances to all others are held at once."""


class Atlas(NamedTuple):
    """The used codes of one codebook, the most used first (ties: the lower id first)."""

    ids: Tensor
    """(U,) int64."""
    counts: Tensor
    """(U,) int64."""
    patches: Tensor
    """(U, C, f, f) in [-1, 1]: the mean of the image patches at the positions that have this code."""
    nearest: Tensor
    """(U, n) int64: the nearest other codes of the whole codebook, the nearest first."""
    distances: Tensor
    """(U, n) float32."""
    codebook_size: int

    def json(self) -> str:
        """What is written beside the picture."""
        share = self.counts.double() / self.counts.sum()
        codes = [
            {
                "id": self.ids[i].item(),
                "count": self.counts[i].item(),
                "share": round(share[i].item(), 8),
                "nearest": self.nearest[i].tolist(),
                "distances": [round(distance, 6) for distance in self.distances[i].tolist()],
                "mean_colour": [round(level, 5) for level in self.patches[i].mean(dim=(1, 2)).tolist()],
            }
            for i in range(len(self.ids))
        ]
        return json.dumps({"codebook_size": self.codebook_size, "used": len(self.ids), "codes": codes}, indent=1)


def mean_patches(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images x (N, C, H, W) and codes (N, h, w) -> used ids (U,) ascending, their counts (U,), and the mean
    (U, C, f, f) of the patches under each."""
    h, w = codes.shape[1:]
    patches = rearrange(x, "N C (h f) (w g) -> (N h w) (C f g)", h=h, w=w)
    flat = codes.flatten().contiguous()
    counts = torch.bincount(flat)
    ids = counts.nonzero()[:, 0]
    counts, places = counts[ids], torch.searchsorted(ids, flat)
    sums = torch.zeros(len(ids), patches.shape[1], dtype=torch.float64)
    sums.index_add_(0, places, patches.double())
    means = (sums / counts[:, None]).float()
    return ids, counts, rearrange(means, "U (C f g) -> U C f g", C=x.shape[1], f=x.shape[2] // h)


def nearest_codes(codebook: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n codes of codebook (V, d) that lie nearest to each of the ids (U,), other than itself, and how far away:
    (U, n) twice, or fewer where there are not n others."""
    n = min(n, len(codebook) - 1)
    found, apart = [], []
    for part in ids.chunk(-(-len(ids) // CHUNK)):
        distances = torch.cdist(codebook[part], codebook, compute_mode="donot_use_mm_for_euclid_dist")  # (u, V)
        distances[torch.arange(len(part)), part] = torch.inf
        ordered = distances.topk(n, dim=1, largest=False)
        found.append(ordered.indices)
        apart.append(ordered.values)
    return torch.cat(found), torch.cat(apart)


def atlas_of(x: Tensor, codes: Tensor, codebook: Tensor, neighbours: int) -> Atlas:
    """x (N, C, H, W), codes (N, h, w) of one codebook (V, d)."""
    ids, counts, patches = mean_patches(x, codes)
    order = counts.argsort(descending=True, stable=True)
    ids, counts, patches = ids[order], counts[order], patches[order]
    return Atlas(ids, counts, patches, *nearest_codes(codebook, ids, neighbours), len(codebook))
