"""The images of a folder: found, arranged in classes and splits, with a note about each decision."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stage1_tokenizer.data.bad_files import QUOTED, one_line
from stage1_tokenizer.data.folder.labels import read_classes, read_labels, read_list
from stage1_tokenizer.data.folder.layout import Arranged, Place, arrange, arrange_like
from stage1_tokenizer.data.folder.scan import NO_FILES, Seen, image_files
from stage1_tokenizer.data.image_batches import Split
from stage1_tokenizer.data.image_files import GET_HEIC, HEIC, RAW, USUAL
from stage1_tokenizer.data.record import Found, plural
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import describe_path, natural_sort_key, normalise_name

if TYPE_CHECKING:
    from stage1_tokenizer.data.folder import FolderConfig

Places = dict[str, Place]


class Item(NamedTuple):
    """One image."""

    root: str
    name: str
    """Path below the root, with forward slashes."""
    class_: str | None
    refusal: str
    """Why it is not to be opened; empty: it is."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.root, self.name)


class FolderIndex:
    """The images of both splits, in the order of their names; the classes, in the order of their labels; the report."""

    splits: Mapping[Split, Sequence[Item]]
    classes: tuple[str, ...]
    found: Found

    def __init__(self, config: "FolderConfig") -> None:
        """List a folder, and arrange what is there.

        Raises:
            ConfigError: there is no such folder, no image in it, too few for two splits, not the layout that is asked
                for, or a class whose name is not UTF-8.
            BadFileError: a folder in it cannot be listed.
        """
        self._config, self._root, self._option = config, Path(config.root), f"data.root {describe_path(config.root)}"
        self._notes, self._left_out = list[str](), Counter[str]()
        self.how = config.decoding  # one for both splits, so that what is odd is reported once
        files, self._seen = _files(self._root, config, self._option)
        if config.files is not None:
            chosen = read_list(Path(config.files), files, self._root, "files")
            others = len(files) - len(chosen)
            self._notes.append(f"only the {len(chosen):,} images that {config.files} lists; {others:,} others are not")
            files = {name: reason for name, reason in files.items() if name in chosen}
        places = self._places(files)
        names = self._split(places)
        shared = names["train"] == names["validation"] and config.validation_root is None
        self.classes = self._ordered({class_ for name in names["train"] if (class_ := places[name].class_) is not None})
        splits = {split: [_item(config.root, name, places, files) for name in names[split]] for split in names}
        if config.validation_root is not None:
            splits["validation"] = self._other_root(config.validation_root)
        for split, items in splits.items():
            if not items:
                number = plural(len(places), "image is", "images are")
                raise ConfigError(
                    f"{self._option}: {number} too few for a {split} split; with --data.validation_share 0 all are "
                    "trained on and validated on, and --data.validation_root names another folder to validate on"
                )
        numbers = Counter(item.class_ for item in {*splits["train"], *splits["validation"]})
        self.splits = splits
        self.found = Found(
            where=f"under {describe_path(config.root)}",
            train=len(splits["train"]),
            validation=len(splits["validation"]),
            shared=shared,
            classes={name: numbers[name] for name in self.classes},
            ignored=dict(self._seen.ignored + self._left_out),
            notes=(*self._notes, *self._tables(), *_advice(self._seen)),
        )

    def _places(self, files: Mapping[str, str]) -> Places:
        """Split and class of each image that is used, from folders and tables."""
        config = self._config
        # A file that is refused counts: a class whose files are all links would be gone, and the labels others.
        held = [name for name, reason in files.items() if not reason.startswith(NO_FILES)]
        arranged = self._arranged(held)
        self._notes += arranged.notes
        self._left_out += arranged.left_out
        no_files = (name for name, reason in files.items() if reason.startswith(NO_FILES))
        places = arranged.places | dict.fromkeys(no_files, Place(None, None))
        self._named = None if config.classes is None else read_classes(Path(config.classes))
        if self._named is None:
            return places
        kept = {name: place for name, place in places.items() if place.class_ in self._named}
        if not kept:
            there = sorted({place.class_ for place in places.values() if place.class_}, key=natural_sort_key)
            raise ConfigError(
                f"data.classes {config.classes}: no image is of one of its classes; the folder has "
                + (", ".join(there[:QUOTED]) or "no classes")
            )
        used = {place.class_ for place in kept.values()}
        if empty := [name for name in self._named if name not in used]:
            self._notes.append(f"no image of {', '.join(empty[:QUOTED])}, so no class")
        if gone := len(places) - len(kept):
            self._notes.append(f"left out: {gone:,} images of classes that {config.classes} does not name")
        return kept

    def _arranged(self, held: list[str]) -> Arranged:
        """The images with their classes, from a table if there is one, else from the folders."""
        config, ours = self._config, self._seen.ours
        above_ours = {os.fspath(parent) for name in ours for parent in Path(name).parents}  # runs/, no empty class
        folders = [name for name in self._seen.folders if name not in above_ours]
        arranged = arrange(held, folders, config.layout, self._option, chosen=config.files is not None)
        if config.labels is None:
            return arranged
        # Of the folders the splits alone count then.
        done = read_labels(Path(config.labels), config.label_column, held, self._root)
        for name, place in done.places.items():
            if place.part is None and name in arranged.places:
                done.places[name] = place._replace(part=arranged.places[name].part)
        if gone := [name for name in held if name not in done.places]:
            done.left_out["without a label"] += len(gone)
            more = f" and {len(gone) - 1:,} more" if len(gone) > 1 else ""
            done.notes.append(f"left out: {gone[0]}{more}, which have no row in the table")
        return done

    def _split(self, places: Places) -> dict[Split, list[str]]:
        """The images that are trained on, and those that are validated on, in their order."""
        config, notes, ordered = self._config, self._notes, _ordered(places)
        parts = {place.part for place in places.values()}
        if config.validation_root is not None:
            ordered = [name for name in ordered if places[name].part in (None, "train")]
            if gone := len(places) - len(ordered):
                notes.append(f"left out: {gone:,} images of other splits, for data.validation_root is given")
            return {"train": ordered, "validation": []}
        if config.validation_files is not None:
            validation = read_list(Path(config.validation_files), ordered, self._root, "validation_files")
        elif parts - {None, "train"}:
            # The test part is validated on where there is no validation part, and else left out.
            part = "validation" if "validation" in parts else "test"
            ordered = [name for name in ordered if places[name].part in (None, "train", part)]
            if gone := len(places) - len(ordered):
                notes.append(
                    f"left out: {gone:,} images of the test split; --data.validation_root names a folder to use"
                )
            validation = {name for name in ordered if places[name].part == part}
        elif config.validation_share in (0.0, 1.0):
            return {"train": ordered, "validation": ordered}
        else:
            validation = held_out({name: places[name].class_ for name in ordered}, config.validation_share)
        train = [name for name in ordered if name not in validation]
        known = {None, *(places[name].class_ for name in train)}
        validated = [name for name in ordered if name in validation]
        if strange := [name for name in validated if places[name].class_ not in known]:
            notes.append(
                f"left out: {len(strange):,} validation images of classes without training images, {strange[0]} first"
            )
            self._left_out["left out"] += len(strange)
        return {"train": train, "validation": [name for name in validated if places[name].class_ in known]}

    def _ordered(self, names: set[str]) -> tuple[str, ...]:
        """The classes in the order of their labels."""
        for name in names:
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # what Python makes of bytes that are no UTF-8
                raise ConfigError(
                    f"{self._option}: the name of the folder {one_line(name)} is not UTF-8, and names of classes have "
                    "to be, since a prior keeps them; rename it"
                )
        if self._named is not None:
            return tuple(name for name in self._named if name in names)
        return tuple(sorted(names, key=natural_sort_key))

    def _other_root(self, given: str) -> list[Item]:
        """All images of data.validation_root, with the classes of the training images."""
        config, root = self._config, Path(given)
        files, beside = _files(root, config, f"data.validation_root {describe_path(root)}")
        arranged = arrange_like(list(files), () if config.labels else self.classes, os.fspath(root))
        self._seen.ignored.update(beside.ignored + arranged.left_out)
        self._notes += [f"all of {root} is validated on", *arranged.notes]
        places = arranged.places
        if config.labels is not None:
            table = read_labels(Path(config.labels), config.label_column, files, root)
            self._notes += table.notes[1:]
            places = {name: place for name, place in table.places.items() if place.class_ in self.classes}
        return [_item(given, name, places, files) for name in _ordered(places)]

    def _tables(self) -> list[str]:
        """Advice where there are no classes, but files that may hold them."""
        ignored = self._seen.ignored
        tables = {kind: ignored[kind] for kind in (".csv", ".tsv", ".jsonl") if ignored[kind]}
        if self.classes or self._config.layout == "flat" or not tables:
            return []
        shown = ", ".join(f"{kind} {number:,}" for kind, number in tables.items())
        return [f"there are no classes, but tables ({shown}); --data.labels FILE takes the classes from one"]


