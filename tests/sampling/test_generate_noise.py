"""Images straight from a tokenizer with a normal latent: the noise, which image is which, and what is refused."""

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sampling import noise as noise_module
from sampling.generate import GenerateConfig, main
from sampling.noise import draw_normals
from sampling.option_facts import Idle, facts_of_kind
from sampling.sampler import SamplingConfig
from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.dictionary import DictionaryConfig
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.data.image_batches import to_uint8
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from tests.helpers.artefacts import (
    IMAGE_SIZE,
    edit_weights,
    files_of,
    pictures_of,
    pixels_of,
    write_prior,
    write_tokenizer,
)
from tests.helpers.commands import Ended, run, run_script
from tests.helpers.processes import run_processes


def write_kl(folder: Path, **options: Any) -> LoadedTokenizer:
    """A tokenizer with five channels of normal latent, and images in which a little noise shows."""
    write_tokenizer(folder, bottleneck=KlConfig(channels=5), **options)
    name = "bottleneck.project_out.weight"
    weight = LoadedTokenizer.load(folder).tokenizer.state_dict()[name]
    edit_weights(folder / TOKENIZER_FILE, **{name: 20 * weight})
    return LoadedTokenizer.load(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    write_kl(folder)
    return folder


def generate(tokenizer: Path, out: Path, *arguments: object) -> Ended:
    """The command; it must succeed."""
    ended = run(main, "--tokenizer", tokenizer, "--out", out, *arguments)
    assert ended.code == 0, ended.err
    return ended


def test_image_i_depends_on_seed_and_i_alone(tokenizer: Path, tmp_path: Path) -> None:
    """Trap 36: the same bytes at any batch size and any n; another seed gives other images."""
    generate(tokenizer, tmp_path / "19", "-n", 19, "--batch_size", 19)
    wanted = pictures_of(tmp_path / "19")
    assert list(wanted) == [f"{i:06d}.png" for i in range(19)]
    assert len(set(wanted.values())) == 19
    for size in (1, 3):
        generate(tokenizer, tmp_path / str(size), "-n", 7, "--batch_size", size)
        assert pictures_of(tmp_path / str(size)) == dict(list(wanted.items())[:7])
    generate(tokenizer, tmp_path / "other", "-n", 7, "--seed", 1)
    assert not set(pictures_of(tmp_path / "other").values()) & set(wanted.values())


def test_two_processes_make_the_same_images(tokenizer: Path, tmp_path: Path) -> None:
    """Trap 36: seven images on two processes are the seven of one, no more, and in the same grid."""
    generate(tokenizer, tmp_path / "one", "-n", 7)
    arguments = ("--tokenizer", str(tokenizer), "--out", str(tmp_path / "two"), "-n", 7, "--batch_size", 3)
    run_processes(2, run_script, "sampling/generate.py", *arguments)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name.endswith(".png"))


