"""evaluate.py with perturbed codes: which codes are replaced and by which, and what the results say."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sampling.evaluation.perturbation import CodePerturbation
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.perturbation import PerturbationConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.metrics import psnr
from tests.helpers.artefacts import shapes, write_prior, write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.quantizers import EVERY_KIND, Tree, bottleneck, latents, name_of

with_codes = pytest.mark.parametrize("tree", [tree for tree in EVERY_KIND if bottleneck(tree).depth], ids=name_of)
DATA = shapes(image_size=(16, 24), train_images=12, validation_images=50)


def evaluate(*arguments: object) -> Ended:
    """Run the command without features."""
    return run(names_of("sampling/evaluate.py")["main"], "--extractor.kind", "none", *arguments)


def figures(path: Path) -> dict[str, Any]:
    """Return the metrics of a JSON file by name."""
    return {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}


@with_codes
def test_the_stated_share_is_replaced_by_the_nearest(tree: Tree) -> None:
    """For every quantizer: the share within four deviations; never the code itself; one of the N nearest by brute force
    in float64, each equally often; and all positions alike."""
    made = bottleneck(tree)
    made.start(latents(seed=0))
    size, share, nearest = made.codebook_size, 0.3, 5
    perturb = CodePerturbation(PerturbationConfig(codes=share, nearest=nearest), made, 7, torch.device("cpu"))
    codes = torch.randint(size, (150, 4, 5, made.depth), generator=torch.Generator().manual_seed(0))
    replaced = perturb(codes, np.arange(150))
    changed = replaced != codes
    for k, book in enumerate(made.codebooks()):
        number = changed[..., k].sum().item()
        assert abs(number - 3000 * share) < 4 * math.sqrt(3000 * share * (1 - share))
        distances = torch.cdist(book.double(), book.double()).fill_diagonal_(math.inf)
        farthest = distances.sort(dim=1).values[:, nearest - 1]  # (V,)
        old, new = codes[..., k][changed[..., k]], replaced[..., k][changed[..., k]]
        assert (distances[old, new] <= farthest[old] + 1e-5).all()
        if tree["kind"] not in ("fsq", "lfq"):  # their distances have ties
            ranks = distances.argsort(dim=1).argsort(dim=1)[old, new].bincount(minlength=nearest)
            assert len(ranks) == nearest
            assert (abs(ranks - number / nearest) < 4 * math.sqrt(number / nearest)).all()
    by_position = changed.double().mean(dim=(0, 3))
    assert (abs(by_position - share) < 5 * math.sqrt(share * (1 - share) / (150 * made.depth))).all()


def test_an_image_has_the_same_errors_in_any_batch() -> None:
    """Codes to be replaced depend on the seed and the image alone."""
    made = bottleneck({"kind": "vq", "codebook_size": 16, "kmeans_init": False})
    config = PerturbationConfig(codes=0.5, nearest=3)
    perturb = CodePerturbation(config, made, 0, torch.device("cpu"))
    codes = torch.randint(16, (40, 3, 3, 1), generator=torch.Generator().manual_seed(0))
    whole = perturb(codes, np.arange(40))
    chosen = np.array([31, 2, 17])
    assert torch.equal(perturb(codes[chosen], chosen), whole[chosen])
    assert not torch.equal(CodePerturbation(config, made, 1, torch.device("cpu"))(codes, np.arange(40)), whole)
    none = CodePerturbation(PerturbationConfig(nearest=3), made, 0, torch.device("cpu"))
    assert torch.equal(none(codes, np.arange(40)), codes)


def decoded_psnr(loaded: Any, codes: Tensor, x: Tensor) -> float:
    """Return the mean PSNR of the rounded images of codes."""
    x_hat = normalise(to_uint8(torch.cat([loaded.tokenizer.decode_codes(part) for part in torch.split(codes, 1)])))
    return float(psnr(x, x_hat).double().mean())


def test_the_command_measures_the_decoded_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics are those of the perturbed codes' images, their names and the protocol say so, and the batch
    size changes nothing; the codebook's use stays that of the true codes."""
    monkeypatch.chdir(tmp_path)
    loaded = write_tokenizer(tmp_path / "run", data=DATA)
    given = ("--tokenizer", tmp_path / "run", "--seed", 3, "--perturbation.nearest", 4)
    for share in (0, 0.2, 1):
        ended = evaluate(*given, "--perturbation.codes", share, "--out", tmp_path / f"{share}")
        assert ended.code == 0, ended.err
    assert "PSNR, perturbed codes" in ended.out
    plain, some, whole = (figures(tmp_path / f"{share}.json") for share in (0, 0.2, 1))
    x = normalise(open_data(DATA).image_batches("validation", 0).batch(np.arange(50))[0])
    codes = loaded.tokenizer.encode_codes(x)
    config = PerturbationConfig(codes=0.2, nearest=4)
    perturbed = CodePerturbation(config, loaded.tokenizer.bottleneck, 3, torch.device("cpu"))(codes, np.arange(50))
    assert plain["psnr"]["value"] == pytest.approx(decoded_psnr(loaded, codes, x), rel=1e-5)
    assert some["perturbed_psnr"]["value"] == pytest.approx(decoded_psnr(loaded, perturbed, x), rel=1e-5)
    assert plain["psnr"]["value"] > some["perturbed_psnr"]["value"] > whole["perturbed_psnr"]["value"]
    assert {"perturbed_psnr", "perturbed_ssim", "perturbed_nmse"} <= some.keys()
    assert not {"psnr", "ssim", "nmse"} & some.keys(), "nobody takes them for the tokenizer's own"
    assert some["code_perplexity"] == plain["code_perplexity"]
    assert json.loads((tmp_path / "0.2.json").read_text())["protocol"]["perturbation"] == {
        "codes": 0.2,
        "nearest": 4,
        "seed": 3,
    }
    assert evaluate(*given, "--perturbation.codes", 0.2, "--batch_size", 7, "--out", tmp_path / "seven").code == 0
    assert figures(tmp_path / "seven.json") == some


