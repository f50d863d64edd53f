"""Search for the nearest codebook vectors of each vector, without a matrix of all vectors by all codes.

For a vector x and codebook vectors e,  |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2),  and |x|^2 is the same for all e. So
the nearest e is the argmax of the scores x.e - |e|^2 / 2, one matrix product, computed in tiles of some vectors by some
codes. On a CPU where oneDNN is faster than MKL, oneDNN computes it (fast path `onednn` of engine/processor.py).
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine import processor

FAST_PATHS: tuple[processor.FastPath, ...] = ("onednn",)
"""Fast paths of the processor that `find_nearest` uses, in every precision of a training: it computes in float32."""
TILE_CODES = 2048
"""Codes per tile."""
TILE_VECTORS = {"cpu": 512, "cuda": 8192}
"""Vectors per tile. A tile of scores has 4 MiB on a CPU, so that it stays in the cache, and 64 MiB on a GPU, which
keeps it busy. With all codes at once the matrix product had half the speed."""
NEIGHBOUR_SCORES = 2**21
"""Scores per tile of `find_neighbours`, in which each row has all V codes."""
GROUPS = 64
"""Groups of successive codes per tile in `_keep_greater_by_groups`."""
MIN_SCORES = 2**22
"""Fewest scores of all vectors with a tile's codes for which oneDNN is used. Packing the codes takes half a
millisecond."""


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
    bias = codebook.square().sum(dim=1).mul_(0.0 if dot_product else -0.5)  # (V,), -|e|^2 / 2
    n, device = len(vectors), vectors.device
    codes, best = torch.zeros(n, dtype=torch.int64, device=device), torch.full((n,), -torch.inf, device=device)
    rows = min(n, TILE_VECTORS.get(device.type, TILE_VECTORS["cuda"]))
    is_on_cpu = not processor.is_traced(vectors) and device.type == "cpu"
    with torch.autocast(device.type, enabled=False):
        for first in range(0, len(codebook), TILE_CODES):
            part, part_bias = codebook[first : first + TILE_CODES], bias[first : first + TILE_CODES]  # (m, d), (m,)
            has_groups = is_on_cpu and len(part) % GROUPS == 0
            if has_groups:
                order = rearrange(torch.arange(len(part)), "(group place) -> (place group)", group=GROUPS)
                part, part_bias = part[order], part_bias[order]
            uses_onednn = is_on_cpu and n * len(part) >= MIN_SCORES and processor.takes_fast_path("onednn")
            score = _prepare_scores(part, part_bias, rows, uses_onednn)
            for start in range(0, n, rows):
                scores = score(vectors[start : start + rows])  # (rows, m)
                if temperature > 0:  # Gumbel-max: the greatest score with Gumbel noise is a draw from their softmax
                    noise = torch.empty_like(scores).exponential_().log_()  # minus a Gumbel variable
                    scores.sub_(noise, alpha=temperature / 2)
                keep = _keep_greater_by_groups if has_groups else _keep_greater
                keep(scores, best[start : start + rows], codes[start : start + rows], first)
                del scores  # so that the next tile has the same memory, which is in the cache
    return codes


def _prepare_scores(part: Tensor, bias: Tensor, rows: int, uses_onednn: bool) -> Callable[[Tensor], Tensor]:
    """Return the function of vectors (n, d), n at most `rows`, that computes their scores (n, m) with m codes."""
    if uses_onednn:
        packed = processor.pack(part, rows)
        return lambda vectors: processor.multiply(vectors, packed, bias)
    return lambda vectors: torch.addmm(bias, vectors, part.T)


def _keep_greater(scores: Tensor, best: Tensor, codes: Tensor, first: int) -> None:
    """Replace best scores (n,) and codes (n,) in place where a score (n, m) of the codes from `first` on is greater."""
    greatest, columns = scores.max(dim=1)
    is_greater = greatest > best
    best.copy_(torch.where(is_greater, greatest, best))
    codes.copy_(torch.where(is_greater, first + columns, codes))


def _keep_greater_by_groups(scores: Tensor, best: Tensor, codes: Tensor, first: int) -> None:
    """Do the same as `_keep_greater`, faster on a CPU, for columns in the order (place in the group, group).

    There amax is vectorised, best with neighbouring columns in different groups, and argmax is not. So argmax searches
    only vectors with a greater score, first for the group and then in it.
    """
    places = scores.shape[1] // GROUPS
    by_group = scores.view(-1, places, GROUPS)
    group_best = by_group.amax(dim=1)  # (n, GROUPS)
    greatest = group_best.amax(dim=1)  # (n,)
    improved = (greatest > best).nonzero()[:, 0]
    group = group_best[improved].argmax(dim=1)
    place = by_group[improved, :, group].argmax(dim=1)
    best[improved] = greatest[improved]
    codes[improved] = first + group * places + place


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
