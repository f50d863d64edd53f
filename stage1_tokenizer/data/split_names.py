"""Names of folders that hold splits: which words say that, and which folders belong together."""

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Literal

from stage1_tokenizer.data.companions import COMPANIONS
from stage1_tokenizer.engine.names import folded

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
    """The part of each folder that is named as a split, and the class that the rest of its name says. There has to be a
    folder to train on, and another of the same rest. Else nothing. Other folders may lie beside one pair of splits.

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
    """The part that a folder's name says, and the name without it; None where it says none, or two."""
    name = folded(name)
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
