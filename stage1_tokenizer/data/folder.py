"""A folder of images: one sub-folder per class, or all in one without classes."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stage1_tokenizer.data.bad_files import QUOTED, PictureError, one_line
from stage1_tokenizer.data.decode import EXTENSIONS, decode
from stage1_tokenizer.data.listing import NO_FILES, Links, image_files
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
    bad_share: float = Field(0.01, ge=0.0, le=1.0)
    """Share of a split's files that may be unreadable: damaged, too large, links to nowhere. Each is listed, and the
    next picture stands in for it. Above this share the run stops, for then the data set is not what it seems."""
    links: Links = "inside"
    """Where a file that is a symbolic link may lead. With `inside`, one that leads out of the folder counts as
    unreadable: a folder from elsewhere could otherwise show a run, and what it publishes, any file of this machine. So
    does a link to a folder that is not in this one; with `anywhere` it is followed, each folder once."""

    @property
    def tolerated(self) -> float:
        """As the base class has it."""
        return self.bad_share


class FolderImages:
    """One split of a folder, in the order of the relative paths. Reading a bad file raises PictureError."""

    def __init__(self, config: FolderConfig, split: Split) -> None:
        """Raises ConfigError where there is no such folder, no image in it, or a class whose name is not UTF-8, and
        BadFileError where a folder in it cannot be listed."""
        root = Path(config.root)
        if not root.is_dir():
            advice = "; it is a file, and an archive is not unpacked" if root.exists() else ""
            raise ConfigError(f"data.root {root}: there is no such folder{advice}")
        files = dict(sorted(image_files(root, config.links)))
        self._refused = {name: reason for name, reason in files.items() if reason}
        names = list(files)
        if not names:
            raise ConfigError(f"data.root {root}: holds no images (looked for {', '.join(sorted(EXTENSIONS))})")
        if len(self._refused) == len(names):
            shown = "".join(f"\n  {one_line(f'{name}: {reason}')}" for name, reason in islice(files.items(), QUOTED))
            raise ConfigError(f"data.root {root}: holds no images that can be read, but{shown}")
        # A file that is refused counts: a class whose files are all links would be gone, and the labels others.
        held = [name for name in names if not self._refused.get(name, "").startswith(NO_FILES)]
        tops = sorted({name.split("/", 1)[0] for name in held if "/" in name})
        # One sub-folder, or images beside the sub-folders, is a tree without classes.
        self.classes = tuple(tops) if len(tops) > 1 and all("/" in name for name in held) else ()
        for name in self.classes:
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # what Python makes of bytes that are no UTF-8
                raise ConfigError(
                    f"data.root {root}: the name of the folder {one_line(name)} is not UTF-8, and names of classes "
                    "have to be, since a prior keeps them; rename it"
                )
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
        listing = "\n".join(f"{name} {self._size(name)}" for name in self._names)
        return hashlib.blake2b(listing.encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def _size(self, name: str) -> int | str:
        if name in self._refused:
            return "refused"
        try:
            return (self._root / name).stat().st_size
        except OSError:  # a link to nowhere
            return "unreadable"

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        name = self._names[index]
        path = self._root / name
        if name in self._refused:
            raise PictureError(path, self._refused[name])
        return decode(path, self._channels), self._labels.get(name.split("/", 1)[0], 0)


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return (
        int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
        / 2.0**64
    )
