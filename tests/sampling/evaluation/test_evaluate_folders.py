"""evaluate.py on folders: all images of one, one compared with another, and reconstructions without features."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sampling.evaluation.distances import frechet_distance
from sampling.evaluation.moments import moments_of
from stage1_tokenizer.data.folder import FolderConfig
from tests.helpers.artefacts import IMAGE_SIZE, shapes, write_image_folder, write_prior, write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.sampling.evaluation.test_evaluate import TinyExtractor, evaluate, features_of, result, slow_frechet


def without_extractor(*arguments: object) -> Ended:
    """Run the command without an extractor; building one fails."""
    names = names_of("sampling/evaluate.py")

    def refused(*_: object) -> None:
        raise AssertionError("no weights are wanted")

    names.update(build_extractor=refused, Perceptual=refused)
    return run(names["main"], "--extractor.kind", "none", *arguments)


def write_noise(folder: Path, n: int, size: tuple[int, int] = IMAGE_SIZE, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(n):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the run of a tokenizer that was trained on a folder, with a tenth for validation."""
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "data", ("cat", "dog"), per_class=20)
    write_tokenizer(tmp_path / "run", data=FolderConfig(root=str(tmp_path / "data"), image_size=IMAGE_SIZE))
    return tmp_path / "run"


@pytest.mark.parametrize("n", [1, 2, 7, 43])
def test_all_of_a_folder_is_measured(run_folder: Path, tmp_path: Path, n: int) -> None:
    """--root names any folder of images, whatever share the training validated on; console, protocol and name state
    it. (43 images would have a validation split of a few.)"""
    write_noise(tmp_path / "val", n)
    ended = without_extractor("--tokenizer", run_folder, "--root", tmp_path / "val")
    assert ended.code == 0, ended.err
    assert f"reconstructing {n} of all {n} images in {tmp_path / 'val'}" in ended.out
    found = result(next(run_folder.glob(f"evaluation/reconstructions-folder-all-{n}-none-*.json")))
    assert found["protocol"]["pictures"] == f"{n} of {n}"
    assert found["protocol"]["data"]["split"] == "all images of the folder"


def test_a_split_of_a_folder_that_was_moved_is_measured_on_demand(run_folder: Path, tmp_path: Path) -> None:
    """--split with --root is the split of the training in its new folder, with the same values as before the move."""
    values = []
    for root in ((), ("--root", tmp_path / "moved", "--split", "validation")):
        if root:
            (tmp_path / "data").rename(tmp_path / "moved")
        assert without_extractor("--tokenizer", run_folder, *root, "--out", tmp_path / "out").code == 0
        found = result(tmp_path / "out")
        assert found["protocol"]["data"]["split"] == "validation"
        values.append([figure["value"] for figure in found["figures"]])
    assert values[0] == values[1]


def test_without_an_extractor_images_are_compared_one_by_one(run_folder: Path, tmp_path: Path) -> None:
    """PSNR, SSIM and NMSE equal those with an extractor; no distance, no LPIPS, no warning about features."""
    assert without_extractor("--tokenizer", run_folder, "--split", "train", "--out", tmp_path / "none").code == 0
    assert evaluate("--tokenizer", run_folder, "--split", "train", "--out", tmp_path / "tiny").code == 0
    none, tiny = result(tmp_path / "none"), result(tmp_path / "tiny")
    assert none["of"] == {name: figure for name, figure in tiny["of"].items() if name != "rfd"}
    assert none["warnings"] == []
    assert none["protocol"]["extractor"] == "none"
    assert "resize" not in none["protocol"]


def test_samples_need_an_extractor(run_folder: Path) -> None:
    """Samples are compared as sets, so the command refuses extractor.kind none before it samples."""
    for arguments in (("--prior", run_folder), ("--samples", run_folder, "--reference", run_folder)):
        ended = without_extractor(*arguments)
        assert ended.code == 2
        assert "--extractor.kind none cannot be used with" in ended.err


def test_a_folder_beside_itself_and_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance to itself is 0, to another folder that of equation 6; no run and no data set is needed."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "other")):
        write_noise(tmp_path / name, 30, seed=seed)
    for reference in ("one", "other"):
        ended = evaluate("--samples", "one", "--reference", reference, "--out", tmp_path / f"to-{reference}")
        assert ended.code == 0, ended.err
    same, apart = result(tmp_path / "to-one"), result(tmp_path / "to-other")
    assert same["of"]["fd"]["value"] == pytest.approx(0.0, abs=1e-6)
    sides = [
        features_of(np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())]))
        for name in ("one", "other")
    ]
    assert apart["of"]["fd"]["value"] == pytest.approx(slow_frechet(*sides), rel=1e-4)
    assert apart["protocol"]["reference"]["data"]["folder"] == "other"
    assert apart["protocol"]["reference"]["pictures"] == 30
    identities = {each["protocol"]["reference"]["data"]["identity"] for each in (same, apart)}
    assert len(identities) == 2


def test_a_prior_may_be_compared_with_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prior(tmp_path / "run", tokenizer={"data": shapes()}, label_dropout=0.5)
    write_noise(tmp_path / "val", 9)
    ended = evaluate("--prior", "run", "-n", 5, "--reference", "val", "--nearest", 2, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert {"fd", "memorised_pixels"} <= result(tmp_path / "out")["of"].keys()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "--reference val: "),
        (("a.png",), "there is 1 image to measure"),
        (("a.png", "wide.png"), "must have one size"),
    ],
    ids=str,
)
def test_a_reference_that_cannot_be_used_is_refused_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], message: str
) -> None:
    """The error comes before any sampling, which can take an hour, and names the fault."""
    monkeypatch.chdir(tmp_path)
    write_prior(tmp_path / "run", tokenizer={"data": shapes()}, label_dropout=0.5)
    (tmp_path / "val").mkdir()
    for name in names:
        Image.new("RGB", (20 if name == "wide.png" else 12, 8)).save(tmp_path / "val" / name)
    ended = evaluate("--prior", "run", "-n", 5, "--reference", "val")
    assert ended.code in (2, 3)
    assert message in " ".join(ended.err.split()).replace(str(tmp_path) + "/", "")
    assert not (tmp_path / "run/evaluation").exists()


@pytest.mark.parametrize(("n", "dimension"), [(2, 300), (40, 300), (400, 30)])
def test_equal_moments_are_at_distance_0(n: int, dimension: int) -> None:
    """Also for a singular covariance, for which rounding would give slightly less than 0."""
    features = np.random.default_rng(0).exponential(size=(n, dimension)).astype(np.float32)
    moments = moments_of(features)
    assert 0.0 <= frechet_distance(moments, moments) < 1e-3


def test_one_image_has_no_distance(run_folder: Path, tmp_path: Path) -> None:
    """With an extractor, the error names --extractor.kind none, before anything is reconstructed."""
    write_noise(tmp_path / "val", 1)
    TinyExtractor.seen = 0
    ended = evaluate("--tokenizer", run_folder, "--root", tmp_path / "val")
    assert ended.code == 2
    assert "--extractor.kind none" in ended.err
    assert TinyExtractor.seen == 0
