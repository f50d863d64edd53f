"""The classifier of class-conditional samples: it learns, and its accuracies count each image once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sampling import agreement as judging
from sampling import summary
from sampling.agreement import (
    BATCH,
    Agreement,
    Classifier,
    accuracy,
    blur,
    measure_agreement,
    shift,
    train_classifier,
)
from sampling.sampler import Sampler
from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import ImageBatches
from tests.helpers.artefacts import IMAGE_SIZE, write_image_folder, write_prior

CPU = torch.device("cpu")


class Halves(DataSplit):
    """Noise images whose left half (label 0) or right half (label 1) is slightly brighter; both classes in turn."""

    classes: tuple[str, ...] = ("left", "right")
    identity = ""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        image = np.random.default_rng((self._seed, index)).integers(0, 200, size=(*IMAGE_SIZE, 3), dtype=np.uint8)
        half = IMAGE_SIZE[1] // 2
        image[:, half * (index % 2) :][:, :half] += 55
        return image, index % 2


def halves(n: int, seed: int) -> ImageBatches:
    return ImageBatches(Halves(n, seed), BaseDataConfig(image_size=IMAGE_SIZE), seed=0)


def samples_of(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, H, W, C) and labels, as sampling gives them."""
    drawn = [Halves(n, seed)[i] for i in range(n)]
    return np.stack([image for image, _ in drawn]), np.array([label for _, label in drawn])


class Reader(nn.Module):
    """A classifier that returns the uint8 level of the first pixel as the class."""

    def forward(self, x: Tensor) -> Tensor:
        levels = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        return nn.functional.one_hot(levels, 4).float()


def images_of(levels: list[int]) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, *IMAGE_SIZE)


def test_the_classifier_learns() -> None:
    """The classifier tells two plain classes apart, and its verdict on samples follows the requested labels."""
    images, labels = samples_of(100, seed=3)
    found = measure_agreement(halves(200, seed=1), halves(70, seed=2), images, labels, steps=40, seed=0)
    assert found.held_out > 0.95
    assert found.samples > 0.95
    wrong = measure_agreement(halves(200, seed=1), halves(70, seed=2), images, 1 - labels, steps=40, seed=0)
    assert wrong.held_out == found.held_out
    assert wrong.samples == pytest.approx(1.0 - found.samples, abs=1e-6)


