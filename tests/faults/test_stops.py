"""Faults 1 to 7: a training that is killed, send_signal to stop, or loses one of its processes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from stage1_tokenizer.engine import files, signals
from stage1_tokenizer.engine.lock import LOCK_FILE
from stage1_tokenizer.engine.state import list_states, step_of_state
from tests.helpers.artefacts import write_tokenizer
from tests.helpers.commands import ROOT
from tests.helpers.faults import Names, at_step, dies, ended, killed, prior_trained, send_signal, sending, trained
from tests.helpers.processes import RankFailedError, run_processes
from tests.helpers.training import TINY, checksums, log

OPTIONS: dict[str, Any] = {"steps": 6, "save_every": 2, "log_every": 2, "bottleneck.revive_below": 2.0}
PRIOR_OPTIONS: dict[str, Any] = {"steps": 6, "save_every": 2, "log_every": 2, "validate_every": 3}


def same_end(ours: Path, whole: Path, step: int = 6) -> None:
    """Weights, EMA, optimizers, counters and log are those of a run that nothing happened to."""
    assert checksums(ours, step) == checksums(whole, step)
    assert log(ours) == log(whole)
    weights = [name for name in ("tokenizer.safetensors", "prior.safetensors") if (whole / name).exists()]
    assert weights
    for name in weights:
        assert (ours / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage one, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run_processes(1, trained, out, OPTIONS)[0][0] == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole_prior(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Stage two, uninterrupted."""
    out = tmp_path_factory.mktemp("whole_prior") / "run"
    assert run_processes(1, prior_trained, out, tokenizer, PRIOR_OPTIONS)[0][0] == 0
    return out


def test_fault_01_killed_while_training(tmp_path: Path, whole: Path) -> None:
    """Fault 1: SIGKILL at any moment loses the steps since the last state and nothing else; the end is bit-equal."""
    dies(trained, tmp_path, OPTIONS, partial(at_step, step=5, fault=killed))
    assert [step_of_state(state) for state in list_states(tmp_path / "state")] == [4, 2]
    (ended,) = run_processes(1, trained, tmp_path, OPTIONS)
    assert ended[0] == 0
    same_end(tmp_path, whole)


def test_fault_01_killed_while_training_a_prior(tmp_path: Path, tokenizer: Path, whole_prior: Path) -> None:
    """Fault 1: the same for stage two."""
    dies(prior_trained, tmp_path, tokenizer, PRIOR_OPTIONS, partial(at_step, step=5, fault=killed))
    (ended,) = run_processes(1, prior_trained, tmp_path, tokenizer, PRIOR_OPTIONS)
    assert ended[0] == 0
    same_end(tmp_path, whole_prior)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_03_told_to_stop(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    """Faults 3 and 5: SIGTERM, or Ctrl-C once, at the end of step 2: the next step, in which it is seen, is finished
    and saved although no save was due; the code is 75; and the run ends as if nothing had been, counters between two
    log entries included."""
    ((code, err),) = run_processes(1, trained, tmp_path, OPTIONS, sending(2, number))
    assert code == 75
    assert "saved step 3 of 6; the same command continues" in err
    assert [step_of_state(state) for state in list_states(tmp_path / "state")] == [3, 2]
    assert run_processes(1, trained, tmp_path, OPTIONS)[0][0] == 0
    same_end(tmp_path, whole)


def test_fault_03_told_to_stop_a_prior(tmp_path: Path, tokenizer: Path, whole_prior: Path) -> None:
    """Fault 3: the same for stage two."""
    ((code, err),) = run_processes(1, prior_trained, tmp_path, tokenizer, PRIOR_OPTIONS, sending(2, signal.SIGTERM))
    assert (code, "saved step 3 of 6" in err) == (75, True)
    assert run_processes(1, prior_trained, tmp_path, tokenizer, PRIOR_OPTIONS)[0][0] == 0
    same_end(tmp_path, whole_prior)


def test_fault_03_told_to_stop_on_one_rank_of_two(tmp_path: Path) -> None:
    """Fault 3: a scheduler may signal one process alone. Both finish the step and save together; counts of codes that
    were spread over both come back."""
    ranks = run_processes(2, trained, tmp_path / "ours", OPTIONS, sending(3, signal.SIGTERM, on_rank=1))
    assert [code for code, _ in ranks] == [75, 75]
    assert run_processes(2, trained, tmp_path / "ours", OPTIONS)[0][0] == 0
    run_processes(2, trained, tmp_path / "whole", OPTIONS)
    same_end(tmp_path / "ours", tmp_path / "whole")


def stop_while_starting(names: Names, rank: int) -> None:
    names["open_data"] = lambda *_, **__: send_signal(signal.SIGTERM)


def test_fault_03_told_to_stop_before_the_first_step(tmp_path: Path) -> None:
    """Fault 3: while data are read there is nothing to save, and the stop is at once."""
    ((code, err),) = run_processes(1, trained, tmp_path / "run", OPTIONS, stop_while_starting)
    assert code == 75
    assert "SIGTERM" in err
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != LOCK_FILE]


def stop_request_of_a_lost_console(_: Accelerator) -> bool:
    """Whether a stop is noted where nothing can be written to stderr any more."""
    os.close(2)
    request = signals.StopRequest()
    send_signal(signal.SIGTERM)
    return request.asked


def test_fault_03_told_to_stop_with_the_console_gone() -> None:
    """Fault 3: `2>&1 | tee log` dies of the same Ctrl-C, and what is said into it must not cost the save."""
    assert run_processes(1, stop_request_of_a_lost_console) == [True]


