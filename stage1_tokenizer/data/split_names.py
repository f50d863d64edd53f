"""Names of folders that hold splits: which words say that, and which folders belong together."""

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Literal

Part = Literal["train", "validation", "test"]
PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
}
"""Words in the names of folders that hold splits."""
_FORMS = sorted({form for word in PARTS for form in (word, word.upper(), word.capitalize())}, key=len, reverse=True)
WORD = re.compile(
    rf"(?:(?<![A-Za-z])(?:{'|'.join(_FORMS)})|(?<=[a-z])(?:{'|'.join(form for form in _FORMS if form[0].isupper())}))"
    r"(?=_?[Ss]ets?(?![a-z])|[^a-z]|$)"
)
"""Such a word in the name of a folder: train, Train_set, DIV2K_train_HR, trainA; not `latest`, `trains`."""
SET = re.compile(r"^_?[Ss]ets?(?![a-z])")


def split_names(names: Collection[str]) -> dict[str, tuple[Part, str]]:
    """The part of each folder that is named as a split, and the class that the rest of its name says. There has to be a
    folder to train on, and another of the same rest. Else nothing. Other folders may lie beside one pair of splits.

        train, val      DIV2K_train_HR, DIV2K_valid_HR      trainA, trainB, testA, testB
    """
    found = {name: said for name in names if (said := _part_and_rest(name))}
    parts = defaultdict[str, set[Part]](set)
    for part, rest in found.values():
        parts[rest].add(part)
    whole = [rest for rest, have in parts.items() if "train" in have and len(have) > 1]
    if len(whole) == 1:
        return {name: (part, "") for name, (part, rest) in found.items() if rest == whole[0]}
    if len(whole) == len(parts) and len(found) == len(names):
        return {name: (part, rest.strip("_- .")) for name, (part, rest) in found.items()}
    return {}


def _part_and_rest(name: str) -> tuple[Part, str] | None:
    """The part that a folder's name says, and the name without it; None where it says none, or two."""
    words = list(WORD.finditer(name))
    if len(words) != 1:
        return None
    rest = name[: words[0].start()] + SET.sub("", name[words[0].end() :])
    return PARTS[words[0].group().lower()], "" if rest.strip("_- .").isdecimal() else rest


def lack_training(names: Collection[str]) -> bool:
    """True where all folders are named as splits, but none to train on: taken as classes, their images would be."""
    found = [_part_and_rest(name) for name in names]
    return len(found) > 1 and all(each and each[0] != "train" and each[1] == "" for each in found)
