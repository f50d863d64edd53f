"""A sampler as a thing to call: which images it gives, which candidate it keeps, and what it refuses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sampling.generate import main
from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.bottlenecks.fsq import FsqConfig
from stage1_tokenizer.data.order import rank_range
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.networks.mlp import MlpNetworkConfig
from stage2_prior.likelihood import image_nats, nats_by_class
from stage2_prior.prior import PRIOR_FILE
from tests.helpers import artefacts
from tests.helpers.artefacts import IMAGE_SIZE, MAKERS, edit_weights, pixels_of, write_prior
from tests.helpers.commands import run
from tests.helpers.processes import run_processes

PLAIN: dict[str, Any] = {"guidance": 1.0, "top_p": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "guided": {"guidance": 3.0, "guidance_schedule": "cosine", "temperature_end": 0.7, "top_p": 1.0},
    "larger": {"size": (16, 20), "top_p": 1.0},
    "stride": {"size": (8, 24), "window": (2, 2), "stride": 1, "guidance": 1.0},
    "candidates": {"candidates": 3, "top_p": 1.0},
    "by class": {"candidates": 3, "best_by": "class", **PLAIN},
}
CAT_DOG = np.array([0, 1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a prior over cats and dogs, of each kind."""
    folder = tmp_path_factory.mktemp("priors")
    return {kind: write_prior(folder / kind, kind=kind).path.parent for kind in MAKERS}


def sampler_of(folder: Path, **options: Any) -> Sampler:
    return Sampler.load(folder, SamplingConfig(**options))


def codes_of(sampler: Sampler, n: int = 12, seed: int = 0, variant: int = 0) -> Tensor:
    """Codes (n, h, w, K) of cats and dogs in turn."""
    indices = np.arange(n)
    return sampler.codes(indices, sampler.labels(indices), seed, np.full_like(indices, variant))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_image_i_follows_from_seed_and_i(folders: dict[str, Path], kind: str, setting: str) -> None:
    """Trap 36: neither n nor the batch size changes an image, whatever the settings; another seed changes all."""
    options = SETTINGS[setting]
    wanted = sampler_of(folders[kind], **options).sample(7, seed=3)
    assert wanted.dtype == np.uint8
    assert wanted.shape == (7, *options.get("size", IMAGE_SIZE), 3)
    assert len({picture.tobytes() for picture in wanted}) > 3
    for batch_size in (1, 3):
        sampler = sampler_of(folders[kind], batch_size=batch_size, **options)
        assert np.array_equal(sampler.sample(7, seed=3), wanted)
        assert np.array_equal(sampler.sample(2, seed=3), wanted[:2])
    assert not np.array_equal(sampler.sample(7, seed=4), wanted)


def shares_on_a_rank(accelerator: Accelerator, folders: dict[str, Path]) -> list[NDArray[np.uint8]]:
    """This rank's share of five images, of each kind and setting."""
    mine = np.asarray(rank_range(5, accelerator.process_index, accelerator.num_processes))
    samplers = [sampler_of(folder, **options) for folder in folders.values() for options in SETTINGS.values()]
    return [sampler.images(mine, sampler.labels(mine), seed=3) for sampler in samplers]


@pytest.mark.slow
def test_two_processes_make_the_same_images(folders: dict[str, Path]) -> None:
    """Trap 36: five on two processes are the five of one, for each kind and setting."""
    ranks = run_processes(2, shares_on_a_rank, folders)
    places = np.argsort(np.concatenate([np.asarray(rank_range(5, rank, 2)) for rank in range(2)]))
    alone = [sampler_of(folder, **options) for folder in folders.values() for options in SETTINGS.values()]
    for sampler, first, second in zip(alone, *ranks, strict=True):
        assert np.array_equal(np.concatenate([first, second])[places], sampler.sample(5, seed=3))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_command_writes_the_same_images(folders: dict[str, Path], tmp_path: Path, setting: str) -> None:
    """Who goes from the command line to a notebook finds the images that the files show."""
    flags = [
        word
        for name, value in SETTINGS[setting].items()
        for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    ]
    ended = run(main, "--prior", folders["gpt"], "--out", tmp_path / "out", "-n", 4, "--seed", 5, *flags)
    assert ended.code == 0, ended.err
    pictures = sampler_of(folders["gpt"], **SETTINGS[setting]).sample(4, seed=5)
    for i, picture in enumerate(pictures):
        assert np.array_equal(pixels_of(tmp_path / "out" / f"{i:06d}.png"), picture)


