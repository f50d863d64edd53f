"""The folders that become classes and splits, the files that are left out, and the notes about them."""

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.folder.name_rules import split_names
from stage1_tokenizer.data.open_data import OpenData, open_data
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import natural_sort_key
from stage1_tokenizer.engine.lock import mark_folder

SPLITS: tuple[Split, Split] = ("train", "validation")


def fill(root: Path, *folders: str, n: int = 12, ending: str = "png") -> Path:
    """`n` images in each folder, each file of another size in bytes."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 256, (4, 4 + i % 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.{ending}", format="PNG")
    return root


def opened(root: Path, **options: Any) -> OpenData:
    return OpenData(FolderConfig(root=str(root), **options))


def numbers(data: OpenData) -> dict[str, int | None]:
    return dict(data.summary.classes)


def said(data: OpenData) -> str:
    return "\n".join(data.summary.lines())


@pytest.mark.parametrize(
    ("folders", "classes", "splits"),
    [
        (("cat", "dog"), {"cat": 12, "dog": 12}, None),
        (("data/cat", "data/dog"), {"cat": 12, "dog": 12}, None),
        (("a/b/c",), {}, None),
        (("train/cat", "train/dog", "val/cat", "val/dog"), {"cat": 24, "dog": 24}, (24, 24)),
        (("x/Train/cat", "x/Train/dog", "x/Test/cat", "x/Test/dog"), {"cat": 24, "dog": 24}, (24, 24)),
        (("train/cat", "train/dog", "valid/cat", "valid/dog", "test/cat"), {"cat": 24, "dog": 24}, (24, 24)),
        (("train", "val"), {}, (12, 12)),
        (("train/images", "val/images", "train/labels"), {}, (12, 12)),
        (("training_set/training_set/cat", "training_set/training_set/dog", "test_set/test_set/dog"), None, (24, 12)),
        (("DIV2K_train_HR", "DIV2K_valid_HR"), {}, (12, 12)),
        (("train2017", "val2017"), {}, (12, 12)),
        (("trainA", "trainB", "testA", "testB"), {"A": 24, "B": 24}, (24, 24)),
        (("cat/train", "cat/val", "dog/train", "dog/val"), {"cat": 24, "dog": 24}, (24, 24)),
        (("train", "car", "plane"), {"car": 12, "plane": 12, "train": 12}, None),
        (("train/cat", "train/dog", "test/cat", "unlabeled", "ground_truth/cat"), {"cat": 24, "dog": 12}, (24, 12)),
        (("b/train/good", "b/test/bad", "b/masks/bad", "c/train/good", "c/test/x"), {"b": 24, "c": 24}, (24, 24)),
        (("cat/thumbs", "cat", "dog", "Thumbnails"), {"cat": 12, "dog": 12}, None),
        (("images", "masks"), {}, None),
        (("1", "2", "10"), {"1": 12, "2": 12, "10": 12}, None),
        (("cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat", ".Trash-1000", "@eaDir"), {"cat": 12, "dog": 12}, None),
        (("train/cat", "train/dog", "val/cat"), {"cat": 24, "dog": 12}, (24, 12)),
    ],
    ids=str,
)
def test_folders_become_classes_and_splits(
    tmp_path: Path, folders: tuple[str, ...], classes: dict[str, int] | None, splits: tuple[int, int] | None
) -> None:
    """The rule of docs/data.md, by the layouts that people have. What is validated on is never trained on."""
    data = opened(fill(tmp_path, *folders))
    if classes is not None:
        assert list(numbers(data).items()) == list(classes.items())
    if splits:
        assert (data.summary.train, data.summary.validation) == splits
    trained, validated = (
        {(item.root, item.name) for item in data.splits[split]._items}  # type: ignore[attr-defined]
        for split in SPLITS
    )
    assert not trained & validated
    assert len(trained) + len(validated) == data.summary.images


@pytest.mark.parametrize(
    "names", [("latest", "trains"), ("train", "cars"), ("test",), ("train",), ("contest", "train")]
)
def test_other_names_are_no_splits(names: tuple[str, ...]) -> None:
    """A word within a word says nothing, and a split comes with another."""
    assert not split_names(names)


def test_images_beside_the_classes_are_left_out_and_said(tmp_path: Path) -> None:
    """One stray image cost all labels without a word. The user may decide otherwise."""
    fill(fill(tmp_path, "cat", "dog"), ".", n=1)
    data = opened(tmp_path)
    assert numbers(data) == {"cat": 12, "dog": 12}
    assert "left out: 0.png, beside the folders of the classes" in said(data)
    flat = opened(tmp_path, layout="flat")
    assert (numbers(flat), flat.summary.images) == ({}, 25)


def test_the_layout_can_be_asked_for(tmp_path: Path) -> None:
    """`classes` takes names of splits as classes; what is not there is refused with what is."""
    fill(tmp_path, "train/cat", "val/cat")
    assert numbers(opened(tmp_path, layout="classes")) == {"train": 12, "val": 12}
    with pytest.raises(ConfigError, match=r"no sub-folders named like splits.*are: cat, dog"):
        opened(fill(tmp_path / "b", "cat", "dog"), layout="splits")
    with pytest.raises(ConfigError, match="sub-folders are: test, val"):  # would be trained on as classes
        opened(fill(tmp_path / "c", "val/cat", "test/cat"))
    with pytest.raises(ConfigError, match="no sub-folders with images"):
        opened(tmp_path / "b" / "cat", layout="classes")


def test_what_was_found_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images with their classes and their folder, and the files that are no data by their kind."""
    fill(tmp_path, "cat", "dog", ".hidden")
    fill(tmp_path, "dog", n=1000, ending="bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "clip.mp4").write_bytes(b"\0\0\0 ftypisom")
    (tmp_path / "cat" / "raw.cr2").write_bytes(b"II*\0" + bytes(90))
    open_data(FolderConfig(root=str(tmp_path)))
    first, second, *notes = capsys.readouterr().out.splitlines()
    assert first.startswith("data: 1,024 images in 2 classes (cat 12, dog 1,012) under ")
    head, _, kinds = first.removesuffix(")").rpartition(" (")
    assert head.endswith(f"{tmp_path}; 15 files ignored")
    assert set(kinds.split(", ")) == {"hidden 12", ".txt 1", ".mp4 1", ".cr2 1"}
    assert "to train on" in second
    assert any("no image in empty/" in note for note in notes)
    assert any("raw data of cameras" in note for note in notes)


def test_odd_names_are_said(tmp_path: Path) -> None:
    """Backslashes of an archive from Windows are folders; classes that differ in case alone may be one."""
    fill(tmp_path, "x", n=6)
    for i in range(6):
        os.rename(tmp_path / "x" / f"{i}.png", tmp_path / f"{'cat' if i % 2 else 'Cat'}\\{i}.png")
    fill(tmp_path, "Cat", n=3, ending="jpg")
    data = opened(tmp_path)
    assert numbers(data) == {"Cat": 6, "cat": 3}
    assert "6 names hold backslashes" in said(data)
    assert "capital letters, spaces or hyphens alone: Cat/, cat/" in said(data)


def test_few_images_are_split_or_refused(tmp_path: Path) -> None:
    """Every class keeps an image to train on, one at least is validated on, and a single image is named as too few."""
    for n in range(2, 12):
        data = opened(fill(tmp_path / str(n), "all", n=n))
        assert (data.summary.images, data.summary.validation >= 1, data.summary.train >= 1) == (n, True, True)
    rare = opened(fill(tmp_path / "rare", *[f"class{i}" for i in range(40)], n=2), validation_share=0.5)
    assert {label for _, label in map(rare.splits["train"].__getitem__, range(rare.summary.train))} == set(range(40))
    one = fill(tmp_path / "one", ".", n=1)
    with pytest.raises(ConfigError, match=r"1 image is too few.*--data\.validation_share 0"):
        opened(one)


@pytest.mark.parametrize("share", [0, 1])
def test_all_can_be_trained_on_and_validated_on(tmp_path: Path, share: int) -> None:
    """A single image can be overfitted, and a bad file counts once."""
    data = opened(fill(tmp_path, ".", n=1), validation_share=share)
    assert (data.summary.images, len(data.splits["train"]), len(data.splits["validation"])) == (1, 1, 1)
    assert "all are trained on, and validated on too" in said(data)


def test_another_folder_is_validated_on(tmp_path: Path) -> None:
    """All of it, with the labels of the training's classes, which are matched by name; others are left out."""
    fill(tmp_path, "a/bee", "a/cat", "b/cat", "b/zebra", n=5)
    data = opened(tmp_path / "a", validation_root=str(tmp_path / "b"))
    assert (data.summary.train, data.summary.validation) == (10, 5)
    assert {data.splits["validation"][i][1] for i in range(5)} == {1}
    assert "left out: zebra/" in said(data)


def write_table(path: Path, form: str, rows: list[tuple[str, str]]) -> Path:
    if form == "json":
        path.write_text("".join(json.dumps({"file_name": file, "label": label}) + "\n" for file, label in rows))
    else:
        head = "" if form == "bare" else "image,breed\n"
        path.write_text(head + "".join(f'"{file}",{label}\n' for file, label in rows), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("form", ["csv", "bare", "json"])
@pytest.mark.parametrize("names", ["path", "name", "stem"])
def test_labels_come_from_a_table(tmp_path: Path, form: str, names: str) -> None:
    """CSV with and without a header, JSON lines; files by path, by name, and without their extension."""
    fill(tmp_path, "images", n=20)
    text = {"path": "images/{}.png", "name": "{}.png", "stem": "{}"}[names]
    rows = [(text.format(i), "cat, big" if i % 2 and form == "json" else "cat" if i % 2 else "dog") for i in range(18)]
    table = write_table(tmp_path / "labels", form, [*rows, ("gone.png", "cat")])
    data = opened(tmp_path, labels=str(table))
    cat = "cat, big" if form == "json" else "cat"
    assert numbers(data) == {cat: 9, "dog": 9}
    assert "left out: " in said(data)
    assert "1 rows" in said(data)


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """It names no image, gives one two classes, or does not say which column is the class."""
    fill(tmp_path, "images", n=4)
    for text, words in [
        ("file,label\nnowhere.png,cat\n", "no column holds names of images"),
        ("file,label\n1.png,cat\n1.png,dog\n", "one class"),
        ("file,size,colour\n1.png,cat,x\n", "--data.label_column"),
        ("file\n1.png\n", "--data.files"),
        ('{"file_name": "1.png", "label": }', "not JSON"),
        ("", "no rows"),
    ]:
        (tmp_path / "table").write_text(text)
        with pytest.raises(ConfigError, match=words):
            opened(tmp_path, labels=str(tmp_path / "table"))
    (tmp_path / "table").write_text("file,size,colour\n1.png,2,x\n2.png,2,y\n3.png,2,x\n0.png,2,y\n")
    assert numbers(opened(tmp_path, labels=str(tmp_path / "table"), label_column="colour")) == {"x": 2, "y": 2}


def test_lists_choose_classes_and_images(tmp_path: Path) -> None:
    """The order of the classes and which there are; which images are used, and which are validated on."""
    fill(tmp_path, "a", "b", "c", n=10)
    (tmp_path / "classes.txt").write_text("c\n\na\nx\n")
    data = opened(tmp_path, classes=str(tmp_path / "classes.txt"))
    assert list(numbers(data)) == ["c", "a"]
    assert "no image of x" in said(data)
    assert "10 images of classes" in said(data)
    (tmp_path / "some.txt").write_text("".join(f"{letter}/{i}.png\n" for letter in "ab" for i in range(6)))
    (tmp_path / "held.txt").write_text(f"{tmp_path}/a/2.png\n./b/3.png\n")
    options = {"files": str(tmp_path / "some.txt"), "validation_files": str(tmp_path / "held.txt")}
    data = opened(tmp_path, **options)
    assert (numbers(data), data.summary.train, data.summary.validation) == ({"a": 6, "b": 6}, 10, 2)
    (tmp_path / "held.txt").write_text("a/99.png\n")
    with pytest.raises(ConfigError, match=r"1 of its 1 lines.*a/99\.png"):
        opened(tmp_path, **options)


def test_images_are_known_by_their_content(tmp_path: Path) -> None:
    """Any extension or none; text, archives and unfinished downloads are no images."""
    fill(tmp_path, "all", n=3)
    data = (tmp_path / "all" / "0.png").read_bytes()
    image = Image.open(tmp_path / "all" / "1.png")
    for name, kind in [("a.jfif", "JPEG"), ("b.avif", "AVIF"), ("c", "WEBP"), ("d.tga", "TGA"), ("e.jp2", "JPEG2000")]:
        image.save(tmp_path / "all" / name, format=kind)
    (tmp_path / "all" / "f.dat").write_bytes(data)
    for name, content in [("t.txt", b"P3 is no image"), ("z", b"PK\3\4"), ("g.png.part", data), ("h.png~", data)]:
        (tmp_path / "all" / name).write_bytes(content)
    found = opened(tmp_path)
    assert found.summary.images == 9
    assert sum(found.summary.ignored.values()) == 4
    for split in SPLITS:
        found.image_batches(split, 0).batch(np.arange(len(found.splits[split])))


def test_what_we_write_is_no_data(tmp_path: Path) -> None:
    """Runs, samples and grids below or beside the images are left out; a folder that is named itself is read."""
    fill(tmp_path, "cat", "dog")
    for folder in ("runs/one", "cat/out"):
        mark_folder(tmp_path / folder)
        fill(tmp_path, folder, f"{folder}/samples")
    data = opened(tmp_path)
    assert numbers(data) == {"cat": 12, "dog": 12}
    assert data.summary.ignored["written by Tessera"] == 50
    assert opened(tmp_path / "runs/one", layout="flat").summary.images == 24
    before = (tmp_path / "cat" / ".tessera").exists()
    mark_folder(tmp_path / "cat")  # holds images, so it is somebody's
    assert (before, (tmp_path / "cat" / ".tessera").exists()) == (False, False)


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
@pytest.mark.parametrize("kept", ["NFC", "NFD"])
def test_accents_have_two_forms_and_are_one(tmp_path: Path, typed: Any, kept: Any) -> None:
    """A path, a class and a split are the same in the form of a Mac and in that of a keyboard."""
    names = ["caf\u00e9 au lait", "a,b", 'say "hi"']
    folder = "\u00e9t\u00e9, 'x'"
    root = fill(tmp_path / unicodedata.normalize(kept, folder), *(unicodedata.normalize(kept, n) for n in names))
    data = OpenData(FolderConfig(root=str(tmp_path / unicodedata.normalize(typed, folder))))
    assert list(numbers(data)) == sorted(names)
    (tmp_path / "list").write_text("\n".join(unicodedata.normalize(typed, name) for name in names))
    assert len(numbers(opened(root, classes=str(tmp_path / "list")))) == 3
    other = fill(tmp_path / "other", *(unicodedata.normalize(typed, n) for n in names))
    assert opened(other).identity == opened(root).identity


def test_numbers_are_sorted_by_their_value() -> None:
    """Folders 1, 2, 10 have the labels 0, 1, 2, whatever is around the number."""
    assert sorted(["10", "2", "1", "a10", "a9", "01"], key=natural_sort_key) == ["01", "1", "2", "10", "a9", "a10"]


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    """The same elsewhere; another one when an image is added, removed, moved to another class, or replaced by one of
    the same size."""
    before = opened(fill(tmp_path / "a", "cat", "dog")).identity
    fill(tmp_path / "b", "cat", "dog")
    assert opened(tmp_path / "b").identity == before
    file = tmp_path / "b" / "cat" / "3.png"
    kept = file.read_bytes()
    changes: list[Callable[[], object]] = [
        lambda: file.write_bytes(kept[:60] + b"x" + kept[61:]),
        file.unlink,
        lambda: (tmp_path / "b" / "dog" / "new.png").write_bytes(kept),
        lambda: os.rename(tmp_path / "b" / "dog", tmp_path / "b" / "wolf"),
    ]
    found = [before]
    for change in changes:
        change()
        found.append(opened(tmp_path / "b").identity)
    assert len({json.dumps(each) for each in found}) == len(found)
