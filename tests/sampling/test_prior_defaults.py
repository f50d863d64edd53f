"""A prior's own sampling defaults: used as if they were given, replaced by options, and tied to the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sampling.check import main as check
from sampling.complete import main as complete
from sampling.generate import main as generate
from sampling.playground.tasks import Limits, Playground
from sampling.prior_defaults import ENTRY, DrawConfig, read_defaults, write_defaults
from sampling.publishing.folder import sample_images, write_weights_files
from sampling.publishing.source import Source
from sampling.sampler import Sampler, SamplingConfig
from sampling.saved_images import read_png
from stage1_tokenizer.engine.checkpoint import read_weights, write_tensors
from stage1_tokenizer.engine.errors import BadFileError
from stage2_prior.best_weights import BestWeights
from stage2_prior.prior import PRIOR_FILE, SavedPrior, load_prior
from tests.helpers.artefacts import write_prior
from tests.helpers.commands import names_of, run

OWN = DrawConfig(temperature=0.7, top_k=5, top_p=1.0, guidance=3.0, guidance_schedule="cosine")
AS_OPTIONS = ("--temperature", 0.7, "--top_k", 5, "--top_p", 1, "--guidance", 3, "--guidance_schedule", "cosine")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The folder of a prior without defaults of its own."""
    write_prior(tmp_path / "plain", label_dropout=0.5)
    return tmp_path / "plain"


@pytest.fixture
def stating(plain: Path) -> Path:
    """The folder of the same prior, which states OWN."""
    folder = plain.with_name("stating")
    shutil.copytree(plain, folder)
    write_defaults(folder / PRIOR_FILE, OWN)
    return folder


def pngs(folder: Path) -> list[NDArray[np.uint8]]:
    return [read_png(path) for path in sorted(folder.glob("0*.png"))]


