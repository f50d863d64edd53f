"""Why folders that are taken as classes may be none, in words: years, patients, two spellings of one name."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set

from stage1_tokenizer.engine.names import folded, natural

SHOWN = 5
"""Names that a note lists."""


def doubts(classes: Mapping[str, Set[str]]) -> list[str]:
    """What is doubtful about the folders of classes, each with its sub-folders."""
    notes = []
    plain = Counter(map(_plain, {folded(name) for name in classes}))
    if twice := [name for name in classes if plain[_plain(folded(name))] > 1]:
        notes.append(f"classes that differ in capital letters, spaces or hyphens alone: {listed(twice)}")
    first = next(iter(classes.values()), set())
    if classes and all(re.fullmatch(r"(?:.* )?(?:19|20)\d\d", name) for name in classes):
        notes.append("the classes are years; --data.layout flat reads all, without classes")
    elif len(first) > 1 and all(each == first for each in classes.values()):
        notes.append(
            f"each class has the same sub-folders, {listed(first)}, which are no classes; if they are the classes in "
            "truth, say so by --data.labels FILE"
        )
    return notes


def listed(folders: Iterable[str]) -> str:
    """The first of some folders by their names, for a note."""
    ordered = sorted(folders, key=natural)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(f"{name}/" for name in ordered[:SHOWN]) + more


def _plain(name: str) -> str:
    """A name without what tells apart only names of the same thing: red_panda, Red Panda."""
    return re.sub(r"[\s_-]", "", name).casefold()
