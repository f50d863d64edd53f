"""Folders of images: classes, the split, and what is refused."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.data import build_splits
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.folder.scan import find_images, try_images
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.engine.errors import BadFileError, ConfigError

SPLITS: tuple[Split, Split] = ("train", "validation")


def write(root: Path, *names: str, first: int = 0) -> None:
    """A PNG under each name, whose colour tells the files apart: the n-th is (n // 256, n % 256, 9)."""
    for number, name in enumerate(names, start=first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 3), (number // 256, number % 256, 9)).save(root / name, "PNG")


def split_of(root: Path, **options: Any) -> dict[Split, dict[int, int]]:
    """For both splits, the label of each file by its number."""
    found: dict[Split, dict[int, int]] = {}
    for split in SPLITS:
        images = build_splits(FolderConfig(root=str(root), **options))[split]
        items = [images[i] for i in range(len(images))]
        found[split] = {int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]): label for image, label in items}
        assert len(found[split]) == len(images)
    return found


def classes(root: Path) -> tuple[str, ...]:
    return build_splits(FolderConfig(root=str(root)))["train"].classes


def test_the_first_level_of_folders_are_the_classes(tmp_path: Path) -> None:
    """Trap 34: sorted by name, not in the file system's order, and the same map in both splits."""
    names = ["pear", "apple", "fig"]
    write(tmp_path, *[f"{names[i % 3]}/deep/{i}.PNG" if i % 2 else f"{names[i % 3]}/{i}.png" for i in range(120)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no image")
    assert classes(tmp_path) == ("apple", "fig", "pear")
    for split in split_of(tmp_path, validation_share=0.3).values():
        assert split == {number: [2, 0, 1][number % 3] for number in split}
        assert len(split) > 20


@pytest.mark.parametrize("extra", ["", "one/", "a/b/"])
def test_a_tree_without_classes_has_label_0(tmp_path: Path, extra: str) -> None:
    """All in one folder, or in one sub-folder, or most beside it: there is nothing to tell the images apart by."""
    write(tmp_path / "most", *[f"{extra if i % 3 == 0 else ''}{i}.png" for i in range(60)])
    write(tmp_path / "all", *[f"{extra or 'x/'}{i}.png" for i in range(60)])
    for root in (tmp_path / "all", tmp_path / "most"):
        assert classes(root) == ()
        found = split_of(root)
        assert {label for split in found.values() for label in split.values()} == {0}
        assert sum(map(len, found.values())) == 60


def test_the_split_is_stable(tmp_path: Path) -> None:
    """Every image is in exactly one split, wherever the folder lies, and stays there when others come or go."""
    names = [f"{i % 7}/{i}.png" for i in range(400)]
    write(tmp_path / "a", *names)
    before = split_of(tmp_path / "a", validation_share=0.2)
    assert before["train"].keys() | before["validation"].keys() == set(range(400))
    assert not before["train"].keys() & before["validation"].keys()
    assert abs(len(before["validation"]) - 80) < 4 * (400 * 0.2 * 0.8) ** 0.5
    shutil.move(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "b", *[f"{i % 3}/new{i}.png" for i in range(100)], first=400)
    for i in range(0, 400, 5):
        (tmp_path / "b" / names[i]).unlink()
    after = split_of(tmp_path / "b", validation_share=0.2)
    for split in SPLITS:
        assert {n for n in after[split] if n < 400} == {n for n in before[split] if n % 5}
    larger = split_of(tmp_path / "b", validation_share=0.4)
    assert larger["validation"].keys() > after["validation"].keys()


def test_the_identity_tells_the_content(tmp_path: Path) -> None:
    """Tokens that were cached of another content would be taken for those of this one."""

    def identities(root: Path) -> tuple[str, ...]:
        return tuple(build_splits(FolderConfig(root=str(root)))[split].identity for split in SPLITS)

    write(tmp_path / "a", *[f"{i}.png" for i in range(60)])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = identities(tmp_path / "a")
    assert identities(tmp_path / "b") == before
    assert before[0] != before[1]
    changes: list[Callable[[Path], object]] = [lambda path: path.write_bytes(b"longer" * 99), Path.unlink]
    for change in changes:
        change(tmp_path / "b" / "7.png")
        after = identities(tmp_path / "b")
        assert sum(map(str.__ne__, before, after)) == 1
        before = after


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    """The message names the folder, and what was looked for: most often the path is a level too high or misspelt."""
    write(tmp_path / "one", "a.png")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "a.txt").write_text("x")
    for name, words in [
        ("nowhere", "no such"),
        ("one/a.png", "no such"),
        ("empty", r"\.jpg"),
        ("one", "validation_share"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            split_of(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_name_may_be_any_bytes(tmp_path: Path) -> None:
    """Linux allows them, old archives hold them, and the user cannot mend a UnicodeEncodeError."""
    write(tmp_path, *[f"{i}.png" for i in range(60)])
    os.rename(tmp_path / "7.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    assert all(build_splits(FolderConfig(root=str(tmp_path)))[split].identity for split in SPLITS)
    assert 7 in {**split_of(tmp_path)["train"], **split_of(tmp_path)["validation"]}


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_damaged_image_is_named(tmp_path: Path, cache: str) -> None:
    """Among thousands of files the message has the path of the one to mend, from the cache's threads too."""
    write(tmp_path, *[f"{i}.png" for i in range(60)])
    bad = tmp_path / "7.png"
    bad.write_bytes(bad.read_bytes()[:40])
    config = FolderConfig.from_tree({"root": str(tmp_path), "cache": cache, "image_size": 8})

    def load_all() -> None:
        for split in SPLITS:
            batches = ImageBatches(build_splits(config)[split], config, seed=0)
            batches.batch(np.arange(len(batches)))

    with pytest.raises(BadFileError) as caught:  # one in sixty is more than data.bad_share
        load_all()
    assert str(bad) in str(caught.value)


def test_all_unreadable_files_are_found_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a training would leave out, with the same reasons, and a folder of any length is read in pieces."""
    monkeypatch.setattr("stage1_tokenizer.engine.system.CHUNK", 7)
    write(tmp_path / "set", *[f"{i % 3}/{i}.png" for i in range(40)])
    write(tmp_path, "outside.png")
    (tmp_path / "set" / "0" / "3.png").write_bytes(b"")
    (tmp_path / "set" / "1" / "x.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "set" / "readme.txt").write_text("no image")
    errors = list(try_images(tmp_path / "set"))
    assert len(errors) == 41
    found = {error.path.relative_to(tmp_path / "set").as_posix(): error.reason for error in errors if error}
    assert found.keys() == {"0/3.png", "1/x.png"}
    assert found["0/3.png"] == "the file is empty"
    assert "leads out of the folder" in found["1/x.png"]
    assert [error.path.name for error in try_images(tmp_path / "set", "anywhere") if error] == ["3.png"]


def test_links_to_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class that is a link is either read or told, never missing without a word; and nothing is there twice."""
    write(tmp_path / "store", *[f"{name}/{i}.png" for i in range(30) for name in ("cat", "dog")])
    write(tmp_path / "set", *[f"{name}/{i}.png" for i in range(30) for name in ("ant", "bee")], first=100)
    for name, target in [
        ("cat", "../store/cat"),
        ("dog", str(tmp_path / "store" / "dog")),
        ("zoo", "../store/dog"),  # again
        ("ant/circle", ".."),
        ("fly", "bee"),
        ("gone", "nowhere"),
    ]:
        (tmp_path / "set" / name).symlink_to(target)
    (tmp_path / "store" / "dog" / "circle").symlink_to("..")
    (tmp_path / "other").symlink_to("set")
    for root in (tmp_path / "set", tmp_path / "other"):
        followed = dict(find_images(root, "anywhere"))
        assert not any(followed.values())
        assert {name.split("/")[0] for name in followed} == {"ant", "bee", "cat", "dog"}
        assert len(followed) == 120
        kept = dict(find_images(root, "inside"))
        refused = {name: reason for name, reason in kept.items() if reason}
        assert refused.keys() == {"cat", "dog", "zoo"}
        assert all(
            "--data.links anywhere" in reason and str(tmp_path / "store") in reason for reason in refused.values()
        )
        assert len(kept) == 63
        assert classes(root) == ("ant", "bee")
    open_data(FolderConfig(root=str(tmp_path / "set"), bad_share=0.9, validation_share=0.01)).image_batches("train", 0)
    assert "cat: is a link to a folder that is not in this one" in capsys.readouterr().err


def test_a_folder_of_links_alone_is_refused(tmp_path: Path) -> None:
    """Nothing can be read; the message says why, and what permits it."""
    write(tmp_path / "store", "cat/1.png", "dog/2.png")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name)
    with pytest.raises(ConfigError, match=r"no images that can be read(?s:.*)cat: is a link.*--data\.links anywhere"):
        build_splits(FolderConfig(root=str(tmp_path / "set")))["train"]


def test_a_class_of_refused_links_keeps_its_label(tmp_path: Path) -> None:
    """Were it gone, all classes behind it would have other labels, and a prior would be trained on the wrong ones."""
    write(tmp_path / "set", *[f"{name}/{i}.png" for name in "abc" for i in range(30)])
    before = split_of(tmp_path / "set")
    write(tmp_path, "outside.png")
    for path in (tmp_path / "set" / "b").iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "outside.png")
    assert classes(tmp_path / "set") == ("a", "b", "c")
    images = build_splits(FolderConfig(root=str(tmp_path / "set")))["train"]
    labels = {}
    for place in range(len(images)):
        with suppress(BadFileError):
            image, label = images[place]
            labels[int(image[0, 0, 1])] = label
    assert labels == {number: label for number, label in before["train"].items() if label != 1}


def test_the_name_of_a_class_is_text(tmp_path: Path) -> None:
    """A prior's header keeps it, and would fail to hours later; that of a file may be any bytes."""
    write(tmp_path, *[f"{i % 2}/{i}.png" for i in range(60)])
    os.rename(tmp_path / "0", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ConfigError, match=r"folder caf\\udce9 is not UTF-8.*rename") as caught:
        build_splits(FolderConfig(root=str(tmp_path)))["train"]
    str(caught.value).encode()


def test_photographs_load(real_data: Path) -> None:
    """Real JPEG files in class folders: the classes by name, each image once, and images with something on them."""
    config = FolderConfig.from_tree({"root": str(real_data / "flowers"), "image_size": [64, 48], "cache": "none"})
    sets = [build_splits(config)[split] for split in SPLITS]
    assert sets[0].classes == sets[1].classes == ("daisy", "dandelion", "rose", "sunflower", "tulip")
    assert sum(map(len, sets)) == len([*(real_data / "flowers").glob("*/*")])
    assert 0.06 < len(sets[1]) / sum(map(len, sets)) < 0.14
    pixels, labels = ImageBatches(sets[1], config, seed=0).batch(np.arange(len(sets[1])))
    assert pixels.shape == (len(sets[1]), 3, 64, 48)
    assert pixels.float().std(dim=(1, 2, 3)).min() > 10
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}
    # Dandelions and sunflowers are yellower than the rest: red and green far above blue.
    yellow = (pixels[:, :2].float().mean(dim=(1, 2, 3)) - pixels[:, 2].float().mean(dim=(1, 2))).numpy()
    means = [yellow[labels.numpy() == label].mean() for label in range(5)]
    assert set(np.argsort(means)[-2:]) == {1, 3}
