"""The likelihood of codes under a prior, and under a bigram model, which a prior must beat.

nats = -ln p(codes | label) = - sum over the L codes of  ln softmax(logits[l])[codes[l]]         bits = nats / ln 2
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine.precision import device_of_float64, to_float64
from stage2_prior.base import Prior
from stage2_prior.tokens import TokenSet

MOST_TOKENS = 4_000_000
"""Most training codes that the bigram model counts: enough for the pairs of 1,000 codes, and takes seconds."""


def token_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """Return -ln p of each code (B, L) in float32: logits (B, L, V), codes (B, h, w, K) with L = h*w*K."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), rearrange(codes, "B h w K -> (B h w K)"), reduction="none")
    return losses.view(logits.shape[:2])


def token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross entropy () in nats over all B*L codes: logits (B, L, V), codes (B, h, w, K)."""
    return token_nats(logits, codes).mean()


@torch.inference_mode()
def image_nats(prior: Prior, codes: Tensor, labels: Tensor) -> Tensor:
    """Return -ln p(codes | label) of each image in nats, float64: codes (B, h, w, K), labels (B,) -> (B,)."""
    return to_float64(token_nats(prior(codes, labels), codes)).sum(dim=1)


@torch.inference_mode()
def nats_by_class(prior: Prior, codes: Tensor) -> Tensor:
    """Return -ln p(codes | c) for each class c in nats, float64: codes (B, h, w, K) -> (B, classes)."""
    by_class = torch.zeros(len(codes), prior.classes, dtype=torch.float64, device=device_of_float64(codes.device))
    for label in range(prior.classes):
        by_class[:, label] = image_nats(prior, codes, codes.new_full((len(codes),), label))
    return by_class


def class_log_probabilities(by_class: Tensor) -> Tensor:
    """Return ln p(class | codes) by Bayes' rule with equal prior probabilities: `nats_by_class` (B, classes) ->
    same."""
    return (-by_class).log_softmax(dim=1)


def nats_to_bits(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2)


def bigram_bits(train: TokenSet, validation: TokenSet, codebook_size: int) -> float:
    """Return the bits per token of a bigram model of the training split, measured on the validation split.

        p(b | a) = (n_ab + alpha p(b)) / (n_a + alpha)        a: the code before b in the sequence (h w K)

    Most pairs are rare, so the frequency of b alone, p(b), smooths the counts of pairs (MacKay and Bauman Peto, "A
    Hierarchical Dirichlet Language Model", 1995). alpha is the power of 4 that is best on the validation split, which
    favours the bigram model. Equal codes at different depths count as different symbols.
    """
    depth = train.codes.shape[-1]
    size = depth * codebook_size  # symbols; one more stands before the first code of an image
    counted = train.codes[:: max(1, train.codes[:, 0].numel() // MOST_TOKENS), 0]
    before, after = _pairs(counted, codebook_size)
    singles = torch.bincount(after, minlength=size).double() + 0.5
    per_depth = singles.view(depth, codebook_size)
    single = (per_depth / per_depth.sum(dim=1, keepdim=True)).flatten()  # p(b) (size,)
    predecessors = torch.bincount(before, minlength=size + 1).double()  # n_a (size + 1,)
    known, counts = torch.unique(before * size + after, return_counts=True)

    before, after = _pairs(validation.codes[:, 0], codebook_size)
    pairs = before * size + after
    place = torch.searchsorted(known, pairs).clamp_max(len(known) - 1)
    pair_counts = torch.where(known[place] == pairs, counts[place], 0).double()  # n_ab of each validation code
    return min(
        float(-((pair_counts + alpha * single[after]) / (predecessors[before] + alpha)).log2().mean())
        for alpha in (4.0**power for power in range(9))
    )


def _pairs(codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Return the predecessor (N * L,) and the symbol (N * L,) of each code: codes (N, h, w, K); symbol = k * V +
    code."""
    depth = codes.shape[-1]
    symbols = rearrange(codes.long() + torch.arange(depth) * codebook_size, "N h w K -> N (h w K)")
    before = torch.cat([torch.full_like(symbols[:, :1], depth * codebook_size), symbols[:, :-1]], dim=1)
    return before.flatten(), symbols.flatten()