def test_an_image_is_its_noise_decoded(tokenizer: Path, tmp_path: Path) -> None:
    """Through the bottleneck's own projection and the decoder: by hand, for one image of many."""
    generate(tokenizer, tmp_path, "-n", 20, "--seed", 3)
    model = LoadedTokenizer.load(tokenizer).tokenizer
    for i in (0, 18):
        uniform = draw_uniforms(3, "noise", np.zeros(1, dtype=np.int64), np.array([i]), 5 * 2 * 3)[0]
        noise = torch.tensor([NormalDist().inv_cdf(u) for u in uniform]).float().reshape(1, 5, 2, 3)
        image = model.decode(model.bottleneck.sample(noise))
        wanted = to_uint8(image)[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(pixels_of(tmp_path / f"{i:06d}.png") - wanted).max() <= 1


def test_what_is_written(tokenizer: Path, tmp_path: Path) -> None:
    """As for a prior: just n images, the same ones in the .npz, and settings that say from what they are."""
    ended = generate(tokenizer, tmp_path, "-n", 5)
    others = {"grid.png", "samples.npz", "settings.json", ".lock", ".tessera"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{i:06d}.png" for i in range(5)} | others
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_0"].shape == (5, *IMAGE_SIZE, 3)
        for i, picture in enumerate(saved["arr_0"]):
            assert np.array_equal(picture, pixels_of(tmp_path / f"{i:06d}.png"))
        assert saved["labels"].tolist() == [0] * 5
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["n"], settings["seed"], settings["step"], settings["temperature"]) == (5, 0, 7, 1.0)
    assert settings["tokenizer"] == str(tokenizer / TOKENIZER_FILE)
    assert (settings["prior"], settings["guidance"], settings["classes"]) == (None, None, [])
    assert f"{tokenizer / TOKENIZER_FILE} (step 7)" in ended.out


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    """Beside one another in the run's own folder, whether the run or its file is named; grey images too."""
    write_kl(tmp_path, channels=1)
    for number, path in enumerate((tmp_path, tmp_path / TOKENIZER_FILE), start=1):
        assert run(main, "--tokenizer", path, "-n", 2).code == 0
        assert len(pictures_of(tmp_path / "generated" / f"{number:03d}")) == 2
    assert pixels_of(tmp_path / "generated" / "001" / "000000.png").shape == IMAGE_SIZE


def test_temperature_is_the_spread_of_the_noise(tokenizer: Path, tmp_path: Path) -> None:
    """At 0 there is one image, that of the latent 0; a small temperature gives images nearer to it than 1 does."""
    pictures = {}
    for temperature in (0, 0.1, 1):
        generate(tokenizer, tmp_path / str(temperature), "-n", 6, "--temperature", temperature)
        with np.load(tmp_path / str(temperature) / "samples.npz") as saved:
            pictures[temperature] = saved["arr_0"].astype(int)
    centre = pictures[0][0]
    assert (pictures[0] == centre).all()
    model = LoadedTokenizer.load(tokenizer).tokenizer
    zero = to_uint8(model.decode(model.bottleneck.sample(torch.zeros(1, 5, 2, 3))))[0].permute(1, 2, 0).numpy()
    assert np.abs(centre - zero.astype(int)).max() <= 1
    assert 0 < np.abs(pictures[0.1] - centre).mean() < 0.5 * np.abs(pictures[1] - centre).mean()


def test_the_noise_is_standard_normal() -> None:
    """Moments, tails and the distribution function itself; channels and images do not repeat one another."""
    noise = draw_normals(0, np.arange(2000), (3, 4, 5))
    assert noise.shape == (2000, 3, 4, 5)
    assert noise.dtype == torch.float32
    values = noise.flatten().double()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs((values**power).mean() - moment) < 5 * math.sqrt((values**power).var() / len(values))
    ordered = values.sort().values
    expected = torch.special.ndtr(ordered)
    assert (expected - torch.arange(len(ordered)) / len(ordered)).abs().max() < 1.95 / math.sqrt(len(ordered))
    correlation = torch.corrcoef(noise.flatten(1).double().T)  # of each place with each other one
    assert (correlation - torch.eye(60)).abs().max() < 0.12


def test_the_ends_of_the_unit_interval_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in 2^53 numbers the generator gives exactly 0, whose inverse is -inf: an image of NaN."""

    def extremes(*_: object) -> NDArray[np.float64]:
        return np.array([[0.0, 1 - 2.0**-53, 0.5, 2.0**-53]])

    monkeypatch.setattr(noise_module, "draw_uniforms", extremes)
    low, high, middle, next_to_low = draw_normals(0, np.array([0]), (1, 2, 2)).flatten().tolist()
    assert middle == 0
    assert -8.5 < low < next_to_low < -8
    assert 8 < high < 8.5


def test_noise_of_an_image_is_not_that_of_a_prior() -> None:
    """Its purpose is part of the key, so that the tokens of image i and its noise have nothing in common."""
    indices = np.arange(50)
    tokens = draw_uniforms(0, "sample", np.zeros_like(indices), indices, 6)
    noise = torch.special.ndtr(draw_normals(0, indices, (1, 2, 3)).double()).flatten(1).numpy()
    assert abs(np.corrcoef(tokens.flatten(), noise.flatten())[0, 1]) < 0.2


FOR_A_PRIOR: dict[str, tuple[object, str]] = {
    "class": ("cat", "no classes"),
    "guidance": (1, "with and without a class"),
    "guidance_schedule": ("cosine", "with and without a class"),
    "top_k": (5, "filters codes"),
    "top_p": (0.5, "filters codes"),
    "min_p": (0.1, "filters codes"),
    "temperature_end": (0.5, "no positions"),
    "size": ("16,24", "size of training"),
    "window": ("1,2", "size of training"),
    "stride": (2, "size of training"),
    "precision": ("bfloat16", "a prior's weights"),
    "candidates": (2, "which one is best"),
    "prior": ("runs", "exclude each other"),
}
"""Option: a value that is not its default, and what the refusal says."""


@pytest.mark.parametrize("option", FOR_A_PRIOR)
def test_options_of_a_prior_are_refused(tokenizer: Path, tmp_path: Path, option: str) -> None:
    """They would have no effect, and who sweeps over them would not know; the message says why."""
    value, reason = FOR_A_PRIOR[option]
    ended = run(main, "--tokenizer", tokenizer, "--out", tmp_path / "out", "-n", 1, f"--{option}", value)
    assert ended.code == 2
    assert f"--{option}" in ended.err
    assert "--tokenizer" in ended.err
    assert reason in ended.err
    assert not (tmp_path / "out").exists()


def test_the_refused_options_are_all_there_are() -> None:
    """The list above grows with the facts at the fields; a new option states that it is idle, or stands here."""
    idle = {name.removesuffix("_") for name in facts_of_kind(GenerateConfig, Idle)}
    assert idle == FOR_A_PRIOR.keys() - {"prior"}
    only_with_one_of_these = {"temperature_schedule", "guidance_interval", "best_by"}
    assert SamplingConfig.model_fields.keys() - idle == {"temperature", "batch_size", *only_with_one_of_these}


@pytest.mark.parametrize("bottleneck", [NoBottleneckConfig(), DictionaryConfig(atoms=8, top=2)], ids=lambda c: c.kind)
def test_an_autoencoder_has_nothing_to_draw_from(tmp_path: Path, bottleneck: BottleneckConfig) -> None:
    """Its latents have some distribution, but none that is known; noise decodes to noise, and looks like a failure."""
    write_tokenizer(tmp_path, bottleneck=bottleneck)
    ended = run(main, "--tokenizer", tmp_path, "-n", 1)
    assert ended.code == 2
    assert f"bottleneck.kind {bottleneck.kind!r} is an autoencoder" in ended.err
    assert "no distribution to draw from" in ended.err
    assert "--bottleneck.kind kl" in ended.err
    assert not (tmp_path / "generated").exists()


def test_codes_need_a_prior(tmp_path: Path) -> None:
    """The next command is in the message, ready to be run; also where the folder is that of a prior."""
    write_prior(tmp_path)
    ended = run(main, "--tokenizer", tmp_path, "-n", 1)
    assert ended.code == 2
    assert "'vq' has codes" in ended.err
    assert f"python stage2_prior/train.py --tokenizer {tmp_path}`" in ended.err
    assert "--prior" in ended.err


def test_damaged_weights_give_no_images(tmp_path: Path) -> None:
    """NaN would become some grey level; the command ends and names the file instead."""
    loaded = write_kl(tmp_path)
    edit_weights(tmp_path / TOKENIZER_FILE, **{"decoder.0.bias": torch.full((8,), float("nan"))})
    ended = run(main, "--tokenizer", tmp_path, "--out", tmp_path / "out", "-n", 2)
    assert ended.code == 3
    assert f"{loaded.path}: gives numbers that are not finite" in ended.err
    assert not list((tmp_path / "out").glob("*.png"))
