"""Masks, small copies and pieces of a set are no images and no classes of their own, and what is doubtful is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.folder.name_rules import are_pieces, split_names
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.engine.errors import ConfigError


def lay(root: Path, *names: str) -> Path:
    """One small image for each path."""
    pixels = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(root / name)
    return root


def trees(*folders: str, n: int = 4) -> list[str]:
    """Paths of `n` images in each folder, each of its own name."""
    return [f"{folder}/{folder.replace('/', '-')}{i}.png" for folder in folders for i in range(n)]


def opened(root: Path, **options: Any) -> OpenData:
    return OpenData(FolderConfig(root=str(root), **options))


def said(data: OpenData) -> str:
    return "\n".join(data.summary.lines())


@pytest.mark.parametrize(
    ("beside", "image"),
    [
        ("{}_mask.png", "benign (1)"),
        ("{}_mask_1.png", "benign (1)"),
        ("{}_Segmentation.png", "ISIC_0000001"),
        ("{}-150x150.png", "photo"),
        ("{}_json/label.png", "IMG_0001"),
    ],
)
def test_files_that_go_with_an_image_are_left_out(tmp_path: Path, beside: str, image: str) -> None:
    """A tokenizer would learn to draw masks, and a small copy would be validated on while its image is trained on. The
    same name without its image is an image, and so is each that the user lists."""
    images = [f"{class_}/{image}{i}.png" for class_ in ("a", "b") for i in range(4)]
    others = [beside.format(name.removesuffix(".png")) for name in images]
    alone = [f"b/{beside.format('other')}"]
    lay(tmp_path, *images, *others, *alone)
    data = opened(tmp_path)
    assert data.summary.images == len(images + alone)
    assert data.summary.classes == {"a": 4, "b": 5}
    assert data.summary.ignored == {"left out": len(others)}
    assert f"left out: {others[0]} and 7 more" in said(data)
    assert opened(tmp_path, layout="flat").summary.images == len(images + alone)
    (tmp_path / "list.txt").write_text("\n".join(images + others))
    assert opened(tmp_path, files=str(tmp_path / "list.txt")).summary.images == len(images + others)


@pytest.mark.parametrize(
    ("folders", "classes", "splits"),
    [
        (("leftImg8bit/train/x", "leftImg8bit/val/x", "gtFine/train/x", "gtFine/val/x"), [], (4, 4)),
        (("CUB/images/a", "CUB/images/b", "segmentations/a", "segmentations/b"), ["a", "b"], None),
        (("images/train", "images/val", "runs/detect"), [], (4, 4)),
        (("train", "train_labels", "val", "val_labels"), [], (4, 4)),
        (("photos", "drawings"), ["drawings", "photos"], None),  # names of classes too
        (("masks", "hats", "shoes"), ["hats", "masks", "shoes"], None),
        (("HAM_part_1", "HAM_part_2"), [], None),
        (("fold1/yes", "fold1/no", "fold2/yes", "fold2/no"), ["no", "yes"], None),
        (("images_001/images", "images_002/images"), [], None),
        (("DCIM/100APPLE", "DCIM/101APPLE"), [], None),
        (("train/aachen", "train/bochum", "val/lindau", "val/munster"), [], (8, 8)),
        (("train/images/a", "train/images/b", "train/masks/a", "val/images/c", "val/images/d"), [], (8, 8)),
        (("train_depth", "val_depth"), [], (4, 4)),
        (("train/cat", "train/dog", "test/unknown"), ["cat", "dog"], None),
    ],
    ids=str,
)
def test_folders_that_are_no_classes(
    tmp_path: Path, folders: tuple[str, ...], classes: list[str], splits: tuple[int, int] | None
) -> None:
    """Folders that go with others, pieces of one set, and sub-folders that no other split has; each is said."""
    data = opened(lay(tmp_path, *trees(*folders)))
    assert list(data.summary.classes) == classes
    if splits:
        assert (data.summary.train, data.summary.validation) == splits
    assert data.summary.notes or len(classes) == len(folders)


@pytest.mark.parametrize(
    "names", [("class1", "class2"), ("part1", "other"), ("0", "1"), ("n01440764", "n01443537"), ()]
)
def test_numbered_folders_are_no_pieces(names: tuple[str, ...]) -> None:
    """Classes are often numbered; the word says that something was cut."""
    assert not are_pieces(names)


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Validierung", "Test"),
        ("ENTRAINEMENT", "VALIDATION", "TEST"),
        ("entrenamiento", "validacio\u0301n", "prueba"),  # an accent as a Mac writes it
        ("训练集", "验证集", "测试集"),
        ("обучение", "валидация", "тест"),
    ],
)
def test_splits_are_known_in_other_languages(names: tuple[str, str, str]) -> None:
    """Taken as classes, all would be trained on."""
    assert [part for part, _ in split_names(names).values()] == ["train", "validation", "test"]
    assert not split_names((names[0] + "ierte", "про" + names[2]))  # a word within a word


def test_splits_without_one_to_train_on_are_refused(tmp_path: Path) -> None:
    """The name of the third folder may be in a language that we do not know."""
    lay(tmp_path, *trees("kouluttaa/a", "validation/a", "test/a"))
    with pytest.raises(ConfigError, match="Name the folder to train on"):
        opened(tmp_path)
    assert len(opened(tmp_path, layout="classes").summary.classes) == 3


def test_other_splits_without_classes_are_said(tmp_path: Path) -> None:
    """ImageNet's validation images lie in one folder. The splits named are those used, and the way out is one."""
    lay(tmp_path, *trees("train/a", "train/b", "val"))
    data = opened(tmp_path)
    assert data.summary.images == 8
    assert "only a part of the training images is validated on" in said(data)
    assert "(validation)" not in said(data)
    flat = opened(tmp_path / "train", validation_root=str(tmp_path / "val"), layout="flat")
    assert (flat.summary.train, flat.summary.validation) == (8, 4)


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (("8863/0", "8863/1", "8864/0", "8864/1"), "the same sub-folders, 0/, 1/"),
        (("2021/01", "2021/02", "2022/01"), "the classes are years"),
        (("red_panda", "Red Panda", "fox"), "spaces or hyphens alone: Red Panda/, red_panda/"),
    ],
)
def test_doubtful_classes_are_said(tmp_path: Path, folders: tuple[str, ...], note: str) -> None:
    """Patients, years and two spellings of one name stay classes, for they may be; the user can see it and decide."""
    assert note in said(opened(lay(tmp_path, *trees(*folders))))


def test_a_table_is_named_where_there_are_no_classes(tmp_path: Path) -> None:
    """Labels from a table have to be asked for, so the option is named; with it the note is gone."""
    lay(tmp_path, *trees("train", "test"))
    rows = [{"file_name": f"train{i}.png", "label": "ab"[i % 2]} for i in range(4)]
    table = tmp_path / "train" / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "tables (.jsonl 1); --data.labels FILE" in said(opened(tmp_path))
    assert "there are no classes" not in said(opened(tmp_path, labels=str(table)))
