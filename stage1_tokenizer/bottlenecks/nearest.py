"""Search for the nearest codebook vectors of each vector, without a matrix of all vectors by all codes.

For a vector x and codebook vectors e,  |x - e|^2 = |x|^2 + 2 (|e|^2 / 2 - x.e),  and |x|^2 is the same for all e. So
the nearest e is the argmin of |e|^2 / 2 - x.e, one matrix product, computed in tiles of some vectors by some codes.
"""

import torch
from torch import Tensor

TILE_CODES = 2048
"""Codes per tile."""
TILE_VECTORS = {"cpu": 1024, "cuda": 8192}
"""Vectors per tile. A tile of scores has 8 MiB on a CPU, about the size of its cache, and 64 MiB on a GPU, which keeps
it busy. Nearly square tiles keep the matrix product at full speed; with all codes at once it had half of it."""
NEIGHBOUR_SCORES = 2**21
"""Scores per tile of `find_neighbours`, in which each row has all V codes."""
BLOCK = 64
"""Columns per block in `_smallest`."""


@torch.no_grad()
def find_nearest(vectors: Tensor, codebook: Tensor, temperature: float = 0.0, dot_product: bool = False) -> Tensor:
    """Find the nearest codebook vectors: vectors (N, d), codebook (V, d), both float32 -> codes (N,) int64.

    The distance is Euclidean; for unit vectors the nearest one has the greatest cosine. Of several at the same distance
    the first is taken. With a temperature t > 0, a code is drawn with probability proportional to
    exp(-distance^2 / t) instead (RQ-VAE: Lee et al. 2022, section 3.2.3). dot_product: the greatest dot product x.e
    instead of the smallest distance.

    Raises:
        ValueError: not float32. In bfloat16, similar codebook vectors are equally near to every vector.
    """
    if vectors.dtype != torch.float32 or codebook.dtype != torch.float32:
        raise ValueError(f"distances are taken in float32, got {vectors.dtype} and {codebook.dtype}")
    if torch.compiler.is_exporting():
        return _find_nearest_exported(vectors, codebook, dot_product)
    half = codebook.square().sum(dim=1).mul_(0.0 if dot_product else 0.5)  # (V,), |e|^2 / 2
    n, rows = len(vectors), TILE_VECTORS.get(vectors.device.type, TILE_VECTORS["cuda"])
    codes = torch.empty(n, dtype=torch.int64, device=vectors.device)
    tile = torch.empty(min(n, rows) * min(len(codebook), TILE_CODES), device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        for start in range(0, n, rows):
            chunk = vectors[start : start + rows]  # (rows, d)
            best = torch.full((len(chunk),), torch.inf, device=vectors.device)
            best_codes = codes[start : start + rows]
            best_codes.zero_()
            for first in range(0, len(codebook), TILE_CODES):
                part = codebook[first : first + TILE_CODES]  # (columns, d)
                scores = tile[: len(chunk) * len(part)].view(len(chunk), len(part))
                torch.addmm(half[first : first + TILE_CODES], chunk, part.T, alpha=-1, out=scores)
                if temperature > 0:  # Gumbel-max: the smallest score with Gumbel noise is a draw from their softmax
                    noise = torch.empty_like(scores).exponential_().log_()  # minus a Gumbel variable
                    scores.add_(noise, alpha=temperature / 2)
                smallest, columns = _smallest(scores)
                nearer = smallest < best
                best = torch.where(nearer, smallest, best)
                best_codes.copy_(torch.where(nearer, columns + first, best_codes))
    return codes


@torch.no_grad()
def find_neighbours(codes: Tensor, codebook: Tensor, count: int) -> Tensor:
    """Find the `count` codebook vectors nearest to that of each code, without its own: codes (N,), codebook (V, d)
    float32 -> codes (N, count), the nearest first. Vectors at the same distance are in any order.
    """
    half = codebook.square().sum(dim=1).mul_(0.5)  # (V,), |e|^2 / 2
    neighbours = []
    with torch.autocast(codebook.device.type, enabled=False):
        for chunk in torch.split(codes, max(1, NEIGHBOUR_SCORES // len(codebook))):
            scores = torch.addmm(half, codebook[chunk], codebook.T, alpha=-1)  # (rows, V)
            scores.scatter_(1, chunk[:, None], torch.inf)
            neighbours.append(scores.topk(count, dim=1, largest=False).indices)  # (rows, count)
    return torch.cat(neighbours)


def _find_nearest_exported(vectors: Tensor, codebook: Tensor, dot_product: bool = False) -> Tensor:
    """Find the codes as `find_nearest` does, by plain operators and without tiles of vectors: torch.export knows no N.

    The memory is that of N vectors by 2048 codes.
    """
    half = (0.0 if dot_product else 0.5) * codebook.square().sum(dim=1)  # (V,)
    best, best_codes = torch.min(half[:TILE_CODES] - vectors @ codebook[:TILE_CODES].T, dim=1)  # (N,), (N,)
    for first in range(TILE_CODES, codebook.shape[0], TILE_CODES):
        part = slice(first, first + TILE_CODES)
        smallest, places = torch.min(half[part] - vectors @ codebook[part].T, dim=1)
        nearer = smallest < best
        best, best_codes = torch.where(nearer, smallest, best), torch.where(nearer, places + first, best_codes)
    return best_codes


def _smallest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Find the smallest value of each row and its column: (n, m) -> (n,), (n,).

    On a CPU amin is vectorised and argmin is not. So the smallest value of each block of columns comes first, and then
    its column in that block.
    """
    n, m = scores.shape
    if scores.device.type != "cpu" or m % BLOCK or m == BLOCK:
        smallest, columns = scores.min(dim=1)
        return smallest, columns
    blocks = scores.view(n, m // BLOCK, BLOCK)
    smallest, block = blocks.amin(dim=2).min(dim=1)
    return smallest, block * BLOCK + blocks[torch.arange(n), block].argmin(dim=1)