def test_a_share_of_zero_is_the_evaluation_without_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file with the same content; perturbed ones have another name."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "run", data=DATA)
    folder = tmp_path / "run/evaluation"
    assert evaluate("--tokenizer", tmp_path / "run").code == 0
    (path,) = folder.glob("*.json")
    before = figures(path)
    assert evaluate("--tokenizer", tmp_path / "run", "--perturbation.codes", 0).code == 0
    assert [*folder.glob("*.json")] == [path]
    assert figures(path) == before
    assert evaluate("--tokenizer", tmp_path / "run", "--perturbation.codes", 0.5, "--perturbation.nearest", 2).code == 0
    assert len([*folder.glob("perturbed-shapes-validation-50-none-*.json")]) == 1
    assert figures(path) == before


@pytest.mark.parametrize(
    ("bottleneck", "options", "message"),
    [
        (KlConfig(), ("--perturbation.codes", 0.5), "is continuous"),
        (VqConfig(codebook_size=16), ("--perturbation.codes", 0.5), "only 15 others"),
        (VqConfig(codebook_size=16), ("--perturbation.codes", 1.5), "less than or equal to 1"),
        (
            VqConfig(codebook_size=16),
            ("--perturbation.codes", 0.5, "--perturbation.nearest", 0),
            "perturbation.nearest",
        ),
    ],
)
def test_what_cannot_be_perturbed_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bottleneck: KlConfig | VqConfig,
    options: tuple[object, ...],
    message: str,
) -> None:
    """In one message, before anything is measured or written."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "run", data=DATA, bottleneck=bottleneck)
    ended = evaluate("--tokenizer", tmp_path / "run", *options)
    assert ended.code == 2, ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run/evaluation").exists()


def test_samples_of_a_prior_are_not_perturbed(tmp_path: Path) -> None:
    """The option would have no effect beside a prior."""
    write_prior(tmp_path / "run")
    ended = run(names_of("sampling/evaluate.py")["main"], "--prior", tmp_path / "run", "--perturbation.codes", 0.5)
    assert ended.code == 2
    assert "only the codes of reconstructions are perturbed" in ended.err
