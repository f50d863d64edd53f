"""The nearest code of each vector, without ever holding a matrix of all vectors by all codes.

For a vector x and codes e,  |x - e|^2 = |x|^2 + 2 (|e|^2 / 2 - x.e),  and |x|^2 is the same for all codes: so the
nearest is the argmin of |e|^2 / 2 - x.e, one matrix product, taken for a few vectors at a time.
"""

import torch
from torch import Tensor

_SCORES = {"cpu": 1 << 21, "cuda": 1 << 24}
"""Scores held at once: 8 MiB, which a CPU's cache holds about; on a GPU 64 MiB, enough to keep it busy."""


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor, temperature: float = 0.0) -> Tensor:
    """vectors (N, d), codebook (V, d), both float32 -> ids (N,) int64 of the nearest codes, by Euclidean distance.

    On unit vectors and unit codes that is the greatest cosine. With a temperature t an id is drawn instead, with
    probability proportional to exp(-distance^2 / t) (RQ-VAE: Lee et al. 2022, section 3.2.3).

    Raises:
        ValueError: not float32. In bfloat16, codes that are near to each other are equally near to every vector.
    """
    if vectors.dtype != torch.float32 or codebook.dtype != torch.float32:
        raise ValueError(f"distances are taken in float32, got {vectors.dtype} and {codebook.dtype}")
    n, size = len(vectors), len(codebook)
    half = codebook.square().sum(dim=1).mul_(0.5)  # (V,)
    rows = min(n, max(32, _SCORES.get(vectors.device.type, 1 << 24) // size))
    ids = torch.empty(n, dtype=torch.int64, device=vectors.device)
    buffer = torch.empty(rows, size, device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        for start in range(0, n, rows):
            chunk = vectors[start : start + rows]
            scores = torch.addmm(half, chunk, codebook.T, alpha=-1, out=buffer[: len(chunk)])  # (rows, V)
            if temperature > 0:  # the smallest of scores with Gumbel noise is a draw from their softmax
                noise = torch.empty_like(scores).exponential_().log_()  # minus a Gumbel variable
                scores.add_(noise, alpha=temperature / 2)
            ids[start : start + rows] = _argmin(scores)
    return ids


def _argmin(scores: Tensor) -> Tensor:
    """argmin over the last dimension of (n, V). On a CPU amin is vectorised and argmin is not, so the smallest of each
    block is found first, and then its place in the block where it lies."""
    n, size = scores.shape
    block = 64
    if scores.device.type != "cpu" or size % block or size == block:
        return scores.argmin(dim=1)
    blocks = scores.view(n, size // block, block)
    best = blocks.amin(dim=2).argmin(dim=1)  # (n,)
    return best * block + blocks[torch.arange(n), best].argmin(dim=1)