def _files(root: Path, config: "FolderConfig", option: str) -> tuple[dict[str, str], Seen]:
    """List the images below a folder with the reasons why some are refused, and what else is there."""
    if not root.is_dir():
        advice = "; it is a file, and an archive is not unpacked" if root.exists() else ""
        raise ConfigError(f"{option}: there is no such folder{advice}")
    seen = Seen()
    files = dict(sorted(image_files(root, config.links, seen)))
    if not files:
        there = ", ".join(f"{kind} {number:,}" for kind, number in seen.ignored.most_common(QUOTED))
        raise ConfigError(
            f"{option}: holds no images (looked for {', '.join(USUAL)} and all others that Pillow reads, by content)"
            + (f"; it holds {there}" if there else "; it is empty")
            + "".join(f"; {advice}" for advice in _advice(seen))
        )
    if all(files.values()):
        shown = "".join(f"\n  {one_line(f'{name}: {reason}')}" for name, reason in islice(files.items(), QUOTED))
        raise ConfigError(f"{option}: holds no images that can be read, but{shown}")
    return files, seen


def _advice(seen: Seen) -> list[str]:
    """Say what can be done about ignored files that are images all the same."""
    advice = []
    if heic := sum(seen.ignored[kind] for kind in HEIC):
        how = GET_HEIC.removesuffix(" it")
        advice.append(f"{plural(heic, 'HEIC file is', 'HEIC files are')} not read; {how} them")
    if raw := sum(seen.ignored[kind] for kind in RAW):
        number = plural(raw, "file", "files")
        advice.append(f"raw data of cameras are not read ({number}); convert them to TIFF or JPEG")
    return advice


def _item(root: str, name: str, places: Places, files: Mapping[str, str]) -> Item:
    return Item(root, name, places[name].class_, files[name])


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (normalise_name(name), name))


def held_out(classes: Mapping[str, str | None], share: float) -> set[str]:
    """Choose the images whose name has a hash below the share, so that adding images moves none.

    classes: the class of each image. Each keeps one image to train on, and one image at least is held out if another of
    its class is left. So of a folder with few images the result may be empty: then none can be spared.
    """
    hashes = {name: unit_hash(name) for name in classes}
    out = {name for name in classes if hashes[name] < share}
    left = Counter(class_ for name, class_ in classes.items() if name not in out)
    for name in sorted(out, key=lambda name: -hashes[name]):
        if not left[classes[name]]:
            out.remove(name)
            left[classes[name]] += 1
    if not out and classes:
        spare = [name for name, class_ in classes.items() if left[class_] > 1]
        out.update(sorted(spare, key=lambda name: hashes[name])[:1])
    return out


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, in whichever normal form its accents are."""
    data = normalise_name(name).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2.0**64
