"""Rules for the names of files and folders: splits, masks and small copies, pieces of one set. See docs/data.md.

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

from stage1_tokenizer.data.bad_files import MAX_QUOTED
from stage1_tokenizer.engine.file_names import natural_sort_key, normalise_name

IMAGES_ONLY = frozenset({"image", "images", "img", "imgs", "jpegimages", "leftimg8bit"})
"""Folders that hold the images, and are no class whatever lies beside them."""
IMAGES = IMAGES_ONLY | {"original", "originals", "photos", "rgb"}
"""Folders that hold the images if masks and the like lie beside them."""
ANNOTATIONS = frozenset({"annot", "annotation", "annotations", "ground_truth", "groundtruth", "gtcoarse", "gtfine"}) | {
    *("segmentation", "segmentationclass", "segmentationobject", "segmentations", "trimaps")
}
"""Folders that annotate images, whatever lies beside them: no class of objects has such a name."""
COMPANIONS = ANNOTATIONS | {
    *("depth", "edges", "gt", "label", "labels", "mask", "masks", "previews", "thumbnails", "thumbs")
}
"""Folders that annotate or repeat images if they lie beside a folder of IMAGES."""
_MASK = re.compile(r"(.+)[_-](?:masks?|labels?|seg|segmentation|gt|depth)(?:_\d+)?", re.IGNORECASE)
_SMALL_COPY = re.compile(r"(.+)-\d+x\d+")
_LABELME = "_json"
_PIECE = re.compile(r"(|.*[^a-z])(?:part|fold|batch|chunk|shard|images?|img)[ _-]?\d+", re.IGNORECASE)
_CAMERA = re.compile(r"\d{3}[A-Z_]{5}|\d{6}__")
"""The folders of cameras and phones by their standard (DCF): 100APPLE, 101_PANA, 202305__."""


def companion_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Find the images that annotate or repeat another image in the same folder, by the reason."""
    stems = {splitext(name)[0] for name in names}
    companions: dict[str, list[str]] = {}
    for name in names:
        stem = splitext(name)[0]
        if (match := _MASK.fullmatch(stem)) and match[1] in stems:
            companions.setdefault("masks or labels of other images by their names", []).append(name)
        elif (match := _SMALL_COPY.fullmatch(stem)) and match[1] in stems:
            companions.setdefault("smaller copies of other images by their names", []).append(name)
        elif any(above in stems for above in name.split(f"{_LABELME}/")[:-1]):
            companions.setdefault("in folders that LabelMe wrote about other images", []).append(name)
    return companions


def companion_folders(groups: Mapping[str, Sized]) -> tuple[set[str], str]:
    """Find the folders that annotate or repeat the images of the others, and the reason for a note.

    groups: the folders beside each other, with their images.
    """
    kinds = {name: name.lower() for name in groups}
    images = [name for name, kind in kinds.items() if kind in IMAGES]
    if len(images) == 1:
        rest = kinds.keys() - images
        has_most = len(groups[images[0]]) * 2 >= sum(map(len, groups.values()))
        if all(kinds[name] in COMPANIONS for name in rest) or (kinds[images[0]] in IMAGES_ONLY and has_most):
            return rest, f"which goes with {images[0]}/"
    annotations = {name for name, kind in kinds.items() if kind in ANNOTATIONS}
    return (annotations, "which annotates images") if len(annotations) < len(groups) else (set(), "")


def are_pieces(folders: Collection[str]) -> bool:
    """Return True if the names of folders say that each holds a piece of one set of images."""
    pieces = [_PIECE.fullmatch(name) for name in folders]
    are_numbered = all(pieces) and len({piece[1] for piece in pieces if piece}) == 1
    return len(folders) > 1 and (are_numbered or all(map(_CAMERA.fullmatch, folders)))


