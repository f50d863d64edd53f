"""The classifier that judges class-conditional samples: that it learns, and that its figures count what they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sampling import agreement as judging
from sampling import summary
from sampling.agreement import BATCH, Agreement, Classifier, agreement, share_right, train_classifier
from sampling.sampler import Sampler
from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import ImageBatches
from tests.helpers.artefacts import IMAGE_SIZE, write_image_folder, write_prior

CPU = torch.device("cpu")


class Halves(DataSplit):
    """Noise whose left half (label 0) or right half (label 1) is a little brighter; both kinds in turn."""

    classes: tuple[str, ...] = ("left", "right")
    identity = ""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        picture = np.random.default_rng((self._seed, index)).integers(0, 200, size=(*IMAGE_SIZE, 3), dtype=np.uint8)
        half = IMAGE_SIZE[1] // 2
        picture[:, half * (index % 2) :][:, :half] += 55
        return picture, index % 2


def halves(n: int, seed: int) -> ImageBatches:
    return ImageBatches(Halves(n, seed), BaseDataConfig(image_size=IMAGE_SIZE), seed=0)


def samples_of(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, H, W, C) and labels, as sampling gives them."""
    drawn = [Halves(n, seed)[i] for i in range(n)]
    return np.stack([picture for picture, _ in drawn]), np.array([label for _, label in drawn])


class Reader(nn.Module):
    """Classifies a picture as the uint8 level of its first pixel says."""

    def forward(self, x: Tensor) -> Tensor:
        levels = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        return nn.functional.one_hot(levels, 4).float()


def pictures_of(levels: list[int]) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, *IMAGE_SIZE)


def test_it_learns_what_can_be_learned() -> None:
    """A judge that cannot tell two plain classes apart says nothing of samples; it must follow the labels asked for."""
    pictures, labels = samples_of(100, seed=3)
    found = agreement(halves(200, seed=1), halves(70, seed=2), pictures, labels, steps=40, seed=0)
    assert found.held_out > 0.95
    assert found.samples > 0.95
    wrong = agreement(halves(200, seed=1), halves(70, seed=2), pictures, 1 - labels, steps=40, seed=0)
    assert wrong.held_out == found.held_out
    assert wrong.samples == pytest.approx(1.0 - found.samples, abs=1e-6)


@pytest.mark.parametrize("n", [1, BATCH - 1, BATCH, 2 * BATCH + 22])
def test_the_share_counts_each_picture_once(n: int) -> None:
    """A mean over batches of unequal size would give the pictures of the last one more weight."""
    levels = [i % 4 for i in range(n)]
    wanted = [level if i < n - n // 3 else (level + 1) % 4 for i, level in enumerate(levels)]  # the last third is wrong
    share = share_right(Reader(), pictures_of(levels), torch.tensor(wanted))  # type: ignore[arg-type]
    assert share == pytest.approx(1.0 - (n // 3) / n)


def test_both_figures_are_of_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """`held_out` is of the validation split and its labels, `samples` of the samples and the labels asked for."""

    class Levels(Halves):
        def __getitem__(self, index: int) -> tuple[ImageArray, int]:
            label = index % 2 if index < 65 else 1 - index % 2  # 65 of 80 are as the reader says
            return np.full((*IMAGE_SIZE, 3), index % 2, dtype=np.uint8), label

    trained_on = []

    def reader(pictures: ImageBatches, *_: Any) -> Reader:
        trained_on.append(pictures)
        return Reader()

    monkeypatch.setattr(judging, "train_classifier", reader)
    train, validation = halves(5, seed=0), ImageBatches(Levels(80, 0), BaseDataConfig(image_size=IMAGE_SIZE), seed=0)
    samples = pictures_of([0, 1, 2, 3, 0]).permute(0, 2, 3, 1).contiguous().numpy()
    found = agreement(train, validation, samples, np.array([0, 1, 2, 0, 1]), steps=1, seed=0)
    assert found == pytest.approx((65 / 80, 3 / 5))
    assert trained_on == [train], "it must not see what it is judged on"


def test_the_judge_follows_from_the_seed() -> None:
    """A figure in a report can be had again; whatever was drawn before does not matter."""
    weights = []
    for seed in (0, 0, 1):
        torch.rand(7)
        classifier = train_classifier(halves(30, seed=1), steps=3, seed=seed, device=CPU)
        weights.append(nn.utils.parameters_to_vector(classifier.parameters()).detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_the_judge_is_in_eval_mode() -> None:
    """Batch norm in train mode would judge a picture by its neighbours: here those of one class, there of both."""
    classifier = train_classifier(halves(30, seed=1), steps=3, seed=0, device=CPU)
    assert not classifier.training
    pictures = torch.from_numpy(samples_of(6, seed=2)[0]).permute(0, 3, 1, 2)
    x = pictures.float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(classifier(x)[:1], classifier(x[:1]), atol=1e-5)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (8, 12)), (3, (64, 32))])
def test_any_size_of_picture_is_taken(channels: int, size: tuple[int, int]) -> None:
    """Whatever a tokenizer makes can be judged: grey, not square, and as small as 8x8."""
    assert Classifier(channels, 5).eval()(torch.zeros(2, channels, *size)).shape == (2, 5)


def test_the_summary_matches_classes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 34: a class that the folder has gained shifts the judge's labels, and no sample would count as right."""
    write_image_folder(tmp_path / "images", ("bird", "cat", "dog"))
    data = FolderConfig(root=str(tmp_path / "images"), image_size=IMAGE_SIZE, validation_share=0.3)
    prior = write_prior(tmp_path / "run", classes=("cat", "dog"), tokenizer={"data": data})
    asked: list[str] = []
    judged: list[NDArray[np.uint8]] = []

    def judge(train: ImageBatches, validation: ImageBatches, pictures: Any, labels: Any, *_: Any) -> Agreement:
        asked.extend(train.classes[label] for label in labels)
        judged.append(pictures)
        return Agreement(1.0, 1.0)

    monkeypatch.setattr(summary, "agreement", judge)
    summary.class_figures(summary.SummaryConfig(samples=4), prior)
    assert asked == ["cat", "dog", "cat", "dog"]
    assert np.array_equal(judged[0], Sampler(prior).sample(4, asked, summary.SummaryConfig().seed))


def test_the_summary_reads_a_log_that_was_cut_off(tmp_path: Path) -> None:
    """Fault 1: a training that was killed, or runs on, leaves half a line at the end."""
    entries = '{"step": 1, "validation/psnr": 20.0}\n{"step": 2, "validation/psnr": 21.0}\n'
    (tmp_path / "metrics.jsonl").write_text(entries + '{"step": 3, "validation/ps')
    assert summary.last_figures(tmp_path, "validation/psnr")["validation/psnr"] == 21.0
