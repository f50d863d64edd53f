"""The soak's harness: the conditions for the end of a campaign."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stage1_tokenizer.engine.errors import InterruptionError
from tests.helpers import soak

STOPPED = InterruptionError.exit_code
SAMPLER = next(job for job in soak.JOBS if job.result is soak.sampling_files)


def write(out: Path, finished: bool) -> None:
    """Write a sampler's folder: two images and the settings; finished: the grid too."""
    out.mkdir(parents=True, exist_ok=True)
    names = ["000000.png", "000001.png", *(["grid.png"] if finished else [])]
    for name in names:
        (out / name).write_bytes(name.encode())
    (out / "settings.json").write_text(json.dumps({"finished": finished}))


def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[tuple[list[int], bool]]) -> Counter[str]:
    """Run a campaign of two sampling processes, whose lives have these exit codes and a finished folder or not."""
    write(tmp_path / "given" / f"{SAMPLER.name}-2", finished=True)
    left = iter(lives)

    def run_processes(n: int, life: Any, job: soak.Job, out: Path, *_: Any, **__: Any) -> list[tuple[int, str]]:
        codes, finished = next(left)
        write(out, finished)
        return [(code, "") for code in codes]

    class Terminating(random.Random):
        def choices(self, *_: Any, **__: Any) -> list[Any]:
            return ["SIGTERM"]

        def random(self) -> float:  # no damage
            return 0.5

        def uniform(self, a: float, b: float) -> float:
            return a

    monkeypatch.setattr(soak, "run_processes", run_processes)
    counts = Counter[str]()
    soak.campaign(SAMPLER, 2, tmp_path / "ours", tmp_path / "given", Terminating(0), counts)
    assert next(left, None) is None, "the campaign ended before its last life"
    return counts


def test_a_sampler_ends_when_its_folder_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 77: the main process was stopped before the grid, and the other one had finished its share."""
    counts = campaign(tmp_path, monkeypatch, [([STOPPED, 0], False), ([0, 0], True)])
    assert counts["stops by SIGTERM"] == 1


@pytest.mark.parametrize("codes", [[0, STOPPED], [STOPPED, 0], [STOPPED, STOPPED]])
def test_a_stop_after_the_end_is_an_end(codes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop after the folder is finished ends the campaign; the same command again would be refused."""
    campaign(tmp_path, monkeypatch, [(codes, True)])


def test_other_exit_codes_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(soak.SoakError, match="was ended by SIGTERM"):
        campaign(tmp_path, monkeypatch, [([0, 1], True)])


def test_a_sampler_that_never_finishes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 of every process does not prove that the folder is finished."""
    with pytest.raises(soak.SoakError, match="no progress in 200 lives"):
        campaign(tmp_path, monkeypatch, [([0, 0], False)] * 200)
