"""Other systems than Linux, simulated: a process of its own loses what they lack, and the commands still work."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from stage1_tokenizer.engine import environment, system
from stage1_tokenizer.engine.files import sync_folder
from stage1_tokenizer.engine.lock import find_lock_holder, lock_folder, unlock_folders
from tests.helpers.commands import ROOT

MACOS = ["os.sched_getaffinity", "signal.sigwaitinfo", "signal.sigtimedwait", "os.O_DIRECT", "os.posix_fallocate"]
WINDOWS = [
    *MACOS,
    *(f"os.{name}" for name in ("fork", "pread", "pwrite", "sysconf", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW")),
    *(f"os.{name}" for name in ("getuid", "geteuid", "getpgid", "setsid", "killpg", "uname", "getloadavg")),
    *("fcntl", "resource", "termios", "pwd", "grp"),
    *(f"signal.{name}" for name in ("SIGCHLD", "SIGKILL", "SIGALRM", "SIGHUP", "pthread_sigmask", "sigwait")),
]
CHILD = """
import ctypes, os, signal, sys
# What the libraries do on another system is their matter, so they are imported before anything is missing.
import accelerate, matplotlib.pyplot, multiprocessing.popen_spawn_posix, numpy, PIL.Image, safetensors, scipy, torch
import lpips, torch.utils.data, torch.utils.tensorboard, torch_fidelity, torchvision, vector_quantize_pytorch
import x_transformers

def without_proc(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc/"):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

def no_library(name):
    raise TypeError("no such C library")

for name in {missing!r}:
    module, _, attribute = name.partition(".")
    if attribute:
        delattr(sys.modules[module], attribute)
    else:
        sys.modules[module] = None
sys.addaudithook(without_proc)
ctypes.CDLL = no_library
sys.platform = {platform!r}

from tests.helpers.commands import names_of, run

for script, *words in {commands!r}:
    for _ in range(2 if "train.py" in script else 1):  # the second time it reads its state and has nothing to do
        ended = run(names_of(script)["main"], *words)
        if ended.code:
            sys.exit(f"{{script}} ended with {{ended.code}}\\n{{ended.out}}\\n{{ended.err}}")
        print(ended.err)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six images, and one file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        path = folder / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * index, 90, 200 - 10 * index)).save(path)
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "missing", "workers"), [("darwin", MACOS, 1), ("win32", WINDOWS, 0)])
def test_the_three_commands_without_linux(
    platform: str, missing: list[str], workers: int, images: Path, tmp_path: Path
) -> None:
    """Train a tokenizer on a folder, a prior on its codes, and sample."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    few = "--steps 2 --batch_size 4 --no-report"
    data = (
        f"--data.kind folder --data.root {images} --data.image_size 16 --data.bad_share 0.5 --data.validation_share 0.3"
    )
    data += f" --data.cache none --data.workers {workers}"
    small = "--network.channels 8 --network.residual_channels 4 --bottleneck.codebook_size 16"
    commands = [
        f"stage1_tokenizer/train.py {few} {data} {small} --out {one}".split(),
        f"stage2_prior/train.py {few} --prior.layers 1 --samples 2 --tokenizer {one} --out {two}".split(),
        f"sampling/generate.py -n 3 --prior {two} --out {three}".split(),
    ]
    script = CHILD.format(missing=missing, platform=platform, commands=commands)
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in three.glob("0*.png")) == ["000000.png", "000001.png", "000002.png"]
    assert "bad.png" in (one / "bad_files.txt").read_text()
    if platform == "win32":
        assert "cannot be locked (this system has no locks that end with a process)" in ended.stdout
    else:
        assert "cannot be locked" not in ended.stdout


def test_without_locks_a_folder_is_used_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(system, "fcntl", None)
    lock_folder(tmp_path / "run")
    unlock_folders()
    assert "Do not start two commands on it" in capsys.readouterr().err
    assert find_lock_holder(tmp_path / "run") is None


def test_cores_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the machine's, and one where even that is unknown."""
    assert system.count_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert system.count_cores() == 7
    assert environment.processor_name().endswith("7 cores")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.count_cores() == 1


def test_folders_that_cannot_be_opened_are_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows os.open refuses every folder."""
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a folder was opened"))
    sync_folder(tmp_path)


def test_a_worker_that_cannot_tell_who_stops_it_goes_on_for_a_while() -> None:
    """As on macOS: after a SIGTERM that may be a scheduler's, which the parent needs batches after; then it ends."""
    script = """
    import multiprocessing, signal, sys, time
    if hasattr(signal, "sigwaitinfo"):
        del signal.sigwaitinfo
    from stage1_tokenizer.data import order
    order.GRACE_SECONDS = 1.0
    order._leave_signals_to_parent(0)
    print("ready", flush=True)
    time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            began = time.monotonic()
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=30) == 0
            assert time.monotonic() - began >= 0.9
        finally:
            child.kill()
