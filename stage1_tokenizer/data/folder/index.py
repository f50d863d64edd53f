"""The images of a folder: found, arranged in classes and splits, with a note about each decision."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stage1_tokenizer.data.bad_files import MAX_QUOTED, one_line
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.folder.labels import read_classes, read_labels, read_list
from stage1_tokenizer.data.folder.layout import Membership, arrange, arrange_like, first_and_more
from stage1_tokenizer.data.folder.scan import NOT_A_FILE, OtherFiles, find_images
from stage1_tokenizer.data.image_files import HEIC_EXTENSIONS, INSTALL_HEIC, RAW_EXTENSIONS, USUAL_EXTENSIONS
from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import describe_path, natural_sort_key, normalise_name

if TYPE_CHECKING:
    from stage1_tokenizer.data.folder import FolderConfig

Members = dict[str, Membership]
"""Split and class of each image, by its name."""


class Item(NamedTuple):
    """One image of a split."""

    root: str
    name: str
    """Path below the root, with forward slashes."""
    class_: str | None
    refusal: str
    """Reason for not opening the file; empty if it may be opened."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.root, self.name)


class FolderIndex:
    """The images, the classes and the ignored files of a folder."""

    splits: Mapping[Split, Sequence[Item]]
    """The images of each split in the order of their names; one object if both splits are the same images."""
    classes: tuple[str, ...]
    """Names of the classes in the order of their labels."""
    ignored: Mapping[str, int]
    """Number of files that are no data, by their kind."""
    notes: tuple[str, ...]
    """Decisions and oddities, for the user."""

    def __init__(self, config: "FolderConfig") -> None:
        """List a folder, and arrange its images.

        Raises:
            ConfigError: there is no such folder, no image in it, too few images for two splits, not the layout that is
                asked for, or a class whose name is not UTF-8.
            BadFileError: a folder in it cannot be listed.
        """
        self._config, self._root, self._option = config, Path(config.root), f"data.root {describe_path(config.root)}"
        self._notes, self._left_out = list[str](), Counter[str]()
        files, self._others = _list_images(self._root, config, self._option)
        if config.files is not None:
            chosen = read_list(Path(config.files), files, self._root, "files")
            left = len(files) - len(chosen)
            self._notes.append(f"only the {len(chosen):,} images that {config.files} lists; {left:,} others are not")
            files = {name: reason for name, reason in files.items() if name in chosen}
        self._class_order = None if config.classes is None else read_classes(Path(config.classes))
        members = self._select_classes(self._arrange(files))
        names = self._split(members)
        self.classes = self._order_classes({members[name].class_ for name in names["train"]})
        train = _items(config.root, names["train"], members, files)
        if config.validation_root is not None:
            validation = self._read_validation_root(config.validation_root)
        elif names["validation"] is names["train"]:
            validation = train
        else:
            validation = _items(config.root, names["validation"], members, files)
        self.splits = {"train": train, "validation": validation}
        for split, items in self.splits.items():
            if not items:
                number = format_count(len(members), "image is", "images are")
                raise ConfigError(
                    f"{self._option}: {number} too few for a {split} split; with --data.validation_share 0 all are "
                    "trained on and validated on, and --data.validation_root names another folder to validate on"
                )
        self.ignored = dict(self._others.ignored + self._left_out)
        self.notes = (*self._notes, *self._advise_tables(), *_advise_formats(self._others))

    def _arrange(self, files: Mapping[str, str]) -> Members:
        """Return the split and class of each image, from a table if there is one, otherwise from the folders."""
        config = self._config
        # A refused file counts here: a class whose files are all links would vanish, and labels would move.
        names = [name for name, reason in files.items() if not reason.startswith(NOT_A_FILE)]
        # The folders above those that Tessera wrote, as runs/, are no empty classes.
        above_ours = {os.fspath(parent) for name in self._others.our_folders for parent in Path(name).parents}
        folders = [name for name in self._others.folders if name not in above_ours]
        arranged = arrange(names, folders, config.layout, self._option, chosen=config.files is not None)
        if config.labels is not None:  # the folders then decide only the splits
            table = read_labels(Path(config.labels), config.label_column, names, self._root)
            for name, member in table.members.items():
                if member.split is None and name in arranged.members:
                    table.members[name] = member._replace(split=arranged.members[name].split)
            if unlabelled := [name for name in names if name not in table.members]:
                table.left_out["without a label"] += len(unlabelled)
                table.notes.append(f"left out: {first_and_more(unlabelled)}, which have no row in the table")
            arranged = table
        self._notes += arranged.notes
        self._left_out += arranged.left_out
        no_files = (name for name, reason in files.items() if reason.startswith(NOT_A_FILE))
        return arranged.members | dict.fromkeys(no_files, Membership(None, None))

    def _select_classes(self, members: Members) -> Members:
        """Leave out images of classes that data.classes does not name."""
        order, config = self._class_order, self._config
        if order is None:
            return members
        kept = {name: member for name, member in members.items() if member.class_ in order}
        if not kept:
            there = sorted({member.class_ for member in members.values() if member.class_}, key=natural_sort_key)
            raise ConfigError(
                f"data.classes {config.classes}: no image is of one of its classes; the folder has "
                + (", ".join(there[:MAX_QUOTED]) or "no classes")
            )
        used = {member.class_ for member in kept.values()}
        if empty := [name for name in order if name not in used]:
            self._notes.append(f"no image of {', '.join(empty[:MAX_QUOTED])}, so no class")
        if number := len(members) - len(kept):
            self._notes.append(f"left out: {number:,} images of classes that {config.classes} does not name")
        return kept

    def _split(self, members: Members) -> dict[Split, list[str]]:
        """Return the ordered names of the images to train on and to validate on."""
        config, ordered = self._config, _ordered(members)
        named_splits = {member.split for member in members.values()}
        if config.validation_root is not None:
            train = [name for name in ordered if members[name].split in (None, "train")]
            if number := len(members) - len(train):
                self._notes.append(f"left out: {number:,} images of other splits, for data.validation_root is given")
            return {"train": train, "validation": []}
        if config.validation_files is not None:
            validation = read_list(Path(config.validation_files), ordered, self._root, "validation_files")
        elif named_splits - {None, "train"}:
            # A test split is used for validation if there is no validation split, and otherwise left out.
            used = "validation" if "validation" in named_splits else "test"
            ordered = [name for name in ordered if members[name].split in (None, "train", used)]
            if number := len(members) - len(ordered):
                self._notes.append(
                    f"left out: {number:,} images of the test split; --data.validation_root names a folder to use"
                )
            validation = {name for name in ordered if members[name].split == used}
        elif config.validation_share in (0.0, 1.0):
            return {"train": ordered, "validation": ordered}
        else:
            validation = held_out({name: members[name].class_ for name in ordered}, config.validation_share)
        train = [name for name in ordered if name not in validation]
        known = {None, *(members[name].class_ for name in train)}
        unknown = [name for name in ordered if name in validation and members[name].class_ not in known]
        if unknown:
            self._notes.append(
                f"left out: {len(unknown):,} validation images of classes without training images, {unknown[0]} first"
            )
            self._left_out["left out"] += len(unknown)
        validation = validation.difference(unknown)
        return {"train": train, "validation": [name for name in ordered if name in validation]}

    def _order_classes(self, names: set[str | None]) -> tuple[str, ...]:
        """Return the classes in the order of their labels."""
        classes = {name for name in names if name is not None}
        for name in classes:
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's form of bytes that are not UTF-8
                raise ConfigError(
                    f"{self._option}: the name of the folder {one_line(name)} is not UTF-8. The names of classes have "
                    "to be, because a prior keeps them; rename it"
                )
        if self._class_order is not None:
            return tuple(name for name in self._class_order if name in classes)
        return tuple(sorted(classes, key=natural_sort_key))

    def _read_validation_root(self, given: str) -> list[Item]:
        """Return all images of data.validation_root, with the classes of the training images."""
        config, root = self._config, Path(given)
        files, others = _list_images(root, config, f"data.validation_root {describe_path(root)}")
        arranged = arrange_like(list(files), () if config.labels else self.classes, os.fspath(root))
        self._others.ignored.update(others.ignored + arranged.left_out)
        self._notes += [f"all of {root} is validated on", *arranged.notes]
        members = arranged.members
        if config.labels is not None:
            table = read_labels(Path(config.labels), config.label_column, files, root)
            self._notes += table.notes[1:]
            members = {name: member for name, member in table.members.items() if member.class_ in self.classes}
        return _items(given, _ordered(members), members, files)

    def _advise_tables(self) -> list[str]:
        """Advise data.labels if there are no classes, but files that may hold them."""
        ignored = self._others.ignored
        tables = {kind: ignored[kind] for kind in (".csv", ".tsv", ".jsonl") if ignored[kind]}
        if self.classes or self._config.layout == "flat" or not tables:
            return []
        listed = ", ".join(f"{kind} {number:,}" for kind, number in tables.items())
        return [f"there are no classes, but tables ({listed}); --data.labels FILE takes the classes from one"]


