"""The processor's fast paths: forced on and off, the same results in every state, and never met by what only looks."""

from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from stage1_tokenizer.bottlenecks import BottleneckConfig, build_bottleneck, nearest
from stage1_tokenizer.bottlenecks.fsq import FsqConfig
from stage1_tokenizer.bottlenecks.grouped_rvq import GroupedRvqConfig
from stage1_tokenizer.bottlenecks.lfq import LfqConfig
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.bottlenecks.simvq import SimVqConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.bottlenecks.vq_library import VqLibraryConfig
from stage1_tokenizer.engine import launch, processor
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.precision import TrainingPrecision
from stage1_tokenizer.engine.processor import FAST_PATHS, FAST_PATHS_VARIABLE, FastPath, takes_fast_path
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior import fast_linear
from stage2_prior.fast_linear import Precision, prepare
from stage2_prior.generation import generate
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.likelihood import token_loss
from stage2_prior.planning.costs import count_generation, count_training
from tests.helpers import training
from tests.helpers.commands import names_of, run
from tests.helpers.prior_training import SCRIPT

CPU = torch.device("cpu")
SHAPE = TokenShape(8, 16, 1, 40)
STATES = [
    ",".join(path if on else f"-{path}" for path, on in zip(FAST_PATHS, states, strict=True))
    for states in product([True, False], repeat=len(FAST_PATHS))
]
"""Every state of all paths, as the variable's value."""


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A forced state of all paths, if this build of torch has their operators."""
    value: str = request.param
    if not processor.has_onednn() and not value.startswith("-onednn,-packed"):
        pytest.skip("this build of torch has no such operators")
    monkeypatch.setenv(FAST_PATHS_VARIABLE, value)
    return value


@pytest.fixture
def _all_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path forced on."""
    if not processor.has_onednn():
        pytest.skip("this build of torch has no such operators")
    monkeypatch.setenv(FAST_PATHS_VARIABLE, STATES[0])


