"""Experiment trackers (`--log_with`): a fake one that is registered with Accelerate records all that it receives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker, register_tracker_class
from accelerate.utils import LoggerType
from PIL import Image

from stage1_tokenizer.engine.log_file import read_log
from tests.helpers.artefacts import write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.processes import run_processes
from tests.helpers.training import TINY, train

STAGE_ONE, STAGE_TWO = "stage1_tokenizer/train.py", "stage2_prior/train.py"


class Fake(GeneralTracker):  # type: ignore[misc]
    """A tracker that records its calls in a list that all its objects share, and in a file if it is given a folder."""

    name = "fake"
    requires_logging_directory = False
    main_process_only = False  # so only the caller keeps other processes out
    calls: ClassVar[list[tuple[Any, ...]]] = []
    failing: ClassVar[str] = ""

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self._record("start", project, options)

    @property
    def tracker(self) -> Any:
        """Return the thing itself, as Accelerate's base class demands."""
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record the config."""
        self._record("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record scalars."""
        self._record("log", step, values)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images."""
        self._record("images", step, values)

    def finish(self) -> None:
        """Record the end."""
        self._record("finish")

    def _record(self, *call: Any) -> None:
        if self.failing == call[0]:
            raise OSError("no route to host")
        self.calls.append(call)


@pytest.fixture
def calls() -> Iterator[list[tuple[Any, ...]]]:
    """Register the fake tracker as `fake`, and return its record."""
    with mock.patch.dict(tracking.LOGGER_TYPE_TO_CLASS):
        register_tracker_class(Fake)
        Fake.calls.clear()
        Fake.failing = ""
        yield Fake.calls
        Fake.failing = ""


def words(**options: Any) -> list[object]:
    """Return the command line of a tiny training."""
    options = {**TINY, "adversarial.weight": 0.0, **options}
    flat: list[object] = []
    for key, value in options.items():
        if value is True:
            flat.append(f"--{key}")
        else:
            flat += [f"--{key}", value]
    return flat


def train_one(out: Path, *more: object, **options: Any) -> Ended:
    """Train a tiny tokenizer by the command."""
    return run(names_of(STAGE_ONE)["main"], *words(out=out, **options), *more)


def entries(log: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the entries of a metrics.jsonl as (step, scalars)."""
    return [(entry.pop("step"), entry) for entry in read_log(log)]


