"""Small numbers: with 0, 1 or 2 of anything a command works, or refuses before it has done anything."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sampling import complete, generate, reconstruct, summary
from stage1_tokenizer import analyze
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.order import split_evenly
from stage1_tokenizer.data.shapes import Shapes
from stage1_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator, check_depth
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.vqgan import VqganEncoder, VqganNetworkConfig
from stage2_prior import score
from tests.helpers import prior_training, training
from tests.helpers.artefacts import shapes, write_image_folder, write_tokenizer
from tests.helpers.commands import Ended, names_of, run, run_script
from tests.helpers.processes import RankFailedError, run_processes

BRIEF: dict[str, Any] = {"steps": 2, "save_every": 2, "validate_every": 2}


def train_tokenizer(out: Path, **options: object) -> Ended:
    """A tiny training of stage one, with these options over those of tests/helpers/training.py."""
    given = {**training.TINY, **BRIEF, **{key.replace("__", "."): value for key, value in options.items()}}
    words: list[object] = []
    for key, value in given.items():
        words += [f"--{'' if value else 'no-'}{key}"] if isinstance(value, bool) else [f"--{key}", value]
    return run(names_of("stage1_tokenizer/train.py")["main"], "--out", out, *words)


def checked(ended: Ended, works: bool, out: Path) -> None:
    """The command has worked; or it was refused with one message, and nothing was trained."""
    assert ended.code == (0 if works else 2), ended.err
    if not works:
        assert "training" not in ended.out
        assert not (out / "state").exists()


@pytest.mark.parametrize(
    ("options", "works"),
    [
        *[({f"data__{split}_images": n}, n > 0) for split in ("train", "validation") for n in (0, 1, 2)],
        *[({"batch_size": n}, n > 0) for n in (0, 1, 2)],
        ({"data__train_images": 1, "data__validation_images": 1, "batch_size": 1}, True),
        *[({"bottleneck__codebook_size": n}, n > 0) for n in (0, 1, 2)],
        *[({"pictures": n}, True) for n in (0, 1)],
        *[({"data__image_size": size}, size % 4 == 0) for size in (1, 2, 4, 8)],
        *[({"adversarial__discriminator__layers": n, "adversarial__start": 1}, n in (1, 2)) for n in (0, 1, 2, 3, 9)],
    ],
    ids=str,
)
def test_a_tokenizers_training(tmp_path: Path, options: dict[str, object], works: bool) -> None:
    """Images of each split, batches, codes, and a discriminator whose layers 16x16 pixels allow or not, though it would
    start later."""
    if options.get("data__image_size") in (4, 8):
        options = options | {"adversarial__weight": 0}
    checked(train_tokenizer(tmp_path / "run", **options), works, tmp_path / "run")


@pytest.mark.parametrize("side", [*range(1, 27), 47, 48, 49, 95, 96, 97])
def test_the_depth_that_images_allow(side: int) -> None:
    """check_depth knows how many layers can be computed, without the discriminator; and the depth that it names can."""
    for layers in range(1, 6):
        config = DiscriminatorConfig(layers=layers, channels=1)
        try:
            PatchDiscriminator(config, 1)(torch.zeros(2, 1, side, side + 5))
            computed = True
        except (RuntimeError, ValueError):
            computed = False
        if computed:
            check_depth(config, (side, side + 5))
            continue
        with pytest.raises(ConfigError, match=rf"layers {layers}: needs images of at least") as refused:
            check_depth(config, (side, side + 5))
        if "--adversarial" in str(refused.value):
            advised = int(str(refused.value).split("discriminator.layers ")[2].split(",")[0])
            PatchDiscriminator(DiscriminatorConfig(layers=advised, channels=1), 1)(torch.zeros(2, 1, side, side + 5))


@pytest.mark.parametrize(("channels", "size", "fits"), [(32, 4, False), (32, 8, True), (64, 4, True)])
def test_a_norm_needs_more_than_one_value(tmp_path: Path, channels: int, size: int, fits: bool) -> None:
    """On a latent grid of 1x1, a group of one channel has one value: whatever the image, the encoder gives the same."""
    config = VqganNetworkConfig(channels=channels, multipliers=(1, 1, 1))
    torch.manual_seed(0)
    z = VqganEncoder(3, config)(torch.randn(2, 3, size, size))
    assert torch.allclose(z[0], z[1], rtol=0.0, atol=1e-6) != fits
    if fits:
        config.check((size, size))
        return
    with pytest.raises(ConfigError, match=r"network.channels 32: .*1x1"):
        config.check((size, size))
    kept = {key: value for key, value in training.TINY.items() if not key.startswith("network.") and value is not True}
    kept |= {"network.kind": "vqgan", "network.channels": 32, "network.multipliers": "1,1,1"}
    kept |= {"data.image_size": 4, "adversarial.weight": 0}
    words = [word for key, value in kept.items() for word in (f"--{key}", value)]
    ended = run(names_of("stage1_tokenizer/train.py")["main"], "--out", tmp_path / "run", *words)
    checked(ended, False, tmp_path / "run")


GRIDS: dict[str, dict[str, Any]] = {
    "one code": {"bottleneck": VqConfig(codebook_size=1, kmeans_init=False)},
    "two codes": {"bottleneck": VqConfig(codebook_size=2, kmeans_init=False)},
    "depth one": {"bottleneck": RvqConfig(codebook_size=2, depth=1, kmeans_init=False)},
    "depth two, one code": {"bottleneck": RvqConfig(codebook_size=1, depth=2, kmeans_init=False)},
    "one position": {"data": shapes(image_size=(4, 4))},
    "two positions": {"data": shapes(image_size=(4, 8))},
    "one image": {"data": shapes(train_images=1, validation_images=1)},
    "two images": {"data": shapes(train_images=2, validation_images=2)},
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("gpt", name) for name in GRIDS), ("pixelcnn", "one code"), ("pixelcnn", "one position")]
)
def test_a_prior_and_all_that_is_done_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """Codes, positions and images: trained, sampled from, completed, scored, summarised, and looked at."""
    if kind == "pixelcnn":
        monkeypatch.delitem(prior_training.TINY, "prior.heads")
    write_tokenizer(tmp_path / "t", **GRIDS[name])
    ended = prior_training.train(tmp_path / "r", tmp_path / "t", prior__kind=kind, batch_size=1, **BRIEF)
    assert ended.code == 0, ended.err
    prior = ("--prior", tmp_path / "r")
    out = tmp_path / "out"
    position = "position" in name
    commands: list[tuple[Callable[[], None], tuple[object, ...]]] = [
        (generate.main, (*prior, "-n", 1, "--out", out)),
        (generate.main, (*prior, "-n", 2, "--candidates", 2, "--batch_size", 1)),
        (complete.main, (*prior, "-n", 1, "--variants", 1, "--box", "0,0,4,2" if position else "0,0,4,4")),
        (score.main, (*prior, "--by_class")),
        (summary.main, (*prior, "--samples", 0)),
        (reconstruct.main, ("--tokenizer", tmp_path / "t", out / "000000.png")),
    ]
    if name in ("one code", "one position", "one image"):
        commands.append((analyze.main, ("--tokenizer", tmp_path / "t")))
    for main, arguments in commands:
        ended = run(main, *arguments)
        if main is complete.main and position:  # a part of a code cannot be kept
            assert (ended.code, "covers no code whole" in ended.err) == (2, True)
        else:
            assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("main", "option", "values"),
    [
        (generate.main, "-n", (0,)),
        (generate.main, "--batch_size", (0, 1, 2)),
        (generate.main, "--candidates", (0, 1, 2)),
        (complete.main, "-n", (0, 1, 2)),
        (complete.main, "--variants", (0, 1, 2)),
        (score.main, "-n", (0, 1, 2)),
        (score.main, "--batch_size", (0, 1)),
    ],
)
def test_counts_of_a_command(
    tmp_path_factory: pytest.TempPathFactory, main: Any, option: str, values: tuple[int, ...]
) -> None:
    """Of 0 of something there is nothing to do, which is refused and named; of 1 and 2 there is."""
    folder = tmp_path_factory.mktemp("prior")
    write_tokenizer(folder / "t")
    assert prior_training.train(folder / "r", folder / "t", **BRIEF).code == 0
    few = ("-n", 2) if main is generate.main and option != "-n" else ()
    for value in values:
        ended = run(main, "--prior", folder / "r", *few, option, value)
        assert ended.code == (0 if value else 2), ended.err
        assert value or "greater than 0" in ended.err


@pytest.mark.parametrize("classes", [(), ("a",), ("a", "b")], ids=len)
@pytest.mark.parametrize("per_class", [1, 2])
def test_folders_of_few_images(tmp_path: Path, classes: tuple[str, ...], per_class: int) -> None:
    """None or one class is none; where a split has no image, that is said at the start."""
    write_image_folder(tmp_path / "images", classes or ("",), per_class=per_class)
    data = FolderConfig(root=str(tmp_path / "images"), image_size=(8, 12), validation_share=0.5)
    write_tokenizer(tmp_path / "t", data=data)
    ended = prior_training.train(tmp_path / "r", tmp_path / "t", **BRIEF)
    assert ended.code in (0, 2), ended.err
    if ended.code:
        assert re.search("images? (is|are) too few for a", ended.err)
        assert "training /" not in ended.out


@pytest.mark.parametrize(("train", "validation"), [(1, 1), (5, 1), (1, 2), (2, 3)])
def test_two_processes_share_what_there_is(tmp_path: Path, train: int, validation: int) -> None:
    """Where one of them has no image to validate on, or none to extract codes of, the other's figures are those of
    all: as on one process."""
    write_tokenizer(tmp_path / "t", data=shapes(train_images=train, validation_images=validation))
    arguments = prior_training.flags(tmp_path / "two", tmp_path / "t", prior__dropout=0.0, **BRIEF)
    run_processes(2, run_script, prior_training.SCRIPT, *arguments)
    assert prior_training.train(tmp_path / "one", tmp_path / "t", prior__dropout=0.0, **BRIEF).code == 0
    one, two = (training.log(tmp_path / name)[-1] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    run_processes(2, run_script, "stage2_prior/score.py", "--prior", tmp_path / "two")
    run_processes(2, run_script, "sampling/generate.py", "--prior", tmp_path / "two", "-n", 1)
    found = json.loads((tmp_path / "two/scores/shapes-validation/scores.json").read_text())
    assert found["images"] == validation
    assert found["nats_per_token"] == pytest.approx(two["validation/nats_per_token"], rel=1e-4)


def test_two_processes_and_one_validation_image_are_no_tokenizers_training(tmp_path: Path) -> None:
    """Stage one asks for an image for each process, and says so at the start."""
    words = [f"--{key}={value}" for key, value in training.TINY.items() if not isinstance(value, bool)]
    arguments = (*words, "--data.validation_images=1", "--out", str(tmp_path / "run"), "--no-report")
    with pytest.raises(RankFailedError, match="1 validation images are fewer than the 2 processes"):
        run_processes(2, run_script, "stage1_tokenizer/train.py", *arguments)
    assert not (tmp_path / "run/state").exists()


def decoded_on_a_rank(accelerator: Any, out: Path, tokenizer: Path) -> list[int]:
    """The training images that this rank decodes while a prior's training extracts their codes."""
    seen: list[int] = []
    draw = Shapes.__getitem__

    def counted(self: Shapes, index: int) -> Any:
        if len(self) == 300:
            seen.append(index)
        return draw(self, index)

    setattr(Shapes, "__getitem__", counted)  # noqa: B010
    run_script(accelerator, prior_training.SCRIPT, *prior_training.flags(out, tokenizer, views=3, **BRIEF))
    return seen


def test_each_process_decodes_its_own_share(tmp_path: Path) -> None:
    """Each image is decoded once, whatever the number of views, and by one process. (The first one is looked at by all,
    since it shows the size and the number of channels.)"""
    write_tokenizer(tmp_path / "t", data=shapes(train_images=300, flip=True))
    ranks = run_processes(2, decoded_on_a_rank, tmp_path / "r", tmp_path / "t")
    shares = [list(range(150)), list(range(150, 300))]
    assert [sorted(index for index in seen if index) for seen in ranks] == [
        [index for index in share if index] for share in shares
    ]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("at_most", [1, 2, 9])
def test_parts_are_never_empty(n: int, at_most: int) -> None:
    parts = split_evenly(np.arange(n), at_most)
    assert [index for part in parts for index in part] == list(range(n))
    assert all(1 <= len(part) <= at_most for part in parts)
