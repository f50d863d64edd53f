"""The plan's times: they follow from a device's rates, and every rate counts where it is the one that limits."""

import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.memory import peak_of
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.gpt.model import GptConfig
from stage2_prior.likelihood import token_loss
from stage2_prior.pixelcnn.model import PixelCnnConfig
from stage2_prior.plan import image_seconds, main, step_seconds
from stage2_prior.planning.costs import count_generation, count_training
from stage2_prior.planning.devices import interpolate, measure_device, resolve_device
from stage2_prior.prior import PriorConfig, build_prior
from tests.helpers.commands import run

SHAPE = TokenShape(4, 6, 1, 32)
GPT = GptConfig(layers=2, width=32, heads=2)
CONFIGS: list[PriorConfig] = [GPT, PixelCnnConfig(layers=3, width=24)]
kinds = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)


@kinds
def test_arithmetic_alone(config: PriorConfig) -> None:
    """With fast memory and free calls, the time is FLOPs / rate, once per micro-batch."""
    counted, device = count_training(config, SHAPE, 7, 2), resolve_device("1e9,1e30,0", config)
    assert step_seconds(counted, 1, device) == pytest.approx(counted.training_flops / 1e9)
    assert step_seconds(counted, 3, device) == pytest.approx(3 * counted.training_flops / 1e9)


@kinds
def test_traffic_alone(config: PriorConfig) -> None:
    """With free arithmetic and calls, the time is bytes / bandwidth, among them 13 numbers for each parameter:
    one for the norm, two for clipping, seven for AdamW, three for the mean."""
    counted, device = count_training(config, SHAPE, 7, 2), resolve_device("1e30,1e9,0", config)
    traffic = sum(each.bytes for each in counted.step) + 13 * 4 * counted.parameters
    assert step_seconds(counted, 1, device) == pytest.approx(traffic / 1e9)


@kinds
def test_drawing_codes_takes_a_step_for_each_position(config: PriorConfig) -> None:
    """Generation of one image does the arithmetic of a forward pass, except for attention,
    which sees half of the sequence, and what a PixelCNN's forward pass computes and masks."""
    counted, device = count_generation(config, SHAPE, 7, 5), resolve_device("1e9,1e30,0", config)
    forward = count_training(config, SHAPE, 7, 1).forward_flops
    assert image_seconds(counted, SHAPE, 5, device) == pytest.approx(forward / 1e9, rel=0.25)


def test_half_of_the_cache_is_read_at_each_position() -> None:
    """Keys and values of the average position, of every image: the rest of the traffic does not grow with the batch."""
    large = TokenShape(32, 32, 1, 32)
    one, more = (count_generation(GPT, large, 7, batch) for batch in (100, 200))
    assert one.cache_bytes == 2 * 2 * 1024 * 32 * 4
    grown = sum(each.bytes for each in more.operations) - sum(each.bytes for each in one.operations)
    assert grown == pytest.approx(100 * one.cache_bytes / 2, rel=0.35)


def test_a_rate_between_two_sizes_lies_between_theirs() -> None:
    curve = ((10.0, 1.0), (1000.0, 100.0))
    assert [interpolate(curve, size) for size in (1.0, 10.0, 1000.0, 1e9)] == [1.0, 1.0, 100.0, 100.0]
    assert interpolate(curve, 100.0) == pytest.approx(10.0)


def test_bfloat16_is_faster_where_it_is() -> None:
    """Published peaks; and its activations take less memory."""
    plain, half = (
        count_training(GPT, TokenShape(16, 16, 1, 1024), 7, 256, precision=each) for each in ("float32", "bf16")
    )
    device = resolve_device("a100", GPT)
    assert device.bf16 == pytest.approx(312 / 19.5)
    assert half.training_flops == plain.training_flops
    assert sum(map(device.arithmetic_seconds, half.step)) < 0.5 * sum(map(device.arithmetic_seconds, plain.step))
    assert half.peak_bytes < plain.peak_bytes


@pytest.mark.parametrize("name", ["h1000", "1e9,2e9", "1e9,0,1e-6", "1e9,1e9,-1", "a,b,c"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"give here, one of a100, h100, h200, or three numbers"):
        resolve_device(name, GPT)


def test_the_command_says_how_long() -> None:
    """The printed time is FLOP / rate. Published peaks give an estimate; no device, no times."""
    arguments = ("--shape", "4,6,1,32", "--prior.layers", 1, "--steps", 1000, "--batch_size", 8)
    ended = run(main, *arguments, "--device", "1e9,1e30,0")
    assert ended.code == 0, ended.err
    seconds = count_training(GptConfig(layers=1), TokenShape(4, 6, 1, 32), 0, 8).training_flops / 1e9
    assert f"{seconds / 60 * 1000:.1f} min for 1,000 steps" in ended.out
    assert "per image at batch 16" in ended.out
    assert "an estimate from measurements of one H200" in run(main, *arguments, "--device", "h200").out
    assert "time" not in run(main, *arguments).out
    assert run(main, *arguments, "--device", "abacus").code == 2


@pytest.mark.slow
@kinds
def test_this_machine_can_be_measured(config: PriorConfig) -> None:
    """Every rate is one that a machine may have."""
    device = measure_device(config, torch.device("cpu"))
    rates = [
        rate for curve in (*device.rates.values(), device.memory, device.moving, device.reading) for _, rate in curve
    ]
    assert all(math.isfinite(rate) and 1e6 < rate < 1e15 for rate in rates)
    assert 1e-7 < device.training_call < 1e-2
    assert 1e-7 < device.generation_call < 1e-2


def step_of(batch: int) -> Callable[[], object]:
    """Return the forward and backward pass of a training step, after a tiny one, for `peak_of`."""
    shape = TokenShape(8, 8, 1, 512)
    prior = build_prior(GptConfig(), shape, 4)

    def step(images: int) -> None:
        codes = torch.zeros(images, 8, 8, 1, dtype=torch.int64)
        token_loss(prior(codes, torch.zeros(images, dtype=torch.int64)), codes).backward()  # type: ignore[no-untyped-call]

    step(1)
    return lambda: step(batch)


@pytest.mark.slow
def test_memory_is_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that a real step adds to the process's memory. Large tensors get pages of their own here: otherwise
    what the allocator keeps of those that were freed, some ten to thirty percent, would be measured too."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    measured = peak_of(torch.device("cpu"), step_of, 64)
    if measured is None:
        pytest.skip("this system does not tell a process's peak")
    assert count_training(GptConfig(), TokenShape(8, 8, 1, 512), 4, 64).peak_bytes / 2**20 == pytest.approx(
        measured, rel=0.25
    )