def test_stage_one(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """The tracker has the config, the numbers of metrics.jsonl, and the images of the PNG files."""
    out = tmp_path / "run"
    ended = train_one(out, "--log_with", "fake", "--log_project", "mine")
    assert ended.code == 0, ended.err
    assert calls[0] == ("start", "mine", {})
    (config,) = [call[1] for call in calls if call[0] == "config"]
    assert config["network.channels"] == 8
    assert config["data.image_size"] == "[16, 16]"
    assert config["bottleneck.kind"] == "vq"
    assert all(value is None or isinstance(value, (str, int, float)) for value in config.values())
    assert [(call[1], call[2]) for call in calls if call[0] == "log"] == entries(out / "metrics.jsonl")
    (images,) = [call for call in calls if call[0] == "images"]
    with Image.open(out / "samples" / "reconstructions-00000004.png") as png:
        assert images[1] == 4
        assert np.array_equal(images[2]["reconstructions"][0], np.asarray(png))
    assert calls[-1] == ("finish",)
    assert [*out.glob("events.out*")]  # TensorBoard as well
    assert json.loads((out / "trackers.json").read_text()).keys() == {"fake"}


def test_stage_two(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    options = "--steps 2 --batch_size 4 --log_every 1 --validate_every 2 --samples 2 --prior.layers 1 --prior.width 16"
    out = tmp_path / "run"
    ended = run(
        names_of(STAGE_TWO)["main"],
        *("--tokenizer", tmp_path / "tokenizer", *options.split(), "--prior.heads", 2, "--out", out, "--no-report"),
        *("--log_with", "fake"),
    )
    assert ended.code == 0, ended.err
    assert [(call[1], call[2]) for call in calls if call[0] == "log"] == entries(out / "metrics.jsonl")
    assert [call[2].keys() for call in calls if call[0] == "images"] == [{"samples"}]
    assert next(call for call in calls if call[0] == "config")[1]["prior.kind"] == "gpt"


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_resumed_run_goes_on_in_the_tracker(calls: list[tuple[Any, ...]], tmp_path: Path, name: str) -> None:
    """The identifier of the first start is given again, the config is not sent again, and no step is missing."""
    available = [*tracking.get_available_trackers(), LoggerType(name)]
    with (
        mock.patch.dict(tracking.LOGGER_TYPE_TO_CLASS, {name: Fake}),
        mock.patch.object(tracking, "_available_trackers", available),
    ):
        for steps, more in ((2, ()), (4, ("--allow_changed",))):
            ended = train_one(tmp_path / "run", "--log_with", name, *more, steps=steps, pictures=0)
            assert ended.code == 0, ended.err
        first, second = (call[2] for call in calls if call[0] == "start")
        assert first == second
        assert first["resume"] == "allow"
        key = "name" if name == "trackio" else "id"
        assert json.loads((tmp_path / "run" / "trackers.json").read_text())[name][:8] in first[key]
        assert len([call for call in calls if call[0] == "config"]) == 1
        logged = [(call[1], call[2]) for call in calls if call[0] == "log"]
        assert logged == entries(tmp_path / "run" / "metrics.jsonl")
        train_one(tmp_path / "other", "--log_with", name, steps=1, pictures=0)
        other = [call[2] for call in calls if call[0] == "start"][-1]
        assert other[key] != first[key]


def test_wrong_names(tmp_path: Path) -> None:
    """One message, exit code 2, and nothing is written."""
    missing = LoggerType.COMETML
    with mock.patch.object(tracking, "_available_trackers", []):
        for name, message in (
            ("wandbb", "there is no such tracker; there are aim, clearml"),
            ("tensorboard", "each run writes TensorBoard's events anyway"),
            (missing.value, "its package is not installed; type: pip install comet-ml"),
            ("wandb", "its package is not installed; type: pip install wandb"),
        ):
            ended = train_one(tmp_path / "run", "--log_with", name)
            assert ended.code == 2, ended.err
            assert f"--log_with {name}: {message}" in ended.err
            assert "Traceback" not in ended.err
            assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    Fake.failing = "start"
    ended = train_one(tmp_path / "run", "--log_with", "fake")
    assert ended.code == 2
    assert "--log_with fake: cannot be started (no route to host)" in ended.err
    Fake.failing = ""  # the same command trains once it can
    assert train_one(tmp_path / "run", "--log_with", "fake").code == 0


def test_a_tracker_that_fails_later(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """The run ends as it would without the tracker, after one message."""
    Fake.failing = "log"
    ended = train_one(tmp_path / "run", "--log_with", "fake")
    assert ended.code == 0, ended.err
    assert (ended.out + ended.err).count("the tracker fake has failed (no route to host)") == 1
    assert train_one(tmp_path / "plain").code == 0
    files = [(tmp_path / name / "tokenizer.safetensors").read_bytes() for name in ("run", "plain")]
    assert files[0] == files[1]


def _train_with_record(accelerator: Any, out: Path) -> list[str]:
    """Train in one of several processes, and return the names of the calls that its tracker received."""
    register_tracker_class(Fake)
    train(accelerator, out, {"adversarial.weight": 0.0, "log_with": "fake"})
    return [call[0] for call in Fake.calls]


@pytest.mark.slow
def test_only_the_main_process_logs(tmp_path: Path) -> None:
    main, other = run_processes(2, _train_with_record, tmp_path / "run")
    assert main.count("start") == main.count("finish") == main.count("config") == 1
    assert main.count("log") == len(read_log(tmp_path / "run" / "metrics.jsonl"))
    assert other == []
