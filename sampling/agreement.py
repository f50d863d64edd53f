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
from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.optim import set_learning_rate
from stage1_tokenizer.engine.seeds import derive_seed

BATCH = 64
"""Images in a batch."""
MAX_LR = 3e-3
"""Learning rate after the warm-up."""


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
        layers: list[nn.Module] = []
        for c_in, c_out in zip((channels, width, 2 * width), (width, 2 * width, 4 * width), strict=True):
            layers += [_convolution(c_in, c_out), nn.MaxPool2d(2), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers += [_convolution(c_out, c_out), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * 4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images x (B, C, H, W) in [-1, 1]."""
        features = self.features(x)  # (B, c, H/8, W/8)
        # The maximum tells if a feature (a corner, for example) occurs, the mean how often.
        return self.head(torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], dim=1))


def _convolution(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)


def train_classifier(images: ImageBatches, steps: int, seed: int, device: torch.device) -> Classifier:
    """Train a classifier on a labelled split for `steps` steps, and return it in eval mode.

    It sees the crops and flips of the data's config, each batch shifted by up to 1/16 of the image, and each image more
    or less blurred, as decoders blur: else it would judge sharpness, not classes.
    """
    torch.manual_seed(derive_seed(seed, "classifier"))
    classifier = Classifier(images.channels, len(images.classes)).to(device).train()
    classifier = classifier.to(memory_format=torch.channels_last)  # faster on a CPU
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=MAX_LR, weight_decay=0.05)
    order = BatchOrder(len(images), BATCH, seed)
    in_bfloat16 = processor.takes_fast_path("bfloat16", device)
    for step in show_progress(range(steps), steps, "step", "training a classifier"):
        warm_up = min(1.0, 10.0 * (step + 1) / steps)
        set_learning_rate(optimizer, MAX_LR * warm_up * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
        pixels, labels = images.batch(*order.indices(step))
        x = blur(shift(normalise(pixels.to(device)))).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            logits = classifier(x)
        loss = F.cross_entropy(logits.float(), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return classifier.eval()


def shift(x: Tensor) -> Tensor:
    """Shift images x (B, C, H, W) together by a random distance of up to 1/16 of a side; borders are reflected."""
    down, right = (side // 16 for side in x.shape[2:])
    top, left = (int(torch.randint(2 * most + 1, ())) for most in (down, right))
    padded = F.pad(x, (right, right, down, down), mode="reflect")  # (B, C, H + 2 down, W + 2 right)
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def blur(x: Tensor) -> Tensor:
    """Mix each of the images x (B, C, H, W) with its copy at half the resolution, in a random proportion."""
    blurred = F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear")
    return torch.lerp(x, blurred, torch.rand(len(x), 1, 1, 1).to(x.device))


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
