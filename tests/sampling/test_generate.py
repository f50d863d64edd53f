"""Sampling: which images there are, that image i is always the same one, and that nothing is written over."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sampling.generate import main
from sampling.saved_images import arrange_grid
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.prior import PRIOR_FILE, find_newest_run
from tests.helpers.artefacts import IMAGE_SIZE, MAKERS, edit_weights, files_of, pictures_of, pixels_of, write_prior
from tests.helpers.commands import Ended, run, run_script
from tests.helpers.processes import run_processes

PLAIN = ("--guidance", 1, "--top_p", 1)
"""From the prior as it is, where pictures are the least alike."""


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a prior over cats and dogs, of each kind."""
    folder = tmp_path_factory.mktemp("priors")
    return {kind: write_prior(folder / kind, kind=kind).path.parent for kind in MAKERS}


@pytest.fixture
def prior(priors: dict[str, Path]) -> Path:
    """That of one kind, where the kind does not matter."""
    return priors["gpt"]


def generate(prior: Path, out: Path, *arguments: object) -> Ended:
    """The command; it must succeed."""
    ended = run(main, "--prior", prior, "--out", out, *arguments)
    assert ended.code == 0, ended.err
    return ended


def labels_in(out: Path) -> list[int]:
    with np.load(out / "samples.npz") as saved:
        labels: list[int] = saved["labels"].tolist()
        return labels