NamedSplit = Literal["train", "validation", "test"]
"""A split that a folder or a table names."""
_WORDS: dict[NamedSplit, str] = {
    "train": "train training entrainement entraînement apprentissage entrenamiento treino treinamento addestramento "
    "обучение 训练 訓練 学習",
    "validation": "val valid validation dev validierung validacion validación validacao validação validazione "
    "валидация 验证 驗證 検証",
    "test": "test testing eval evaluation holdout hold-out hold_out prueba pruebas teste тест 测试 測試 テスト",
}
SPLIT_OF_WORD: dict[str, NamedSplit] = {word: split for split, words in _WORDS.items() for word in words.split()}
"""Words that name splits, in lower case."""
_FORMS = sorted(
    {form for word in SPLIT_OF_WORD for form in (word, word.upper(), word.capitalize())}, key=len, reverse=True
)
_WORD = re.compile(
    rf"(?:(?<![^\W\d_])(?:{'|'.join(_FORMS)})|(?<=[a-z])(?:{'|'.join(form for form in _FORMS if form[0].isupper())}))"
    r"(?=_?[Ss]ets?(?![a-z])|[^a-zß-öø-ÿа-яё]|$)"
)
"""Such a word in the name of a folder: train, Train_set, DIV2K_train_HR, trainA; not `latest`, `trains`."""
_SET = re.compile(r"^_?[Ss]ets?(?![a-z])")


def split_names(names: Collection[str]) -> dict[str, tuple[NamedSplit, str]]:
    """Find the folders that are named as splits: for each its split, and the class that the rest of its name says.

    The result is empty unless there is a folder to train on and another split with the same rest of the name. Other
    folders may lie beside one such pair.

        train, val      DIV2K_train_HR, DIV2K_valid_HR      trainA, trainB, testA, testB
    """
    parsed = {name: parts for name in names if (parts := _split_and_rest(name))}
    # train_masks goes with train, unless there is nothing else
    parsed = {
        name: parts for name, parts in parsed.items() if parts[1].strip("_- .").lower() not in COMPANIONS
    } or parsed
    splits_of_rest = defaultdict[str, set[NamedSplit]](set)
    for split, rest in parsed.values():
        splits_of_rest[rest].add(split)
    complete = [rest for rest, splits in splits_of_rest.items() if "train" in splits and len(splits) > 1]
    if len(complete) == 1:
        return {name: (split, "") for name, (split, rest) in parsed.items() if rest == complete[0]}
    if len(complete) == len(splits_of_rest) and len(parsed) == len(names):
        return {name: (split, rest.strip("_- .")) for name, (split, rest) in parsed.items()}
    return {}


def _split_and_rest(name: str) -> tuple[NamedSplit, str] | None:
    """Return the split that a folder's name says, and the name without it; None if it says no split, or two."""
    name = normalise_name(name)
    words = list(_WORD.finditer(name))
    if len(words) != 1:
        return None
    rest = name[: words[0].start()] + _SET.sub("", name[words[0].end() :])
    return SPLIT_OF_WORD[words[0].group().lower()], "" if rest.strip("_- .").isdecimal() else rest


def lacks_training_split(names: Collection[str]) -> bool:
    """Return True if folders are named as splits, but none to train on. Taken as classes, validation and test images
    would be trained on."""
    parsed = [_split_and_rest(name) for name in names]
    splits = {parts[0] for parts in parsed if parts and parts[1] == ""}
    return len(parsed) > 1 and "train" not in splits and ((all(parsed) and bool(splits)) or len(splits) > 1)


def class_doubts(classes: Mapping[str, Set[str]]) -> list[str]:
    """Return notes about folders that are taken as classes, but may be none. classes: each with its sub-folders."""
    notes = []
    spellings = Counter(map(_spelling_key, {normalise_name(name) for name in classes}))
    if twice := [name for name in classes if spellings[_spelling_key(normalise_name(name))] > 1]:
        notes.append(f"classes that differ in capital letters, spaces or hyphens alone: {quote_folders(twice)}")
    first = next(iter(classes.values()), set())
    if classes and all(re.fullmatch(r"(?:.* )?(?:19|20)\d\d", name) for name in classes):
        notes.append("the classes are years; --data.layout flat reads all, without classes")
    elif len(first) > 1 and all(inner == first for inner in classes.values()):
        notes.append(
            f"each class has the same sub-folders, {quote_folders(first)}, which are no classes; if they are the real "
            "classes, give them with --data.labels FILE"
        )
    return notes


def quote_folders(folders: Iterable[str]) -> str:
    """Return the first names of some folders, for a note."""
    ordered = sorted(folders, key=natural_sort_key)
    more = f" and {len(ordered) - MAX_QUOTED} more" if len(ordered) > MAX_QUOTED else ""
    return ", ".join(f"{name}/" for name in ordered[:MAX_QUOTED]) + more


def _spelling_key(name: str) -> str:
    """Return a key that all spellings of a name share: red_panda, Red Panda."""
    return re.sub(r"[\s_-]", "", name).casefold()