@pytest.fixture
def gpt() -> Gpt:
    torch.manual_seed(0)
    return Gpt(GptConfig(layers=1, width=32, heads=2), SHAPE, classes=2).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Codes (3, 8, 16, 1) and labels (3,)."""
    return torch.randint(SHAPE.V, (3, *SHAPE[:3]), generator=torch.Generator().manual_seed(1)), torch.arange(3)


def equal(rule: bool, _: torch.device) -> bool:
    return rule


def refuse(*_: object) -> Tensor:
    raise AssertionError("a private operator of oneDNN was called")


# The choice


@pytest.mark.parametrize("path", FAST_PATHS)
def test_the_variable_decides_before_the_processor(path: FastPath, monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (True, False):
        monkeypatch.setattr(processor, "RULES", dict.fromkeys(FAST_PATHS, partial(equal, rule)))
        for value, wanted in (("", rule), (path, True), (f"-{path}", False), (f" -{path} ,", False)):
            monkeypatch.setenv(FAST_PATHS_VARIABLE, value)
            assert takes_fast_path(path) == wanted


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("operators", [True, False])
def test_the_rules_by_processor(amd: bool, avx512: bool, operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of the processor, simulated."""
    monkeypatch.delenv(FAST_PATHS_VARIABLE, raising=False)
    monkeypatch.setattr(processor, "is_amd", lambda: amd)
    monkeypatch.setattr(processor, "has_onednn", lambda: operators)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    assert takes_fast_path("onednn") == (amd and avx512 and operators)
    assert takes_fast_path("packed") == (amd and operators)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_is_the_default_where_it_is_native(bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain python; what Accelerate was told stays, and a device that is neither CPU nor CUDA gets float32."""
    monkeypatch.delenv(FAST_PATHS_VARIABLE, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert launch.choose_precision(CPU) == ("bf16" if bf16 or amx else "no")
    assert launch.choose_precision(torch.device("mps")) == "no"
    monkeypatch.setenv(FAST_PATHS_VARIABLE, "-bfloat16")
    assert launch.choose_precision(CPU) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert launch.choose_precision(CPU) is None


@pytest.mark.parametrize("value", ["onedn", "-", "onednn bfloat16", "onednn,-onednn", "ONEDNN", "1", "--onednn"])
def test_a_wrong_value_ends_each_command_at_once(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One message with what is allowed, exit code 2, and nothing is written."""
    monkeypatch.setenv(FAST_PATHS_VARIABLE, value)
    for script in ("stage1_tokenizer/train.py", SCRIPT, "sampling/generate.py"):
        ended = run(names_of(script)["main"], "--out", tmp_path / "out")
        assert ended.code == 2
        assert ended.err.startswith(f"ConfigError: {FAST_PATHS_VARIABLE}={value}: ")
        assert ended.err.count("\n") == 1
        assert "both on and off" in ended.err or all(path in ended.err for path in FAST_PATHS)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_not_there_cannot_be_turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off is always possible."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    for path in ("onednn", "packed"):
        monkeypatch.setenv(FAST_PATHS_VARIABLE, path)
        with pytest.raises(ConfigError, match=f"{path} cannot be turned on.*give -{path}"):
            processor.check_fast_paths()
        monkeypatch.setenv(FAST_PATHS_VARIABLE, f"-{path},bfloat16")
        processor.check_fast_paths()


# The same results in every state


@pytest.mark.usefixtures("state")
def test_training_and_likelihoods_are_equal(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and every gradient, to float32's rounding, whatever is forced."""
    codes, labels = batch()

    def found() -> list[Tensor]:
        loss = token_loss(gpt(codes, labels), codes)
        return [loss, *torch.autograd.grad(loss, list(gpt.parameters()))]

    forced = found()
    monkeypatch.setenv(FAST_PATHS_VARIABLE, STATES[-1])
    for one, other in zip(forced, found(), strict=True):
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.usefixtures("state")
def test_decoding_is_equal(precision: Precision, gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next logits after three codes: products that are packed round as the others, within their precision."""
    codes, labels = batch()

    def found() -> Tensor:
        generation = gpt.prepare(precision).begin(labels, SHAPE[:2])
        generation.prefill(codes.flatten(1, 2)[:, :3])
        return generation.logits()

    forced = found()
    monkeypatch.setenv(FAST_PATHS_VARIABLE, STATES[-1])
    wanted = found()
    most = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-4}[precision]
    assert float((forced - wanted).norm()) <= most * float(wanted.norm())


# What only looks never meets a private operator


@pytest.mark.usefixtures("_all_on")
def test_a_plan_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, training and decoding."""
    config = GptConfig(layers=1, width=32, heads=2)
    counts = count_training(config, SHAPE, 2, 2), count_generation(config, SHAPE, 2, 2)
    monkeypatch.setenv(FAST_PATHS_VARIABLE, STATES[-1])
    assert counts == (count_training(config, SHAPE, 2, 2), count_generation(config, SHAPE, 2, 2))


@pytest.mark.usefixtures("_all_on")
def test_flops_are_counted_whole(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counter sees every product of a training step and of generation, also with weights prepared before."""
    codes, labels = batch()
    prepared = gpt.prepare()

    def operations() -> tuple[int, int]:
        with FlopCounterMode(display=False) as training:
            token_loss(gpt(codes, labels), codes).backward()  # type: ignore[no-untyped-call]
        with FlopCounterMode(display=False) as decoding:
            generate(gpt, labels, torch.zeros(3, SHAPE.length), prepared=prepared)
        return training.get_total_flops(), decoding.get_total_flops()

    forced = operations()
    monkeypatch.setenv(FAST_PATHS_VARIABLE, STATES[-1])
    prepared = gpt.prepare()
    assert forced == operations()


@pytest.mark.usefixtures("_all_on")
def test_tracers_meet_plain_operators(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export, make_fx, torch.compile up to its graph, torch.func, meta and fake tensors."""
    codes, labels = batch()
    wanted = gpt(codes, labels).detach()
    monkeypatch.setattr(fast_linear, "pack", refuse)
    monkeypatch.setattr(fast_linear, "multiply", refuse)

    def close(found: Any) -> bool:
        return bool(float((found - wanted).detach().norm()) <= 1e-5 * float(wanted.norm()))

    exported: Any = torch.export.export(gpt, (codes, labels))
    with torch.no_grad():
        assert close(exported.module()(codes, labels))
        assert close(make_fx(gpt)(codes, labels)(codes, labels))
        assert close(torch.compile(gpt, backend="eager")(codes, labels))
        assert prepare(torch.ones(8, 4, device="meta"), None, "float32")(torch.ones(2, 4, device="meta")).shape == (
            2,
            8,
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert prepare(torch.ones(8, 4), torch.ones(8), "bfloat16")(torch.ones(2, 4)).shape == (2, 8)


def test_ordinary_tensors_are_not_traced() -> None:
    """Or the fast paths would never be taken: in training, inference, autocast and under a checkpoint."""
    x = torch.ones(2, 2)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.enable_grad()):
        with context:
            assert not processor.is_traced(x)
            assert not processor.is_traced(nn.Parameter(x))


# A resumed run


def accelerator(device: str = "cpu", precision: str = "no") -> Accelerator:
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO))
    described: Any = SimpleNamespace(device=torch.device(device), mixed_precision=precision, scaler=None, state=state)
    return described


def test_a_resume_must_choose_the_same_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the value to set; states of older versions, which say nothing, are taken as they are."""
    folder = Path("runs/x")
    monkeypatch.setenv(FAST_PATHS_VARIABLE, "-onednn")
    saved = TrainingPrecision(accelerator(), ("onednn",)).record()
    TrainingPrecision(accelerator(), ("onednn",)).check(folder, saved)
    monkeypatch.setenv(FAST_PATHS_VARIABLE, "onednn")
    now = TrainingPrecision(accelerator(), ("onednn",))
    with pytest.raises(ConfigError, match=rf"Set {FAST_PATHS_VARIABLE}=-onednn, or give --allow_changed"):
        now.check(folder, saved)
    now.check(folder, {"precision": "no"})
    with pytest.raises(ConfigError, match="Set ACCELERATE_MIXED_PRECISION=bf16"):
        now.check(folder, {"precision": "bf16"})


def test_paths_that_a_run_does_not_meet_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing goes that way, so another processor is the same run. A search for codes is in float32 in every
    precision."""
    monkeypatch.setenv(FAST_PATHS_VARIABLE, "onednn")
    assert TrainingPrecision(accelerator("cuda"), ("onednn",)).record()["fast_paths"] == {}
    searching = TrainingPrecision(accelerator(precision="bf16"), VqConfig().fast_paths)
    assert searching.record()["fast_paths"] == {"onednn": True}


@pytest.mark.parametrize(
    "config",
    [VqConfig(), RvqConfig(), GroupedRvqConfig(groups=2), SimVqConfig(), VqLibraryConfig(), FsqConfig(), LfqConfig()],
)
def test_a_kind_states_the_paths_that_it_meets(config: BottleneckConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one more search or one less, a resume would change codes, or be refused for nothing."""
    bottleneck = build_bottleneck(config, 8)
    asked: list[FastPath] = []
    z = torch.randn(2, 8, 32, 32)
    bottleneck.start(z)
    monkeypatch.setattr(nearest, "MIN_SCORES", 1)
    monkeypatch.setattr(processor, "takes_fast_path", asked.append)
    bottleneck(z)
    assert set(asked) == set(config.fast_paths)


@pytest.mark.slow
def test_a_run_is_bound_to_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command: trained with one value, refused with another, continued with --allow_changed."""
    if not processor.has_onednn():
        pytest.skip("this build of torch has no such operators")
    main = names_of(str(training.SCRIPT))["main"]
    values = {**training.TINY, "out": tmp_path / "out", "adversarial.weight": 0.0, "steps": 2}
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items()]
    monkeypatch.setenv(FAST_PATHS_VARIABLE, "onednn")
    assert run(main, *words).code == 0
    monkeypatch.setenv(FAST_PATHS_VARIABLE, "-onednn")
    ended = run(main, *words)
    assert ended.code == 2
    assert f"Set {FAST_PATHS_VARIABLE}=onednn, or give --allow_changed" in ended.err
    assert run(main, *words, "--allow_changed").code == 0
