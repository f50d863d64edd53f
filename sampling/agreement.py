"""Agreement of class-conditional samples with the requested classes, as a small classifier sees it.

The classifier is trained on the prior's labelled data. Its accuracy on the validation split limits how much its
verdict on samples means.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.order import BatchOrder, validation_batches
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.seeds import derive_seed

BATCH = 64
"""Images in a batch."""


class Agreement(NamedTuple):
    """Accuracies of the classifier, shares in [0, 1]."""

    held_out: float
    """Share of the validation split that is classified correctly."""
    samples: float
    """Share of the samples that are classified as the requested class."""


class Classifier(nn.Module):
    """A small convolutional classifier."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for c_in, c_out, stride in zip((channels, *widths), widths, (2, 1, 2, 1), strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images x (B, C, H, W) in [-1, 1]."""
        features = self.features(x)  # (B, c, H/4, W/4)
        # The maximum tells if a feature (a corner, for example) occurs, the mean how often.
        return self.head(torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1))


def train_classifier(images: ImageBatches, steps: int, seed: int, device: torch.device) -> Classifier:
    """Train a classifier on a labelled split for `steps` steps, and return it in eval mode."""
    torch.manual_seed(derive_seed(seed, "classifier"))
    classifier = Classifier(images.channels, len(images.classes)).to(device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    order = BatchOrder(len(images), BATCH, seed)
    for step in show_progress(range(steps), steps, "step", "training a classifier"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        pixels, labels = images.batch(*order.indices(step))
        loss = F.cross_entropy(classifier(normalise(pixels.to(device))), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier.eval()


def labels_in_data(
    data_classes: Sequence[str], prior_classes: Sequence[str], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the labels (n,) of a prior as labels of its data set, which may have them in another order now.

    Raises:
        ConfigError: the data set no longer has all classes of the prior.
    """
    missing = [name for name in prior_classes if name not in data_classes]
    if missing:
        raise ConfigError(f"the data no longer has the classes {', '.join(missing)} that the prior was trained on")
    return np.array([data_classes.index(name) for name in prior_classes], dtype=np.int64)[labels]


@torch.inference_mode()
def accuracy(classifier: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images (n, C, H, W) uint8 that are classified as their labels (n,) say."""
    correct = [
        (classifier(normalise(part)).argmax(dim=1) == wanted).float().sum()
        for part, wanted in zip(torch.split(pixels, BATCH), torch.split(labels, BATCH), strict=True)
    ]
    return float(torch.stack(correct).sum() / len(labels))


def accuracy_of_split(classifier: Classifier, split: ImageBatches, device: torch.device) -> float:
    """Return the share of a split that is classified correctly."""
    batches = validation_batches(split, BATCH, 0, 1)
    return sum(accuracy(classifier, x.to(device), y.to(device)) * len(y) for x, y in batches) / len(split)


def measure_agreement(
    train: ImageBatches,
    validation: ImageBatches,
    samples: NDArray[np.uint8],
    labels: NDArray[np.int64],
    steps: int,
    seed: int,
) -> Agreement:
    """Train a classifier on one split, and classify the other split and samples.

    samples: (n, H, W, C) uint8. labels: (n,), the requested classes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = train_classifier(train, steps, seed, device)
    images = torch.from_numpy(samples).permute(0, 3, 1, 2).to(device)
    of_samples = accuracy(classifier, images, torch.from_numpy(labels).to(device))
    return Agreement(accuracy_of_split(classifier, validation, device), of_samples)
