"""Names of files and folders, and what they say: splits, masks and small copies, pieces of one set. See docs/data.md.

train, val               splits
images, masks            a folder of masks beside that of the images
1.jpg, 1_mask.png        a mask beside its image
1.jpg, 1-150x150.jpg     a smaller copy beside its image
1.jpg, 1_json/label.png  a folder that LabelMe writes about an image
part_1, part_2           pieces of one set of images; a camera's 100APPLE, 101APPLE
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set, Sized
from os.path import splitext
from typing import Literal

from stage1_tokenizer.engine.file_names import natural_sort_key, normalise_name

SHOWN = 5
"""Names that a note lists."""
HOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "leftimg8bit"})
"""Folders that hold the images, and are no class whatever lies beside them."""
IMAGES = HOLDERS | {"original", "originals", "photos", "rgb"}
ABOUT = frozenset({"annot", "annotation", "annotations", "ground_truth", "groundtruth", "gtcoarse", "gtfine"}) | {
    *("segmentation", "segmentationclass", "segmentationobject", "segmentations", "trimaps")
}
"""Folders that say something about images, whatever lies beside them: no object is called so."""
COMPANIONS = ABOUT | {"depth", "edges", "gt", "label", "labels", "mask", "masks", "previews", "thumbnails", "thumbs"}
"""Folders that say something about images, or repeat them, where they lie beside a folder of IMAGES."""
_MASK = re.compile(r"(.+)[_-](?:masks?|labels?|seg|segmentation|gt|depth)(?:_\d+)?", re.IGNORECASE)
_SMALL = re.compile(r"(.+)-\d+x\d+")
_LABELME = "_json"
_PIECE = re.compile(r"(|.*[^a-z])(?:part|fold|batch|chunk|shard|images?|img)[ _-]?\d+", re.IGNORECASE)
_CAMERA = re.compile(r"\d{3}[A-Z_]{5}|\d{6}__")
"""The folders of cameras and phones by their standard (DCF): 100APPLE, 101_PANA, 202305__."""


def companion_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Find the images that only say something about another image in the same folder, or repeat it."""
    stems = {splitext(name)[0] for name in names}
    found: dict[str, list[str]] = {}
    for name in names:
        stem = splitext(name)[0]
        if (match := _MASK.fullmatch(stem)) and match[1] in stems:
            found.setdefault("masks or labels of others by their names", []).append(name)
        elif (match := _SMALL.fullmatch(stem)) and match[1] in stems:
            found.setdefault("smaller copies of others by their names", []).append(name)
        elif any(above in stems for above in name.split(f"{_LABELME}/")[:-1]):
            found.setdefault("in folders that LabelMe wrote about others", []).append(name)
    return found


def companion_folders(groups: Mapping[str, Sized]) -> tuple[set[str], str]:
    """Find the folders, of some beside each other, that go with the rest, and say with what they go."""
    kinds = {name: name.lower() for name in groups}
    images = [name for name, kind in kinds.items() if kind in IMAGES]
    if len(images) == 1:
        rest = kinds.keys() - images
        most = len(groups[images[0]]) * 2 >= sum(map(len, groups.values()))
        if all(kinds[name] in COMPANIONS for name in rest) or (kinds[images[0]] in HOLDERS and most):
            return rest, f"which goes with {images[0]}/"
    about = {name for name, kind in kinds.items() if kind in ABOUT}
    return (about, "which says something about images") if len(about) < len(groups) else (set(), "")


def are_pieces(folders: Collection[str]) -> bool:
    """True where the names of folders say that each holds a piece of one set of images, and nothing else."""
    pieces = [_PIECE.fullmatch(name) for name in folders]
    numbered = all(pieces) and len({piece[1] for piece in pieces if piece}) == 1
    return len(folders) > 1 and (numbered or all(map(_CAMERA.fullmatch, folders)))


Part = Literal["train", "validation", "test"]
_WORDS: dict[Part, str] = {
    "train": "train training entrainement entraînement apprentissage entrenamiento treino treinamento addestramento "
    "обучение 训练 訓練 学習",
    "validation": "val valid validation dev validierung validacion validación validacao validação validazione "
    "валидация 验证 驗證 検証",
    "test": "test testing eval evaluation holdout hold-out hold_out prueba pruebas teste тест 测试 測試 テスト",
}
PARTS: dict[str, Part] = {word: part for part, words in _WORDS.items() for word in words.split()}
"""Words in the names of folders that hold splits."""
_FORMS = sorted({form for word in PARTS for form in (word, word.upper(), word.capitalize())}, key=len, reverse=True)
WORD = re.compile(
    rf"(?:(?<![^\W\d_])(?:{'|'.join(_FORMS)})|(?<=[a-z])(?:{'|'.join(form for form in _FORMS if form[0].isupper())}))"
    r"(?=_?[Ss]ets?(?![a-z])|[^a-zß-öø-ÿа-яё]|$)"
)
"""Such a word in the name of a folder: train, Train_set, DIV2K_train_HR, trainA; not `latest`, `trains`."""
SET = re.compile(r"^_?[Ss]ets?(?![a-z])")


def split_names(names: Collection[str]) -> dict[str, tuple[Part, str]]:
    """Find the part of each folder that is named as a split, and the class that the rest of its name says. There has to
    be a folder to train on, and another of the same rest; else nothing is found. Others may lie beside one pair.

        train, val      DIV2K_train_HR, DIV2K_valid_HR      trainA, trainB, testA, testB
    """
    found = {name: said for name in names if (said := _part_and_rest(name))}
    # train_masks goes with train, or is the whole data set
    found = {name: said for name, said in found.items() if said[1].strip("_- .").lower() not in COMPANIONS} or found
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
    """Return the part that a folder's name says, and the name without it; None where it says none, or two."""
    name = normalise_name(name)
    words = list(WORD.finditer(name))
    if len(words) != 1:
        return None
    rest = name[: words[0].start()] + SET.sub("", name[words[0].end() :])
    return PARTS[words[0].group().lower()], "" if rest.strip("_- .").isdecimal() else rest


def lack_training(names: Collection[str]) -> bool:
    """True where folders are named as splits, but none to train on: taken as classes, their images would be."""
    found = [_part_and_rest(name) for name in names]
    parts = {each[0] for each in found if each and each[1] == ""}
    return len(found) > 1 and "train" not in parts and ((all(found) and bool(parts)) or len(parts) > 1)


def doubts(classes: Mapping[str, Set[str]]) -> list[str]:
    """Say why folders that are taken as classes, each with its sub-folders, may be none."""
    notes = []
    plain = Counter(map(_plain, {normalise_name(name) for name in classes}))
    if twice := [name for name in classes if plain[_plain(normalise_name(name))] > 1]:
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
    """Write the first of some folders by their names, for a note."""
    ordered = sorted(folders, key=natural_sort_key)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(f"{name}/" for name in ordered[:SHOWN]) + more


def _plain(name: str) -> str:
    """Reduce a name to what two spellings of it share: red_panda, Red Panda."""
    return re.sub(r"[\s_-]", "", name).casefold()
