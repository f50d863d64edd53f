"""A folder of images: one sub-folder per class, or all in one without classes."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stage1_tokenizer.data.decode import EXTENSIONS, decode
from stage1_tokenizer.data.pictures import Picture, SizedConfig, Split
from stage1_tokenizer.errors import ConfigError


class FolderConfig(SizedConfig):
    """Any tree of images. The first level of sub-folders are the classes, where there are two or more."""

    kind: Literal["folder"] = "folder"
    root: str
    """The folder."""
    channels: Annotated[Literal[1, 3], BeforeValidator(lambda given: {"1": 1, "3": 3}.get(str(given), given))] = 3
    """1 converts to grey."""
    validation_share: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the images in the validation split. A hash of an image's path decides, so adding images moves none."""


class FolderImages:
    """One split of a folder, in the order of the relative paths."""

    def __init__(self, config: FolderConfig, split: Split) -> None:
        """Raises ConfigError where there is no such folder, or no image in it."""
        root = Path(config.root)
        if not root.is_dir():
            raise ConfigError(f"data.root {root}: there is no such folder")
        names = sorted(_image_names(root))
        if not names:
            raise ConfigError(f"data.root {root}: holds no images (looked for {', '.join(sorted(EXTENSIONS))})")
        tops = sorted({name.split("/", 1)[0] for name in names if "/" in name})
        # One sub-folder, or images beside the sub-folders, is a tree without classes.
        self.classes = tuple(tops) if len(tops) > 1 and all("/" in name for name in names) else ()
        self._labels = {name: index for index, name in enumerate(self.classes)}
        in_validation = {name: _unit_hash(name) < config.validation_share for name in names}
        self._names = [name for name in names if in_validation[name] == (split == "validation")]
        self._root, self._channels = root, config.channels
        if not self._names:
            raise ConfigError(
                f"data.root {root}: {len(names)} images are too few for a {split} split; set data.validation_share"
            )

    @property
    def identity(self) -> str:
        """A hash of the names and sizes of this split's files."""
        listing = "\n".join(f"{name} {(self._root / name).stat().st_size}" for name in self._names)
        return hashlib.blake2b(listing.encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        name = self._names[index]
        return decode(self._root / name, self._channels), self._labels.get(name.split("/", 1)[0], 0)


def _image_names(root: Path) -> list[str]:
    """Paths relative to the root, with forward slashes, of all files whose extension is an image's."""
    found = []
    for folder, _, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files if Path(file).suffix.lower() in EXTENSIONS]
    return found


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return (
        int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
        / 2.0**64
    )
