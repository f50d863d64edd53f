"""codes.py and code_files.py: the codes of a folder of images as files for other programs, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.code_files import ImageCodes
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, TokenShape, save_tokenizer
from stage2_prior.tokens import load_or_encode
from tests.helpers.artefacts import pixels_of, shapes, write_image_folder, write_tokenizer
from tests.helpers.commands import lone_accelerator, names_of, run

SCRIPT = "sampling/codes.py"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of two classes with images that are larger than the tokenizer's, by odd numbers."""
    write_image_folder(tmp_path / "images", ("cat", "dog"), per_class=3, size=(19, 33))
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["codes.npz", "codes.npy"])
def test_there_and_back(images: Path, tmp_path: Path, name: str) -> None:
    """Other programs read the file with NumPy alone; decoding gives the reconstructions, under the names."""
    loaded, file = write_tokenizer(tmp_path / "run"), tmp_path / name
    ended = run(names_of(SCRIPT)["main"], "--tokenizer", tmp_path / "run", images, "--out", file)
    assert ended.code == 0, ended.err
    assert "encoded 6 images in 2 classes to 2x3x1 codes of 16" in ended.out
    array = np.load(file)
    facts = json.loads(file.with_suffix(".json").read_text()) if name == "codes.npy" else dict(array)
    codes = array if name == "codes.npy" else array["codes"]
    assert codes.dtype == np.int32
    assert codes.shape == (6, 2, 3, 1)
    assert list(facts["names"]) == [f"{kind}/0{number}.png" for kind in ("cat", "dog") for number in range(3)]
    assert list(facts["labels"]) == [0, 0, 0, 1, 1, 1]
    assert list(facts["classes"]) == ["cat", "dog"]
    assert list(facts["shape"]) == [2, 3, 1, 16]
    assert str(facts["fingerprint"]) == loaded.code_fingerprint

    ended = run(names_of(SCRIPT)["main"], "--tokenizer", tmp_path / "run", file, "--out", tmp_path / "back")
    assert ended.code == 0, ended.err
    decoded = loaded.tokenizer.decode_codes(torch.from_numpy(codes).long())
    expected = decoded.add(1).mul(127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    for place, image in enumerate(facts["names"]):
        assert np.abs(pixels_of(tmp_path / "back" / str(image)) - expected[place]).max() <= 1


def test_the_codes_are_those_of_stage_two(images: Path, tmp_path: Path) -> None:
    """The tokens that a prior learns from the same folder have the same codes and labels."""
    loaded = write_tokenizer(tmp_path / "run")
    encoded = ImageCodes.encode(tmp_path / "run", images)
    data = OpenData(FolderConfig(root=str(images), image_size=(8, 12), validation_share=0.0))
    tokens = load_or_encode(lone_accelerator(), loaded, data, "train", 1, 0, tmp_path / "tokens")
    assert np.array_equal(encoded.codes, tokens.codes[:, 0].numpy())
    assert np.array_equal(encoded.labels, tokens.labels.numpy())
    assert encoded.classes == tokens.classes
    assert len(np.unique(encoded.codes)) > 3
    images_again = encoded.decode(tmp_path / "run")
    assert images_again.shape == (6, 8, 12, 3)
    assert images_again.dtype == np.uint8


def test_images_that_cannot_be_read(images: Path, tmp_path: Path) -> None:
    """They are named and left out, and all other images are in the file under their own names."""
    write_tokenizer(tmp_path / "run")
    whole = ImageCodes.encode(tmp_path / "run", images)
    (images / "cat" / "01.png").write_bytes((images / "cat" / "01.png").read_bytes()[:60])
    ended = run(names_of(SCRIPT)["main"], "--tokenizer", tmp_path / "run", images, "--out", tmp_path / "codes.npz")
    assert ended.code == 3
    assert "1 images were left out" in ended.err
    assert "01.png" in ended.out
    encoded = ImageCodes.read(tmp_path / "codes.npz")
    assert encoded.names == tuple(name for name in whole.names if name != "cat/01.png")
    assert np.array_equal(encoded.codes, np.delete(whole.codes, 1, axis=0))


def test_another_tokenizer(images: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "run")
    other = write_tokenizer(tmp_path / "other", seed=1)
    file = tmp_path / "codes.npz"
    ImageCodes.encode(tmp_path / "run", images).write(file)
    ended = run(names_of(SCRIPT)["main"], "--tokenizer", tmp_path / "other", file, "--out", tmp_path / "back")
    assert ended.code == 3
    assert other.code_fingerprint in ended.err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", ["code", "names", "objects", "half", "missing", "outside"])
def test_damaged_files(images: Path, tmp_path: Path, change: str) -> None:
    write_tokenizer(tmp_path / "run")
    file = tmp_path / "codes.npz"
    ImageCodes.encode(tmp_path / "run", images).write(file)
    arrays = dict(np.load(file))
    match change:
        case "code":
            arrays["codes"][0, 0, 0, 0] = 16
        case "names":
            arrays["names"] = arrays["names"][1:]
        case "objects":
            arrays["names"] = arrays["names"].astype(object)
        case "missing":
            del arrays["shape"]
        case "outside":
            arrays["names"][0] = "../x.png"
    np.savez(file, **arrays)
    if change == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ended = run(names_of(SCRIPT)["main"], "--tokenizer", tmp_path / "run", file, "--out", tmp_path / "back")
    assert ended.code == 3, ended.err
    assert str(file) in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("names", [1, 2]), ("labels", ["a", "b"]), ("shape", [1, 2]), ("classes", None), ("labels", 3)]
)
def test_a_damaged_json_file_beside_an_array(tmp_path: Path, key: str, value: object) -> None:
    codes = ImageCodes(
        np.zeros((2, 1, 2, 1), np.int32), np.zeros(2, np.int32), ("a.png", "b.png"), ("c",), TokenShape(1, 2, 1, 8), "f"
    )
    array, beside = codes.write(tmp_path / "codes.npy")
    assert ImageCodes.read(array).names == codes.names
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {key: value}))
    with pytest.raises(BadFileError, match=r"codes\.npy"):
        ImageCodes.read(array)


