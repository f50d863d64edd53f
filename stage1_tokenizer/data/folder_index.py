"""The images of a folder: found, arranged in classes and splits, and said what was decided."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stage1_tokenizer.data.bad_files import QUOTED, one_line
from stage1_tokenizer.data.formats import GET_HEIC, HEIC, RAW, USUAL
from stage1_tokenizer.data.found import Found, plural
from stage1_tokenizer.data.hold_out import held_out
from stage1_tokenizer.data.label_files import read_classes, read_labels, read_list
from stage1_tokenizer.data.layout import Arranged, Place, arrange, arrange_like, as_split
from stage1_tokenizer.data.listing import NO_FILES, Seen, image_files
from stage1_tokenizer.data.pictures import Split
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.names import folded, located, natural

if TYPE_CHECKING:
    from stage1_tokenizer.data.folder import FolderConfig


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


@dataclass(frozen=True)
class FolderIndex:
    """The images of both splits, in the order of their names."""

    splits: Mapping[Split, Sequence[Item]]
    classes: tuple[str, ...]
    """In the order of their labels."""
    found: Found


def index_folder(config: "FolderConfig") -> FolderIndex:
    """List a folder, and arrange what is there. Errors are those of `Folder`."""
    root, option = Path(config.root), f"data.root {located(config.root)}"
    files, seen = _files(root, config, option)
    notes = list[str]()
    if config.files is not None:
        chosen = read_list(Path(config.files), files, root, "files")
        notes.append(
            f"only the {len(chosen):,} images that {config.files} lists; {len(files) - len(chosen):,} others are not"
        )
        files = {name: reason for name, reason in files.items() if name in chosen}
    # A file that is refused counts: a class whose files are all links would be gone, and the labels others.
    held = [name for name, reason in files.items() if not reason.startswith(NO_FILES)]
    arranged = _arranged(config, held, seen, root, option)
    places = arranged.places | {
        name: Place(None, None) for name, reason in files.items() if reason.startswith(NO_FILES)
    }
    notes += arranged.notes
    if config.classes is not None:
        places = _of_classes(places, read_classes(Path(config.classes)), config.classes, notes)
    ordered = sorted(places, key=lambda name: (folded(name), name))
    splits = _split(config, places, ordered, root, option, notes)
    trained = {place.class_ for name in splits["train"] if (place := places[name]).class_ is not None}
    if strange := [name for name in splits["validation"] if places[name].class_ not in {*trained, None}]:
        notes.append(
            f"left out: {len(strange):,} validation images of classes without training images, {strange[0]} first"
        )
        arranged.left_out["left out"] += len(strange)
        splits["validation"] = [name for name in splits["validation"] if places[name].class_ in {*trained, None}]
    classes = _ordered(config, trained, option)
    items = {name: Item(config.root, name, place.class_, files[name]) for name, place in places.items()}
    made: dict[Split, list[Item]] = {split: [items[name] for name in names] for split, names in splits.items()}
    if config.validation_root is not None:
        made["validation"] = _other_root(config, classes, notes, seen)
    for split, found in made.items():
        if not found:
            number = plural(len(places), "image is", "images are")
            raise ConfigError(
                f"{option}: {number} too few for a {split} split; with --data.validation_share 0 all are trained "
                "on and validated on, and --data.validation_root names another folder to validate on"
            )
    numbers = Counter(item.class_ for item in dict.fromkeys([*made["train"], *made["validation"]]))
    report = Found(
        where=f"under {located(config.root)}",
        train=len(made["train"]),
        validation=len(made["validation"]),
        shared=splits["train"] == splits["validation"] and config.validation_root is None,
        classes={name: numbers[name] for name in classes},
        ignored=dict(seen.ignored + arranged.left_out),
        notes=(*notes, *_tables(config, classes, seen), *_advice(seen)),
    )
    return FolderIndex(made, classes, report)


def _files(root: Path, config: "FolderConfig", option: str) -> tuple[dict[str, str], Seen]:
    """The images below a folder with the reasons why some are refused, and what else is there."""
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
    refused = {name: reason for name, reason in files.items() if reason}
    if len(refused) == len(files):
        shown = "".join(f"\n  {one_line(f'{name}: {reason}')}" for name, reason in islice(files.items(), QUOTED))
        raise ConfigError(f"{option}: holds no images that can be read, but{shown}")
    return files, seen


def _tables(config: "FolderConfig", classes: tuple[str, ...], seen: Seen) -> list[str]:
    """What can be done where there are no classes, but files that may hold them."""
    tables = {kind: seen.ignored[kind] for kind in (".csv", ".tsv", ".jsonl") if seen.ignored[kind]}
    if classes or config.layout == "flat" or not tables:
        return []
    shown = ", ".join(f"{kind} {number:,}" for kind, number in tables.items())
    return [f"there are no classes, but tables ({shown}); --data.labels FILE takes the classes from one"]


def _advice(seen: Seen) -> list[str]:
    """What can be done about ignored files that are images all the same."""
    heic = sum(seen.ignored[kind] for kind in HEIC)
    raw = sum(seen.ignored[kind] for kind in RAW)
    return [
        *[f"{plural(heic, 'HEIC file is', 'HEIC files are')} not read; {GET_HEIC.removesuffix(' it')} them"]
        * bool(heic),
        *[f"raw data of cameras are not read ({plural(raw, 'file', 'files')}); convert them to TIFF or JPEG"]
        * bool(raw),
    ]


def _arranged(config: "FolderConfig", held: list[str], seen: Seen, root: Path, option: str) -> Arranged:
    """The images with their classes, from a table if there is one, else from the folders."""
    above_ours = {os.fspath(parent) for name in seen.ours for parent in Path(name).parents}  # runs/, no empty class
    folders = [name for name in seen.folders if name not in above_ours]
    arranged = arrange(held, folders, config.layout, option, chosen=config.files is not None)
    if config.labels is None:
        return arranged
    # Of the folders the splits alone count then.
    table = read_labels(Path(config.labels), config.label_column, held, root)
    done = Arranged(notes=table.notes)
    for name in held:
        if name in table.places:
            place = table.places[name]
            at = arranged.places.get(name)
            done.places[name] = place._replace(part=place.part or (at.part if at else None))
    if gone := len(held) - len(done.places):
        done.left_out["without a label"] += gone
        first = next(name for name in held if name not in done.places)
        done.notes.append(f"left out: {first}{f' and {gone - 1:,} more' * (gone > 1)}, which have no row in the table")
    return done


def _of_classes(places: dict[str, Place], classes: tuple[str, ...], source: str, notes: list[str]) -> dict[str, Place]:
    """The images of the classes that a file names."""
    kept = {name: place for name, place in places.items() if place.class_ in classes}
    held = {place.class_ for place in kept.values()}
    if not kept:
        there = sorted({place.class_ for place in places.values() if place.class_}, key=natural)
        raise ConfigError(
            f"data.classes {source}: no image is of one of its classes; the folder has "
            + (", ".join(there[:QUOTED]) or "no classes")
        )
    if empty := [name for name in classes if name not in held]:
        notes.append(f"no image of {', '.join(empty[:QUOTED])}, so no class")
    if gone := len(places) - len(kept):
        notes.append(f"left out: {gone:,} images of classes that {source} does not name")
    return kept


def _split(
    config: "FolderConfig",
    places: dict[str, Place],
    ordered: list[str],
    root: Path,
    option: str,
    notes: list[str],
) -> dict[Split, list[str]]:
    """Which images are trained on, and which are validated on, in their order."""
    parts = {place.part for place in places.values()}
    validation: set[str]
    if config.validation_root is not None:
        ordered = [name for name in ordered if places[name].part in (None, "train")]
        if len(ordered) < len(places):
            notes.append(
                f"left out: {len(places) - len(ordered):,} images of other splits, for data.validation_root is given"
            )
        return {"train": ordered, "validation": []}
    if config.validation_files is not None:
        validation = read_list(Path(config.validation_files), ordered, root, "validation_files")
    elif parts - {None, "train"}:
        used = {name: as_split(places[name].part or "train", parts) for name in ordered}
        if gone := sum(split is None for split in used.values()):
            notes.append(f"left out: {gone:,} images of the test split; --data.validation_root names a folder to use")
        ordered = [name for name in ordered if used[name] is not None]
        validation = {name for name in ordered if used[name] == "validation"}
    elif config.validation_share in (0.0, 1.0):
        return {"train": ordered, "validation": ordered}
    else:
        validation = held_out(ordered, {name: places[name].class_ for name in ordered}, config.validation_share)
    return {
        "train": [name for name in ordered if name not in validation],
        "validation": [name for name in ordered if name in validation],
    }


def _ordered(config: "FolderConfig", names: Collection[str], option: str) -> tuple[str, ...]:
    """The classes in the order of their labels."""
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # what Python makes of bytes that are no UTF-8
            raise ConfigError(
                f"{option}: the name of the folder {one_line(name)} is not UTF-8, and names of classes have to be, "
                "since a prior keeps them; rename it"
            )
    if config.classes is not None:
        return tuple(name for name in read_classes(Path(config.classes)) if name in names)
    return tuple(sorted(names, key=natural))


def _other_root(config: "FolderConfig", classes: tuple[str, ...], notes: list[str], seen: Seen) -> list[Item]:
    """All images of data.validation_root, with the classes of the training images."""
    assert config.validation_root is not None
    root = Path(config.validation_root)
    files, beside = _files(root, config, f"data.validation_root {located(root)}")
    seen.ignored.update(beside.ignored)
    arranged = arrange_like(list(files), () if config.labels else classes, f"{os.fspath(root)}")
    notes.append(f"all of {root} is validated on")
    notes += arranged.notes
    seen.ignored.update(arranged.left_out)
    if config.labels is not None:
        table = read_labels(Path(config.labels), config.label_column, files, root)
        notes += table.notes[1:]
        arranged.places = {name: place for name, place in table.places.items() if place.class_ in classes}
    ordered = sorted(arranged.places, key=lambda name: (folded(name), name))
    return [Item(config.validation_root, name, arranged.places[name].class_, files[name]) for name in ordered]
