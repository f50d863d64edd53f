"""The rule by which the folders below a root become splits and classes; docs/data.md shows it in drawings.

    ROOT/cat/1.png, ROOT/dog/2.png                 classes
    ROOT/train/cat/1.png, ROOT/val/cat/2.png       splits, and classes in them
    ROOT/1.png, ROOT/2.png                         flat: no classes

Folders that only wrap others (ROOT/data/cat, ROOT/data/dog) are passed through.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from stage1_tokenizer.data.bad_files import MAX_QUOTED
from stage1_tokenizer.data.folder.name_rules import (
    NamedSplit,
    are_pieces,
    class_doubts,
    companion_files,
    companion_folders,
    lacks_training_split,
    quote_folders,
    split_names,
)
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import natural_sort_key, normalise_name

Layout = Literal["auto", "classes", "flat", "splits"]
Groups = dict[str, list[str]]
"""The images of each folder, by the folder's name."""
NamedSplits = dict[str, tuple[NamedSplit, str]]
"""The split of each folder that is named as one, and the class that the rest of its name says."""


class Membership(NamedTuple):
    """The split and the class of one image."""

    split: NamedSplit | None
    """None: neither a folder nor a table names it."""
    class_: str | None
    """None: the image has no class."""


@dataclass
class Arrangement:
    """The images of a folder with their splits and classes."""

    members: dict[str, Membership] = field(default_factory=dict)
    """The images that are used, by name."""
    notes: list[str] = field(default_factory=list)
    """Decisions, for the user."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of images that are not used, by the reason."""

    def add(self, names: Iterable[str], split: NamedSplit | None, class_: str | None = None) -> None:
        """Give images one split and one class. class_: the name of the folder that is their class."""
        self.members |= dict.fromkeys(names, Membership(split, None if class_ is None else normalise_name(class_)))

    def leave_out(self, names: Sequence[str], reason: str) -> None:
        """Leave images out, with a note that says why."""
        if names:
            self.notes.append(f"left out: {first_and_more(names)}, {reason}")
            self.left_out["left out"] += len(names)


def first_and_more(names: Sequence[str]) -> str:
    """Return the first of some images and the number of the others, for a note."""
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def arrange(names: Sequence[str], folders: Collection[str], layout: Layout, option: str, chosen: bool) -> Arrangement:
    """Find splits and classes in the relative paths of images.

    folders: all folders below the root, also those without images.
    option: the option with its value, for errors.
    chosen: True if the user listed the images, so that images that go with others are not left out.

    Raises:
        ConfigError: the folders do not have the layout that is asked for.
    """
    result = Arrangement()
    if backslashes := [name for name in names if "\\" in name]:
        result.notes.append(
            f"{len(backslashes):,} names hold backslashes ({backslashes[0]}), which are taken as folders"
        )
    if not chosen:
        names = _leave_out_companions(result, names)
    if layout == "flat":
        result.add(names, None)
    elif layout == "classes":
        _add_classes(result, names, folders, 0, None, are_asked_for=True)
        if not any(member.class_ for member in result.members.values()):
            raise ConfigError(f"{option}: there are no sub-folders with images, so no classes; leave out --data.layout")
    else:
        _add_by_rule(result, names, folders, layout, option)
    return result


def arrange_like(names: Sequence[str], classes: Collection[str], where: str) -> Arrangement:
    """Find the given classes in another folder of the same data set. where: the folder's name, for notes."""
    result = Arrangement()
    _add_known_classes(result, _leave_out_companions(result, names), classes, 0, None, where)
    return result


def _leave_out_companions(result: Arrangement, names: Sequence[str]) -> Sequence[str]:
    """Return the images without those that annotate or repeat others."""
    by_reason = companion_files(names)
    for reason, companions in by_reason.items():
        result.leave_out(companions, f"{reason}; --data.files names all images to read")
    gone = {name for companions in by_reason.values() for name in companions}
    return [name for name in names if name not in gone]


