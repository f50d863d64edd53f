"""How likely a prior finds codes: in nats, per code, for any labels."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine.precision import device_of_float64, float64
from stage2_prior.base import Prior


def nats_of(logits: Tensor, codes: Tensor) -> Tensor:
    """-ln p of each code (B, L): logits (B, L, V), codes (B, h, w, K). In float32 whatever the logits are."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), rearrange(codes, "B h w K -> (B h w K)"), reduction="none")
    return losses.view(logits.shape[:2])


def token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy () in nats over all L codes, the first included: logits (B, L, V), codes (B, h, w, K)."""
    return nats_of(logits, codes).mean()


@torch.inference_mode()
def image_nats(prior: Prior, codes: Tensor, labels: Tensor) -> Tensor:
    """-ln p(codes | label) of each image, in nats, float64: codes (B, h, w, K), labels (B,) -> (B,)."""
    return float64(nats_of(prior(codes, labels), codes)).sum(dim=1)


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
