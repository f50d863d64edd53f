"""stage1_tokenizer/analyze.py: it runs on every kind of tokenizer, and its images show something."""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.diagnostics.views.base import encode_images
from stage1_tokenizer.diagnostics.views.codebook_map import searched_vectors
from stage1_tokenizer.diagnostics.views.masked_latents import replacement
from tests.helpers.artefacts import CODES, files_of, shapes, write_image_folder, write_tokenizer
from tests.helpers.commands import Ended, names_of, run

ALWAYS = {"reconstructions", "random_codes", "latent_maps", "masked_latents"}
OF_CODES = {"codebook_2d", "atlas", "usage"}
RVQ = RvqConfig(codebook_size=8, depth=3, kmeans_init=False)


def analyze(*arguments: object) -> Ended:
    return run(names_of("stage1_tokenizer/analyze.py")["main"], *arguments)


def names_of_images(folder: Path) -> set[str]:
    """Return the names of the images in a folder; each must be a whole PNG that shows something."""
    names = set()
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] == 1200
        assert len({*map(tuple, pixels[::5, ::5].reshape(-1, 3).tolist())}) > 30
        names.add(path.stem)
    return names


def write_log(folder: Path) -> None:
    entries: list[dict[str, float]] = [{"step": i, "train/total": 2 / i, "train/l2": 1 / i} for i in range(1, 6)]
    entries.append({"step": 5, "validation/nmse": 0.3, "validation/code_perplexity": 7.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_every_picture_of_a_run_with_codes_is_drawn_and_drawn_again_alike(tmp_path: Path) -> None:
    loaded = write_tokenizer(tmp_path, data=shapes(holes=True, size=(0.8, 1.0)))
    write_log(tmp_path)
    ended = analyze("--tokenizer", tmp_path)
    assert ended.code == 0, ended.err
    assert names_of_images(tmp_path / "analysis") == ALWAYS | OF_CODES | {"curves", "holes"}
    assert "left out" not in ended.out
    assert ended.out.count(".png") == 9
    holes = json.loads((tmp_path / "analysis/holes.json").read_text(encoding="utf-8"))
    assert holes["holes"] > 0
    assert 0 <= holes["hole_recall"] <= 1
    first = files_of(tmp_path / "analysis")
    assert len([name for name in first if name.startswith("events.out")]) == 1
    assert analyze("--tokenizer", loaded.path).out == ended.out
    again = files_of(tmp_path / "analysis")
    assert len(again) == len(first)
    assert {name: data for name, data in again.items() if "events" not in name} == {
        name: data for name, data in first.items() if "events" not in name
    }


def test_a_tokenizer_of_drawn_images_looks_at_any_folder(tmp_path: Path) -> None:
    """A folder with the images of its own validation split gives the same holes and the same PSNR."""
    data = shapes(holes=True, size=(0.8, 1.0))
    write_tokenizer(tmp_path / "run", data=data)
    split = OpenData(data).image_batches("validation", 0)
    images, _ = split.batch(np.arange(len(split)))
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:04}.png")
    drawn = analyze("--tokenizer", tmp_path / "run")
    read = analyze("--tokenizer", tmp_path / "run", "--root", tmp_path / "images", "--out", tmp_path / "out")
    assert read.code == 0, read.err
    holes = [(folder / "holes.json").read_text() for folder in (tmp_path / "run/analysis", tmp_path / "out")]
    assert holes[0] == holes[1]
    psnr = [next(line for line in ended.out.splitlines() if line.startswith("PSNR")) for ended in (drawn, read)]
    assert psnr[0] == psnr[1]


@pytest.mark.parametrize(
    ("bottleneck", "left_out"),
    [(KlConfig(), OF_CODES), (RVQ, set())],
    ids=["kl", "rvq"],
)
def test_other_kinds_of_bottleneck(bottleneck: BottleneckConfig, left_out: set[str], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bottleneck=bottleneck)
    ended = analyze("--tokenizer", tmp_path, "--images", 5)
    assert ended.code == 0, ended.err
    assert names_of_images(tmp_path / "analysis") == (ALWAYS | OF_CODES) - left_out
    for name in (*left_out, "curves", "holes"):
        assert f"{name}: left out, " in ended.out


def test_grey_images_from_a_folder_that_was_moved_and_a_codebook_of_one_code(tmp_path: Path) -> None:
    """Grey levels, two images to validate on, an atlas that stops early: nothing to spread a colour or an axis over."""
    write_image_folder(tmp_path / "now", ("a", "b"), per_class=6)
    for path in (tmp_path / "now").rglob("*.png"):
        with Image.open(path) as image:
            image.convert("L").save(path)
    data = FolderConfig(root=str(tmp_path / "then"), image_size=(8, 12), channels=1, validation_share=0.2)
    one = VqConfig(codebook_size=1, kmeans_init=False)
    write_tokenizer(tmp_path / "run", channels=1, data=data, bottleneck=one)
    missing = analyze("--tokenizer", tmp_path / "run")
    assert missing.code in (2, 3)
    assert str(tmp_path / "then") in missing.err
    ended = analyze(
        "--tokenizer", tmp_path / "run", "--root", tmp_path / "now", "--codes", 1, "--out", tmp_path / "out"
    )
    assert ended.code == 0, ended.err
    assert names_of_images(tmp_path / "out") == ALWAYS | OF_CODES
    atlas = json.loads((tmp_path / "out" / "atlas.json").read_text())
    assert atlas["codes"][0]["share"] == 1.0
    assert atlas["codes"][0]["nearest"] == []


def test_a_picture_that_no_longer_belongs_is_removed_and_the_runs_own_events_stay(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bottleneck=NoBottleneckConfig())
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"of the training")
    (tmp_path / "curves.png").write_bytes(b"of an earlier analysis")
    with mock.patch.dict(sys.modules):
        sys.modules.pop("matplotlib.pyplot", None)
        assert analyze("--tokenizer", tmp_path, "--images", 3, "--out", tmp_path).code == 0
        assert "matplotlib.pyplot" not in sys.modules  # it keeps its figures for ever
    assert (tmp_path / "events.out.tfevents.1.host").read_bytes() == b"of the training"
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--projection", "umap"), ("umap-learn is not installed", "pip install", "--projection pca")),
        (("--projection", "tsne"), ("projection", "'tsne'", "pca")),
        (("--root", "elsewhere"), ("--root elsewhere", "there is no such folder")),
        (("--images", "0"), ("images", "0")),
        (("--out", "{run}/tokenizer.safetensors"), ("--out", "is a file, not a folder")),
        (("--tokenizer", "{run}/nowhere"), ("--tokenizer", "nowhere", "no such file")),
    ],
)
def test_what_the_user_can_mend_is_said(options: tuple[str, str], said: tuple[str, ...], tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    before = files_of(tmp_path)
    given = {"--tokenizer": str(tmp_path), options[0]: options[1].format(run=tmp_path)}
    with mock.patch("importlib.util.find_spec", return_value=None):
        ended = analyze(*(part for pair in given.items() for part in pair))
    assert ended.code == 2
    assert all(part in ended.err for part in said), ended.err
    assert "Traceback" not in ended.err
    assert {name: data for name, data in files_of(tmp_path).items() if "events" not in name} == before


@pytest.mark.parametrize("bottleneck", [CODES, RVQ, RVQ.model_copy(update={"code_dim": 3})])
def test_the_vectors_drawn_behind_a_codebook_are_those_looked_up_in_it(
    bottleneck: BottleneckConfig, tmp_path: Path
) -> None:
    """The vectors of the latent itself, of residuals, and of a projection."""
    loaded = write_tokenizer(tmp_path, bottleneck=bottleneck)
    encoded = encode_images(loaded, shapes(), 7)
    assert encoded.codes is not None
    searched = searched_vectors(encoded)
    for k, (vectors, codebook) in enumerate(zip(searched, loaded.tokenizer.bottleneck.codebooks(), strict=True)):
        assert vectors.shape == (encoded.codes[..., k].numel(), codebook.shape[1])
        assert torch.cdist(vectors, codebook).argmin(dim=1).tolist() == encoded.codes[..., k].flatten().tolist()


def test_masked_positions_get_the_most_frequent_code(tmp_path: Path) -> None:
    loaded = write_tokenizer(tmp_path)
    encoded = encode_images(loaded, shapes(), 7)
    assert encoded.codes is not None
    common = int(torch.bincount(encoded.codes.flatten()).argmax())
    wanted = loaded.tokenizer.bottleneck.codebooks()[0][common]
    torch.testing.assert_close(replacement(encoded), wanted)
