"""CIFAR-10, MNIST and Fashion-MNIST: the images and labels are those of the published files."""

import hashlib
import io
import pickle
import shutil
import struct
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from stage1_tokenizer.data import build_splits
from stage1_tokenizer.data.base import DataSplit, Split
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.torchvision_sets import READERS, Cifar10, Cifar10Config, FashionMnistConfig, MnistConfig
from stage1_tokenizer.engine.errors import ConfigError

SPLITS: tuple[Split, Split] = ("train", "validation")
CONFIGS: dict[str, type[Cifar10Config | MnistConfig | FashionMnistConfig]] = {
    "cifar10": Cifar10Config,
    "mnist": MnistConfig,
    "fashion_mnist": FashionMnistConfig,
}


@pytest.fixture(scope="module")
def cifar10(real_data: Path) -> list[DataSplit]:
    return [build_splits(Cifar10Config(root=str(real_data / "cifar10")))[split] for split in SPLITS]


@pytest.fixture(scope="module")
def mnist(real_data: Path) -> list[DataSplit]:
    return [build_splits(MnistConfig(root=str(real_data / "mnist")))[split] for split in SPLITS]


def test_cifar10_is_the_published_one(real_data: Path, cifar10: list[DataSplit]) -> None:
    """Each image and label of the published batches, the rows of a record being channels first, in their order."""
    train, test = cifar10
    assert (len(train), len(test)) == (50_000, 10_000)
    folder = real_data / "cifar10" / "cifar-10-batches-py"
    for images, file, start in [(test, "test_batch", 0), (train, "data_batch_1", 0), (train, "data_batch_5", 40_000)]:
        with (folder / file).open("rb") as opened:
            record: dict[str, Any] = pickle.load(opened, encoding="latin1")
        for place in [0, 1, 2, 4999, 9999]:
            image, label = images[start + place]
            assert np.array_equal(image, record["data"][place].reshape(3, 32, 32).transpose(1, 2, 0))
            assert label == record["labels"][place]
        assert [images[start + place][1] for place in range(10_000)] == record["labels"]
    assert train.classes == test.classes
    assert train.classes[:3] == ("airplane", "automobile", "bird")


def test_mnist_is_the_published_one(real_data: Path, mnist: list[DataSplit]) -> None:
    """Every image and label of the idx files, with one channel, white on black as published."""
    raw = real_data / "mnist" / "MNIST" / "raw"
    for images, name, n in zip(mnist, ("train", "t10k"), (60_000, 10_000), strict=True):
        pixels = np.fromfile(raw / f"{name}-images-idx3-ubyte", dtype=np.uint8)[16:].reshape(n, 28, 28, 1)
        labels = np.fromfile(raw / f"{name}-labels-idx1-ubyte", dtype=np.uint8)[8:]
        items = [images[i] for i in range(len(images))]
        assert np.array_equal(np.stack([image for image, _ in items]), pixels)
        assert [label for _, label in items] == labels.tolist()
        assert [name.split(" ")[0] for name in images.classes] == [str(digit) for digit in range(10)]
        assert 20 < pixels.mean() < 50


@pytest.mark.parametrize(("name", "channels"), [("mnist", 1), ("cifar10", 3)])
def test_batches_keep_images_and_labels_together(real_data: Path, name: str, channels: int) -> None:
    """Through resize and cache, batch row i is image and label indices[i], with the data set's own channels."""
    config = CONFIGS[name].from_tree({"root": str(real_data / name), "image_size": 32, "cache": "none"})
    batches, images = open_data(config).image_batches("validation", seed=0), build_splits(config)["validation"]
    indices = np.array([9_999, 3, 3, 0])
    pixels, labels = batches.batch(indices)
    assert pixels.shape == (4, channels, 32, 32)
    assert batches.channels == channels
    assert labels.tolist() == [images[int(i)][1] for i in indices]
    for row, i in zip(pixels, indices, strict=True):
        assert abs(row.float().mean() - images[int(i)][0].mean()) < 2.0


