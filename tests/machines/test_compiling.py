"""torch.compile by Accelerate's switch: the same training, under the same names, or a refusal that says why."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn

from stage1_tokenizer.engine import compiling
from stage1_tokenizer.engine.compiling import LEAST_STEPS, Compiling, pays
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.train_config import TrainPriorConfig
from tests.helpers import prior_training
from tests.helpers.artefacts import write_tokenizer
from tests.helpers.commands import lone_accelerator
from tests.helpers.processes import run_processes
from tests.helpers.training import assert_close, log, part, train

WISHES = ("auto", "always", "never")


def compiled(_: Accelerator, backend: str, *args: Any) -> None:
    """A tiny run of stage one under the switch; to be called by run_processes."""
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = backend
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")  # inductor's import, in torch 2.11
    AcceleratorState._reset_state()  # the given accelerator was made without the switch; the processes stay a group
    train(Accelerator(cpu=True), *args)


def assert_same(out: Path, other: Path, step: int, names: tuple[str, ...]) -> None:
    """Up to rounding, under the same names."""
    for name in names:
        assert_close(part(out, step, name), part(other, step, name))


def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    """Stage one with micro-batches, a discriminator and the adaptive weight; stopped, and resumed by the same
    command. The codebook learns from every micro-batch, and files name no wrapper."""
    plain, stopped = tmp_path / "plain", tmp_path / "stopped"
    options = {"accumulation": 2}
    run_processes(1, train, plain, options)
    run_processes(1, compiled, "aot_eager", stopped, options, ("save", 3), timeout=240.0)
    assert len(log(stopped)) == 3
    run_processes(1, compiled, "aot_eager", stopped, options, timeout=240.0)
    for step in (1, 4):
        assert_same(stopped, plain, step, ("tokenizer", "ema", "discriminator", "optimizer"))


def test_results_are_kept_where_the_user_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's folder, or else, as in many containers, in torch's own place. Nobody's choice is changed."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(variable, "")  # undone at the end, whatever is set in between
    monkeypatch.delenv(variable)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # nothing can be created in it
    compiling.keep_results()
    assert variable not in os.environ
    with mock.patch.object(Path, "home", side_effect=RuntimeError("Could not determine home directory.")):
        compiling.keep_results()
    assert variable not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path))
    compiling.keep_results()
    assert Path(os.environ[variable]).is_dir()
    monkeypatch.setenv(variable, "elsewhere")
    compiling.keep_results()
    assert os.environ[variable] == "elsewhere"


@pytest.mark.slow
def test_several_processes_compile_too(tmp_path: Path) -> None:
    """DistributedDataParallel under the compiler: its hooks still average gradients, no_sync still holds them back."""
    plain, both = tmp_path / "plain", tmp_path / "both"
    run_processes(2, train, plain, {"accumulation": 2})
    run_processes(2, compiled, "aot_eager", both, {"accumulation": 2}, timeout=240.0)
    assert_same(both, plain, 4, ("tokenizer", "ema", "discriminator"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_inductor_trains_what_eager_trains(tmp_path: Path) -> None:
    """The backend that users take: its kernels round otherwise, and no more."""
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    run_processes(1, train, plain, {})
    run_processes(1, compiled, "inductor", fused, {}, timeout=240.0)
    assert_same(fused, plain, 4, ("tokenizer", "ema"))


@pytest.mark.parametrize(("kind", "regional"), [("gpt", False), ("gpt", True), ("pixelcnn", False)])
def test_a_compiled_prior_is_the_same_prior(
    kind: str, regional: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage two, micro-batches and dropout included; whole, and layer by layer."""
    write_tokenizer(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional).lower())
    if kind == "pixelcnn":
        monkeypatch.delitem(prior_training.TINY, "prior.heads")
    runs = {}
    for backend in ("no", "aot_eager"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        options: dict[str, Any] = {"steps": 3, "accumulation": 2, "prior__kind": kind}
        runs[backend] = prior_training.train(tmp_path / backend, tmp_path, **options)
        torch.compiler.reset()
    assert "dynamo=aot_eager" in runs["aot_eager"].out
    assert "dynamo" not in runs["no"].out
    assert_same(tmp_path / "aot_eager", tmp_path / "no", 3, ("prior", "ema"))


def test_always_and_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile without Accelerate's switch: the same training; a resumed run must go on alike, and auto does."""
    write_tokenizer(tmp_path)
    monkeypatch.setattr(compiling, "BACKEND", DynamoBackend.AOT_EAGER)
    options: dict[str, Any] = {"steps": 2}
    ended = {wish: prior_training.train(tmp_path / wish, tmp_path, compile=wish, **options) for wish in WISHES}
    assert ["dynamo" in ended[wish].out for wish in WISHES] == [False, True, False]
    assert_same(tmp_path / "always", tmp_path / "never", 2, ("prior", "ema"))
    for before, now, option in (("always", "never", "always"), ("never", "always", "never")):
        refused = prior_training.train(tmp_path / before, tmp_path, compile=now, **options)
        assert refused.code == 2
        assert f"--compile {option}" in refused.err
        goes_on = prior_training.train(tmp_path / before, tmp_path, compile="auto", **options)
        assert goes_on.code == 0
        assert ("dynamo" in goes_on.out) == (before == "always")
    assert prior_training.train(tmp_path / "never", tmp_path, compile="always", allow_changed=True, **options).code == 0


def test_auto_is_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, enough steps, and a compiler that works."""
    fast, slow = (mock.Mock(device=torch.device("cpu"), mixed_precision=name) for name in ("bf16", "no"))
    monkeypatch.setattr(compiling, "compiles", lambda device: True)
    assert pays(fast, LEAST_STEPS)
    assert not pays(fast, LEAST_STEPS - 1)
    assert not pays(slow, LEAST_STEPS)
    monkeypatch.setattr(compiling, "compiles", lambda device: False)
    assert not pays(fast, LEAST_STEPS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiler_is_tried(tmp_path: Path) -> None:
    """In a process of its own: one that works, none, and one that ends with an error, as without Python's headers."""
    (tmp_path / "broken").write_text("#!/bin/sh\ncase $* in *--version*) echo g++ 12;; *) exit 1;; esac\n")
    (tmp_path / "broken").chmod(0o755)
    code = "import torch; from stage1_tokenizer.engine.compiling import compiles; print(compiles(torch.device('cpu')))"
    for number, (compiler, works) in enumerate(
        {"g++": "True", str(tmp_path / "broken"): "False", "no": "False"}.items()
    ):
        environment = {**os.environ, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache{number}")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == works, compiler


def test_only_a_gpt_is_compiled_by_itself() -> None:
    for kind in ("gpt", "pixelcnn"):
        for wish in WISHES:
            config = TrainPriorConfig.model_validate({"tokenizer": "x", "prior": {"kind": kind}, "compile": wish})
            assert config.compile_wish == ("never" if (kind, wish) == ("pixelcnn", "auto") else wish)


def switched(**settings: str) -> Accelerator:
    """An accelerator under these ACCELERATE_DYNAMO_... variables."""
    with mock.patch.dict(os.environ, {f"ACCELERATE_DYNAMO_{name}": value for name, value in settings.items()}):
        return lone_accelerator()


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained, with the way out."""
    part = nn.Identity()
    with pytest.raises(ConfigError, match="REGIONAL"):
        Compiling(switched(BACKEND="eager", USE_REGIONAL_COMPILATION="true"), eager=[part])
    with pytest.raises(ConfigError, match="fullgraph"):
        Compiling(switched(BACKEND="eager", USE_FULLGRAPH="true"), eager=[part])
    with pytest.raises(ConfigError, match=r"reduce-overhead.*--no-adversarial.adaptive"):
        Compiling(switched(BACKEND="inductor", MODE="reduce-overhead"), keeps_graph=True)
    with pytest.raises(ConfigError, match="cudagraphs"):
        Compiling(switched(BACKEND="cudagraphs"), keeps_graph=True)
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415 (takes seconds)

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", mock.Mock(side_effect=InvalidCxxCompiler))
    with pytest.raises(ConfigError, match=r"g\+\+"):
        Compiling(switched(BACKEND="inductor"))


def test_without_the_switch_nothing_changes() -> None:
    """Modules stay theirs, and no compiler is imported or asked."""
    module = nn.Identity()
    Compiling(switched(BACKEND="no", USE_REGIONAL_COMPILATION="true"), eager=[module]).begin_step()
    assert "forward" not in vars(module)


def test_float32_stays_float32() -> None:
    """Accelerate's switch turns TF32 on, in which codes that are near to each other cannot be told apart."""
    torch.backends.cuda.matmul.allow_tf32 = True
    Compiling(switched(BACKEND="eager"))
    assert not torch.backends.cuda.matmul.allow_tf32
