"""CIFAR-10, MNIST and Fashion-MNIST, read by torchvision."""

import shutil
import tarfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.datasets.utils import download_url

from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray, Split
from stage1_tokenizer.engine.errors import ConfigError, UserError


class Cifar10(CIFAR10):  # type: ignore[misc]  # torchvision has no types
    """CIFAR-10 with a safe way to unpack the archive: torchvision 0.26 lets members of it leave the folder."""

    def download(self) -> None:
        """Download and unpack the data set, unless the folder holds it."""
        if self._check_integrity():
            return
        download_url(self.url, self.root, self.filename, self.tgz_md5)
        names = [name for name, _ in (*self.train_list, *self.test_list)] + [self.meta["filename"]]
        unpack(Path(self.root) / self.filename, Path(self.root), [f"{self.base_folder}/{name}" for name in names])


def unpack(archive: Path, folder: Path, names: list[str]) -> None:
    """Write the named files of a tar archive, and no others, into a folder.

    Raises:
        KeyError: the archive does not hold one of them as a regular file.
    """
    with tarfile.open(archive) as opened:
        for name in names:
            member = opened.getmember(name)
            content = opened.extractfile(member) if member.isfile() else None
            if content is None:
                raise KeyError(f"{name} is not a file in {archive}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with content, (folder / name).open("wb") as file:
                shutil.copyfileobj(content, file)


class DownloadedConfig(BaseDataConfig):
    """The keys of all data sets that torchvision can download."""

    root: Annotated[str, Mark.PATH] = "data"
    """Folder that holds the data set, or to which it is downloaded."""
    download: Annotated[bool, Mark.FREE] = False
    """Download the data set if the folder does not hold it."""


class Cifar10Config(DownloadedConfig):
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels in ten classes (Krizhevsky 2009)."""

    kind: Literal["cifar10"] = "cifar10"


class MnistConfig(DownloadedConfig):
    """MNIST: 60,000 + 10,000 grey handwritten digits of 28x28 pixels."""

    kind: Literal["mnist"] = "mnist"


class FashionMnistConfig(DownloadedConfig):
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes of 28x28 pixels in ten classes (Xiao et al. 2017)."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"


READERS: dict[str, type[CIFAR10] | type[MNIST] | type[FashionMNIST]] = {
    "cifar10": Cifar10,
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
}


class TorchvisionImages(DataSplit):
    """One split. The validation split is the published test set."""

    def __init__(self, config: Cifar10Config | MnistConfig | FashionMnistConfig, split: Split) -> None:
        """Read the data set. torchvision unpickles CIFAR-10's files, each only after its checksum fits.

        Raises:
            ConfigError: the folder does not hold the whole data set; the message names the option that downloads it.
        """
        reader = READERS[config.kind]
        old = Path(config.root) / reader.__name__ / "processed"
        if old.exists():  # torchvision would read these pickles instead of the published files, which are no pickles
            raise ConfigError(
                f"data.kind {config.kind}: {old.absolute()} holds pickles, as old versions of torchvision made them. "
                "They are not read because they may be unsafe; move that folder away"
            )
        try:
            data = reader(config.root, train=split == "train", download=config.download)
        except UserError:  # raised by a signal handler
            raise
        except Exception as error:  # missing or damaged files, or no network: torchvision may raise any error
            reason = str(error).partition(". You can use download=True")[0]  # the option of torchvision, not of ours
            advice = "check the network" if config.download else "a training with --data.download gets it"
            raise ConfigError(
                f"data.kind {config.kind}: {Path(config.root).absolute()} does not hold it ({reason}); {advice}, "
                "or name the folder that holds it with --data.root (or --root, if the command has no --data.root)"
            ) from None
        self.classes, self.origin = tuple(data.classes), f"of {config.kind}"
        images = np.asarray(data.data)
        self._images = images if images.ndim == 4 else images[..., None]  # (N, h', w', C)
        self._labels = np.asarray(data.targets)
        if len(self._labels) != len(self._images) or not np.isin(self._labels, range(len(self.classes))).all():
            raise ConfigError(
                f"data.kind {config.kind}: {Path(config.root).absolute()} holds {len(self._images)} images and "
                f"{len(self._labels)} labels that do not fit them; download it again"
            )

    @property
    def class_sizes(self) -> dict[str, int | None]:
        """Number of images of each class."""
        return dict(zip(self.classes, np.bincount(self._labels, minlength=len(self.classes)).tolist(), strict=True))

    @property
    def identity(self) -> str:
        """Number of images: published data sets do not change, but a folder may hold a part of one."""
        return str(len(self))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        return self._images[index], int(self._labels[index])
