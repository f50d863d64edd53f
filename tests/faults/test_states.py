"""Faults 2, 8 to 14, 49, 50, 53: what is on disk is killed in the making, damaged, full, held by another, or old."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stage1_tokenizer.engine import checkpoint, files, state
from stage1_tokenizer.engine.checkpoint import read_weights, write_weights
from stage1_tokenizer.engine.errors import BadFileError, StorageError
from stage1_tokenizer.engine.lock import LOCK_FILE
from stage1_tokenizer.engine.state import (
    find_newest_state,
    list_states,
    load_state,
    remove_unfinished,
    save_state,
    step_of_state,
)
from stage2_prior.prior import load_prior
from tests.helpers.artefacts import files_of, write_tokenizer
from tests.helpers.commands import names_of, run
from tests.helpers.faults import at_save, at_step, dies, killed, trained
from tests.helpers.processes import run_processes
from tests.helpers.training import TINY, checksums, log, train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1"
OPTIONS: dict[str, Any] = {"steps": 4, "save_every": 1, "keep": 2}


def model(step: int) -> nn.Module:
    """Weights that say which step they are of."""
    linear = nn.Linear(3, 2)
    for parameter in linear.parameters():
        nn.init.constant_(parameter, float(step))
    return linear


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_state(folder, step, {"model": model(step)}, {"step": step}, keep)


def silent(message: str) -> None:
    """For warnings that are not looked at."""


POINTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "after the first file": (files, "sync_folder", lambda folder: ".tmp-step-00000003" in str(folder)),
    "the manifest under its temporary name": (
        Path,
        "replace",
        lambda path, _: "manifest" in path.name and "00000003" in str(path),
    ),
    "before the rename": (Path, "rename", lambda path, _: path.name.startswith(".tmp-step-00000003")),
    "after the rename": (state, "sync_folder", lambda folder: (folder / "step-00000003").exists()),
    "in the middle of the purge": (
        shutil,
        "rmtree",
        lambda path, **_: "dropped-step-00000001" in str(path) and path.exists(),
    ),
}
"""Where a state of step 3 is killed in the making: a function, and whether this call of it is the last thing done."""


def killed_while_saving(_: Accelerator, folder: Path, point: str) -> None:
    for step in (1, 2):
        save(folder, step)
    owner, name, here = POINTS[point]
    original = getattr(owner, name)

    def doomed(*args: Any, **kwargs: Any) -> Any:
        if here(*args, **kwargs):
            if name == "rmtree":  # half of it is gone
                next(Path(args[0]).iterdir()).unlink()
            killed()
        return original(*args, **kwargs)

    setattr(owner, name, doomed)
    save(folder, 3)


@pytest.mark.parametrize("point", POINTS)
def test_fault_02_killed_while_saving(tmp_path: Path, point: str) -> None:
    """Fault 2: at five points, a whole state is there, it is the newest that was finished, and the rest is swept."""
    dies(killed_while_saving, tmp_path, point)
    warnings: list[str] = []
    newest = find_newest_state(tmp_path, warnings.append)
    assert newest is not None
    finished = point in ("after the rename", "in the middle of the purge")
    assert step_of_state(newest) == (3 if finished else 2)
    assert not warnings, "nothing half is ever found under a state's name"
    fresh = model(0)
    assert load_state(newest, {"model": fresh}) == (step_of_state(newest), {"step": step_of_state(newest)})
    assert torch.equal(fresh.weight, model(step_of_state(newest)).weight)  # type: ignore[arg-type]
    assert list(tmp_path.glob(".tmp-*")) or finished
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
    save(tmp_path, 4)
    assert len(list_states(tmp_path)) == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "fault_08 truncated": ("tokenizer.safetensors", truncate, r"tokenizer.safetensors is damaged: [\d,]+ of [\d,]+ b"),
    "fault_09 flipped in weights": ("tokenizer.safetensors", flip, "SHA-256"),
    "fault_09 flipped in the optimizer": ("optimizer.safetensors", flip, "SHA-256"),
    "fault_09 flipped in the manifest": ("manifest.json", flip, "manifest is damaged"),
    "fault_10 no manifest": ("manifest.json", Path.unlink, "incomplete: manifest.json is missing"),
    "fault_10 a file is missing": ("ema.safetensors", Path.unlink, "incomplete: ema.safetensors is missing"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its third step, with states of steps 2 and 3; and the same run to its end."""
    folder = tmp_path_factory.mktemp("stopped")
    run_processes(1, train, folder / "run", OPTIONS, ("save", 3))
    run_processes(1, train, folder / "whole", OPTIONS)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_08_09_10_damaged_states(stopped: Path, tmp_path: Path, damage: str) -> None:
    """Faults 8, 9 and 10: the newest state is damaged. The same command warns, takes the one before, and its end is
    bit-equal; the state named by the user is an error (code 3) that says what is wrong, and nothing is changed."""
    name, harm, message = DAMAGES[damage]
    shutil.copytree(stopped / "run", tmp_path / "run")
    harm(tmp_path / "run/state/step-00000003" / name)
    before = files_of(tmp_path / "run")
    ((code, err),) = run_processes(1, trained, tmp_path / "run", {**OPTIONS, "resume": "step-00000003"})
    assert code == 3
    assert "--resume step-00000003" in err
    check(err, message)
    assert {key: value for key, value in files_of(tmp_path / "run").items() if key != LOCK_FILE} == {
        key: value for key, value in before.items() if key != LOCK_FILE
    }
    (result,) = run_processes(1, said_and_trained, tmp_path / "run")
    assert result["code"] == 0
    check(result["out"], message)
    assert "continuing" in result["out"]
    assert "from step 2" in result["out"]
    assert checksums(tmp_path / "run", 4) == checksums(stopped / "whole", 4)
    assert log(tmp_path / "run") == log(stopped / "whole")