@pytest.mark.parametrize("n", [1, BATCH - 1, BATCH, 2 * BATCH + 22])
def test_the_share_counts_each_image_once(n: int) -> None:
    """A mean over batches of unequal size would weight the images of the last batch more."""
    levels = [i % 4 for i in range(n)]
    wanted = [level if i < n - n // 3 else (level + 1) % 4 for i, level in enumerate(levels)]  # the last third is wrong
    share = accuracy(Reader(), images_of(levels), torch.tensor(wanted))  # type: ignore[arg-type]
    assert share == pytest.approx(1.0 - (n // 3) / n)


def test_both_figures_are_of_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """`held_out` is the accuracy on the validation split, `samples` that on the samples with the requested labels."""

    class Levels(Halves):
        def __getitem__(self, index: int) -> tuple[ImageArray, int]:
            label = index % 2 if index < 65 else 1 - index % 2  # 65 of 80 are as the reader says
            return np.full((*IMAGE_SIZE, 3), index % 2, dtype=np.uint8), label

    trained_on = []

    def reader(images: ImageBatches, *_: Any) -> Reader:
        trained_on.append(images)
        return Reader()

    monkeypatch.setattr(judging, "train_classifier", reader)
    train, validation = halves(5, seed=0), ImageBatches(Levels(80, 0), BaseDataConfig(image_size=IMAGE_SIZE), seed=0)
    samples = images_of([0, 1, 2, 3, 0]).permute(0, 2, 3, 1).contiguous().numpy()
    found = measure_agreement(train, validation, samples, np.array([0, 1, 2, 0, 1]), steps=1, seed=0)
    assert found == pytest.approx((65 / 80, 3 / 5))
    assert trained_on == [train], "it must not see what it is judged on"


def test_the_classifier_depends_on_the_seed_alone() -> None:
    """The result can be reproduced, whatever random numbers were drawn before."""
    weights = []
    for seed in (0, 0, 1):
        torch.rand(7)
        classifier = train_classifier(halves(30, seed=1), steps=3, seed=seed, device=CPU)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in classifier.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_the_classifier_is_in_eval_mode() -> None:
    """Batch norm in train mode would let the other images of a batch change an image's logits."""
    classifier = train_classifier(halves(30, seed=1), steps=3, seed=0, device=CPU)
    assert not classifier.training
    images = torch.from_numpy(samples_of(6, seed=2)[0]).permute(0, 3, 1, 2)
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(classifier(x)[:1], classifier(x[:1]), atol=1e-5)


def test_blur_is_no_class() -> None:
    """Samples are as sharp as the tokenizer's decoder makes them: a judge that never saw blur errs on them."""
    x = torch.rand(64, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred, flat = blur(x), blur(torch.full((2, 3, *IMAGE_SIZE), 0.5))
    assert torch.allclose(flat, torch.full_like(flat, 0.5))
    assert torch.allclose(blurred.mean(dim=(2, 3)), x.mean(dim=(2, 3)), atol=0.05)
    share = ((blurred - x).std(dim=(1, 2, 3)) / x.std(dim=(1, 2, 3))).sort().values
    assert share[0] < 0.1  # some images are nearly as they were
    assert share[-1] > 0.7  # and some are mostly their mean over 2x2 pixels


@pytest.mark.parametrize("seed", range(8))
def test_shifted_images_keep_their_pixels(seed: int) -> None:
    """By up to 1/16 of a side: an image of 32x48 moves by at most 2 and 3 pixels, all images of a batch together."""
    x = torch.arange(32 * 48, dtype=torch.float32).view(1, 1, 32, 48).repeat(2, 1, 1, 1)
    torch.manual_seed(seed)
    shifted = shift(x)
    assert shifted.shape == x.shape
    assert torch.equal(shifted[0], shifted[1])
    down, right = divmod(int(shifted[0, 0, 16, 24]) - int(x[0, 0, 14, 21]), 48)  # from the farthest place
    assert 0 <= down <= 4
    assert 0 <= right <= 6


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (8, 12)), (3, (64, 32))])
def test_any_size_of_image_is_taken(channels: int, size: tuple[int, int]) -> None:
    """The classifier takes all images that tokenizers make: grey, not square, and as small as 8x8."""
    assert Classifier(channels, 5).eval()(torch.zeros(2, channels, *size)).shape == (2, 5)


def test_the_summary_matches_classes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 34: a class that the folder has gained shifts the judge's labels, and no sample would count as right."""
    write_image_folder(tmp_path / "images", ("bird", "cat", "dog"))
    data = FolderConfig(root=str(tmp_path / "images"), image_size=IMAGE_SIZE, validation_share=0.3)
    prior = write_prior(tmp_path / "run", classes=("cat", "dog"), tokenizer={"data": data})
    asked: list[str] = []
    judged: list[NDArray[np.uint8]] = []

    def judge(train: ImageBatches, validation: ImageBatches, images: Any, labels: Any, *_: Any) -> Agreement:
        asked.extend(train.classes[label] for label in labels)
        judged.append(images)
        return Agreement(1.0, 1.0)

    monkeypatch.setattr(summary, "measure_agreement", judge)
    summary.class_lines(summary.SummaryConfig(samples=4), prior)
    assert asked == ["cat", "dog", "cat", "dog"]
    assert np.array_equal(judged[0], Sampler(prior).sample(4, asked, summary.SummaryConfig().seed))


def test_the_summary_reads_a_log_that_was_cut_off(tmp_path: Path) -> None:
    """Fault 1: a training that was killed, or runs on, leaves half a line at the end."""
    entries = '{"step": 1, "validation/psnr": 20.0}\n{"step": 2, "validation/psnr": 21.0}\n'
    (tmp_path / "metrics.jsonl").write_text(entries + '{"step": 3, "validation/ps')
    assert summary.last_metrics(tmp_path, "validation/psnr")["validation/psnr"] == 21.0
