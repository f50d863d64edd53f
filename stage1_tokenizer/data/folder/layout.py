"""The rule by which the folders below a root become splits and classes. docs/data.md has it with pictures.

    ROOT/cat/1.png, ROOT/dog/2.png                 classes
    ROOT/train/cat/1.png, ROOT/val/cat/2.png       splits, and classes in them
    ROOT/1.png, ROOT/2.png                         flat: no classes

Folders that only wrap others (ROOT/data/cat, ROOT/data/dog) are passed through.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from stage1_tokenizer.data.folder.names import (
    SHOWN,
    Part,
    are_pieces,
    companion_files,
    companion_folders,
    doubts,
    lack_training,
    listed,
    split_names,
)
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import natural_sort_key, normalise_name

Layout = Literal["auto", "classes", "flat", "splits"]


class Place(NamedTuple):
    """Split and class that the rule gives one image."""

    part: Part | None
    """None: no folder says so."""
    class_: str | None
    """None: it has none."""


@dataclass
class Arranged:
    """The images of a folder by their places."""

    places: dict[str, Place] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Decisions, in words."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of images that belong to nothing, by the reason."""

    def put(self, names: Iterable[str], part: Part | None, class_: str | None = None) -> None:
        """Give images one place. class_: the name of the folder that is their class."""
        self.places |= dict.fromkeys(names, Place(part, None if class_ is None else normalise_name(class_)))

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Leave images out, and say why."""
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            self.notes.append(f"left out: {names[0]}{more}, {why}")
            self.left_out["left out"] += len(names)


def arrange(names: Sequence[str], folders: Collection[str], layout: Layout, option: str, chosen: bool) -> Arranged:
    """Find splits and classes in the relative paths of images.

    folders: all folders there are, those without images too. option: the option and its value, for errors.
    chosen: the user listed the images, so those that go with others are meant too.

    Raises:
        ConfigError: the layout that is asked for is not there.
    """
    done = Arranged()
    if backslashes := [name for name in names if "\\" in name]:
        done.notes.append(f"{len(backslashes):,} names hold backslashes ({backslashes[0]}), which are taken as folders")
    if not chosen:
        names = _without_companions(done, names)
    if layout == "flat":
        done.put(names, None)
    elif layout == "classes":
        _classes(done, names, folders, 0, None, asked=True)
        if not any(place.class_ for place in done.places.values()):
            raise ConfigError(f"{option}: there are no sub-folders with images, so no classes; leave out --data.layout")
    else:
        _any(done, names, folders, layout, option)
    return done


def arrange_like(names: Sequence[str], classes: Collection[str], where: str) -> Arranged:
    """Find the given classes in another folder, the part `where` of the same data set."""
    done = Arranged()
    _like(done, _without_companions(done, names), classes, 0, None, where)
    return done


def _without_companions(done: Arranged, names: Sequence[str]) -> Sequence[str]:
    """Return the images without those that go with others."""
    beside = companion_files(names)
    for what, found in beside.items():
        done.leave_out(found, f"{what}; --data.files names all that are read")
    gone = {name for found in beside.values() for name in found}
    return [name for name in names if name not in gone]


def _any(done: Arranged, names: Sequence[str], folders: Collection[str], layout: Layout, option: str) -> None:
    """The rule of docs/data.md, from its second point on."""
    depth, names = _unwrapped(done, names)
    if depth and len({(*_folders_and_file(name)[:depth],) for name in names}) == 1:
        done.notes.append(f"all images are below {'/'.join(names[0].split('/')[:depth])}/")
    groups, loose = _below(names, depth)
    splits = split_names(groups)
    if splits and len(loose) * 2 <= len(names):
        beside = [*loose, *(name for folder in groups.keys() - splits.keys() for name in groups[folder])]
        done.leave_out(sorted(beside), "beside the folders of the splits")
        _splits(done, groups, splits, folders, depth)
        return
    inner = {name: _below(group, depth + 1) for name, group in groups.items()}
    if len(groups) > 1 and all(below and not own and split_names(below) for below, own in inner.values()):
        for name, (below, _) in inner.items():
            splits = split_names(below)
            for folder, (part, _) in splits.items():
                done.put(below[folder], part, name)
            for folder in sorted(below.keys() - splits.keys()):
                done.leave_out(below[folder], "beside the folders of the splits")
        done.notes.append("each class has its splits in sub-folders")
        return
    if layout == "splits" or lack_training(groups):
        shown = ", ".join(sorted(groups)[:SHOWN]) or "none"
        raise ConfigError(
            f"{option}: no sub-folders named like splits (train with val, valid, validation or test) are there; the "
            f"sub-folders are: {shown}. Name the folder to train on with --data.root, or give --data.layout classes"
        )
    _classes(done, names, folders, depth, None)


def _unwrapped(
    done: Arranged, names: Sequence[str], depth: int = 0, stop: Collection[str] = ()
) -> tuple[int, Sequence[str]]:
    """Pass through folders that hold all of the images, and leave out masks and the like beside them.

    stop: classes, whose folders are not passed through.
    """
    while True:
        groups, loose = _below(names, depth)
        beside, why = companion_folders({} if split_names(groups) else groups)
        for name in sorted(beside):
            done.leave_out(groups.pop(name), f"in {name}/, {why}")
        if beside:
            names = [*(name for group in groups.values() for name in group), *loose]
        if loose or any(normalise_name(name) in stop for name in groups):
            return depth, names
        if are_pieces(groups):
            done.notes.append(f"{listed(groups)} are pieces of one set by their names, so no classes")
        elif len(groups) != 1:
            return depth, names
        depth += 1


def _below(names: Iterable[str], depth: int) -> tuple[dict[str, list[str]], list[str]]:
    """Return the images by their folder at a depth, and those that lie in none."""
    groups, loose = defaultdict[str, list[str]](list), list[str]()
    for name in names:
        parts = _folders_and_file(name, depth + 1)
        if len(parts) > depth + 1:
            groups[parts[depth]].append(name)
        else:
            loose.append(name)
    return dict(groups), loose


def _folders_and_file(name: str, most: int = -1) -> list[str]:
    """Split a path. A backslash in a name is what an archive of Windows leaves of a folder."""
    return name.replace("\\", "/").split("/", most)


def _splits(
    done: Arranged,
    groups: dict[str, list[str]],
    splits: dict[str, tuple[Part, str]],
    folders: Collection[str],
    depth: int,
) -> None:
    """Place the images of each split, with the classes in its folder."""
    said: dict[Part, list[str]] = defaultdict(list)
    strange = _nothing_in_common(groups, splits, depth)
    for name in sorted(splits, key=lambda name: (splits[name][0] != "train", name)):
        part, class_ = splits[name]
        said[part].append(f"{name}/")
        if class_:
            done.put(groups[name], part, class_)
        elif strange:
            done.put(_unwrapped(done, groups[name], depth + 1)[1], part)
        elif part == "train":
            inner, kept = _unwrapped(done, groups[name], depth + 1)
            _classes(done, kept, folders, inner, part)
        else:
            classes = {place.class_ for place in done.places.values() if place.class_}
            _like(done, groups[name], classes, depth + 1, part, f"{name}/")
    if strange:
        done.notes.append("no classes, since no sub-folder of the other splits is called as one of the training split")
    used = {place.part for place in done.places.values()}
    if used == {"train"}:
        done.notes.append(
            "only a part of the training images is validated on, since the other splits hold none of their classes; a "
            "tokenizer needs none: --data.layout flat, with the two folders as --data.root and --data.validation_root"
        )
    done.notes.append(
        "splits: " + ", ".join(f"{' and '.join(names)} ({part})" for part, names in said.items() if part in used)
    )


def _nothing_in_common(groups: dict[str, list[str]], splits: dict[str, tuple[Part, str]], depth: int) -> bool:
    """True where sub-folders of splits cannot be classes: cities, patients, each in one split alone."""
    trained, others = set[str](), set[str]()
    for name, (part, _) in splits.items():
        folders = _inner_folders(groups[name], depth + 1)
        if part == "train":
            trained |= folders
        elif len(folders) > 1:  # one alone is often a folder of all, test/unknown
            others |= folders
    return bool(others) and trained.isdisjoint(others)


def _inner_folders(names: Sequence[str], depth: int) -> set[str]:
    """Return the sub-folders that would be the classes of some images."""
    inner, names = _unwrapped(Arranged(), names, depth)
    return {normalise_name(folder) for folder in _below(names, inner)[0]}


def _like(
    done: Arranged, names: Sequence[str], classes: Collection[str], depth: int, part: Part | None, where: str
) -> None:
    """Place images with the classes that another part has; those in other folders are left out."""
    if not classes:
        done.put(names, part)
        return
    inner, names = _unwrapped(done, names, depth, classes)
    groups, loose = _below(names, inner)
    unknown = [name for name in groups if normalise_name(name) not in classes]
    others = [*loose, *(name for group in unknown for name in groups[group])]
    done.leave_out(others, f"in no class of the training images, but in {where}")
    for name in groups.keys() - set(unknown):
        done.put(groups[name], part, name)


def _classes(
    done: Arranged, names: Sequence[str], folders: Iterable[str], depth: int, part: Part | None, asked: bool = False
) -> None:
    """Take the folders at a depth as classes, if there are two with most of the images or they are asked for; else the
    images have none."""
    groups, loose = _below(names, depth)
    if not asked and (len(groups) < 2 or len(loose) > len(names) / 2):
        if groups:
            shown = ", ".join(f"{name}/ {len(group):,}" for name, group in sorted(groups.items())[:SHOWN])
            done.notes.append(
                f"no classes, since {len(loose):,} of the images lie beside the sub-folders ({shown}); --data.layout "
                "classes takes only what is in sub-folders"
            )
        done.put(names, part)
        return
    where = f" of {part}" if part else ""
    done.leave_out(loose, f"beside the folders of the classes{where}; --data.layout flat reads all, without classes")
    for name, group in groups.items():
        done.put(group, part, name)
    done.notes += doubts({name: _inner_folders(group, depth + 1) for name, group in groups.items()})
    above = {tuple(_folders_and_file(group[0])[:depth]) for group in groups.values()}
    siblings = {
        parts[depth] for folder in folders if len(parts := folder.split("/")) > depth and tuple(parts[:depth]) in above
    }
    if empty := sorted(siblings - groups.keys() - {""}, key=natural_sort_key):
        done.notes.append(f"no image in {listed(empty)}{where}, so no class")