def said_and_trained(accelerator: Accelerator, out: Path) -> dict[str, Any]:
    """Exit code and stdout of the tiny run."""
    said: list[str] = []
    Accelerator.print = lambda self, *words, **_: said.append(" ".join(map(str, words)))
    code, err = trained(accelerator, out, OPTIONS)
    return {"code": code, "out": "\n".join(said), "err": err}


def check(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text
    assert "Traceback" not in text


def test_fault_08_no_state_is_whole(stopped: Path, tmp_path: Path) -> None:
    """Fault 8: with none left, beginning again in silence would throw the run away: code 3, and all is as it was."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    for each in list_states(tmp_path / "run/state"):
        truncate(each / "tokenizer.safetensors")
    before = checksums(tmp_path / "run", 3)
    ((code, err),) = run_processes(1, trained, tmp_path / "run", OPTIONS)
    assert code == 3
    check(err, r"(?s)none of its states can be used.*step-00000003: .*step-00000002: .*--out")
    assert checksums(tmp_path / "run", 3) == before


def test_fault_09_one_flipped_byte_in_the_weights(tmp_path: Path) -> None:
    """Fault 9: safetensors loads a flipped bit without a word. Every byte of a tokenizer's file that is not padding is
    under its checksum: whichever is changed, the file is refused."""
    path = write_tokenizer(tmp_path).path
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = [*range(8, start, 97), *range(start, len(data), 997), len(data) - 1]
    for place in places:
        if data[place] == ord(" ") and place < start:
            continue
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(BadFileError, match=r"tokenizer\.safetensors"):
            read_weights(path, "tokenizer")
    path.write_bytes(data)
    assert read_weights(path, "tokenizer")[1]["step"] == "7", "and as it was, it is read"


def test_fault_09_a_flipped_byte_ends_a_command(tmp_path: Path) -> None:
    """Fault 9: by the command line it is code 3, the file and the checksum."""
    flip(write_tokenizer(tmp_path).path)
    ended = run(names_of("stage2_prior/train.py")["main"], "--tokenizer", tmp_path, "--out", tmp_path / "run")
    assert ended.code == 3
    check(ended.err, r"tokenizer\.safetensors: is damaged: .*sha256")


def test_fault_11_an_empty_or_temporary_state(tmp_path: Path) -> None:
    """Fault 11: what a power cut may leave is passed over, and what has no state's name is not even looked at."""
    save(tmp_path, 2)
    for name in (".tmp-step-00000009-77", "step-00000008.bak", "step-x", "latest"):
        (tmp_path / name).mkdir()
    newest = find_newest_state(tmp_path, pytest.fail)
    assert newest is not None
    assert step_of_state(newest) == 2
    (tmp_path / "step-00000007").mkdir()
    warnings: list[str] = []
    newest = find_newest_state(tmp_path, warnings.append)
    assert newest is not None
    assert step_of_state(newest) == 2
    check(" ".join(warnings), "step-00000007 cannot be used .*manifest.json is missing")


def fill_the_disk() -> None:
    """No file of this process may grow beyond a thousand bytes; the system says so where one would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("processes", [1, 2])
def test_fault_12_disk_full(tmp_path: Path, processes: int, stopped: Path) -> None:
    """Fault 12: code 5 on every rank, what is needed and what is free; the state before is whole, nothing half is
    left, and with room again the run goes on to the same end."""
    ranks = run_processes(processes, trained, tmp_path, OPTIONS, partial(at_save, step=3, fault=fill_the_disk))
    for code, err in ranks:
        assert code == 5
        check(err, r"no space left writing \S+: it needs [\d,]+ bytes, [\d,]+ are free.*the same command continues")
    assert [step_of_state(each) for each in list_states(tmp_path / "state")] == [2, 1]
    assert not list(tmp_path.rglob(".tmp-*"))
    assert run_processes(processes, trained, tmp_path, OPTIONS)[0][0] == 0
    if processes == 1:
        assert checksums(tmp_path, 4) == checksums(stopped / "whole", 4)


def test_fault_12_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: where the room is seen to be too small, nothing is begun; the largest state would fill the disk."""
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(StorageError, match="needs 32 bytes, 10 are free"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [step_of_state(each) for each in list_states(tmp_path)] == [1]


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("kind", ["a file", "read-only", "no such device"])
def test_fault_13_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Fault 13: code 2 before the first step. (Tests may run as root, whom no permission stops; so a read-only file
    system is what making the folder meets, and a folder of the system's in which nobody can make one.)"""
    out = tmp_path / "out"
    if kind == "a file":
        out.write_text("mine")
    elif kind == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        out = Path("/proc/tessera")
    names = names_of("stage1_tokenizer/train.py")
    names["training_batches"] = lambda *_: pytest.fail("training began")
    options = {"data.train_images": 20, "data.validation_images": 6, "steps": 1}
    ended = run(names["main"], "--out", out, *[word for key, value in options.items() for word in (f"--{key}", value)])
    assert ended.code == 2
    check(ended.err, rf"--out {out}: (is a file|cannot|.*Read-only)")
    assert kind != "a file" or out.read_text() == "mine"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock of a folder."""
    program = (
        "import fcntl, os, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX);"
        'f.truncate(0); f.write(\'{"pid": %d, "host": "node7"}\' % os.getpid()); f.flush();'
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", program, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def tiny(out: Path) -> list[str]:
    ours = {**TINY, "out": out, "steps": 1}
    return [
        word for key, value in ours.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def test_fault_14_two_runs_in_one_folder(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    """Fault 14: the second is refused with the first one's process and host, and may start when that has ended,
    however it did."""
    main = names_of("stage1_tokenizer/train.py")["main"]
    ended = run(main, *tiny(tmp_path))
    assert ended.code == 2
    check(ended.err, rf'in use by another process .*"pid": {holder.pid}, "host": "node7"')
    assert not (tmp_path / "config.yaml").exists()
    holder.kill()
    holder.wait()
    assert run(main, *tiny(tmp_path)).code == 0


def test_fault_49_weights_of_a_compiled_module(tmp_path: Path) -> None:
    """Fault 49: torch.compile puts a prefix before every name. What is written has none, whichever module is given, and
    goes into either; the same of a state."""
    plain = model(5)
    compiled = torch.compile(model(5))
    assert isinstance(compiled, nn.Module)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    for name, module in (("plain", plain), ("compiled", compiled)):
        write_weights(tmp_path / name, module, "tokenizer", {})
        assert read_weights(tmp_path / name, "tokenizer")[0].keys() == {"weight", "bias"}
        saved = save_state(tmp_path / f"state-{name}", 1, {"model": module}, {})
        for target in (model(0), torch.compile(model(0))):
            assert isinstance(target, nn.Module)
            load_state(saved, {"model": target})
            loaded: Any = checkpoint.unwrap_compiled(target).state_dict()["weight"]
            assert bool((loaded == 5.0).all())
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "compiled").read_bytes()


def test_fault_50_files_of_an_old_format(tmp_path: Path) -> None:
    """Fault 50: a tokenizer and a prior that format 1 wrote give the codes and pixels that they gave then."""
    expected = json.loads((FIXTURE / "expected.json").read_text())
    prior = load_prior(FIXTURE)
    assert prior.tokenizer.fingerprint == expected["fingerprint"]
    codes = torch.tensor(expected["codes"])
    corner: Tensor = prior.tokenizer.tokenizer.decode_codes(codes)[0, :, 0, 0]
    assert corner.tolist() == pytest.approx(expected["corner"], abs=1e-4)
    logits = prior.model(codes, torch.tensor([0, 1]))
    assert logits.shape == (2, 6, 16)
    assert bool(logits.isfinite().all())


def test_fault_50_states_of_an_old_format(tmp_path: Path) -> None:
    """Fault 50: a state of format 1 lacks what a bit-exact resume needs now; code 3 names both versions."""
    shutil.copytree(FIXTURE / "state", tmp_path / "state")
    with pytest.raises(BadFileError, match=r"step-00000012: its format is 1, this version reads 2"):
        find_newest_state(tmp_path / "state", silent)
    for version, message in (("3", "format 3, this version reads 1 and 2"), ("0", "format 0")):
        write_weights(tmp_path / "x", model(1), "tokenizer", {"format": version})
        with pytest.raises(BadFileError, match=message):
            read_weights(tmp_path / "x", "tokenizer")


def test_fault_53_times_that_lie(tmp_path: Path) -> None:
    """Fault 53: the newest state is the one of the highest step, with nine digits too, whatever the clock said."""
    for age, step in enumerate((99_999_999, 100_000_000, 7)):
        save(tmp_path, step, keep=9) if step > 7 else None
        if step > 7:
            os.utime(tmp_path / f"step-{step:08d}", (2**31 - age, 2**31 - age))
    assert [step_of_state(each) for each in list_states(tmp_path)] == [100_000_000, 99_999_999]
    newest = find_newest_state(tmp_path, pytest.fail)
    assert newest is not None
    assert step_of_state(newest) == 100_000_000


def test_fault_12_the_disk_is_still_full(tmp_path: Path) -> None:
    """Fault 12: "the same command again" before there is room says 5 again, and not that the command is wrong."""
    assert run_processes(1, full_from_the_start, tmp_path / "run")[0][0] == 5


def full_from_the_start(accelerator: Accelerator, out: Path) -> tuple[int, str]:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    Path.mkdir = refuse  # type: ignore[method-assign]
    return trained(accelerator, out, OPTIONS)


def test_fault_02_a_run_that_went_back_is_killed_before_it_saves(stopped: Path, tmp_path: Path) -> None:
    """Fault 2: its log ends at the step that it went back to, so the states after that must be gone with it; else the
    next command would continue from one whose log is lost."""
    shutil.copytree(stopped / "whole", tmp_path / "run")
    (tmp_path / "run/samples/.tmp-x.png-1").write_text("half")
    dies(trained, tmp_path / "run", {**OPTIONS, "resume": "step-00000003"}, partial(at_step, step=4, fault=killed))
    assert [step_of_state(each) for each in list_states(tmp_path / "run/state")] == [3]
    assert not list(tmp_path.rglob(".tmp-*"))
    assert run_processes(1, trained, tmp_path / "run", OPTIONS)[0][0] == 0
    assert checksums(tmp_path / "run", 4) == checksums(stopped / "whole", 4)
    assert log(tmp_path / "run") == log(stopped / "whole")


def test_a_state_that_the_user_names(stopped: Path, tmp_path: Path) -> None:
    """--resume goes back to an older state, which drops the newer ones; a state of another run is refused."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    ((code, err),) = run_processes(1, trained, tmp_path / "run", {**OPTIONS, "resume": "step-00000099"})
    assert code == 3
    check(err, "are: step-00000003, step-00000002")
    elsewhere = {**OPTIONS, "resume": str(stopped / "whole/state/step-00000004")}
    ((code, err),) = run_processes(1, trained, tmp_path / "run", elsewhere)
    assert code == 3
    check(err, "is no state of this run")
    (seen,) = run_processes(1, train, tmp_path / "run", {**OPTIONS, "resume": "step-00000002"})
    assert len(seen["batches"]) == 2
    assert checksums(tmp_path / "run", 4) == checksums(stopped / "whole", 4)