@pytest.mark.parametrize("kind", MAKERS)
def test_image_i_depends_on_seed_and_i_alone(priors: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Trap 36: the same bytes at any batch size and any n, on one process or two; another seed gives other images."""
    prior = priors[kind]
    generate(prior, tmp_path / "7", "-n", 7, "--batch_size", 7, *PLAIN)
    wanted = pictures_of(tmp_path / "7")
    assert list(wanted) == [f"{i:06d}.png" for i in range(7)]
    assert len(set(wanted.values())) == 7
    for size in (1, 3):
        generate(prior, tmp_path / str(size), "-n", 7, "--batch_size", size, *PLAIN)
        assert pictures_of(tmp_path / str(size)) == wanted
    generate(prior, tmp_path / "fewer", "-n", 3, *PLAIN)
    assert pictures_of(tmp_path / "fewer") == dict(list(wanted.items())[:3])
    generate(prior, tmp_path / "other", "-n", 7, "--seed", 1, *PLAIN)
    assert not set(pictures_of(tmp_path / "other").values()) & set(wanted.values())


def test_two_processes_make_the_same_images(prior: Path, tmp_path: Path) -> None:
    """Trap 36 and fault 43: neither seven on two processes nor one on two gives an image too many or another one."""
    for n in (7, 1):
        generate(prior, tmp_path / f"one-{n}", "-n", n)
        out = tmp_path / f"two-{n}"
        arguments = ("--prior", str(prior), "--out", str(out), "-n", n, "--batch_size", 3)
        run_processes(2, run_script, "sampling/generate.py", *arguments)
        assert pictures_of(out) == pictures_of(tmp_path / f"one-{n}")
        assert pixels_of(out / "grid.png").tolist() == pixels_of(tmp_path / f"one-{n}" / "grid.png").tolist()
        assert len(labels_in(out)) == n


def test_what_is_written(prior: Path, tmp_path: Path) -> None:
    """Trap 36: just n images, the same ones in the .npz and in the grid, with their labels and settings."""
    ended = generate(prior, tmp_path, "-n", 5)
    others = {"grid.png", "samples.npz", "settings.json", ".lock", ".tessera"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{i:06d}.png" for i in range(5)} | others
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_0"].dtype == np.uint8
        assert saved["arr_0"].shape == (5, *IMAGE_SIZE, 3)
        for i, picture in enumerate(saved["arr_0"]):
            assert np.array_equal(picture, pixels_of(tmp_path / f"{i:06d}.png"))
        assert np.array_equal(arrange_grid(list(saved["arr_0"])), pixels_of(tmp_path / "grid.png"))
    assert labels_in(tmp_path) == [0, 1, 0, 1, 0]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["n"], settings["seed"], settings["step"]) == (5, 0, 9)
    assert settings["classes"] == ["cat", "dog"]
    assert str(tmp_path / "grid.png") in ended.out


def test_a_class_by_name_and_by_number(prior: Path, tmp_path: Path) -> None:
    """Trap 34: the name is looked up in the class map of the checkpoint; without one the classes come in turn."""
    generate(prior, tmp_path / "turn", "-n", 4)
    turn = list(pictures_of(tmp_path / "turn").values())
    for label, name in enumerate(("cat", "dog")):
        generate(prior, tmp_path / name, "-n", 4, "--class", name)
        generate(prior, tmp_path / str(label), "-n", 4, "--class", label)
        assert labels_in(tmp_path / name) == [label] * 4
        named = list(pictures_of(tmp_path / name).values())
        assert named == list(pictures_of(tmp_path / str(label)).values())
        assert [named[i] == turn[i] for i in range(4)] == [i % 2 == label for i in range(4)]


@pytest.mark.parametrize("setting", [("--temperature", 0), ("--top_k", 1), ("--top_p", 0)], ids=str)
def test_the_filters_reach_the_prior(prior: Path, tmp_path: Path, setting: tuple[str, int]) -> None:
    """Trap 29: a flag that is parsed and not passed on is a sweep over nothing; greedy images depend on the class."""
    generate(prior, tmp_path, "-n", 6, *setting)
    pictures = list(pictures_of(tmp_path).values())
    assert pictures == pictures[:2] * 3
    assert pictures[0] != pictures[1]


def test_guidance_reaches_the_prior(prior: Path, tmp_path: Path) -> None:
    """Trap 32: at scale 0 the class does not matter, at a large one it does more than at 1."""
    for scale in (0, 1, 5):
        for name in ("cat", "dog"):
            generate(prior, tmp_path / f"{name}-{scale}", "-n", 3, "--class", name, "--guidance", scale)
    pictures = {path.name: pictures_of(path) for path in tmp_path.iterdir()}
    assert pictures["cat-0"] == pictures["dog-0"]
    assert pictures["cat-1"] != pictures["dog-1"]
    assert pictures["cat-5"] != pictures["cat-1"]


FREE: dict[str, object] = {"guidance": 3, "top_p": 1}
WINDOWED: dict[str, object] = {**FREE, "size": "16,24"}
CHANGES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    # name: settings, and what changes the pictures when it is added to them
    "linear guidance": (FREE, {"guidance_schedule": "linear"}),
    "cosine guidance": ({**FREE, "guidance_schedule": "linear"}, {"guidance_schedule": "cosine"}),
    "guidance in an interval": (FREE, {"guidance_schedule": "interval", "guidance_interval": "0.5,1.0"}),
    "another interval": (
        {**FREE, "guidance_schedule": "interval", "guidance_interval": "0.5,1.0"},
        {"guidance_interval": "0.0,0.4"},
    ),
    "top p": ({**FREE, "top_p": 0.9}, {"top_p": 0.3}),
    "top k": (FREE, {"top_k": 2}),
    "min p": (FREE, {"min_p": 0.4}),
    "temperature": (FREE, {"temperature": 0.3}),
    "temperature end": (FREE, {"temperature_end": 0.1}),
    "temperature schedule": ({**FREE, "temperature_end": 0.0}, {"temperature_schedule": "cosine"}),
    "candidates": (FREE, {"candidates": 3}),
    "best by": ({**FREE, "candidates": 3}, {"best_by": "class"}),
    "window": (WINDOWED, {"window": "1,2"}),
    "stride": (WINDOWED, {"stride": 2}),
    "seed": (FREE, {"seed": 1}),
    "class": (FREE, {"class": "dog"}),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", CHANGES)
def test_each_option_changes_the_images(priors: dict[str, Path], tmp_path: Path, kind: str, name: str) -> None:
    """Trap 29: an option that is parsed and not passed on is a sweep over nothing; and settings.json says what was."""
    pictures, settings = [], {}
    for out, options in (("without", CHANGES[name][0]), ("with", CHANGES[name][0] | CHANGES[name][1])):
        words = [word for option, value in options.items() for word in (f"--{option}", value)]
        generate(priors[kind], tmp_path / out, "-n", 24, *words)
        pictures.append(pictures_of(tmp_path / out))
        settings[out] = json.loads((tmp_path / out / "settings.json").read_text())
        for option, value in options.items():
            saved = settings[out][option]
            assert value == (",".join(map(str, saved)) if isinstance(saved, list) else saved)
    assert pictures[0].keys() == pictures[1].keys()
    assert pictures[0] != pictures[1]
    assert settings["without"] != settings["with"]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("size", ["16,24", "12,8", "8,20", "4"])
def test_images_of_another_size(priors: dict[str, Path], tmp_path: Path, kind: str, size: str) -> None:
    """Trap 37: height and width are those asked for, in this order, in the files, the .npz and the grid."""
    height, width = (int(side) for side in (size if "," in size else f"{size},{size}").split(","))
    generate(priors[kind], tmp_path, "-n", 2, "--size", size)
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_0"].shape == (2, height, width, 3)
        for i, picture in enumerate(saved["arr_0"]):
            assert np.array_equal(picture, pixels_of(tmp_path / f"{i:06d}.png"))
    assert pixels_of(tmp_path / "grid.png").shape == (height + 4, 2 * width + 6, 3)


def test_guidance_is_2_only_where_the_prior_was_trained_for_it(prior: Path, tmp_path: Path) -> None:
    """Trap 32: the default asks no prior for images without a class that it never saw; settings say which."""
    generate(prior, tmp_path / "default", "-n", 4)
    generate(prior, tmp_path / "asked", "-n", 4, "--guidance", 2)
    assert pictures_of(tmp_path / "default") == pictures_of(tmp_path / "asked")
    write_prior(tmp_path / "undropped", label_dropout=0.0)
    write_prior(tmp_path / "unconditional", classes=())
    for name, guidance in (("default", 2.0), ("undropped", 1.0), ("unconditional", 1.0)):
        out = tmp_path / name if name == "default" else tmp_path / name / "out"
        if name != "default":
            generate(tmp_path / name, out, "-n", 2)
        assert json.loads((out / "settings.json").read_text())["guidance"] == guidance


def test_images_in_the_folder_stay_as_they_are(prior: Path, tmp_path: Path) -> None:
    """Hours of sampling must not be lost to a repeated command: exit code 2, and every file as it was."""
    generate(prior, tmp_path, "-n", 3)
    before = files_of(tmp_path)
    ended = run(main, "--prior", prior, "--out", tmp_path, "-n", 5, "--seed", 1)
    assert ended.code == 2
    assert "is not empty" in ended.err
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["samples.npz", "settings.json"])
def test_other_results_in_the_folder_stay_as_they_are(prior: Path, tmp_path: Path, name: str) -> None:
    """A folder whose images were moved away may still hold an .npz, which is not written over either."""
    (tmp_path / name).write_text("of an earlier run")
    run(main, "--prior", prior, "--out", tmp_path, "-n", 1)
    assert (tmp_path / name).read_bytes() == b"of an earlier run"


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    """The same command twice is a second set of images beside the first, in the prior's own folder."""
    write_prior(tmp_path / "run")
    for number in (1, 2, 3):
        ended = run(main, "--prior", tmp_path / "run" / PRIOR_FILE, "-n", 1, "--seed", number, *PLAIN)
        assert ended.code == 0, ended.err
        assert len(pictures_of(tmp_path / "run" / "generated" / f"{number:03d}")) == 1
    firsts = {(tmp_path / "run" / "generated" / f"00{n}" / "000000.png").read_bytes() for n in (1, 2, 3)}
    assert len(firsts) == 3


def test_without_an_argument_the_newest_run_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior that was written last, whatever its name, and the command says which; a run without one is none."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        write_prior(Path("runs/stage2") / name, seed=age)
        os.utime(Path("runs/stage2") / name / PRIOR_FILE, (1e9 - age, 1e9 - age))
    (Path("runs/stage2") / "begun").mkdir()
    assert find_newest_run(Path("runs/stage2")) == Path("runs/stage2/b")
    ended = run(main, "-n", 1)
    assert ended.code == 0
    assert f"runs/stage2/b/{PRIOR_FILE} (step 9)" in ended.out
    assert list(Path("runs/stage2/b/generated/001").glob("0*.png"))
    with pytest.raises(ConfigError, match=r"no run to sample from.*stage2_prior/train.py.*--prior"):
        find_newest_run(Path("runs/none"))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_damaged_weights_give_no_images(tmp_path: Path, kind: str, temperature: int) -> None:
    """Fault 45: NaN in the weights ends the command with an error that says so, not with one image n times."""
    write_prior(tmp_path / "run", kind=kind)
    edit_weights(tmp_path / "run" / PRIOR_FILE, **{"head.output.weight": torch.full((16, 24), float("nan"))})
    ended = run(main, "--prior", tmp_path / "run", "--out", tmp_path / "out", "-n", 2, "--temperature", temperature)
    assert ended.code == 3
    assert re.search(r"prior\.safetensors: .*not finite.*damaged", ended.err)
    assert not list((tmp_path / "out").glob("*.png"))
