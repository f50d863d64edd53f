"""sweep.py: its metrics are those of evaluate.py, nothing is measured twice, and --save writes the best setting."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from numpy.typing import NDArray

from sampling.evaluation.results import Metric
from sampling.evaluation.sweep_sheet import curves
from sampling.evaluation.sweep_table import MeasuredSetting, Sweep
from sampling.prior_defaults import DrawConfig, read_defaults, write_defaults
from sampling.sampler import Sampler
from stage2_prior.prior import PRIOR_FILE, SavedPrior
from tests.helpers.artefacts import pixels_of, write_prior
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.processes import run_processes
from tests.sampling.evaluation.test_evaluate import DATA, WEIGHTS, TinyExtractor, evaluate, result

MADE: dict[str, Any] = {"classes": ("disk", "star"), "tokenizer": {"data": DATA}, "label_dropout": 0.5}
FAST = ("--classifier_steps", 0, "-n", 42)


def sweep_names() -> dict[str, Any]:
    names = names_of("sampling/sweep.py")
    names["build_extractor"] = lambda config, device: TinyExtractor().to(device)
    return names


def sweep(*arguments: object) -> Ended:
    """Run the command with the tiny extractor."""
    return run(sweep_names()["main"], *WEIGHTS, *arguments)


def table(folder: Path) -> list[dict[str, Any]]:
    """Return the settings of the only sweep of a run, the best first."""
    (file,) = folder.glob("sweeps/*/sweep.json")
    settings: list[dict[str, Any]] = json.loads(file.read_text())["settings"]
    return settings


@pytest.fixture
def prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a prior's folder into a new current folder."""
    monkeypatch.chdir(tmp_path)
    write_prior(tmp_path / "run", **MADE)
    return tmp_path / "run"


def test_each_setting_has_the_metrics_of_evaluate(prior: Path) -> None:
    """All combinations are in the table, by distance; evaluate.py finds the samples of one, and the same metrics."""
    lists = ("--temperature", "0.5,1", "--guidance", "1,2", "--guidance_schedule", "constant,linear")
    ended = sweep("--prior", prior, "-n", 42, "--classifier_steps", 5, *lists)
    assert ended.code == 0, ended.err
    rows = table(prior)
    options = [tuple(row["sampling"][key] for key in ("temperature", "guidance", "guidance_schedule")) for row in rows]
    kinds = [(1.0, "constant"), (2.0, "constant"), (2.0, "linear")]  # with guidance 1 all schedules are the same
    assert sorted(options) == [(temperature, *kind) for temperature in (0.5, 1.0) for kind in kinds]
    distances = [row["figures"][0]["value"] for row in rows]
    assert distances == sorted(distances)
    assert ended.out.count("sampling 42 images") == len(rows)
    assert all(row["figures"][-1]["name"] == "agreement" for row in rows)
    assert pixels_of(next(prior.glob("sweeps/*/sweep.png"))).shape[1] == 1200

    given = [word for key, value in rows[0]["sampling"].items() for word in (f"--sampling.{key}", value)]
    given = [*("null" if word is None else word for word in given)]
    again = evaluate(
        "--prior", prior, "-n", 42, *given, "--reference", "validation", "--nearest", 0, "--out", prior / "out"
    )
    assert again.code == 0, again.err
    assert f"samples: {prior}/evaluation/{rows[0]['samples']}" in again.out  # not sampled again
    found = result(prior / "out")["of"]
    for figure in rows[0]["figures"][:-1]:
        assert figure == found[figure["name"]]


def test_finished_settings_are_not_measured_again(prior: Path) -> None:
    """A second sweep adds a value to the same table: one setting is sampled, and only its images are looked at."""
    assert sweep("--prior", prior, *FAST, "--temperature", "0.5,1").code == 0
    before = {json.dumps(row["sampling"]): row for row in table(prior)}
    TinyExtractor.seen = 0
    ended = sweep("--prior", prior, *FAST, "--temperature", "1,0.5,2")
    assert ended.code == 0, ended.err
    assert ended.out.count("sampling 42 images") == 1
    assert TinyExtractor.seen == 42
    after = {json.dumps(row["sampling"]): row for row in table(prior)}
    assert len(after) == 3
    assert before.items() <= after.items()
    assert sweep("--prior", prior, *FAST, "--seed", 1).code == 0  # another protocol: another table
    assert len(list(prior.glob("sweeps/*"))) == 2


