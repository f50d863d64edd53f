"""Apple's GPU, simulated: what has no float64 there is computed on the CPU, and the numbers are those of a CPU."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sampling.choose import ChooseConfig, choose
from stage1_tokenizer.bottlenecks.dictionary import largest_eigenvalue
from stage1_tokenizer.bottlenecks.process_group import draw_indices
from stage1_tokenizer.engine import launch
from stage1_tokenizer.engine.precision import device_of_float64, to_float64
from stage1_tokenizer.metrics import CodeUse
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import draw_codes, generate
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.likelihood import image_nats, nats_by_class
from tests.helpers.mps import MPS, on_mps, simulated_mps

SHAPE = TokenShape(3, 3, 1, 20)


def test_the_simulation_refuses_what_apple_s_gpu_refuses() -> None:
    """float64, and operations on tensors of both devices; else the tests below would say nothing."""
    with simulated_mps():
        x = torch.ones(2, 3, device="mps")
        assert x.device == (x * 2).device == torch.zeros(1).to("mps").device == MPS
        assert (x * 2).cpu().device.type == "cpu"
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64).to("mps")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 3)


def test_float64_is_where_it_can_be() -> None:
    with simulated_mps():
        wide = to_float64(torch.full((2,), 0.1, device="mps"))
    assert wide.dtype == torch.float64
    assert wide.device.type == device_of_float64(MPS).type == "cpu"
    for name in ("cpu", "cuda", "cuda:1"):
        assert device_of_float64(torch.device(name)) == torch.device(name)


def test_choosing_a_code() -> None:
    """Every filter, and the draw: the codes of a CPU."""
    logits, noise = torch.randn(6, 20), torch.rand(6, dtype=torch.float64)
    config = ChooseConfig(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)
    wanted = choose(logits, noise, 0.0, config), draw_codes(logits.softmax(dim=-1), noise)
    with simulated_mps():
        there = logits.to("mps")
        found = choose(there, noise, 0.0, config), draw_codes(there.softmax(dim=-1), noise)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.cpu(), other)


def test_sampling_and_likelihoods_of_a_prior() -> None:
    """Codes, nats of images and of classes are those of a CPU."""
    torch.manual_seed(0)
    gpt = Gpt(GptConfig(layers=1, width=16, heads=2), SHAPE, classes=2).eval().requires_grad_(False)
    labels, noise = torch.tensor([0, 1]), torch.from_numpy(np.random.default_rng(0).random((2, SHAPE.length)))
    codes = generate(gpt, labels, noise)
    wanted = image_nats(gpt, codes, labels), nats_by_class(gpt, codes)
    with simulated_mps(), torch.inference_mode():  # as all of it is inside
        there = on_mps(gpt)
        found = generate(there, labels.to("mps"), noise)
        assert found.device == MPS
        nats = image_nats(there, found, labels.to("mps")), nats_by_class(there, found)
    assert torch.equal(found.cpu(), codes)
    for one, other in zip(nats, wanted, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.filterwarnings("ignore:.*frobenius_norm is deprecated")
def test_use_of_codes_and_bottlenecks() -> None:
    """Perplexity, the places that a bottleneck draws, and the bound of a dictionary's step."""
    matrix, weights = torch.randn(8, 5), torch.rand(30)
    gram = matrix.T @ matrix
    use = CodeUse(1, 8, torch.device("cpu"))
    use.add(torch.tensor([[1], [3], [3]]))
    with simulated_mps():
        there = on_mps(CodeUse(1, 8, torch.device("cpu")))
        there.add(torch.tensor([[1], [3], [3]]).to("mps"))
        assert there.metrics() == use.metrics()
        assert torch.equal(draw_indices(weights.to("mps"), 4, 0).cpu(), draw_indices(weights, 4, 0))
        assert torch.equal(largest_eigenvalue(gram.to("mps")).cpu(), largest_eigenvalue(gram))


@pytest.mark.parametrize(
    ("settings", "cuda", "mps", "device"),
    [
        ({}, False, False, "cpu"),
        ({}, False, True, "mps"),
        ({}, True, False, "cuda"),
        ({"WORLD_SIZE": "2"}, False, True, "cpu"),
        ({"WORLD_SIZE": "2"}, True, False, "cuda"),
        ({"ACCELERATE_USE_CPU": "true"}, False, True, "cpu"),
        ({"ACCELERATE_USE_CPU": "true"}, True, False, "cpu"),
    ],
)
def test_which_device_is_asked_for(
    settings: dict[str, str], cuda: bool, mps: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's GPU is Accelerate's to take, for one process; never where the CPU was asked for."""
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert launch.choose_device().type == device


def test_a_command_that_computes_in_float64_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and scores; the others leave Apple's GPU to Accelerate, and say that it is untested."""
    asked: list[bool] = []

    class RefusedError(Exception):
        """Ends the call here: this machine has no such device."""

    def make(cpu: bool, **_: object) -> Accelerator:
        asked.append(cpu)
        raise RefusedError

    monkeypatch.setattr(launch, "Accelerator", make)
    monkeypatch.setattr(launch, "choose_device", lambda: MPS)
    for exact in (False, True):
        with pytest.raises(RefusedError):
            launch.start_accelerator(exact)
    assert asked == [False, True]