@pytest.mark.parametrize("kind", MAKERS)
def test_classes_by_name_by_number_or_in_turn(folders: dict[str, Path], kind: str) -> None:
    """Trap 34: all ways to name a class give the same images, and the class makes a difference."""
    sampler = sampler_of(folders[kind], **PLAIN)
    cats, dogs = sampler.sample(4, classes="cat"), sampler.sample(4, classes="dog")
    assert not np.array_equal(cats, dogs)
    ways: dict[str, list[Any]] = {"cat": [0, "0", [0] * 4], "dog": [1, ["dog"] * 4, (1, "dog", "1", np.int64(1))]}
    for name, one in (("cat", cats), ("dog", dogs)):
        assert all(np.array_equal(sampler.sample(4, classes=same), one) for same in ways[name])
    for turn in (None, ["cat", "dog", "cat", "dog"], (0, "dog", "0", 1)):
        pictures = sampler.sample(4, classes=turn)
        assert all(np.array_equal(pictures[i], (cats, dogs)[i % 2][i]) for i in range(4))


def test_a_prior_without_classes(tmp_path: Path) -> None:
    """Nothing to ask for, nothing to guide by, and images all the same."""
    sampler = Sampler(write_prior(tmp_path, classes=()))
    assert sampler.guidance.scale == 1.0
    assert sampler.sample(3).shape == (3, *IMAGE_SIZE, 3)
    with pytest.raises(ConfigError, match="unconditional"):
        sampler.sample(3, classes=0)


@pytest.mark.parametrize(
    ("n", "classes", "message"),
    [
        (0, None, "n is 0.*at least one"),
        (-1, "cat", "n is -1"),
        (2, "bird", '"bird".*0 cat, 1 dog'),
        (2, 2, '"2".*0 cat, 1 dog'),
        (2, -1, '"-1".*0 cat, 1 dog'),
        (2, ["cat", "bird"], '"bird".*0 cat, 1 dog'),
        (2, ["cat"], "1 classes for 2 images"),
        (2, [0, 1, 0], "3 classes for 2 images"),
    ],
)
def test_what_cannot_be_sampled(
    folders: dict[str, Path], n: int, classes: str | int | Sequence[str | int] | None, message: str
) -> None:
    """Fault 43: a mistake in a notebook is one sentence as well, and a class beyond the last is no other class."""
    with pytest.raises(ConfigError, match=message):
        sampler_of(folders["gpt"]).sample(n, classes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (16, 25)}, "16x25 is not divisible.*16x24 and 16x28"),
        ({"size": (3, 12)}, "3x12 is not divisible.*4x12"),
        ({"size": (16, 24), "window": (2, 4)}, "window 2x4.*2x3"),
        ({"window": (3, 3)}, "window 3x3.*2x3"),
        ({"size": (16, 24), "stride": 3}, "stride 3.*1 to 2"),
        ({"size": (16, 24), "window": (2, 2), "stride": 2}, "stride 2.*1 to 1"),
        ({"size": (16, 24), "candidates": 2}, "candidates 2.*larger than trained.*candidates 1"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_prior(folders: dict[str, Path], options: dict[str, Any], message: str) -> None:
    """Each is refused before anything is computed, by the reason and what would do."""
    with pytest.raises(ConfigError, match=message):
        sampler_of(folders["gpt"], **options)


def test_settings_that_the_training_ruled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 32: no guidance without label dropout, no best class without classes, no other size from a perceptron."""
    undropped = write_prior(tmp_path / "undropped", label_dropout=0.0)
    assert Sampler(undropped).guidance.scale == 1.0
    with pytest.raises(ConfigError, match=r"guidance 3\.0.*label_dropout 0.*guidance 1"):
        Sampler(undropped, SamplingConfig(guidance=3))
    unconditional = write_prior(tmp_path / "unconditional", classes=())
    with pytest.raises(ConfigError, match=r"best_by class.*no classes.*best_by score"):
        Sampler(unconditional, SamplingConfig(candidates=2, best_by="class"))
    perceptron = MlpNetworkConfig(hidden=(8,), factor=4, latent_channels=6)
    monkeypatch.setattr(artefacts, "SonnetNetworkConfig", lambda **_: perceptron)
    mlp = write_prior(tmp_path / "mlp", tokenizer={"bottleneck": FsqConfig(levels=(4, 4))})
    for size in ((16, 24), (4, 4)):
        with pytest.raises(ConfigError, match=r"images of.*perceptron.*only 8x12"):
            Sampler(mlp, SamplingConfig(size=size))
    assert Sampler(mlp, SamplingConfig(size=IMAGE_SIZE)).sample(2).shape == (2, *IMAGE_SIZE, 3)


def test_damaged_weights_give_no_images(tmp_path: Path) -> None:
    """Fault 45: also from Python it is the file that is named, and no image comes out."""
    write_prior(tmp_path)
    edit_weights(tmp_path / PRIOR_FILE, **{"head.output.weight": torch.full((16, 24), float("nan"))})
    with pytest.raises(BadFileError, match=r"prior\.safetensors.*not finite"):
        sampler_of(tmp_path).sample(2)


def score(sampler: Sampler, codes: Tensor, labels: Tensor) -> Tensor:
    return -image_nats(sampler.prior.model, codes, labels)


def class_probability(sampler: Sampler, codes: Tensor, labels: Tensor) -> Tensor:
    """By Bayes' rule, with plain numbers."""
    chances = (-nats_by_class(sampler.prior.model, codes)).exp()
    return (chances / chances.sum(dim=1, keepdim=True))[torch.arange(len(codes)), labels]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("best_by", "by_hand"), [("score", score), ("class", class_probability)])
