"""Training a prior that is interrupted, diverges or finds its data changed: what is left must be sound."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from sampling import generate
from stage1_tokenizer.data.folder import FolderConfig
from stage2_prior.gpt.model import Gpt
from stage2_prior.prior import PRIOR_FILE, load_prior
from tests.helpers import prior_training
from tests.helpers.artefacts import IMAGE_SIZE, MAKERS, write_image_folder, write_tokenizer
from tests.helpers.commands import run
from tests.helpers.prior_training import train
from tests.helpers.training import checksums

Loss = Callable[[Tensor, Tensor], Tensor]


def nan_loss(logits: Tensor, loss: Tensor) -> Tensor:
    return loss * math.nan


def nan_gradient(logits: Tensor, loss: Tensor) -> Tensor:
    """The loss as it is, with the gradient of a square root at 0 times 0."""
    return loss + (logits * 0.0).sqrt().sum()


def spoil(kind: Loss, at_step: int) -> Callable[[dict[str, Any]], None]:
    """A change of the script: at this step, counted from 1, something is not finite."""

    def change(names: dict[str, Any]) -> None:
        token_loss, steps = names["token_loss"], [0]

        def spoilt(logits: Tensor, codes: Tensor) -> Tensor:
            loss: Tensor = token_loss(logits, codes)
            steps[0] += logits.requires_grad
            return kind(logits, loss) if logits.requires_grad and steps[0] == at_step else loss

        names["token_loss"] = spoilt

    return change


def finite(folder: Path) -> bool:
    return all(tensor.isfinite().all() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


@pytest.mark.parametrize(
    ("kind", "log_every"),
    [
        pytest.param(nan_loss, 1, id="loss"),
        pytest.param(nan_loss, 100, id="loss between two log entries"),
        pytest.param(nan_gradient, 1, id="gradient"),
    ],
)
def test_what_is_not_finite_is_never_saved(tmp_path: Path, kind: Loss, log_every: int) -> None:
    """Fault 15: exit code 4, and "the states saved before it are intact": resuming from NaN never ends."""
    write_tokenizer(tmp_path / "stage1")
    run_folder = tmp_path / "run"
    ended = train(
        run_folder, tmp_path / "stage1", None, spoil(kind, at_step=4), steps=8, log_every=log_every, keep=2, skips=0
    )
    assert ended.code == 4
    assert "Traceback" not in ended.err
    states = list((run_folder / "state").iterdir())
    assert states
    assert all(finite(state) for state in states)
    assert finite(run_folder)


def test_a_stop_before_the_weights_were_written_is_made_good(tmp_path: Path) -> None:
    """Trap 41 and fault 2: "the same command continues", also when killed right after the last state."""
    write_tokenizer(tmp_path / "stage1")
    assert train(tmp_path / "run", tmp_path / "stage1", stop_after=3, steps=3, save_every=3).code == -9
    assert not (tmp_path / "run" / PRIOR_FILE).exists()
    assert train(tmp_path / "run", tmp_path / "stage1", steps=3).code == 0
    assert (tmp_path / "run" / PRIOR_FILE).exists()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_can_be_continued_with_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A prior's folder is self-sufficient: it is continued, bit for bit, when the run of its tokenizer is gone."""
    if kind == "pixelcnn":
        monkeypatch.delitem(prior_training.TINY, "prior.heads")
    options: dict[str, Any] = {"steps": 4, "prior__kind": kind}
    write_tokenizer(tmp_path / "stage1")
    assert train(tmp_path / "run", tmp_path / "stage1", stop_after=2, **options).code == -9
    assert train(tmp_path / "whole", tmp_path / "stage1", **options).code == 0
    shutil.rmtree(tmp_path / "stage1")
    assert train(tmp_path / "run", tmp_path / "run", **options).code == 0
    assert load_prior(tmp_path / "run").model.config.kind == kind  # type: ignore[attr-defined]
    assert checksums(tmp_path / "run", 4) == checksums(tmp_path / "whole", 4)


def test_a_start_that_failed_does_not_bind_the_next(tmp_path: Path) -> None:
    """A start that failed for a missing data folder does not refuse the right folder in the next start."""
    write_image_folder(tmp_path / "images", ("cat", "dog"))
    data = FolderConfig(root=str(tmp_path / "images"), image_size=IMAGE_SIZE, validation_share=0.3)
    write_tokenizer(tmp_path / "stage1", data=data)
    (tmp_path / "images").rename(tmp_path / "moved")
    ended = train(tmp_path / "run", tmp_path / "stage1", steps=1)
    assert ended.code == 2
    assert "data.root" in ended.err
    right: dict[str, Any] = {
        "data__kind": "folder",
        "data__root": tmp_path / "moved",
        "data__image_size": "8,12",
        "data__validation_share": 0.3,
    }
    ended = train(tmp_path / "run", tmp_path / "stage1", steps=1, **right)
    assert ended.code == 0, ended.err


def test_the_class_map_travels_with_the_checkpoint(tmp_path: Path) -> None:
    """Trap 34: a class that was added to the folder later sorts itself before the others, and takes nobody's number."""
    images = tmp_path / "images"
    write_image_folder(images, ("cat", "dog"))
    data = FolderConfig(root=str(images), image_size=IMAGE_SIZE, validation_share=0.3)
    write_tokenizer(tmp_path / "stage1", data=data)
    assert train(tmp_path / "run", tmp_path / "stage1", steps=2).code == 0
    weights = (tmp_path / "run" / PRIOR_FILE).read_bytes()
    write_image_folder(images, ("bird",))
    ended = train(tmp_path / "run", tmp_path / "stage1", steps=2)
    assert ended.code == 2
    assert "bird" in ended.err
    assert (tmp_path / "run" / PRIOR_FILE).read_bytes() == weights
    assert load_prior(tmp_path / "run").classes == ("cat", "dog")
    ended = run(generate.main, "--prior", tmp_path / "run", "-n", 2, "--class", "dog", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    with np.load(tmp_path / "out" / "samples.npz") as saved:
        assert saved["labels"].tolist() == [1, 1]


def test_labels_are_matched_by_name_on_a_resume(tmp_path: Path) -> None:
    """Trap 34: where a class lost its images between stop and resume, the labels of the others do not move down."""
    images = tmp_path / "images"
    write_image_folder(images, ("bird", "cat", "dog"))
    data = FolderConfig(root=str(images), image_size=IMAGE_SIZE, validation_share=0.3)
    write_tokenizer(tmp_path / "stage1", data=data)
    assert train(tmp_path / "run", tmp_path / "stage1", stop_after=3, steps=4).code == -9
    shutil.rmtree(images / "bird")
    seen: list[int] = []

    class Recording(Gpt):
        def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
            seen.extend(labels.tolist())
            return super().forward(codes, labels)

    refused = train(tmp_path / "run", tmp_path / "stage1", steps=4)
    assert refused.code == 2
    assert "36 images in 3 classes (bird 12, cat 12, dog 12)" in refused.err
    assert "24 images in 2 classes (cat 12, dog 12)" in refused.err
    ended = train(
        *(tmp_path / "run", tmp_path / "stage1", None, lambda names: names.update(build_prior=Recording)),
        steps=4,
        allow_changed=True,
    )
    assert ended.code == 0, ended.err
    assert {1, 2} <= set(seen) <= {1, 2, 3}, "1 cat, 2 dog, 3 withheld"
    assert load_prior(tmp_path / "run").classes == ("bird", "cat", "dog")