def test_wrong_use(images: Path, tmp_path: Path) -> None:
    """One message, exit code 2, and nothing written."""
    write_tokenizer(tmp_path / "run")
    write_tokenizer(tmp_path / "kl", bottleneck=KlConfig())
    (tmp_path / "there.npz").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    main = names_of(SCRIPT)["main"]
    for run_, source, out, message in (
        ("run", "nowhere", "codes.npz", "there is no such file or folder"),
        ("run", "images", "codes.txt", "codes are written as .npz or .npy"),
        ("run", "there.npz", "images", "is there already, and nothing is overwritten"),
        ("run", "images", "there.npz", "is there already, and nothing is overwritten"),
        ("run", "images/cat/00.png", "new", "is not a folder of images or a file of codes"),
        ("run", "empty", "codes.npz", "no images"),
        ("kl", "images", "codes.npz", "continuous latent"),
    ):
        ended = run(main, "--tokenizer", tmp_path / run_, tmp_path / source, "--out", tmp_path / out)
        assert ended.code == 2, (source, ended.err)
        assert message in ended.err
    assert not (tmp_path / "codes.npz").exists()
    assert (tmp_path / "there.npz").read_bytes() == b"mine"


def test_a_grey_tokenizer_reads_in_grey(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "run", channels=1)
    (tmp_path / "flat").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(tmp_path / "flat" / "a.jpg")
    encoded = ImageCodes.encode(tmp_path / "run", tmp_path / "flat")
    assert encoded.names == ("a.jpg",)
    assert encoded.classes == ()
    assert encoded.decode(tmp_path / "run").shape == (1, 8, 12, 1)


def test_codes_fit_a_tokenizer_whose_decoder_alone_was_fine_tuned(images: Path, tmp_path: Path) -> None:
    """The codes mean the same there, and the images are those of the new decoder."""
    loaded = write_tokenizer(tmp_path / "run")
    encoded = ImageCodes.encode(loaded, images)
    before = encoded.decode(loaded)
    with torch.no_grad():
        next(loaded.tokenizer.decoder.parameters()).mul_(2.0)
    save_tokenizer(tmp_path / "sharper" / TOKENIZER_FILE, loaded.tokenizer, shapes(), 8)
    sharper = LoadedTokenizer.load(tmp_path / "sharper")
    assert sharper.fingerprint != loaded.fingerprint
    assert (encoded.decode(sharper) != before).any()
