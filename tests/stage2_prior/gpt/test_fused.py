"""Operations of a layer with their own backward pass: against plain formulas, gradients against differences."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.gpt import fused
from stage2_prior.gpt.fused import SHORT, causal_attention, normalise_and_rotate, normalise_rms, rotate, swiglu

GRADCHECK: Callable[..., bool] = torch.autograd.gradcheck


def random(*shape: int, seed: int = 0) -> Tensor:
    """float64, with a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def turns_of(n: int, half: int) -> Tensor:
    """(n, half, 2)."""
    angles = random(n, half, seed=9).detach()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


@pytest.fixture(params=["passes", "operators"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backward passes of our own, and torch's operators, as on a GPU."""
    if request.param == "operators":
        monkeypatch.setattr(fused, "_uses_cpu_path", lambda x: False)
    return str(request.param)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 5, 4)], ids=str)
def test_unit_vectors_are_scaled(shape: tuple[int, ...]) -> None:
    """The scale may be per channel, or per channel of each head."""
    x, scale = random(*shape), random(*shape[2:], seed=1)
    assert torch.allclose(normalise_and_rotate(x, scale), F.normalize(x, dim=-1) * scale)
    assert GRADCHECK(normalise_and_rotate, (x, scale))


def test_unit_vectors_are_turned() -> None:
    """Pairs of neighbouring channels turn by the angle of their position."""
    x, scale, turns = random(2, 3, 5, 4), random(5, 4, seed=1), turns_of(3, 2)
    found = normalise_and_rotate(x, scale, turns)
    one, other = (F.normalize(x, dim=-1) * scale).unflatten(-1, (-1, 2)).unbind(dim=-1)  # type: ignore[no-untyped-call]
    cos, sin = turns[:, None].unbind(dim=-1)
    wanted = torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2)
    assert torch.allclose(found, wanted)
    assert GRADCHECK(lambda x, scale: normalise_and_rotate(x, scale, turns), (x, scale))


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_eps_is_added_to_the_mean_square(eps: float) -> None:
    """RMSNorm of LlamaGen: x / sqrt(mean(x^2) + eps); the gradients follow, and generation normalises alike."""
    x, gain = random(2, 3, 4), random(4, seed=1)
    wanted = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    assert torch.allclose(normalise_and_rotate(x, gain * 2.0, eps=eps), wanted * gain, rtol=1e-12)
    assert GRADCHECK(lambda x, gain: normalise_and_rotate(x, gain * 2.0, eps=eps), (x, gain))
    assert torch.allclose(normalise_rms(x.detach(), eps), wanted, rtol=1e-12)


def test_vectors_are_turned_without_a_norm() -> None:
    """A turn of (1, 0) leaves a pair as it is, one of (0, 0) makes it zero, and one by an angle keeps its length."""
    x, turns = random(2, 3, 5, 4), turns_of(3, 2)
    turns[0], turns[1] = 0.0, torch.tensor([1.0, 0.0])
    found = rotate(x, turns)
    assert not found[:, 0].any()
    assert torch.equal(found[:, 1], x[:, 1])
    one, other = x[:, 2].unflatten(-1, (-1, 2)).unbind(dim=-1)  # type: ignore[no-untyped-call]
    cos, sin = turns[2].unbind(dim=-1)
    wanted = torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2)
    assert torch.allclose(found[:, 2], wanted)
    assert GRADCHECK(lambda x: rotate(x, turns), (x,))


def test_a_vector_of_zeros_stays_one() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = normalise_and_rotate(x, torch.ones(4))
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert not y.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gating() -> None:
    x = random(2, 3, 8)
    value, gate = x.chunk(2, dim=-1)
    assert torch.allclose(swiglu(x), value * gate * gate.sigmoid())
    assert GRADCHECK(swiglu, (x,))


@pytest.mark.parametrize("n", [1, 6])
def test_attention_by_plain_products(n: int) -> None:
    q, k, v = (random(2, n, 3, 4, seed=seed) for seed in range(3))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.3
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
    assert torch.allclose(causal_attention(q, k, v, 0.3), wanted)
    assert GRADCHECK(lambda q, k, v: causal_attention(q, k, v, 0.3), (q, k, v))


def test_short_and_long_sequences_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain products and torch's own attention are two ways to the same numbers."""
    found = []
    for short in (SHORT, {}):
        monkeypatch.setattr(fused, "SHORT", short)
        q, k, v = (random(2, 7, 3, 4, seed=seed).float().detach().requires_grad_() for seed in range(3))
        y = causal_attention(q, k, v, 0.3)
        found.append([y, *torch.autograd.grad(y.square().sum(), [q, k, v])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_attention_drops_weights() -> None:
    """Half of them, and the rest count twice: over many positions the mean stays."""
    q, k = torch.zeros(2, 1, 2000, 1, 4)
    torch.manual_seed(0)
    y = causal_attention(q, k, torch.ones(1, 2000, 1, 4), 1.0, share=0.5)[0, :, 0, 0]
    assert 0.01 < float(y[1000:].std()) < 0.05
    assert float(y[1000:].mean()) == pytest.approx(1.0, abs=0.01)