def test_each_set_is_read_by_its_own_reader() -> None:
    """MNIST and Fashion-MNIST have the same shape, so a mix-up would train without a word."""
    assert {kind: reader.__name__ for kind, reader in READERS.items()} == {
        "cifar10": "Cifar10",
        "mnist": "MNIST",
        "fashion_mnist": "FashionMNIST",
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_set_is_an_error_with_the_option_that_gets_it(tmp_path: Path, kind: str) -> None:
    """Nothing is downloaded unasked, and the message says how to ask and where was looked."""
    config = CONFIGS[kind](root=str(tmp_path / "none"))
    for split in SPLITS:
        with pytest.raises(ConfigError, match=rf"{kind}.*--data\.download.*--data\.root") as caught:
            build_splits(config)[split]
        assert str(tmp_path / "none") in str(caught.value)
        assert "download=True" not in str(caught.value)  # torchvision's option, which our commands do not have
    assert not (tmp_path / "none").exists()


def test_a_failed_download_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to download without a network, the user reads of the network and not a traceback of urllib."""

    def reader(root: str, train: bool, download: bool) -> None:
        assert download
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setitem(READERS, "mnist", reader)
    with pytest.raises(ConfigError, match=r"Name or service not known.*network"):
        build_splits(MnistConfig(root=str(tmp_path), download=True))["train"]


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_truncated_set_is_refused(real_data: Path, tmp_path: Path, kept: float) -> None:
    """An interrupted copy leaves half of a file or an empty one, which exists and so passes for downloaded."""
    shutil.copytree(real_data / "mnist" / "MNIST" / "raw", tmp_path / "MNIST" / "raw", copy_function=shutil.copyfile)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[: int(10_008 * kept)])
    with pytest.raises(ConfigError, match="mnist"):
        build_splits(MnistConfig(root=str(tmp_path)))["validation"]


def test_a_damaged_batch_is_refused(real_data: Path, tmp_path: Path) -> None:
    """Trap 44: torchvision unpickles CIFAR-10, so a file is only opened where its published checksum fits."""
    name = "cifar-10-batches-py"
    shutil.copytree(real_data / "cifar10" / name, tmp_path / name, copy_function=shutil.copyfile)
    canary = tmp_path / "canary"
    (tmp_path / name / "test_batch").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match="cifar10"):
        build_splits(Cifar10Config(root=str(tmp_path)))["validation"]
    assert not canary.exists()


@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_fault_28_a_crafted_batch_is_not_unpickled(real_data: Path, tmp_path: Path, file: str) -> None:
    """Faults 28 and 33: a pickle in place of any of CIFAR-10's files is refused, and what it would run does not."""
    name = "cifar-10-batches-py"
    (tmp_path / name).mkdir()
    for path in (real_data / "cifar10" / name).iterdir():
        (tmp_path / name / path.name).symlink_to(path.resolve())
    canary = tmp_path / "canary"
    (tmp_path / name / file).unlink()
    (tmp_path / name / file).write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match="cifar10"):
        build_splits(Cifar10Config(root=str(tmp_path)))["train"]
    assert not canary.exists()


BATCHES = "cifar-10-batches-py"
HOSTILE: dict[str, list[tuple[str, bytes | str]]] = {
    "..": [("../escaped", b"")],
    "absolute": [("{}/escaped", b"")],
    "through a link": [("link", ".."), ("link/escaped", b"")],
    "file that is a link": [(f"{BATCHES}/data_batch_1", "{}/outside")],
    "folder that is a link": [(BATCHES, "{}/elsewhere"), (f"{BATCHES}/data_batch_1", b"1")],
    "more than the data set": [("more", b""), (f"{BATCHES}/more", b"")],
}
"""Members: a name and its content, or a symbolic link's target. {} is a folder that must not change."""


def archive_of(members: list[tuple[str, bytes | str]]) -> bytes:
    """A tar archive with these members."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def serve(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download brings this content."""
    utils = torchvision.datasets.utils
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, filename: Path(filename).write_bytes(content))
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)


