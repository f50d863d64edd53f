"""CIFAR-10, MNIST and Fashion-MNIST: the pictures and labels are those of the published files."""

import pickle
import shutil
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage1_tokenizer.data import build_images, build_pictures
from stage1_tokenizer.data.pictures import ImageSet, Split
from stage1_tokenizer.data.torchvision_sets import READERS, Cifar10Config, FashionMnistConfig, MnistConfig
from stage1_tokenizer.errors import ConfigError

SPLITS: tuple[Split, Split] = ("train", "validation")
CONFIGS: dict[str, type[Cifar10Config | MnistConfig | FashionMnistConfig]] = {
    "cifar10": Cifar10Config,
    "mnist": MnistConfig,
    "fashion_mnist": FashionMnistConfig,
}


@pytest.fixture(scope="module")
def cifar10(real_data: Path) -> list[ImageSet]:
    return [build_images(Cifar10Config(root=str(real_data / "cifar10")), split) for split in SPLITS]


@pytest.fixture(scope="module")
def mnist(real_data: Path) -> list[ImageSet]:
    return [build_images(MnistConfig(root=str(real_data / "mnist")), split) for split in SPLITS]


def test_cifar10_is_the_published_one(real_data: Path, cifar10: list[ImageSet]) -> None:
    """Each picture and label of the published batches, the rows of a record being channels first, in their order."""
    train, test = cifar10
    assert (len(train), len(test)) == (50_000, 10_000)
    folder = real_data / "cifar10" / "cifar-10-batches-py"
    for images, file, start in [(test, "test_batch", 0), (train, "data_batch_1", 0), (train, "data_batch_5", 40_000)]:
        with (folder / file).open("rb") as opened:
            record: dict[str, Any] = pickle.load(opened, encoding="latin1")
        for place in [0, 1, 2, 4999, 9999]:
            picture, label = images[start + place]
            assert np.array_equal(picture, record["data"][place].reshape(3, 32, 32).transpose(1, 2, 0))
            assert label == record["labels"][place]
        assert [images[start + place][1] for place in range(10_000)] == record["labels"]
    assert train.classes == test.classes
    assert train.classes[:3] == ("airplane", "automobile", "bird")


def test_mnist_is_the_published_one(real_data: Path, mnist: list[ImageSet]) -> None:
    """Every picture and label of the idx files, with one channel, white on black as published."""
    raw = real_data / "mnist" / "MNIST" / "raw"
    for images, name, n in zip(mnist, ("train", "t10k"), (60_000, 10_000), strict=True):
        pixels = np.fromfile(raw / f"{name}-images-idx3-ubyte", dtype=np.uint8)[16:].reshape(n, 28, 28, 1)
        labels = np.fromfile(raw / f"{name}-labels-idx1-ubyte", dtype=np.uint8)[8:]
        items = [images[i] for i in range(len(images))]
        assert np.array_equal(np.stack([picture for picture, _ in items]), pixels)
        assert [label for _, label in items] == labels.tolist()
        assert [name.split(" ")[0] for name in images.classes] == [str(digit) for digit in range(10)]
        assert 20 < pixels.mean() < 50


@pytest.mark.parametrize(("name", "channels"), [("mnist", 1), ("cifar10", 3)])
def test_batches_keep_pictures_and_labels_together(real_data: Path, name: str, channels: int) -> None:
    """Through resize and cache, batch row i is picture and label indices[i], with the data set's own channels."""
    config = CONFIGS[name].from_tree({"root": str(real_data / name), "image_size": 32, "cache": "none"})
    pictures, images = build_pictures(config, "validation", seed=0), build_images(config, "validation")
    indices = np.array([9_999, 3, 3, 0])
    pixels, labels = pictures.batch(indices)
    assert pixels.shape == (4, channels, 32, 32)
    assert pictures.channels == channels
    assert labels.tolist() == [images[int(i)][1] for i in indices]
    for row, i in zip(pixels, indices, strict=True):
        assert abs(row.float().mean() - images[int(i)][0].mean()) < 2.0


def test_each_set_is_read_by_its_own_reader() -> None:
    """MNIST and Fashion-MNIST have the same shape, so a mix-up would train without a word."""
    assert {kind: reader.__name__ for kind, reader in READERS.items()} == {
        "cifar10": "CIFAR10",
        "mnist": "MNIST",
        "fashion_mnist": "FashionMNIST",
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_set_is_an_error_with_the_option_that_gets_it(tmp_path: Path, kind: str) -> None:
    """Nothing is downloaded unasked, and the message says how to ask and where was looked."""
    config = CONFIGS[kind](root=str(tmp_path / "none"))
    for split in SPLITS:
        with pytest.raises(ConfigError, match=rf"{kind}.*--data\.download.*--data\.root") as caught:
            build_images(config, split)
        assert str(tmp_path / "none") in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_a_failed_download_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to download without a network, the user reads of the network and not a traceback of urllib."""

    def reader(root: str, train: bool, download: bool) -> None:
        assert download
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setitem(READERS, "mnist", reader)
    with pytest.raises(ConfigError, match=r"Name or service not known.*network"):
        build_images(MnistConfig(root=str(tmp_path), download=True), "train")


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_truncated_set_is_refused(real_data: Path, tmp_path: Path, kept: float) -> None:
    """An interrupted copy leaves half of a file or an empty one, which exists and so passes for downloaded."""
    shutil.copytree(real_data / "mnist" / "MNIST" / "raw", tmp_path / "MNIST" / "raw", copy_function=shutil.copyfile)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[: int(10_008 * kept)])
    with pytest.raises(ConfigError, match="mnist"):
        build_images(MnistConfig(root=str(tmp_path)), "validation")


def test_a_damaged_batch_is_refused(real_data: Path, tmp_path: Path) -> None:
    """Trap 44: torchvision unpickles CIFAR-10, so a file is only opened where its published checksum fits."""
    name = "cifar-10-batches-py"
    shutil.copytree(real_data / "cifar10" / name, tmp_path / name, copy_function=shutil.copyfile)
    canary = tmp_path / "canary"
    (tmp_path / name / "test_batch").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match="cifar10"):
        build_images(Cifar10Config(root=str(tmp_path)), "validation")
    assert not canary.exists()