def test_the_best_candidate_is_kept(
    folders: dict[str, Path], kind: str, best_by: str, by_hand: Callable[[Sampler, Tensor, Tensor], Tensor]
) -> None:
    """Of four tries at each image the one that scores highest, told again by hand; the first try is the plain one."""
    plain = sampler_of(folders[kind], **PLAIN)
    labels = torch.from_numpy(plain.labels(np.arange(40)))
    tries = torch.stack([codes_of(plain, 40, variant=number) for number in range(4)])  # (4, 40, h, w, K)
    assert torch.equal(tries[0], codes_of(plain, 40))
    scores = torch.stack([by_hand(plain, codes, labels) for codes in tries])
    best = scores.argmax(dim=0)
    assert len(set(best.tolist())) == 4, "or the first might as well be taken"
    kept = codes_of(sampler_of(folders[kind], candidates=4, best_by=best_by, **PLAIN), 40)
    for i, number in enumerate(best):
        assert torch.equal(kept[i], tries[number, i])


def test_another_variant_has_other_candidates(folders: dict[str, Path]) -> None:
    """A second try at an image would be no second one if it were chosen among the candidates of the first."""
    plain, several = sampler_of(folders["gpt"], **PLAIN), sampler_of(folders["gpt"], candidates=3, **PLAIN)
    for variant in (0, 1):
        kept = codes_of(several, variant=variant)
        tries = torch.stack([codes_of(plain, variant=3 * variant + number) for number in range(3)])
        assert (tries == kept).flatten(2).all(dim=2).any(dim=0).all()


@pytest.mark.parametrize("kind", MAKERS)
def test_where_in_the_image_settings_apply(folders: dict[str, Path], kind: str) -> None:
    """An interval at the end, and a temperature that ends at 0, change the last code and none before; and how."""
    plain = sampler_of(folders[kind], **PLAIN)
    labels, before = torch.from_numpy(plain.labels(np.arange(60))), codes_of(plain, 60).flatten(1)
    late = sampler_of(
        folders[kind], guidance=9.0, guidance_schedule="interval", guidance_interval=(0.9, 1.0), top_p=1.0
    )
    after = codes_of(late, 60).flatten(1)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.equal(after[:, -1], before[:, -1])
    greedy = codes_of(sampler_of(folders[kind], temperature_end=0.0, **PLAIN), 60)
    assert torch.equal(greedy.flatten(1)[:, -1], plain.prior.model(greedy, labels)[:, -1].argmax(-1))
    assert not torch.equal(greedy.flatten(1)[:, 2], plain.prior.model(greedy, labels)[:, 2].argmax(-1))


def test_progress_adds_up(folders: dict[str, Path]) -> None:
    """A bar that stops at a third, or runs past its end, says nothing of how long it will take."""
    for options in SETTINGS.values():
        sampler, counts = sampler_of(folders["gpt"], **options), list[int]()
        sampler.images(CAT_DOG, CAT_DOG, 0, counts.append)
        assert sum(counts) == 2 * sampler.codes_per_image * sampler.config.candidates


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (4, 4)])
def test_images_smaller_than_trained(folders: dict[str, Path], size: tuple[int, int]) -> None:
    """A part of the grid is a grid too, which has a score: with candidates as without."""
    for options in ({}, {"candidates": 2}):
        for folder in folders.values():
            assert sampler_of(folder, size=size, **options).sample(3).shape == (3, *size, 3)