def settings(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    return {key: value for key, value in tree.items() if key != "prior"}


@pytest.mark.parametrize("command", [generate, complete])
def test_defaults_are_used_as_if_they_were_given(plain: Path, stating: Path, command: Any) -> None:
    """Bit-equal images and equal settings; the command says which options are the prior's."""
    ended = run(command, "--prior", stating, "-n", 4, "--out", stating / "a")
    assert ended.code == 0, ended.err
    assert "temperature 0.7, top_k 5, top_p 1, guidance 3, guidance_schedule cosine" in ended.err
    assert run(command, "--prior", plain, "-n", 4, "--out", plain / "a", *AS_OPTIONS).code == 0
    assert run(command, "--prior", plain, "-n", 4, "--out", plain / "b").code == 0
    ours, given, without = (pngs(folder) for folder in (stating / "a", plain / "a", plain / "b"))
    assert np.array_equal(ours, given)
    assert not np.array_equal(ours, without)
    assert settings(stating / "a") == settings(plain / "a")


def test_python_and_the_page_use_them_too(plain: Path, stating: Path) -> None:
    """A config that is given to a Sampler is complete, so the prior's defaults do not change it."""
    wanted = Sampler.load(plain, SamplingConfig(**OWN.model_dump())).sample(4)
    prior = load_prior(stating)
    assert np.array_equal(Sampler(prior).sample(4), wanted)
    assert np.array_equal(Sampler(prior, SamplingConfig()).sample(4), Sampler.load(plain).sample(4))

    playground = Playground(prior, "float32", Limits(16, 24))
    page = {name: playground.defaults[name] for name in ("temperature", "guidance", "top_k", "top_p", "min_p")}
    made = playground.sample({"n": 4, **page}, lambda share: None)
    assert np.array_equal(made.images, wanted)
    assert made.command.endswith(f"-n 4 --prior {stating}")
    changed = playground.sample({"n": 4, **page, "top_k": 0, "guidance": 1.0}, lambda share: None)
    assert changed.command.endswith(f"{stating} --top_k null --guidance 1 --guidance_schedule constant")
    ended = run(generate, *changed.command.split()[2:], "--out", stating / "page")
    assert ended.code == 0, ended.err
    assert np.array_equal(pngs(stating / "page"), changed.images)


@pytest.mark.parametrize(
    ("given", "as_options"),
    [
        (["--temperature", 1], ["--top_k", 5, "--top_p", 1, "--guidance", 3, "--guidance_schedule", "cosine"]),
        (["--top_k", 0], ["--temperature", 0.7, "--top_p", 1, "--guidance", 3, "--guidance_schedule", "cosine"]),
        # The schedule belongs to the guidance that is replaced, and would be refused with guidance 1.
        (["--guidance", 1], ["--temperature", 0.7, "--top_k", 5, "--top_p", 1]),
        (["--guidance_schedule", "linear"], ["--temperature", 0.7, "--top_k", 5, "--top_p", 1]),
    ],
)
def test_options_replace_them(plain: Path, stating: Path, given: list[object], as_options: list[object]) -> None:
    """An option wins alone, with those that belong to it; a YAML file is the user's word as well."""
    assert run(generate, "--prior", plain, "-n", 3, "--out", plain / "a", *given, *as_options).code == 0
    ended = run(generate, "--prior", stating, "-n", 3, "--out", stating / "a", *given)
    assert ended.code == 0, ended.err
    (stating / "given.yaml").write_text(f"{str(given[0])[2:]}: {given[1]}\n")
    file = ("--config", stating / "given.yaml")
    assert run(generate, "--prior", stating, "-n", 3, "--out", stating / "b", *file).code == 0
    for folder in (stating / "a", stating / "b"):
        assert np.array_equal(pngs(folder), pngs(plain / "a"))
        assert settings(folder) == settings(plain / "a")


def test_only_the_header_changes(plain: Path, stating: Path) -> None:
    """All other entries, the tensors' bytes and every fingerprint stay; a second entry replaces the first."""
    before, after = (SavedPrior.read(folder / PRIOR_FILE) for folder in (plain, stating))
    assert after.raw == before.raw | {ENTRY: OWN.model_dump_json()}
    assert after.fingerprint == before.fingerprint
    assert Sampler.load(stating).settings()["weights"] == Sampler.load(plain).settings()["weights"]
    files = [(folder / PRIOR_FILE).read_bytes() for folder in (plain, stating)]
    starts = [8 + int.from_bytes(data[:8], "little") for data in files]
    assert files[0][starts[0] :] == files[1][starts[1] :]
    write_defaults(stating / PRIOR_FILE, DrawConfig(min_p=0.1))
    assert read_defaults(stating / PRIOR_FILE) == DrawConfig(min_p=0.1)
    assert read_defaults(plain / PRIOR_FILE) == DrawConfig()


BAD = {
    "not json": ("{", "DrawConfig"),
    "a list": ("[0.9]", "DrawConfig"),
    "an unknown option": ('{"heat": 1}', "heat"),
    "an option of another kind": ('{"batch_size": 10000000}', "batch_size"),
    "a wrong type": ('{"top_p": "much"}', "top_p"),
    "out of range": ('{"temperature": -1}', "temperature"),
    "not a number": ('{"temperature": NaN}', "DrawConfig"),
    "an interval without its schedule": ('{"guidance_interval": [0.1, 0.9]}', "belong together"),
    "a schedule without an effect": ('{"guidance": 1, "guidance_schedule": "linear"}', "no effect"),
}


@pytest.mark.parametrize("entry", BAD)
def test_a_bad_entry_is_refused(plain: Path, entry: str) -> None:
    """Each command that samples ends with exit code 3 and a message that names the file; nothing is written."""
    file, (text, named) = plain / PRIOR_FILE, BAD[entry]
    tensors, header = read_weights(file, "prior")
    write_tensors(file, tensors, {**header, ENTRY: text})
    names = {path.name for path in plain.iterdir()}
    commands = [(generate, ("-n", 1)), (complete, ("-n", 1)), (names_of("sampling/evaluate.py")["main"], ("-n", 2))]
    for command, arguments in commands:
        ended = run(command, "--prior", plain, *arguments)
        assert ended.code == 3, ended.err
        assert str(file) in ended.err
        assert named in ended.err
        assert "Traceback" not in ended.err
    with pytest.raises(BadFileError):
        Sampler.load(plain)
    assert "1 bad" in run(check, plain).out
    assert {path.name for path in plain.iterdir()} == names


def test_an_entry_must_fit_its_prior(tmp_path: Path) -> None:
    """Guidance for a prior without classes is a mistake of the file, not of the user."""
    write_prior(tmp_path, classes=())
    write_defaults(tmp_path / PRIOR_FILE, DrawConfig(guidance=2.0))
    ended = run(generate, "--prior", tmp_path, "-n", 1)
    assert ended.code == 3
    assert "do not fit this prior: guidance 2.0" in ended.err
    write_defaults(tmp_path / PRIOR_FILE, DrawConfig(guidance=1.0, temperature=0.5))
    assert run(generate, "--prior", tmp_path, "-n", 1).code == 0


def test_a_prior_is_found_by_every_form_of_its_path(stating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder may be written as `~`, and the newest run needs no name; its defaults are used in both cases."""
    monkeypatch.setenv("HOME", str(stating.parent))
    monkeypatch.chdir(stating.parent)
    runs = stating.parent / "runs/stage2"
    runs.mkdir(parents=True)
    (runs / "newest").symlink_to(stating)
    for number, words in enumerate((["--prior", "~/stating"], [])):
        ended = run(generate, *words, "-n", 1, "--out", stating / f"{number}")
        assert ended.code == 0, ended.err
        assert settings(stating / f"{number}")["temperature"] == 0.7


def test_mistakes_in_options_come_before_a_missing_prior(tmp_path: Path) -> None:
    """Without a prior there are no defaults, and the messages are those of before."""
    assert "temperature" in run(generate, "--prior", tmp_path / "none", "--temperature", -1).err
    (tmp_path / "wrong.yaml").write_text("sampling: 3\nprior: [1]\n")
    assert run(names_of("sampling/evaluate.py")["main"], "--config", tmp_path / "wrong.yaml").code == 2
    ended = run(generate, "--prior", tmp_path / "none")
    assert ended.code == 2
    assert "--prior" in ended.err


def test_publishing_keeps_them(stating: Path, tmp_path: Path) -> None:
    """The published file states them, and the card's samples are made with them."""
    source, folder = Source.open(str(stating)), tmp_path / "published"
    folder.mkdir()
    write_weights_files(source, folder, "float32")
    assert read_defaults(folder / PRIOR_FILE) == OWN
    images, caption = sample_images(source, 3)
    assert np.array_equal(images, Sampler.load(folder).sample(3))
    assert "temperature 0.7, top_k 5, top_p 1, guidance 3, guidance_schedule cosine" in caption
    assert "sampling defaults temperature 0.7" in " ".join(run(check, stating).out.split())


def test_training_keeps_them_as_long_as_the_weights(stating: Path) -> None:
    """A resume that writes the same weights leaves the file as it is; better weights replace it with its entry."""
    file = stating / PRIOR_FILE
    saved, before = SavedPrior.read(file), file.read_bytes()
    header = {key: saved.raw[key] for key in ("config", "data")}
    best = BestWeights(saved.build(), is_main=True)
    best.write(file, header, saved.step)
    assert file.read_bytes() == before
    file.write_bytes(before[:-4])  # damaged: written anew
    best.write(file, header, saved.step)
    assert read_defaults(file) == DrawConfig()
    file.write_bytes(before)
    best.write(file, header, saved.step + 1)
    assert read_defaults(file) == DrawConfig()
    assert SavedPrior.read(file).step == saved.step + 1
