"""Scores of images, by class and of a whole set; the command's files and errors."""

import csv
import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage2_prior.likelihood import token_nats
from stage2_prior.prior import PRIOR_FILE, LoadedPrior, match_labels
from stage2_prior.score import main
from tests.helpers.artefacts import MAKERS, edit_weights, files_of, shapes, write_image_folder, write_prior
from tests.helpers.commands import Ended, run, run_script
from tests.helpers.processes import run_processes

NAMES = ("rectangle", "triangle", "disk", "oval", "star")


@pytest.fixture(scope="module", params=MAKERS)
def prior(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedPrior:
    return write_prior(tmp_path_factory.mktemp(request.param), NAMES, kind=request.param)


def command(prior: LoadedPrior, out: Path, *arguments: object) -> Ended:
    return run(main, "--prior", prior.path, "--out", out, *arguments)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_hand(prior: LoadedPrior) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and nats (N, classes) of the seven validation shapes under each class, one image at a time."""
    pixels, labels = open_data(shapes()).image_batches("validation", 0).batch(np.arange(7))
    nats = torch.zeros(7, 5, dtype=torch.float64)
    for index in range(7):
        codes = prior.tokenizer.tokenizer.encode_codes(normalise(pixels[index : index + 1]))
        for label in range(5):
            nats[index, label] = token_nats(prior.model(codes, torch.tensor([label])), codes).double().sum()
    return labels, nats


def test_each_image_has_the_score_of_its_own_class(prior: LoadedPrior, tmp_path: Path) -> None:
    """Trap 35: nats and bits of one image are the sum over its tokens, and Bayes' rule gives its classes."""
    labels, nats = by_hand(prior)
    assert command(prior, tmp_path, "--by_class", "--batch_size", 3).code == 0
    rows = rows_of(tmp_path)
    own = nats.gather(1, labels[:, None])[:, 0]
    assert [float(row["nats"]) for row in rows] == pytest.approx(own.tolist(), abs=1e-3)
    assert [float(row["bits"]) for row in rows] == pytest.approx((own / math.log(2)).tolist(), abs=1e-3)
    assert [row["class"] for row in rows] == [NAMES[label] for label in labels]
    posterior = torch.tensor([[float(row[f"ln p({name})"]) for name in NAMES] for row in rows])
    assert torch.allclose(posterior.double(), (-nats).log_softmax(dim=1), atol=1e-3)
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["class_found"] == pytest.approx(float((nats.argmin(dim=1) == labels).double().mean()))
    assert summary["bits_per_token"] == pytest.approx(float(own.mean()) / math.log(2) / 6, abs=1e-5)
    assert summary["code_length_bytes"] == pytest.approx(float(own.sum()) / math.log(2) / 8, abs=1e-4)
    for name, figures in summary["classes"].items():
        mine = own[labels == NAMES.index(name)]
        assert figures["bits_per_token"] == pytest.approx(float(mine.mean()) / math.log(2) / 6, abs=1e-5)


def test_processes_and_batch_size_change_no_score(prior: LoadedPrior, tmp_path: Path) -> None:
    """Trap 26: with two processes each image is still scored once, and stands in its own line."""
    assert command(prior, tmp_path / "one", "--batch_size", 2).code == 0
    words = ("--prior", prior.path, "--out", tmp_path / "two")
    run_processes(2, run_script, "stage2_prior/score.py", *words)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(one) == len(two) == 7
    for mine, theirs in zip(one, two, strict=True):
        assert float(mine["nats"]) == pytest.approx(float(theirs["nats"]), abs=2e-4)
        assert mine["class"] == theirs["class"]


def test_a_prior_that_knows_nothing_needs_ln_v(tmp_path: Path) -> None:
    """Trap 35: uniform logits cost log2 V bits per token, whatever the images are."""
    prior = write_prior(tmp_path / "p", NAMES)
    edit_weights(prior.path, **{"head.output.weight": torch.zeros(16, 24)})
    assert command(prior, tmp_path / "o").code == 0
    summary = json.loads((tmp_path / "o/scores.json").read_text())
    assert summary["bits_per_token"] == pytest.approx(4.0, abs=1e-6)
    assert summary["bits_per_image"] == pytest.approx(24.0, abs=1e-5)
    assert summary["bits_per_image_deviation"] == pytest.approx(0.0, abs=1e-5)
    assert summary["code_bits_per_dim"] == pytest.approx(24 / (3 * 8 * 12), abs=1e-6)


def test_classes_are_matched_by_name(prior: LoadedPrior, tmp_path: Path) -> None:
    """Trap 34: another data set lists its classes in another order, and has one that the prior never saw."""
    assert match_labels(prior, ("star", "bird", "disk")).tolist() == [4, 5, 2]
    assert match_labels(prior, ()).tolist() == [5]
    write_image_folder(tmp_path / "own", ("star", "bird"), per_class=3)
    arguments = ("--data.kind", "folder", "--data.root", tmp_path / "own", "--data.image_size", "8,12")
    ended = command(prior, tmp_path / "o", *arguments, "--split", "train", "--data.validation_share", 0.01)
    assert ended.code == 0, ended.err
    assert {row["class"] for row in rows_of(tmp_path / "o")} == {"star", ""}
    assert "(no class)" in ended.out


def test_a_class_that_was_never_seen_needs_label_dropout(tmp_path: Path) -> None:
    """Trap 32: without it the row of no class is untrained, and a score under it would be noise."""
    prior = write_prior(tmp_path, NAMES, label_dropout=0.0)
    with pytest.raises(ValueError, match=r"bird.*rectangle.*label_dropout 0"):
        match_labels(prior, ("star", "bird"))
    with pytest.raises(ValueError, match="images without a class"):
        match_labels(prior, ())
    assert match_labels(prior, NAMES[::-1]).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", 0), "n: "),
        (("--data.kind", "folder", "--data.root", "none", "--data.image_size", "8,12"), "no such folder"),
        (("--data.kind", "shapes", "--data.image_size", 16), "trained on 8x12"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_one_message(
    prior: LoadedPrior, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    """Exit code 2, and nothing is written."""
    ended = command(prior, tmp_path / "o", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "o").exists()


def test_an_unconditional_prior_has_no_classes_to_score(tmp_path: Path) -> None:
    """The option would otherwise write columns of nothing."""
    ended = command(write_prior(tmp_path / "p", ()), tmp_path / "o", "--by_class")
    assert ended.code == 2
    assert "no classes" in ended.err


def test_a_full_disk_leaves_no_half_table(prior: LoadedPrior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: exit code 5 with path and reason; what was there of an earlier run is still there, whole."""
    assert command(prior, tmp_path, "-n", 3).code == 0
    before = files_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    ended = command(prior, tmp_path)
    assert ended.code == 5
    assert str(tmp_path / "scores.csv") in ended.err
    assert files_of(tmp_path) == before


def test_weights_that_are_not_finite_are_a_bad_file(tmp_path: Path) -> None:
    """Fault 45: a NaN in a table of scores is found weeks later."""
    prior = write_prior(tmp_path / "p", NAMES)
    edit_weights(tmp_path / "p" / PRIOR_FILE, **{"norm.weight": torch.full((24,), float("nan"))})
    ended = command(prior, tmp_path / "o")
    assert ended.code == 3
    assert "not finite" in ended.err