def test_an_interrupted_sweep_goes_on_exactly(prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second setting, it goes on with the images that this setting lacks."""
    arguments = ("--prior", prior, *FAST, "--batch_size", 20, "--temperature", "0.5,1")
    assert sweep(*arguments).code == 0
    wanted = table(prior)
    for path in sorted(prior.rglob("*"), reverse=True):
        if path.name not in (PRIOR_FILE, "tokenizer.safetensors"):
            path.rmdir() if path.is_dir() else path.unlink()

    made: list[int] = []
    images, stop_at = Sampler.images, 4  # after three batches of the first setting and one of the second

    def count(self: Sampler, indices: NDArray[np.int64], *rest: Any) -> NDArray[np.uint8]:
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(len(indices))
        return images(self, indices, *rest)

    monkeypatch.setattr(Sampler, "images", count)
    assert sweep(*arguments).code == 130
    assert len(table(prior)) == 1
    stop_at = 99
    ended = sweep(*arguments)
    assert ended.code == 0, ended.err
    assert sum(made) == 2 * 42
    assert table(prior) == wanted


def test_a_damaged_table_is_measured_again(prior: Path) -> None:
    """The samples are kept, so only the measuring is done again."""
    assert sweep("--prior", prior, *FAST).code == 0
    (file,) = prior.glob("sweeps/*/sweep.json")
    wanted = table(prior)
    no_metrics = json.dumps({"settings": [{"sampling": {}, "samples": "x", "figures": []}]})
    for damage in (
        no_metrics,
        "{",
        "[]",
        '{"settings": [{"sampling": {"heat": 1}}]}',
        '{"settings": [{"sampling": {}}]}',
    ):
        file.write_text(damage)
        ended = sweep("--prior", prior, *FAST)
        assert ended.code == 0, ended.err
        assert "its settings are measured again" in ended.out
        assert "sampling 42 images" not in ended.out
        assert table(prior) == wanted


def test_save_makes_the_best_the_default(prior: Path) -> None:
    """Only the header of the prior's file changes, and the options that were not swept are stated too."""
    before = SavedPrior.read(prior / PRIOR_FILE)
    arguments = ("--prior", prior, *FAST, "--temperature", "0.5,2", "--top_k", 7)
    assert sweep(*arguments).code == 0
    assert SavedPrior.read(prior / PRIOR_FILE).raw == before.raw
    ended = sweep(*arguments, "--save")
    assert ended.code == 0, ended.err
    after = SavedPrior.read(prior / PRIOR_FILE)
    assert {key: after.raw[key] for key in before.raw} == before.raw
    assert after.fingerprint == before.fingerprint
    assert read_defaults(prior / PRIOR_FILE).tree() == table(prior)[0]["sampling"]
    assert read_defaults(prior / PRIOR_FILE).top_k == 7
    # A sweep goes on from the defaults: without an option it measures them, and they are in the table already.
    ended = sweep("--prior", prior, *FAST)
    assert ended.code == 0, ended.err
    assert "1 settings" in ended.out
    assert "sampling 42 images" not in ended.out
    assert len(table(prior)) == 2


def test_nothing_is_saved_into_other_weights(prior: Path) -> None:
    """Who replaces the file during a sweep gets a message, and the new file stays as it is."""
    names = sweep_names()
    other = write_prior(prior.with_name("other"), seed=1, **MADE)
    draw = names["draw_sweep"]
    names["draw_sweep"] = lambda *given: (prior / PRIOR_FILE).write_bytes(other.path.read_bytes()) and draw(*given)
    ended = run(names["main"], *WEIGHTS, "--prior", prior, *FAST, "--save")
    assert ended.code == 3
    assert "has other weights than at the start of the sweep" in ended.err
    assert (prior / PRIOR_FILE).read_bytes() == other.path.read_bytes()


REFUSED = {
    "a value": (("--top_p", "0.9,1.5"), 2, "top_p"),
    "a word": (("--temperature", "1,warm"), 2, "temperature"),
    "an option": (("--temprature", 1), 2, "did you mean --temperature"),
    "an empty list": (("--config", "empty.yaml"), 2, "a list of values is empty"),
    "a schedule without its interval": (("--guidance_schedule", "linear,interval"), 2, "belong together"),
    "an interval without its schedule": (("--guidance_interval", "0.2,0.8"), 2, "no setting has guidance_schedule"),
    "a schedule without effect": (("--prior", "unguided", "--guidance_schedule", "linear"), 2, "no effect"),
    "guidance that was not trained": (("--prior", "unguided", "--guidance", "1,2"), 2, "use guidance 1"),
    "one image": (("-n", 1), 2, "n: "),
    "a reference": (("--reference", "nowhere"), 2, "there is no such file or folder"),
    "a root": (("--root", "nowhere"), 2, "--root"),
    "no extractor": (("--extractor.kind", "none"), 2, "extractor"),
    "a precision": (("--precision", "int4"), 2, "precision"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused_before_sampling(prior: Path, mistake: str) -> None:
    write_prior(Path("unguided"), **MADE | {"label_dropout": 0.0})
    Path("empty.yaml").write_text("top_k: []\n")
    arguments, code, named = REFUSED[mistake]
    ended = sweep("--prior", prior, *FAST, *arguments)
    assert ended.code == code, ended.err
    assert named in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert not list(Path().glob("*/evaluation")) + list(Path().glob("*/sweeps"))


def test_save_needs_a_folder_of_its_own(prior: Path) -> None:
    """A file in the cache of the Hub stays as it was published."""
    published = Path("models--own--name/snapshots/0123456789abcdef0123456789abcdef01234567")
    published.mkdir(parents=True)
    for path in prior.iterdir():
        (published / path.name).write_bytes(path.read_bytes())
    ended = sweep("--prior", published, *FAST, "--save")
    assert ended.code == 2
    assert "--save: " in ended.err
    assert "stays as it is" in ended.err


def test_every_option_of_the_draw_can_be_swept(prior: Path) -> None:
    """The lists are those of the options themselves, with their checks and their help."""
    names = sweep_names()
    config = names["parse_command_line"](names["SweepConfig"], ["--top_k", "0,9", "--min_p", "0,0.1"])
    assert {draw.top_k for draw in config.combinations()} == {None, 9}
    assert len(config.combinations()) == 4
    assert set(DrawConfig.model_fields) <= set(names["SweepConfig"].model_fields)
    interval = ["--guidance", "1,3", "--guidance_schedule", "constant,interval", "--guidance_interval", "0.2,0.8"]
    found = names["parse_command_line"](names["SweepConfig"], interval).combinations()
    assert {(draw.guidance, draw.guidance_interval) for draw in found} == {(1.0, None), (3.0, None), (3.0, (0.2, 0.8))}


def test_curves_are_of_the_option_with_most_values(tmp_path: Path) -> None:
    """The best curve is the first; a setting alone has no curve."""
    draws = [DrawConfig(temperature=t, guidance=g) for t in (0.5, 0.8, 1.0) for g in (1.0, 2.0)]
    draws.append(DrawConfig(temperature=0.5, guidance=1.0, top_p=1.0))
    values = [abs(draw.temperature - 0.8) + (draw.guidance or 0.0) for draw in draws]
    metrics = [Metric("fd", "FD", value) for value in values]
    measured = {draw: MeasuredSetting("x", [metric]) for draw, metric in zip(draws, metrics, strict=True)}
    made = Sweep(tmp_path, {"subject": "S", "samples": "2"}, [], measured)
    option, found = curves(made)
    assert option == "temperature"
    assert list(found) == ["top_p 0.9, guidance 1", "top_p 0.9, guidance 2"]
    assert [draw.temperature for draw in found["top_p 0.9, guidance 1"]] == [0.8, 1.0, 0.5]
    assert made.ranked[0] == DrawConfig(temperature=0.8, guidance=1.0)
    assert "chance" in made.conclusion()
    assert curves(Sweep(tmp_path, {}, [], dict([*measured.items()][:1]))) == ("", {})


def on_ranks(_: Accelerator, arguments: list[str]) -> None:
    sys.argv = ["sweep.py", *WEIGHTS, *arguments]
    sweep_names()["main"]()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(prior: Path) -> None:
    """The processes share sampling and measuring; the table, the best setting and the prior's defaults are the same."""
    write_prior(prior.with_name("two"), **MADE)
    arguments = ["-n", "42", "--classifier_steps", "5", "--temperature", "0.5,2", "--save"]
    assert sweep("--prior", prior, *arguments).code == 0
    run_processes(2, on_ranks, ["--prior", str(prior.with_name("two")), "--references", "anew", *arguments])
    one, two = table(prior), table(prior.with_name("two"))
    assert [row["sampling"] for row in one] == [row["sampling"] for row in two]
    for ours, theirs in zip(one, two, strict=True):
        for figure, other in zip(ours["figures"], theirs["figures"], strict=True):
            assert figure["value"] == pytest.approx(other["value"], rel=1e-5, abs=1e-9), figure["name"]
    assert read_defaults(prior / PRIOR_FILE) == read_defaults(prior.with_name("two") / PRIOR_FILE)


def test_defaults_of_a_prior_are_used_by_evaluate(prior: Path) -> None:
    """As if they were given with --sampling; an option of the user wins."""
    own = DrawConfig(temperature=0.5, guidance=3.0)
    words = ("-n", 6, "--nearest", 0)
    given = ("--sampling.temperature", 0.5, "--sampling.guidance", 3)
    assert evaluate("--prior", prior, *words, *given, "--out", prior / "given").code == 0
    assert evaluate("--prior", prior, *words, *given[:2], "--out", prior / "partly").code == 0
    write_defaults(prior / PRIOR_FILE, own)
    ended = evaluate("--prior", prior, *words, "--out", prior / "own")
    assert ended.code == 0, ended.err
    assert "temperature 0.5, guidance 3" in ended.err
    assert evaluate("--prior", prior, *words, "--sampling.guidance", "null", "--out", prior / "won").code == 0
    trees = {name: result(prior / name) for name in ("given", "own", "partly", "won")}
    for one, other in (("given", "own"), ("partly", "won")):
        assert trees[one]["protocol"]["sampling"] == trees[other]["protocol"]["sampling"]
        assert trees[one]["of"]["fd"] == trees[other]["of"]["fd"]