def _add_by_rule(
    result: Arrangement, names: Sequence[str], folders: Collection[str], layout: Layout, option: str
) -> None:
    """Arrange images by the rule of docs/data.md, from its second point on."""
    depth, names = _pass_through(result, names)
    if depth and len({(*_split_path(name)[:depth],) for name in names}) == 1:
        result.notes.append(f"all images are below {'/'.join(names[0].split('/')[:depth])}/")
    groups, loose = _group_by_folder(names, depth)
    splits = split_names(groups)
    if splits and len(loose) * 2 <= len(names):
        beside = [*loose, *(name for folder in groups.keys() - splits.keys() for name in groups[folder])]
        result.leave_out(sorted(beside), "beside the folders of the splits")
        _add_splits(result, groups, splits, folders, depth)
        return
    inner = {name: _group_by_folder(group, depth + 1) for name, group in groups.items()}
    if len(groups) > 1 and all(below and not own and split_names(below) for below, own in inner.values()):
        for name, (below, _) in inner.items():
            splits = split_names(below)
            for folder, (split, _) in splits.items():
                result.add(below[folder], split, name)
            for folder in sorted(below.keys() - splits.keys()):
                result.leave_out(below[folder], "beside the folders of the splits")
        result.notes.append("each class has its splits in sub-folders")
        return
    if layout == "splits" or lacks_training_split(groups):
        there = ", ".join(sorted(groups)[:MAX_QUOTED]) or "none"
        raise ConfigError(
            f"{option}: no sub-folders named like splits (train with val, valid, validation or test) are there; the "
            f"sub-folders are: {there}. Name the folder to train on with --data.root, or give --data.layout classes"
        )
    _add_classes(result, names, folders, depth, None)


def _pass_through(
    result: Arrangement, names: Sequence[str], depth: int = 0, stop: Collection[str] = ()
) -> tuple[int, Sequence[str]]:
    """Find the depth below folders that hold all of the images, and leave out masks and the like on the way.

    stop: classes, whose folders are not passed through.
    """
    while True:
        groups, loose = _group_by_folder(names, depth)
        companions, reason = companion_folders({} if split_names(groups) else groups)
        for name in sorted(companions):
            result.leave_out(groups.pop(name), f"in {name}/, {reason}")
        if companions:
            names = [*(name for group in groups.values() for name in group), *loose]
        if loose or any(normalise_name(name) in stop for name in groups):
            return depth, names
        if are_pieces(groups):
            result.notes.append(f"{quote_folders(groups)} are pieces of one set by their names, so no classes")
        elif len(groups) != 1:
            return depth, names
        depth += 1


def _group_by_folder(names: Iterable[str], depth: int) -> tuple[Groups, list[str]]:
    """Return the images by their folder at a depth, and the images that lie in none."""
    groups, loose = defaultdict[str, list[str]](list), list[str]()
    for name in names:
        parts = _split_path(name, depth + 1)
        if len(parts) > depth + 1:
            groups[parts[depth]].append(name)
        else:
            loose.append(name)
    return dict(groups), loose


def _split_path(name: str, at_most: int = -1) -> list[str]:
    """Split a path into folders and file. Archives from Windows leave backslashes in names, in place of folders."""
    return name.replace("\\", "/").split("/", at_most)


