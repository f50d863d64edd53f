"""The nearest code of each vector, without ever holding a matrix of all vectors by all codes.

For a vector x and codes e,  |x - e|^2 = |x|^2 + 2 (|e|^2 / 2 - x.e),  and |x|^2 is the same for all codes: so the
nearest is the argmin of |e|^2 / 2 - x.e, one matrix product, taken in tiles of some vectors by some codes.
"""

import torch
from torch import Tensor

CODES = 2048
VECTORS = {"cpu": 1024, "cuda": 8192}
"""Size of a tile: 8 MiB of scores, which a CPU's cache about holds; on a GPU 64 MiB, enough to keep it busy. Tiles that
are nearly square keep the matrix product at its full speed: with all codes at once it had half of it."""
BLOCK = 64


@torch.no_grad()
def nearest(vectors: Tensor, codebook: Tensor, temperature: float = 0.0) -> Tensor:
    """vectors (N, d), codebook (V, d), both float32 -> ids (N,) int64 of the nearest codes, by Euclidean distance.

    On unit vectors and unit codes that is the greatest cosine. Of codes at the same distance the first is taken. With a
    temperature t an id is drawn instead, with probability proportional to exp(-distance^2 / t) (RQ-VAE: Lee et al.
    2022, section 3.2.3).

    Raises:
        ValueError: not float32. In bfloat16, codes that are near to each other are equally near to every vector.
    """
    if vectors.dtype != torch.float32 or codebook.dtype != torch.float32:
        raise ValueError(f"distances are taken in float32, got {vectors.dtype} and {codebook.dtype}")
    half = codebook.square().sum(dim=1).mul_(0.5)  # (V,)
    n, rows = len(vectors), VECTORS.get(vectors.device.type, VECTORS["cuda"])
    ids = torch.empty(n, dtype=torch.int64, device=vectors.device)
    tile = torch.empty(min(n, rows) * min(len(codebook), CODES), device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        for start in range(0, n, rows):
            chunk = vectors[start : start + rows]  # (rows, d)
            best = torch.full((len(chunk),), torch.inf, device=vectors.device)
            best_ids = ids[start : start + rows]
            best_ids.zero_()
            for first in range(0, len(codebook), CODES):
                codes = codebook[first : first + CODES]  # (columns, d)
                scores = tile[: len(chunk) * len(codes)].view(len(chunk), len(codes))
                torch.addmm(half[first : first + CODES], chunk, codes.T, alpha=-1, out=scores)
                if temperature > 0:  # the smallest of scores with Gumbel noise is a draw from their softmax
                    noise = torch.empty_like(scores).exponential_().log_()  # minus a Gumbel variable
                    scores.add_(noise, alpha=temperature / 2)
                smallest, places = _smallest(scores)
                nearer = smallest < best
                best = torch.where(nearer, smallest, best)
                best_ids.copy_(torch.where(nearer, places + first, best_ids))
    return ids


def _smallest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) -> the smallest of each row (n,) and its place (n,). On a CPU amin is vectorised and argmin is not, so the
    smallest of each block of columns is found first, and then its place in the block where it lies."""
    n, m = scores.shape
    if scores.device.type != "cpu" or m % BLOCK or m == BLOCK:
        smallest, places = scores.min(dim=1)
        return smallest, places
    blocks = scores.view(n, m // BLOCK, BLOCK)
    smallest, block = blocks.amin(dim=2).min(dim=1)
    return smallest, block * BLOCK + blocks[torch.arange(n), block].argmin(dim=1)
