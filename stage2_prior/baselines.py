"""What a prior must beat: a model that knows the code before, and no more."""

import torch
from einops import rearrange
from torch import Tensor

from stage2_prior.tokens import TokenSet

MOST_TOKENS = 4_000_000
"""Training tokens that are counted: enough for the pairs of a thousand codes, and seconds of work."""


def bigram_bits(train: TokenSet, validation: TokenSet, codebook_size: int) -> float:
    """Bits per token that a bigram model of the training split needs on the validation split.

    p(b | a) = (n_ab + alpha p(b)) / (n_a + alpha): pairs are few, so they are backed by single frequencies (MacKay and
    Bauman Peto, "A Hierarchical Dirichlet Language Model", 1995). alpha is the power of 4 that suits the validation
    split best, which flatters the bigram. A code's predecessor is the one before it in the sequence (h w K); where a
    position has several codes, each depth counts for itself.
    """
    depth = train.codes.shape[-1]
    size = depth * codebook_size  # a code at another depth is another symbol, and one more stands for "the first"
    shown = train.codes[:: max(1, train.codes[:, 0].numel() // MOST_TOKENS), 0]
    before, after = _pairs(shown, codebook_size)
    singles = torch.bincount(after, minlength=size).double() + 0.5
    per_depth = singles.view(depth, codebook_size)
    single = (per_depth / per_depth.sum(dim=1, keepdim=True)).flatten()  # p(b) (size,)
    follows = torch.bincount(before, minlength=size + 1).double()  # n_a
    known, counts = torch.unique(before * size + after, return_counts=True)

    before, after = _pairs(validation.codes[:, 0], codebook_size)
    pairs = before * size + after
    place = torch.searchsorted(known, pairs).clamp_max(len(known) - 1)
    together = torch.where(known[place] == pairs, counts[place], 0).double()  # n_ab
    return min(
        float(-((together + alpha * single[after]) / (follows[before] + alpha)).log2().mean())
        for alpha in (4.0**power for power in range(9))
    )


def _pairs(codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """codes (N, h, w, K) -> (N * L,) of each code's predecessor and of itself, as symbols that know their depth."""
    depth = codes.shape[-1]
    symbols = rearrange(codes.long() + torch.arange(depth) * codebook_size, "N h w K -> N (h w K)")
    before = torch.cat([torch.full_like(symbols[:, :1], depth * codebook_size), symbols[:, :-1]], dim=1)
    return before.flatten(), symbols.flatten()
