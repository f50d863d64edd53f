"""evaluate.py: its metrics equal slow computations, have the right names, and the protocol is stated."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sampling.evaluation.distances import frechet_distance
from sampling.evaluation.extractors.base import Extracted, Extractor
from sampling.evaluation.features import Features
from sampling.evaluation.intervals import paired_frechet_interval, random_groups
from sampling.evaluation.metrics import distance_warnings, sample_metrics
from sampling.evaluation.moments import moments_of
from sampling.evaluation.npz import write_moments, write_samples
from sampling.evaluation.perturbation import CodePerturbation
from sampling.evaluation.reference import Reference
from sampling.evaluation.results import Evaluation, Metric, console_lines, results_json, results_markdown
from sampling.evaluation.sources import random_indices
from sampling.sampler import Sampler, SamplingConfig
from sampling.saved_images import read_png
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.perturbation import PerturbationConfig
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from tests.helpers.artefacts import pixels_of, shapes, write_prior, write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.processes import run_processes

DATA = shapes(image_size=(16, 24), train_images=61, validation_images=50)
WEIGHTS = ("--extractor.kind", "efficientnet_lite0", "--extractor.weights", "tiny")
D = 6


class TinyExtractor(Extractor):
    """An extractor with fixed random features of images of 8x8, which is fast and counts the images."""

    seen = 0

    def __init__(self, is_inception: bool = False) -> None:
        super().__init__("Tiny", D, (8, 8), "0" * 64, is_inception)
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3 * 8 * 8, D, generator=generator), requires_grad=False)

    def _extract(self, images: Tensor) -> Extracted:
        type(self).seen += len(images)
        features = (images.flatten(1).float() / 255.0 @ self.weight / 10.0).tanh()
        return Extracted(features, 3.0 * features[:, :5])


def evaluate(*arguments: object) -> Ended:
    """Run the command with the tiny extractor."""
    names = names_of("sampling/evaluate.py")
    names["build_extractor"] = lambda config, device: TinyExtractor().to(device)
    without = ("--perceptual.weight", 0) if "--tokenizer" in arguments and "--samples" not in arguments else ()
    return run(names["main"], *WEIGHTS, *without, *arguments)


def result(stem: Path) -> dict[str, Any]:
    """Read a JSON file; `of` has its metrics by name."""
    path = stem if stem.suffix == ".json" else stem.with_name(stem.name + ".json")
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree | {"of": {figure["name"]: figure for figure in tree["figures"]}}


def features_of(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the features (N, D) of images (N, H, W, C)."""
    return TinyExtractor()(torch.from_numpy(images).permute(0, 3, 1, 2)).features.double().numpy()