def test_fault_28_a_tampered_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28: a download is unpacked only if it is the published archive."""
    serve(archive_of([(f"{BATCHES}/data_batch_1", b"1")]), monkeypatch)
    with pytest.raises(ConfigError, match=r"File not found or corrupted.*network"):
        build_splits(Cifar10Config(root=str(tmp_path), download=True))["train"]
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("case", HOSTILE)
def test_fault_28_no_member_leaves_the_folder(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28: with the archive's checksum forged too, and with every torchvision: only the data set's own files are
    written, as files, into the folder."""
    root, other = tmp_path / "deep" / "root", tmp_path / "other"
    (other / "elsewhere").mkdir(parents=True)
    (other / "outside").write_text("as before")
    members = [
        (name.format(other), data.format(other) if isinstance(data, str) else data) for name, data in HOSTILE[case]
    ]
    files = [f"{BATCHES}/{name}" for name, _ in (*Cifar10.train_list, *Cifar10.test_list)] + [f"{BATCHES}/batches.meta"]
    content = archive_of([*members, *((name, b"of a stranger") for name in files if name not in dict(members))])
    serve(content, monkeypatch)
    monkeypatch.setattr(Cifar10, "tgz_md5", hashlib.md5(content).hexdigest())
    with pytest.raises(ConfigError, match="does not hold it"):
        build_splits(Cifar10Config(root=str(root), download=True))["train"]
    assert [path.name for path in (root.parent).iterdir()] == ["root"]
    assert not (root / BATCHES).is_symlink()
    written = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    assert written <= {*files, "cifar-10-python.tar.gz"}
    assert not any((root / name).is_symlink() for name in written)
    assert sorted(path.name for path in other.rglob("*")) == ["elsewhere", "outside"]
    assert (other / "outside").read_text() == "as before"


def test_a_downloaded_archive_is_read(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unpacked here is what the archive's own files are."""
    folder = real_data / "cifar10" / BATCHES
    content = archive_of([(f"{BATCHES}/{path.name}", path.read_bytes()) for path in sorted(folder.iterdir())])
    serve(content, monkeypatch)
    monkeypatch.setattr(Cifar10, "tgz_md5", hashlib.md5(content).hexdigest())
    images = build_splits(Cifar10Config(root=str(tmp_path), download=True))["validation"]
    published = build_splits(Cifar10Config(root=str(real_data / "cifar10")))["validation"]
    assert len(images) == len(published)
    assert np.array_equal(images[9_999][0], published[9_999][0])


def write_mnist(root: Path, images: bytes, labels: bytes) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


PICTURES, LABELS = struct.pack(">IIII", 0x803, 6, 28, 28) + bytes(6 * 784), struct.pack(">II", 0x801, 6) + bytes(6)


def test_fault_28_damaged_mnist_files_are_a_plain_error(tmp_path: Path) -> None:
    """Files cut off anywhere, of another type or with labels that are none end in the one error, and not in whatever
    torchvision's reader stumbles over; sound ones are read."""
    write_mnist(tmp_path, PICTURES, LABELS)
    assert len(build_splits(MnistConfig(root=str(tmp_path)))["train"]) == 6
    damaged = [PICTURES[:n] for n in (0, 3, 9, 15, 16, 20, len(PICTURES) - 1)]
    damaged += [struct.pack(">I", magic) + PICTURES[4:] for magic in (0x801, 0xA03, 0xD03, 0x8FF, 0, 0x1F8B0808)]
    cases = [(images, LABELS) for images in damaged]
    cases += [(PICTURES, labels) for labels in (LABELS[:-1], b"", LABELS[:-1] + b"\x0a", PICTURES)]
    cases += [(PICTURES, struct.pack(">II", 0x801, 5) + bytes(5))]
    for images, labels in cases:
        write_mnist(tmp_path, images, labels)
        with pytest.raises(ConfigError, match=r"data\.kind mnist: "):
            build_splits(MnistConfig(root=str(tmp_path)))["train"]


def test_fault_28_pickles_of_old_torchvision_are_not_read(tmp_path: Path) -> None:
    """torchvision prefers a folder of pickles, as its old versions left them, to the published files beside it."""
    write_mnist(tmp_path, PICTURES, LABELS)
    processed, canary = tmp_path / "MNIST" / "processed", tmp_path / "canary"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match=r"processed holds pickles.*move that folder away"):
        build_splits(MnistConfig(root=str(tmp_path)))["train"]
    assert not canary.exists()