def _add_splits(result: Arrangement, groups: Groups, splits: NamedSplits, folders: Collection[str], depth: int) -> None:
    """Add the images of each split, with the classes in its folder."""
    folders_of_split: dict[NamedSplit, list[str]] = defaultdict(list)
    have_no_classes = _have_nothing_in_common(groups, splits, depth)
    for name in sorted(splits, key=lambda name: (splits[name][0] != "train", name)):
        split, class_ = splits[name]
        folders_of_split[split].append(f"{name}/")
        if class_:
            result.add(groups[name], split, class_)
        elif have_no_classes:
            result.add(_pass_through(result, groups[name], depth + 1)[1], split)
        elif split == "train":
            inner, kept = _pass_through(result, groups[name], depth + 1)
            _add_classes(result, kept, folders, inner, split)
        else:
            classes = {member.class_ for member in result.members.values() if member.class_}
            _add_known_classes(result, groups[name], classes, depth + 1, split, f"{name}/")
    if have_no_classes:
        result.notes.append(
            "no classes, since no sub-folder of the other splits is called as one of the training split"
        )
    used = {member.split for member in result.members.values()}
    if used == {"train"}:
        result.notes.append(
            "only a part of the training images is validated on, since the other splits hold none of their classes; a "
            "tokenizer needs none: --data.layout flat, with the two folders as --data.root and --data.validation_root"
        )
    listed = (f"{' and '.join(names)} ({split})" for split, names in folders_of_split.items() if split in used)
    result.notes.append("splits: " + ", ".join(listed))


def _have_nothing_in_common(groups: Groups, splits: NamedSplits, depth: int) -> bool:
    """Return True if the sub-folders of splits cannot be classes: cities or patients, each in one split alone."""
    trained, others = set[str](), set[str]()
    for name, (split, _) in splits.items():
        folders = _inner_folders(groups[name], depth + 1)
        if split == "train":
            trained |= folders
        elif len(folders) > 1:  # a single one often holds all images, as test/unknown
            others |= folders
    return bool(others) and trained.isdisjoint(others)


def _inner_folders(names: Sequence[str], depth: int) -> set[str]:
    """Return the sub-folders that would be the classes of some images."""
    inner, names = _pass_through(Arrangement(), names, depth)
    return {normalise_name(folder) for folder in _group_by_folder(names, inner)[0]}


def _add_known_classes(
    result: Arrangement,
    names: Sequence[str],
    classes: Collection[str],
    depth: int,
    split: NamedSplit | None,
    where: str,
) -> None:
    """Add images with the classes of the training images; leave out the images in other folders."""
    if not classes:
        result.add(names, split)
        return
    inner, names = _pass_through(result, names, depth, classes)
    groups, loose = _group_by_folder(names, inner)
    unknown = [name for name in groups if normalise_name(name) not in classes]
    others = [*loose, *(name for group in unknown for name in groups[group])]
    result.leave_out(others, f"in no class of the training images, but in {where}")
    for name in groups.keys() - set(unknown):
        result.add(groups[name], split, name)


def _add_classes(
    result: Arrangement,
    names: Sequence[str],
    folders: Iterable[str],
    depth: int,
    split: NamedSplit | None,
    are_asked_for: bool = False,
) -> None:
    """Add images with the folders at a depth as their classes, if these are two or more and hold most of the images, or
    if classes are asked for. Otherwise add them without classes."""
    groups, loose = _group_by_folder(names, depth)
    if not are_asked_for and (len(groups) < 2 or len(loose) > len(names) / 2):
        if groups:
            sizes = ", ".join(f"{name}/ {len(group):,}" for name, group in sorted(groups.items())[:MAX_QUOTED])
            result.notes.append(
                f"no classes, since {len(loose):,} of the images lie beside the sub-folders ({sizes}); --data.layout "
                "classes takes only what is in sub-folders"
            )
        result.add(names, split)
        return
    of_split = f" of {split}" if split else ""
    result.leave_out(
        loose, f"beside the folders of the classes{of_split}; --data.layout flat reads all, without classes"
    )
    for name, group in groups.items():
        result.add(group, split, name)
    result.notes += class_doubts({name: _inner_folders(group, depth + 1) for name, group in groups.items()})
    above = {tuple(_split_path(group[0])[:depth]) for group in groups.values()}
    siblings = {
        parts[depth] for folder in folders if len(parts := folder.split("/")) > depth and tuple(parts[:depth]) in above
    }
    if empty := sorted(siblings - groups.keys() - {""}, key=natural_sort_key):
        result.notes.append(f"no image in {quote_folders(empty)}{of_split}, so no class")