def slow_frechet(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Compute Heusel et al.'s equation 6 literally."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(sqrtm(a @ b))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


@pytest.fixture
def prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a prior's folder into a new current folder."""
    monkeypatch.chdir(tmp_path)
    write_prior(tmp_path / "run", classes=("disk", "star"), tokenizer={"data": DATA}, label_dropout=0.5)
    return tmp_path / "run"


def test_reconstructions_are_measured_as_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image metrics equal torchmetrics and numpy on rounded images; the distance equals equation 6."""
    monkeypatch.chdir(tmp_path)
    loaded = write_tokenizer(tmp_path / "run", data=DATA)
    ended = evaluate("--tokenizer", tmp_path / "run", "--batch_size", 9)
    assert ended.code == 0, ended.err
    found = result(next((tmp_path / "run/evaluation").glob("reconstructions-shapes-validation-50-*.json")))["of"]

    x = open_data(DATA).image_batches("validation", 0).batch(np.arange(50))[0]
    x_hat = to_uint8(torch.cat([loaded.tokenizer(part)[0] for part in torch.split(normalise(x), 1)]))
    a, b = x.double() / 255.0, x_hat.double() / 255.0
    psnr = np.mean(
        [float(peak_signal_noise_ratio(q[None], p[None], data_range=1.0)) for p, q in zip(a, b, strict=True)]
    )
    similar = structural_similarity_index_measure(b.float(), a.float(), data_range=1.0)
    assert found["psnr"]["value"] == pytest.approx(psnr, abs=1e-3)
    assert isinstance(similar, Tensor)
    assert found["ssim"]["value"] == pytest.approx(float(similar), abs=1e-4)
    assert found["nmse"]["value"] == pytest.approx(float(((a - b) ** 2).mean() / a.var(correction=0)), rel=1e-4)
    sides = [features_of(pixels.permute(0, 2, 3, 1).numpy()) for pixels in (x, x_hat)]
    assert found["rfd"]["value"] == pytest.approx(slow_frechet(*sides), rel=1e-4)
    codes = loaded.tokenizer.encode_codes(normalise(x)).flatten()
    share = codes.bincount(minlength=16).double() / codes.numel()
    assert found["code_usage"]["value"] == pytest.approx(100 * float((share > 0).double().mean()))
    assert found["code_perplexity"]["value"] == pytest.approx(
        float((-(share * share.clamp_min(1e-99).log()).sum()).exp())
    )
    assert found["bits_per_image"]["value"] == 4 * 6 * 4
    for name in ("rfd", "psnr", "ssim", "nmse"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"], name


def test_reconstructions_of_perturbed_codes_have_their_own_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance equals equation 6 for the images of the perturbed codes."""
    monkeypatch.chdir(tmp_path)
    loaded = write_tokenizer(tmp_path / "run", data=DATA)
    perturbation = PerturbationConfig(codes=0.5, nearest=3)
    options = ("--perturbation.codes", 0.5, "--perturbation.nearest", 3)
    assert evaluate("--tokenizer", tmp_path / "run", *options, "--out", tmp_path / "out").code == 0
    x = open_data(DATA).image_batches("validation", 0).batch(np.arange(50))[0]
    codes = loaded.tokenizer.encode_codes(normalise(x))
    perturb = CodePerturbation(perturbation, loaded.tokenizer.bottleneck, 0, torch.device("cpu"))
    x_hat = to_uint8(
        torch.cat([loaded.tokenizer.decode_codes(part) for part in torch.split(perturb(codes, np.arange(50)), 1)])
    )
    sides = [features_of(pixels.permute(0, 2, 3, 1).numpy()) for pixels in (x, x_hat)]
    found = result(tmp_path / "out")["of"]["perturbed_rfd"]
    assert found["value"] == pytest.approx(slow_frechet(*sides), rel=1e-4)
    assert found["label"] == "Fréchet distance, Tiny, perturbed codes"


def test_a_priors_samples_are_measured_as_by_hand(prior: Path) -> None:
    """The samples are those of these settings, the distance equals equation 6, and the bits per token score.py's. The
    samples on disk have the same metrics when they are measured without the prior."""
    ended = evaluate("--prior", prior, "-n", 45, "--sampling.top_p", 1, "--seed", 3, "--nearest", 10)
    assert ended.code == 0, ended.err
    found, folder = result(next(prior.glob("evaluation/*.json"))), next(prior.glob("evaluation/samples-????????"))
    sampler = Sampler.load(prior, SamplingConfig(top_p=1.0))
    images = sampler.sample(45, seed=3)
    np.testing.assert_array_equal(np.stack([read_png(folder / f"{index:06d}.png") for index in range(45)]), images)

    train = open_data(DATA).image_batches("train", 0).batch(np.arange(61))[0].permute(0, 2, 3, 1).numpy()
    assert found["of"]["fd"]["value"] == pytest.approx(slow_frechet(features_of(images), features_of(train)), rel=1e-4)
    assert run(names_of("stage2_prior/score.py")["main"], "--prior", prior, "--out", prior / "scores").code == 0
    scores = json.loads((prior / "scores/scores.json").read_text())
    assert found["of"]["bits_per_token"]["value"] == pytest.approx(scores["bits_per_token"], rel=1e-6)
    assert found["of"]["throughput"]["value"] > 0
    assert found["protocol"]["sampling"]["top_p"] == 1.0
    assert found["protocol"]["reference"]["pictures"] == 61

    ended = evaluate("--samples", folder, "--prior", prior, "--out", prior / "again", "--seed", 3, "--nearest", 10)
    assert ended.code == 0, ended.err
    again = result(prior / "again")["of"]
    assert again.keys() == found["of"].keys() - {"bits_per_token", "throughput"}
    for name, figure in again.items():
        assert figure == found["of"][name]


def test_samples_that_are_there_are_not_made_again(prior: Path) -> None:
    """A second evaluation measures the same images, and reports no sampling speed."""
    arguments = ("--prior", prior, "-n", 6, "--nearest", 0)
    assert evaluate(*arguments, "--out", prior / "one").code == 0
    folder = next(prior.glob("evaluation/samples-????????"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert evaluate(*arguments, "--out", prior / "two").code == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    one, two = (result(prior / name)["of"] for name in ("one", "two"))
    assert "throughput" in one
    assert two == {name: figure for name, figure in one.items() if name != "throughput"}


def test_a_references_features_are_kept_with_their_provenance(prior: Path) -> None:
    """A second evaluation reads them and gives the same metrics; damaged ones, or those of other data, are computed
    again. The moments are written in the form of published tools too."""
    arguments = ("--prior", prior, "-n", 6, "--nearest", 0)
    figures, computed = [], []
    for changed in ((), (), ("--data.kind", "shapes", *words(DATA.model_copy(update={"drawing_seed": 1})))):
        TinyExtractor.seen = 0
        assert evaluate(*arguments, *changed, "--out", prior / "out").code == 0
        computed.append(TinyExtractor.seen)
        figures.append(result(prior / "out")["of"]["fd"])
    assert computed == [6 + 61, 6, 6 + 61]
    assert figures[0] == figures[1] != figures[2]
    files = sorted(Path("runs/references").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    with np.load(files[0].with_suffix(".npz")) as moments:
        train = open_data(DATA).image_batches("train", 0).batch(np.arange(61))[0].permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(moments["sigma"], np.cov(features_of(train), rowvar=False), rtol=1e-5, atol=1e-7)
    files[0].write_bytes(files[0].read_bytes()[:-9])
    TinyExtractor.seen = 0
    assert "damaged" in evaluate(*arguments, "--out", prior / "out").out
    assert TinyExtractor.seen == 6 + 61
    assert result(prior / "out")["of"]["fd"] == figures[0]


def words(config: Any) -> list[str]:
    """Return a data config as a command line."""
    given = {"image_size": "16,24", "train_images": 61, "validation_images": 50, "drawing_seed": config.drawing_seed}
    return [word for key, value in given.items() for word in (f"--data.{key}", str(value))]


def test_references_may_be_files_of_the_adm_suite(prior: Path) -> None:
    """A file may have images (those of the train split give its distance) or moments of features."""
    train = open_data(DATA).image_batches("train", 0).batch(np.arange(61))[0].permute(0, 2, 3, 1).numpy()
    write_samples(prior / "images.npz", train)
    write_moments(prior / "moments.npz", moments_of(features_of(train)))
    found = {}
    for reference in ("train", prior / "images.npz", prior / "moments.npz"):
        ended = evaluate("--prior", prior, "-n", 6, "--nearest", 0, "--reference", reference, "--out", prior / "out")
        assert ended.code == 0, ended.err
        found[str(reference)] = result(prior / "out")["of"]
    of_split, of_images, of_moments = found.values()
    assert of_images["fd"]["value"] == pytest.approx(of_split["fd"]["value"], rel=1e-6)
    assert of_moments["fd"]["value"] == pytest.approx(of_split["fd"]["value"], rel=1e-4)
    assert of_images["precision"] == of_split["precision"]
    assert "kd" not in of_moments  # which needs features, and the file has none


def test_copies_of_training_images_are_counted_and_shown(prior: Path) -> None:
    """Ten copies of training images among the samples are counted, in pixels and in features."""
    train = open_data(DATA).image_batches("train", 0).batch(np.arange(61))[0].permute(0, 2, 3, 1).numpy()
    fresh = np.random.default_rng(0).integers(0, 256, (20, 16, 24, 3), dtype=np.uint8)
    write_samples(prior / "samples.npz", np.concatenate([train[:10], fresh]))
    arguments = ("--samples", prior / "samples.npz", "--prior", prior, "--out", prior / "out")
    assert evaluate(*arguments).code == 0
    found = result(prior / "out")
    for name in ("memorised_pixels", "memorised_features"):
        # Noise may be near to a training image in six features, but not in pixels.
        assert 100 / 3 - 1e-6 <= found["of"][name]["value"] <= (34 if name == "memorised_pixels" else 45)
    assert "exact copies: 10" in found["of"]["memorised_pixels"]["note"]
    assert "61 training images" in found["protocol"]["memorisation"]
    shown = pixels_of(prior / "out-nearest.png")
    np.testing.assert_array_equal(shown[2:18, 2:26], shown[2:18, 28:52])  # a copy, and next to it its original
    assert evaluate(*arguments, "--nearest", 0).code == 0
    assert "memorised_pixels" not in result(prior / "out")["of"]


def test_samples_of_all_classes_are_looked_at(prior: Path) -> None:
    """Samples have the classes in turn, so every tenth sample would have one class out of ten."""
    chosen = random_indices(100, 1000, seed=0)
    assert len(set(chosen.tolist())) == 100
    assert set(np.bincount(chosen % 10) > 0) == {True}
    assert not np.array_equal(chosen, random_indices(100, 1000, seed=1))
    np.testing.assert_array_equal(random_indices(9, 5, seed=0), np.arange(5))


def test_results_of_different_protocols_have_different_names(prior: Path) -> None:
    """Equal protocols have equal names, so a second evaluation replaces the files of the first."""
    for seed in (0, 0, -1):
        ended = evaluate("--samples", with_images(prior), "--prior", prior, "--nearest", 3, "--seed", seed)
        assert ended.code == 0, ended.err
    assert len(list(prior.glob("*-to-train-8-*.json"))) == 2
    assert len(list(prior.glob("*-nearest.png"))) == 2
    ended = evaluate("--samples", prior, "--prior", prior, "--nearest", 0, "--out", prior / "out")
    assert ended.code == 2  # the folder has only images that the evaluations wrote, and these are not samples
    assert f"--samples {prior}" in " ".join(ended.err.split())


def with_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    write_samples(folder / "eight.npz", rng.integers(0, 256, (8, 16, 24, 3), dtype=np.uint8))
    return folder / "eight.npz"


def test_the_moments_of_a_file_with_images_are_left_alone(prior: Path) -> None:
    """A reference file of the ADM suite has both; its moments have another resize, so its images are used."""
    train = open_data(DATA).image_batches("train", 0).batch(np.arange(61))[0].permute(0, 2, 3, 1).numpy()
    np.savez(prior / "both.npz", arr_0=train, mu=np.full(D, 9.0), sigma=np.eye(D))
    arguments = ("--prior", prior, "-n", 6, "--nearest", 0)
    assert evaluate(*arguments, "--reference", prior / "both.npz", "--out", prior / "both").code == 0
    assert evaluate(*arguments, "--out", prior / "split").code == 0
    both, split = result(prior / "both"), result(prior / "split")
    assert both["of"]["fd"]["value"] == pytest.approx(split["of"]["fd"]["value"], rel=1e-6)
    with_npz(prior, D)
    assert evaluate(*arguments, "--reference", prior / "moments.npz", "--out", prior / "moments").code == 0
    assert "how its images were resized is not known" in " ".join(result(prior / "moments")["warnings"])


@pytest.mark.parametrize("bottleneck", [KlConfig(), RvqConfig(codebook_size=16, depth=3, kmeans_init=False)])
def test_every_kind_of_latent_can_be_measured(
    bottleneck: KlConfig | RvqConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continuous latent has no code metrics; several codes per position add up in bits per image."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "run", data=DATA, bottleneck=bottleneck)
    ended = evaluate("--tokenizer", tmp_path / "run", "-n", 41, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    found = result(tmp_path / "out")["of"]
    if isinstance(bottleneck, KlConfig):
        assert "code_usage" not in found
    else:
        assert found["bits_per_image"]["value"] == 4 * 6 * 3 * 4
    assert found["psnr"]["low"] < found["psnr"]["value"] < found["psnr"]["high"]


def test_lpips_is_that_of_the_package(tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS equals the package's, image by image, on the rounded reconstruction, with published weights."""
    monkeypatch.chdir(tmp_path)
    data = shapes(image_size=(32, 32), train_images=8, validation_images=5)
    loaded = write_tokenizer(tmp_path / "run", data=data)
    weights = str(real_data / "weights/lpips_alex_features.safetensors")
    names = names_of("sampling/evaluate.py")
    names["build_extractor"] = lambda config, device: TinyExtractor()
    options = ("--perceptual.net", "alex", "--perceptual.weights", weights, "--out", tmp_path / "out")
    assert run(names["main"], *WEIGHTS, "--tokenizer", tmp_path / "run", *options).code == 0
    x = normalise(open_data(data).image_batches("validation", 0).batch(np.arange(5))[0])
    x_hat = normalise(to_uint8(loaded.tokenizer(x)[0]))
    package = Perceptual(PerceptualConfig(weight=1.0, net="alex", weights=weights), (32, 32)).lpips
    each = [float(package(a[None], b[None])) for a, b in zip(x, x_hat, strict=True)]
    found = result(tmp_path / "out")
    assert found["of"]["lpips"]["value"] == pytest.approx(np.mean(each), rel=1e-4)
    assert "sha256" in found["protocol"]["LPIPS"]


def on_ranks(_: Accelerator, arguments: list[str]) -> None:
    names = names_of("sampling/evaluate.py")
    names["build_extractor"] = lambda config, device: TinyExtractor().to(device)
    without = ["--perceptual.weight", "0"] if "--tokenizer" in arguments else []
    sys.argv = ["evaluate.py", *WEIGHTS, *without, *arguments]
    names["main"]()


@pytest.mark.parametrize("kind", ["prior", "tokenizer", "perturbed"])
def test_two_processes_find_what_one_finds(tmp_path: Path, kind: str) -> None:
    """Each image is measured once, by one of the processes, and has its row."""
    folder = tmp_path / "run"
    if kind == "prior":
        write_prior(folder, classes=("disk", "star"), tokenizer={"data": DATA}, label_dropout=0.5)
    else:
        write_tokenizer(folder, data=DATA)
    option, own = {
        "prior": ("--prior", "--nearest 9"),
        "tokenizer": ("--tokenizer", ""),
        "perturbed": ("--tokenizer", "--perturbation.codes 0.5 --perturbation.nearest 3"),
    }[kind]
    arguments = [option, str(folder), "-n", "43", *own.split()]
    assert evaluate(*arguments, "--out", folder / "one", "--references", folder / "references").code == 0
    run_processes(2, on_ranks, [*arguments, "--out", str(folder / "two"), "--references", str(folder / "anew")])
    one, two = (result(folder / name)["of"] for name in ("one", "two"))
    two.pop("throughput", None)
    one.pop("throughput", None)
    assert one.keys() == two.keys()
    for name, figure in one.items():
        assert two[name]["value"] == pytest.approx(figure["value"], rel=1e-5, abs=1e-9), name
        if figure["low"] is not None:
            assert two[name]["low"] == pytest.approx(figure["low"], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("is_inception", [True, False])
def test_only_inceptions_metrics_have_its_names(is_inception: bool) -> None:
    """A Fréchet distance of other features must not be called FID."""
    extractor, generator = TinyExtractor(is_inception), torch.Generator().manual_seed(0)
    sets = []
    for _ in range(2):
        features = Features(D, keep=None)
        features.add(extractor(torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)))
        sets.append(features)
    reference = Reference(sets[1].moments, sets[1].features, sets[1].indices, {}, (8, 8))
    labels = {figure.name: figure.label for figure in sample_metrics(sets[0], reference, extractor, 0)}
    told = " ".join(distance_warnings(60, 60, extractor))
    if is_inception:
        assert {"fid": "FID", "kid": "KID", "is": "inception score"}.items() <= labels.items()
        assert "Tiny" not in told
    else:
        assert not {"fid", "kid", "is"} & labels.keys()
        assert not [label for label in labels.values() if any(word in label for word in ("FID", "KID", "nception"))]
        assert "no distance here is an FID" in told


def test_the_interval_of_reconstructions_leaves_a_image_out_of_both_sides() -> None:
    """It equals a jackknife that is computed from the definition."""
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(90, 4))
    made = originals + 0.3 * rng.normal(size=(90, 4))

    def distance(kept: NDArray[np.int64]) -> float:
        return frechet_distance(moments_of(made[kept]), moments_of(originals[kept]))

    everything = np.arange(90)
    left_out = np.array([distance(np.setdiff1d(everything, group)) for group in random_groups(90, 20, seed=5)])
    error = math.sqrt(19 / 20 * ((left_out - left_out.mean()) ** 2).sum())
    low, high = paired_frechet_interval(torch.from_numpy(made), torch.from_numpy(originals), seed=5)
    assert (low + high) / 2 == pytest.approx(distance(everything), rel=1e-6)
    assert (high - low) / 2 == pytest.approx(2.0930 * error, rel=1e-3)  # Student's t of 19 degrees of freedom


def test_results_are_written_for_all_values() -> None:
    """A NaN is null in JSON and "not a number" in Markdown; digits suit the interval; a bar in a name is escaped."""
    figures = [Metric("a", "a|b", float("nan")), Metric("b", "B", 3.14159, unit="dB", better="higher", note="c")]
    evaluation = Evaluation("prior", figures, {"subject": "S", "data": {"kind": "folder", "root": "x\ny"}}, ["mind"])
    tree = json.loads(results_json(evaluation))
    assert [figure["value"] for figure in tree["figures"]] == [None, 3.14159]
    text = results_markdown(evaluation)
    assert "| a\\|b | not a number |" in text
    assert "| B | 3.142 dB |  | higher is better; c |" in text
    assert "> mind" in text
    assert "root x y" in text
    assert console_lines(evaluation)[-1] == "note: mind"


def with_npz(folder: Path, dimension: int) -> Path:
    rng = np.random.default_rng(0)
    write_moments(folder / "moments.npz", moments_of(rng.normal(size=(30, dimension))))
    return folder / "moments.npz"


def one_sample(folder: Path) -> Path:
    write_samples(folder / "one.npz", np.zeros((1, 16, 24, 3), dtype=np.uint8))
    return folder / "one.npz"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (lambda run: ("--prior", run, "--tokenizer", run), 2, "exclude each other"),
        (lambda run: ("--tokenizer", run, "--sampling.top_p", 0.5), 2, "nothing is sampled"),
        (lambda run: ("--tokenizer", run, "--nearest", 3), 2, "reconstructions are no samples"),
        (lambda run: ("--tokenizer", run, "--reference", "validation"), 2, "compared with their originals"),
        (lambda run: ("--samples", run, "--prior", run, "--split", "train"), 2, "nothing is reconstructed"),
        (lambda run: ("--prior", run, "--perceptual.net", "alex"), 2, "LPIPS is of reconstructions"),
        (lambda run: ("--prior", run, "--out", "."), 2, "name the results in it"),
        (lambda run: ("--samples", "x" * 300, "--prior", run), 2, "there is no such file"),
        (lambda run: ("--prior", run, "--reference", "x" * 300), 2, "there is no such file"),
        (lambda run: ("--prior", run, "--root", "/nowhere"), 2, "the images are drawn"),
        (lambda run: ("--samples", run / "none.npz", "--prior", run), 2, "there is no such file"),
        (lambda run: ("--samples", run / "evaluated"), 2, "--data.kind"),
        (lambda run: ("--prior", run, "-n", 3, "--reference", "training"), 2, "train, validation, an .npz"),
        (lambda run: ("--prior", run, "-n", 3, "--reference", with_npz(run, 9)), 3, "9 features"),
        (lambda run: ("--samples", run / "prior.safetensors", "--prior", run), 3, "not an .npz file"),
        (lambda run: ("--prior", run, "-n", 1), 2, "greater than or equal to 2"),
        (lambda run: ("--samples", one_sample(run), "--prior", run), 2, "at least 2"),
        (lambda run: ("--tokenizer", run, "--perceptual.weight", 0.5), 2, "leave it out"),
    ],
)
def test_bad_input_is_refused_in_one_message(
    prior: Path, arguments: Callable[[Path], tuple[object, ...]], code: int, message: str
) -> None:
    """The error names the wrong file or option, and what to do."""
    ended = evaluate(*arguments(prior))
    assert ended.code == code, ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_samples_of_another_size_have_no_nearest_training_images(prior: Path) -> None:
    """A warning says so, and the other metrics are there."""
    size = ("--sampling.size", "16,32", "-n", 41)
    ended = evaluate("--prior", prior, *size, "--out", prior / "out")
    assert ended.code == 0, ended.err
    found = result(prior / "out")
    assert "samples are 16x32, training images 16x24" in " ".join(found["warnings"])
    assert "fd" in found["of"]


def test_grey_images_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extractors get three equal channels; PSNR and the others use one. Samples in an .npz file have three."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "grey"
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(60):
            image = rng.integers(0, 256, (16, 24), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{number:02d}.png")
    data = FolderConfig(root=str(folder), channels=1, image_size=(16, 24), validation_share=0.4)
    write_prior(tmp_path / "run", classes=("a", "b"), tokenizer={"data": data, "channels": 1}, label_dropout=0.5)
    assert evaluate("--tokenizer", tmp_path / "run", "--out", tmp_path / "one").code == 0
    ended = evaluate("--prior", tmp_path / "run", "-n", 41, "--nearest", 5, "--out", tmp_path / "two")
    assert ended.code == 0, ended.err
    samples = next((tmp_path / "run/evaluation").glob("samples-*")) / "samples.npz"
    arguments = ("--samples", samples, "--prior", tmp_path / "run", "--nearest", 5)
    assert evaluate(*arguments, "--out", tmp_path / "three").code == 0
    two, three = result(tmp_path / "two")["of"], result(tmp_path / "three")["of"]
    assert three == {name: figure for name, figure in two.items() if name in three}
    coloured = np.zeros((9, 16, 24, 3), dtype=np.uint8)
    coloured[..., 0] = 200
    write_samples(tmp_path / "red.npz", coloured)
    assert evaluate("--samples", tmp_path / "red.npz", *arguments[2:], "--out", tmp_path / "red").code == 0
    assert "samples have colours" in " ".join(result(tmp_path / "red")["warnings"])