def twice(_: Accelerator, folder: Path) -> tuple[int, list[str]]:
    """SIGTERM while a file is written, and another one on the way out."""

    def main() -> None:
        def interrupted(*_: Any) -> None:
            try:
                send_signal(signal.SIGTERM)
            finally:
                send_signal(signal.SIGTERM)

        setattr(os, "fsync", interrupted)  # noqa: B010
        files.write_file(folder / "x", b"data")

    return ended(main)[0], [path.name for path in folder.iterdir()]


def test_fault_03_told_to_stop_twice(tmp_path: Path) -> None:
    """Fault 3: a launcher and the system may each send it. The way out is not cut short: no half file, code 75."""
    assert run_processes(1, twice, tmp_path) == [(75, [])]


def interrupted_twice() -> None:
    signals.SECOND_AFTER = 0.0
    for _ in range(2):
        send_signal(signal.SIGINT)
        time.sleep(0.01)


def test_fault_05_ctrl_c_twice(tmp_path: Path, whole: Path) -> None:
    """Fault 5: the second Ctrl-C ends the run at once, without a save; what was saved before is whole."""
    ((code, err),) = run_processes(1, trained, tmp_path, OPTIONS, partial(at_step, step=5, fault=interrupted_twice))
    assert code == 130
    assert "same command continues" in err
    assert [step_of_state(state) for state in list_states(tmp_path / "state")] == [4, 2]
    assert run_processes(1, trained, tmp_path, OPTIONS)[0][0] == 0
    same_end(tmp_path, whole)


def test_fault_06_one_rank_is_killed(tmp_path: Path) -> None:
    """Fault 6: the harness ends the other rank, as a launcher does (below with a real one); the rerun is bit-equal."""
    dies(trained, tmp_path / "ours", OPTIONS, partial(at_step, step=5, fault=killed, on_rank=1), processes=2)
    for name in ("ours", "whole"):
        assert run_processes(2, trained, tmp_path / name, OPTIONS)[0][0] == 0
    same_end(tmp_path / "ours", tmp_path / "whole")


def fail() -> None:
    raise KeyError("a bug on rank 1")


def test_fault_07_one_rank_raises(tmp_path: Path) -> None:
    """Fault 7: no hang, and the traceback of the rank that raised is what is shown."""
    with pytest.raises(RankFailedError, match=r"(?s)rank 1:.*Traceback.*a bug on rank 1"):
        run_processes(2, trained, tmp_path, OPTIONS, partial(at_step, step=3, fault=fail, on_rank=1), timeout=30.0)


def failing_main(accelerator: Accelerator, kind: str) -> tuple[str, str]:
    """A UserError that only the main process meets."""
    from stage1_tokenizer.engine import errors, launch  # noqa: PLC0415

    def action() -> None:
        raise getattr(errors, kind)("what to do")

    try:
        launch.run_on_main(accelerator, action)
    except errors.UserError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("kind", ["ConfigError", "StorageError"])
def test_fault_07_what_the_main_rank_meets_ends_all(kind: str) -> None:
    """Fault 7: a full disk is met by the process that writes; the others would wait for it for ever."""
    assert run_processes(2, failing_main, kind) == [(kind, "what to do")] * 2


def command(out: Path, **options: Any) -> list[str]:
    """The command line of a tiny run of many steps."""
    given = {**TINY, "steps": 100_000, "save_every": 10, "keep": 2, "validate_every": 100_000, "out": out, **options}
    pairs = [[f"--{key}"] if value is True else [f"--{key}", str(value)] for key, value in given.items()]
    return [str(ROOT / "stage1_tokenizer/train.py"), *[word for pair in pairs for word in pair]]


def wait_for(what: Any, process: "subprocess.Popen[str]", seconds: float = 120.0) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie, which nobody has waited for yet, has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def launched(*words: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_fault_04_the_launcher_alone_is_told_to_stop(tmp_path: Path) -> None:
    """Fault 4: `accelerate launch` of one process dies of SIGTERM and hands on nothing; the trainer hears of it from
    the system, saves, and is gone. (Without it the training went on, unseen, for ever.)"""
    launcher = launched("accelerate.commands.launch", "--num_cpu_threads_per_process", "1", *command(tmp_path))
    wait_for(lambda: list_states(tmp_path / "state"), launcher)
    trainers = children_of(launcher.pid)
    assert trainers
    before = max(step_of_state(state) for state in list_states(tmp_path / "state"))
    launcher.terminate()
    out, _ = launcher.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while not all(map(gone, trainers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, trainers)), "an orphan"
    assert max(step_of_state(state) for state in list_states(tmp_path / "state")) >= before
    assert "the same command continues" in out


@pytest.mark.slow
def test_fault_06_one_rank_is_killed_under_torchrun(tmp_path: Path) -> None:
    """Fault 6: a real launcher and two processes: it ends with an error in time, no process is left, and the states
    are whole."""
    launcher = launched(
        "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", *command(tmp_path),
    )  # fmt: skip
    wait_for(lambda: list_states(tmp_path / "state"), launcher)
    ranks = children_of(launcher.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    out, _ = launcher.communicate(timeout=90)
    assert launcher.returncode != 0
    assert all(map(gone, ranks)), "an orphan"
    assert "processes=2" in out
    assert str(ranks[1]) in out, "the launcher names the process that died"
