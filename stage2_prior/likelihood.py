"""The likelihood of codes, in nats: to a prior, per code and for any labels; and to a bigram model, which a prior must
beat."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine.precision import device_of_float64, float64
from stage2_prior.base import Prior
from stage2_prior.tokens import TokenSet

MOST_TOKENS = 4_000_000
"""Training tokens that are counted: enough for the pairs of a thousand codes, and seconds of work."""


def token_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """-ln p of each code (B, L): logits (B, L, V), codes (B, h, w, K). In float32 whatever the logits are."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), rearrange(codes, "B h w K -> (B h w K)"), reduction="none")
    return losses.view(logits.shape[:2])


def token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy () in nats over all L codes, the first included: logits (B, L, V), codes (B, h, w, K)."""
    return token_nats(logits, codes).mean()


@torch.inference_mode()
def image_nats(prior: Prior, codes: Tensor, labels: Tensor) -> Tensor:
    """-ln p(codes | label) of each image, in nats, float64: codes (B, h, w, K), labels (B,) -> (B,)."""
    return float64(token_nats(prior(codes, labels), codes)).sum(dim=1)


@torch.inference_mode()
def nats_by_class(prior: Prior, codes: Tensor) -> Tensor:
    """-ln p(codes | c) for each class c: codes (B, h, w, K) -> (B, classes), float64."""
    by_class = torch.zeros(len(codes), prior.classes, dtype=torch.float64, device=device_of_float64(codes.device))
    for label in range(prior.classes):
        by_class[:, label] = image_nats(prior, codes, codes.new_full((len(codes),), label))
    return by_class


def class_log_probabilities(by_class: Tensor) -> Tensor:
    """ln p(class | codes) by Bayes' rule, all classes equally likely beforehand: nats_by_class (B, classes) -> same."""
    return (-by_class).log_softmax(dim=1)


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


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
