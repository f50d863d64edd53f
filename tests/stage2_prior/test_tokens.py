"""Tokens on disk: they are the frozen tokenizer's codes, each image once, and made anew as soon as anything differs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.open_data import OpenData, open_data
from stage1_tokenizer.engine.checkpoint import load_strict, read_weights
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer, fingerprint
from stage2_prior import tokens
from stage2_prior.tokens import TokenSet, load_or_encode
from tests.helpers.artefacts import IMAGE_SIZE, shapes, write_image_folder, write_tokenizer
from tests.helpers.commands import lone_accelerator
from tests.helpers.processes import run_processes
from tests.stage1_tokenizer.data.test_image_tensor import CUDA

SHARD = "train-00000-of-00001.safetensors"
AUGMENTED = {"flip": True, "random_crop": True, "resize_to": 16}


@pytest.fixture
def extractions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of the split with each extraction."""
    seen: list[str] = []
    extract = tokens._encode_shard

    def counted(*args: Any) -> None:
        seen.append(args[-1].name)
        extract(*args)

    monkeypatch.setattr(tokens, "_encode_shard", counted)
    return seen


def expected(tokenizer: LoadedTokenizer, images: ImageBatches, epoch: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes and labels of a whole split, by a tokenizer that is built anew from the file's weights."""
    weights, _ = read_weights(tokenizer.path, "tokenizer")
    model = Tokenizer(tokenizer.tokenizer.config)
    load_strict(model, weights, "test")
    indices = np.arange(len(images))
    pixels, labels = images.batch(indices, None if epoch is None else np.full_like(indices, epoch))
    with torch.no_grad():
        return model.eval().encode_codes(normalise(pixels)), labels


def load(
    folder: Path,
    data: DataConfig,
    split: Split = "train",
    views: int = 1,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> TokenSet:
    """The tokens in folder/tokens by the tokenizer in `folder`."""
    tokenizer = LoadedTokenizer.load(folder)
    return load_or_encode(
        accelerator or lone_accelerator(), tokenizer, OpenData(data), split, views, seed, folder / "tokens"
    )


def test_tokens_are_the_codes_of_the_frozen_tokenizer(tmp_path: Path) -> None:
    """Trap 25: the codes are those of the saved weights in eval mode, and extracting leaves the weights alone."""
    tokenizer = write_tokenizer(tmp_path)
    found = load_or_encode(lone_accelerator(), tokenizer, OpenData(shapes()), "train", 1, 0, tmp_path / "tokens")
    codes, labels = expected(tokenizer, open_data(shapes()).image_batches("train", 0))
    assert len(set(codes.flatten().tolist())) > 8, "a tokenizer that uses few codes would prove little"
    assert torch.equal(found.codes[:, 0].long(), codes)
    assert torch.equal(found.labels.long(), labels)
    assert found.classes == open_data(shapes()).image_batches("train", 0).classes
    assert fingerprint(tokenizer.tokenizer) == tokenizer.fingerprint
    with safe_open(tmp_path / "tokens" / SHARD, framework="pt") as file:
        assert json.loads(file.metadata()["provenance"])["tokenizer"] == tokenizer.fingerprint


def test_epochs_take_the_views_in_turn(tmp_path: Path) -> None:
    """Trap 25: view 0 is the plain image, the others are augmented each in its own way, and none is forgotten."""
    data, seed = shapes(**AUGMENTED), 5
    tokenizer, images = write_tokenizer(tmp_path), open_data(data).image_batches("train", seed)
    found = load(tmp_path, data, views=3, seed=seed)
    wanted = [expected(tokenizer, images, epoch)[0] for epoch in (None, 1, 2)]
    assert not any(torch.equal(wanted[one], wanted[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    indices = np.array([4, 0, 22, 4])
    for epoch in range(7):
        codes, labels = found.batch((indices, np.full_like(indices, epoch)))
        assert torch.equal(codes, wanted[epoch % 3][indices])
        assert torch.equal(labels, found.labels[indices].long())
    mixed, _ = found.batch((np.array([4, 4]), np.array([1, 5])))
    assert torch.equal(mixed, torch.stack([wanted[1][4], wanted[2][4]]))


def extract_on_a_rank(
    accelerator: Accelerator, folder: Path, data: DataConfig
) -> dict[str, tuple[TokenSet, list[int]]]:
    """The tokens of both splits as this rank has them, and the images that it encoded."""
    encoded: list[int] = []
    batch = ImageBatches.batch

    def recorded(self: ImageBatches, indices: Any, epochs: Any = None) -> tuple[Tensor, Tensor]:
        encoded.extend(indices.tolist())
        return batch(self, indices, epochs)

    ImageBatches.batch = recorded  # type: ignore[method-assign]
    found = {}
    for split in ("train", "validation"):
        encoded.clear()
        found[split] = load(folder, data, split, accelerator=accelerator), list(encoded)
    return found


def test_each_image_is_extracted_once_on_three_processes(tmp_path: Path, extractions: list[str]) -> None:
    """Trap 26: samplers pad to equal shares; here ten images are ten, and two on three ranks are two."""
    data = shapes(train_images=10, validation_images=2)
    tokenizer = write_tokenizer(tmp_path)
    ranks = run_processes(3, extract_on_a_rank, tmp_path, data)
    assert len(list((tmp_path / "tokens").iterdir())) == 6
    for split in ("train", "validation"):
        codes, labels = expected(tokenizer, open_data(data).image_batches(split, 0))
        assert [index for rank in ranks for index in rank[split][1]] == list(range(len(labels)))
        alone = load(tmp_path, data, split)
        for found in (alone, *(rank[split][0] for rank in ranks)):
            assert torch.equal(found.codes[:, 0].long(), codes)
            assert torch.equal(found.labels.long(), labels)
    assert not extractions, "one process must read what three have written"
    (tmp_path / "tokens" / "train-00001-of-00003.safetensors").unlink()
    assert torch.equal(load(tmp_path, data).codes, ranks[0]["train"][0].codes)
    assert extractions == ["train"], "a missing shard must be noticed"
    assert [path.name for path in (tmp_path / "tokens").glob("train-*")] == [SHARD]


@pytest.mark.parametrize(
    ("change", "views", "seed"),
    [
        ({}, 1, 0),
        ({}, 3, 0),
        ({}, 2, 1),
        ({"drawing_seed": 1}, 2, 0),
        ({"palette": 3}, 2, 0),
        ({"train_images": 22}, 2, 0),
        ({"flip": False}, 2, 0),
    ],
    ids=str,
)
def test_another_setting_means_other_tokens(
    tmp_path: Path, extractions: list[str], change: dict[str, Any], views: int, seed: int
) -> None:
    """Trap 25: tokens of another data set, number of views or seed of the views are never taken for those asked for."""
    write_tokenizer(tmp_path)
    load(tmp_path, shapes(**AUGMENTED), views=2)
    found = load(tmp_path, shapes(**{**AUGMENTED, **change}), views=views, seed=seed)
    assert extractions == ["train", "train"]
    write_tokenizer(tmp_path / "fresh")
    fresh = load(tmp_path / "fresh", shapes(**{**AUGMENTED, **change}), views=views, seed=seed)
    assert torch.equal(found.codes, fresh.codes)


def test_another_tokenizer_means_other_tokens(
    tmp_path: Path, extractions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap 25 and fault 37: a tokenizer that was trained on, or anew, has other codes, whatever its file is called."""
    write_tokenizer(tmp_path)
    before = load(tmp_path, shapes())
    tokenizer = write_tokenizer(tmp_path, seed=1)
    found = load(tmp_path, shapes())
    assert extractions == ["train", "train"]
    assert "another tokenizer" in capsys.readouterr().out
    assert torch.equal(found.codes[:, 0].long(), expected(tokenizer, open_data(shapes()).image_batches("train", 0))[0])
    assert not torch.equal(found.codes, before.codes)


def test_tokens_are_used_again(tmp_path: Path, extractions: list[str]) -> None:
    """Trap 25: extraction may take an hour; neither the other split nor what does not matter to codes repeats it."""
    write_tokenizer(tmp_path)
    first = load(tmp_path, shapes())
    load(tmp_path, shapes(), "validation")
    assert extractions == ["train", "validation"]
    for options in ({}, {"cache": "none"}, {"workers": 3}):
        again = load(tmp_path, shapes(**options), seed=9)  # one view: nothing is drawn
        assert torch.equal(again.codes, first.codes)
        assert torch.equal(again.labels, first.labels)
        assert again.classes == first.classes
    assert extractions == ["train", "validation"]


def test_a_picture_that_was_replaced_is_noticed(tmp_path: Path, extractions: list[str]) -> None:
    """Trap 25: a folder's config does not change when its images do."""
    write_image_folder(tmp_path / "images", ("cat", "dog"))
    data = FolderConfig(root=str(tmp_path / "images"), image_size=IMAGE_SIZE, validation_share=0.3)
    write_tokenizer(tmp_path, data=data)
    load(tmp_path, data)
    load(tmp_path, data)
    assert extractions == ["train"]
    for name in ("cat", "dog"):
        for path in (tmp_path / "images" / name).iterdir():
            Image.new("RGB", IMAGE_SIZE[::-1], (255, 0, 9)).save(path)
    load(tmp_path, data)
    assert extractions == ["train", "train"]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_batch_is_the_same_on_every_device(device: str) -> None:
    """A GPU that keeps the tokens makes the batches itself; what it keeps is what was there."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (23, 3, 2, 3, 1), generator=rng, dtype=torch.int32)
    plain = TokenSet(codes, torch.arange(23, dtype=torch.int32), ("a", "b"))
    there = plain.to_device(torch.device(device))
    assert there.codes.device.type == there.labels.device.type == device
    places = np.array([4, 0, 22, 4]), np.array([0, 7, 5, 1])
    for one, other in zip(plain.batch(places), there.batch(places), strict=True):
        assert other.device.type == device
        assert torch.equal(one, other.cpu())
