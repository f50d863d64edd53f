"""Inputs that nobody would write: each is used or refused in our own words, in bounded time and memory."""

from pathlib import Path

import pytest

from stage1_tokenizer.errors import ConfigError
from tests.fuzz_targets import targets
from tests.fuzzing import Counts, FindingError, Target, attempt, fuzz, inputs

N = 200
"""Inputs of a format; where one costs more, the number is below."""
FEWER = {"config-stage1": 50, "config-stage2": 50, "run-config": 60}
FEWER |= {"command-line-stage1": 30, "command-line-stage2": 30, "backbone": 60}
FEWER |= {"tokenizer": 120, "prior-0": 50, "prior-1": 50, "prior-2": 50}
NAMES = [*FEWER, *(f"picture-{name}" for name in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm"))]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("beside"))}


def test_every_target_is_fuzzed(known: dict[str, Target]) -> None:
    """One that is added to the list and not to this file would be fuzzed by the soak alone."""
    assert sorted(NAMES) == sorted(known)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_accepted(known: dict[str, Target], name: str, tmp_path: Path) -> None:
    """Mutations of what is refused anyway would prove nothing."""
    for number, seed in enumerate(known[name].seeds[:4]):
        path = tmp_path / f"seed{number}{known[name].suffix}"
        path.write_bytes(seed)
        assert attempt(known[name], path)


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_input_is_accepted_or_refused(known: dict[str, Target], name: str, tmp_path: Path) -> None:
    """Faults 18, 19, 31 to 34, 41: nothing that a file holds is a traceback, a hang, or a spent memory."""
    n = FEWER.get(name, N)
    counts = fuzz(known[name], n, seed=2, folder=tmp_path)
    assert sum(counts) == n
    assert counts.refused > n / 20, "mutations that nobody minds prove nothing"


def test_inputs_follow_from_the_seed(known: dict[str, Target]) -> None:
    """A finding of the soak can be had again, whatever was read before it."""
    for name in ("config-stage1", "command-line-stage1", "tokenizer", "picture-png"):
        first = list(inputs(known[name], 20, seed=5))
        assert first == list(inputs(known[name], 20, seed=5))
        assert first != list(inputs(known[name], 20, seed=6))
        assert len(set(first)) > 10


def crashes(path: Path) -> None:
    path.read_bytes().decode("ascii")


def hangs(_: Path) -> None:
    while True:
        pass


def hoards(_: Path) -> None:
    bytearray(400 * 2**20)


def refuses(_: Path) -> None:
    raise ConfigError("no")


def test_the_driver_finds_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of another class, a hang and a waste of memory are findings, whose bytes are kept; a refusal is
    none."""
    for read, reason in ((crashes, "UnicodeDecodeError"), (hoards, "400 MB were taken"), (hangs, "OvertimeError")):
        monkeypatch.setattr("tests.fuzzing.LIMIT_S", 0.1 if read is hangs else 10.0)
        with pytest.raises(FindingError, match=f"{reason}.*finding-x-0-") as caught:
            fuzz(Target("x", [b"\xe9" * 100], read), 50, seed=0, folder=tmp_path)
        assert Path(str(caught.value).rsplit(": ", 1)[1]).is_file()
    assert fuzz(Target("x", [b"a"], refuses), 5, seed=0, folder=tmp_path) == Counts(accepted=0, refused=5)
