"""Do class-conditional samples show the class that was asked for? A small classifier says.

It is trained on the labelled data that the prior was trained on, and judged on the validation split first: what it says
of samples is worth no more than that.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.order import BatchOrder, validation_batches
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.seeds import derive_seed

BATCH = 64


class Agreement(NamedTuple):
    """Shares in [0, 1]."""

    held_out: float
    """Of the validation split, classified rightly."""
    samples: float
    """Of the samples, classified as the class that was asked for."""


class Classifier(nn.Module):
    """(B, C, H, W) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for c_in, c_out, stride in zip((channels, *widths), widths, (2, 1, 2, 1), strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)  # (B, c, H/4, W/4)
        # The largest response says that a corner is there, the mean how much of its kind there is.
        return self.head(torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1))


def train_classifier(pictures: ImageBatches, steps: int, seed: int, device: torch.device) -> Classifier:
    """A classifier of a labelled training split, in eval mode."""
    torch.manual_seed(derive_seed(seed, "classifier"))
    classifier = Classifier(pictures.channels, len(pictures.classes)).to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    order = BatchOrder(len(pictures), BATCH, seed)
    for step in show_progress(range(steps), steps, "step", "training a classifier"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        pixels, labels = pictures.batch(*order.indices(step))
        loss = F.cross_entropy(classifier(normalise(pixels.to(device))), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier.eval()


@torch.inference_mode()
def share_right(classifier: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """Share of the pictures (n, C, H, W) uint8 that are classified as their labels (n,) say."""
    right = [
        (classifier(normalise(part)).argmax(dim=1) == wanted).float().sum()
        for part, wanted in zip(torch.split(pixels, BATCH), torch.split(labels, BATCH), strict=True)
    ]
    return float(torch.stack(right).sum() / len(labels))


def agreement(
    train: ImageBatches,
    validation: ImageBatches,
    samples: NDArray[np.uint8],
    labels: NDArray[np.int64],
    steps: int,
    seed: int,
) -> Agreement:
    """Train on one split, then judge the other and samples (n, H, W, C) uint8, whose labels (n,) were asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = train_classifier(train, steps, seed, device)
    known = [
        share_right(classifier, x.to(device), y.to(device)) * len(y)
        for x, y in validation_batches(validation, BATCH, 0, 1)
    ]
    asked = torch.from_numpy(samples).permute(0, 3, 1, 2).to(device), torch.from_numpy(labels).to(device)
    return Agreement(sum(known) / len(validation), share_right(classifier, *asked))
