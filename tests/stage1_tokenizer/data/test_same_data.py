"""A run goes on with the data that it was begun with, wherever these lie now, and with no others."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.record import DATA_FILE, DataRecord
from tests.helpers.artefacts import IMAGE_SIZE, write_image_folder, write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.prior_training import train as train_prior
from tests.helpers.training import TINY


def train(root: Path, out: Path, *more: object) -> Ended:
    """`python stage1_tokenizer/train.py` on a folder, without a discriminator."""
    tiny = {key: value for key, value in TINY.items() if key not in ("data.train_images", "data.validation_images")}
    tiny |= {"data.kind": "folder", "data.root": root, "adversarial.weight": 0, "steps": 2}
    words = [part for key, value in tiny.items() if value is not True for part in (f"--{key}", value)]
    return run(names_of("stage1_tokenizer/train.py")["main"], *words, "--out", out, "--no-report", *more)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder of images, and a run on it."""
    write_image_folder(tmp_path / "images", ("cat", "dog"))
    ended = train(tmp_path / "images", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "data: 24 images in 2 classes (cat 12, dog 12) under" in ended.out
    return tmp_path


def test_what_was_found_is_in_the_run(begun: Path) -> None:
    """As it was said, for the report and for a resume."""
    record = DataRecord.saved_in(begun / "run")
    assert record is not None
    assert record.found[0].startswith("24 images in 2 classes (cat 12, dog 12) under")
    (begun / "run" / DATA_FILE).write_text("[1")
    assert DataRecord.saved_in(begun / "run") is None


def test_the_same_data_elsewhere_are_the_same_run(begun: Path) -> None:
    """A moved folder needs no --allow_changed, since the identity proves that it is the same."""
    shutil.move(begun / "images", begun / "elsewhere")
    ended = train(begun / "elsewhere", begun / "run")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "other class"])
def test_other_data_are_another_run(begun: Path, change: str) -> None:
    """Refused with what was there and what is there now; the same bits are promised of the same images alone."""
    files = sorted((begun / "images").rglob("*.png"))
    match change:
        case "added":
            shutil.copy(files[0], files[0].with_name("new.png"))
        case "removed":
            files[0].unlink()
        case "replaced":
            Image.new("RGB", (40, 40), (1, 2, 3)).save(files[0])
        case _:
            files[0].parent.rename(files[0].parent.with_name("wolf"))
    ended = train(begun / "images", begun / "run")
    assert ended.code == 2
    assert "the data, the files of" in ended.err
    assert "24 images in 2 classes (cat 12, dog 12)" in ended.err
    assert train(begun / "images", begun / "run", "--allow_changed").code == 0
    assert train(begun / "images", begun / "run").code == 0


def test_a_run_of_an_earlier_version_goes_on(begun: Path) -> None:
    """Its config lacks the keys of today, and nothing says what data it had: it goes on, and says the latter."""
    (begun / "run" / DATA_FILE).unlink()
    file = begun / "run" / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    for key in ("layout", "background", "bits", "truncated", "largest_pixels", "labels", "classes", "files"):
        del tree["data"][key]
    file.write_text(yaml.safe_dump(tree))
    ended = train(begun / "images", begun / "run")
    assert (ended.code, "has no record of its data" in ended.out) == (0, True), ended.err


def test_a_run_is_not_written_among_images(begun: Path) -> None:
    """It would be counted as Tessera's own from then on, and its images be no data."""
    ended = train(begun / "images", begun / "images" / "cat")
    assert ended.code == 2
    assert "holds images" in ended.err


def test_a_class_without_a_readable_image_is_not_sampled(tmp_path: Path) -> None:
    """It would be drawn in its turn, though the prior never saw it; the other labels do not depend on it."""
    write_image_folder(tmp_path / "images", ("ant", "bee", "cow"))
    for file in (tmp_path / "images" / "bee").iterdir():
        file.write_bytes(b"no image")
    data = FolderConfig(root=str(tmp_path / "images"), image_size=IMAGE_SIZE, validation_share=0.3, bad_share=0.5)
    write_tokenizer(tmp_path / "stage1", data=data)
    ended = train_prior(tmp_path / "run", tmp_path / "stage1", steps=1)
    assert ended.code == 0, ended.err
    assert "no readable image of bee" in ended.out
    made = run(names_of("sampling/generate.py")["main"], "--prior", tmp_path / "run", "-n", 2, "--class", "bee")
    assert (made.code, "classes are: 0 ant, 1 cow" in made.err) == (2, True), made.err