def _list_images(root: Path, config: "FolderConfig", option: str) -> tuple[dict[str, str], OtherFiles]:
    """List the images below a folder with the reasons why some are refused, and the other files there."""
    if not root.is_dir():
        advice = "; it is a file, and an archive is not unpacked" if root.exists() else ""
        raise ConfigError(f"{option}: there is no such folder{advice}")
    others = OtherFiles()
    files = dict(sorted(find_images(root, config.links, others)))
    if not files:
        there = ", ".join(f"{kind} {number:,}" for kind, number in others.ignored.most_common(MAX_QUOTED))
        usual = ", ".join(USUAL_EXTENSIONS)
        raise ConfigError(
            f"{option}: holds no images (looked for {usual} and all others that Pillow reads, by content)"
            + (f"; it holds {there}" if there else "; it is empty")
            + "".join(f"; {advice}" for advice in _advise_formats(others))
        )
    if all(files.values()):
        quoted = "".join(f"\n  {one_line(f'{name}: {reason}')}" for name, reason in islice(files.items(), MAX_QUOTED))
        raise ConfigError(f"{option}: holds no images that can be read, but{quoted}")
    return files, others


def _advise_formats(others: OtherFiles) -> list[str]:
    """Return advice about ignored files that are images in formats that are not read."""
    advice = []
    if heic := sum(others.ignored[kind] for kind in HEIC_EXTENSIONS):
        advice.append(f"{format_count(heic, 'HEIC file is', 'HEIC files are')} not read; {INSTALL_HEIC} them")
    if raw := sum(others.ignored[kind] for kind in RAW_EXTENSIONS):
        number = format_count(raw, "file", "files")
        advice.append(f"raw data of cameras are not read ({number}); convert them to TIFF or JPEG")
    return advice


def _items(root: str, names: Iterable[str], members: Members, files: Mapping[str, str]) -> list[Item]:
    return [Item(root, name, members[name].class_, files[name]) for name in names]


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (normalise_name(name), name))


def held_out(classes: Mapping[str, str | None], share: float) -> set[str]:
    """Choose the validation images: those whose name has a hash below the share, so that adding images moves none.

    Each class keeps one image to train on, and at least one image is chosen if another one of its class is left. So the
    result may be empty for a folder with few images.

    classes: the class of each image.
    """
    hashes = {name: unit_hash(name) for name in classes}
    chosen = {name for name in classes if hashes[name] < share}
    left = Counter(class_ for name, class_ in classes.items() if name not in chosen)
    for name in sorted(chosen, key=lambda name: -hashes[name]):
        if not left[classes[name]]:
            chosen.remove(name)
            left[classes[name]] += 1
    if not chosen and classes:
        spare = [name for name, class_ in classes.items() if left[class_] > 1]
        chosen.update(sorted(spare, key=lambda name: hashes[name])[:1])
    return chosen


def unit_hash(name: str) -> float:
    """Return a number in [0, 1) that depends only on the name, in any normal form of its accents."""
    data = normalise_name(name).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2.0**64
