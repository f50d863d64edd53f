"""Dropout with 16 random bits per element: shares, scale and independence of its masks, gradients, the generator."""

import math

import pytest
import torch
from torch import Tensor

from stage2_prior.gpt.dropout import dropout

N = 2**20
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers of both signs, none of them 0."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.where(x == 0, 1.0, x)


def kept(share: float, n: int = N, seed: int = 0) -> Tensor:
    """Return which of n ones are kept, as float64 (n,)."""
    torch.manual_seed(seed)
    return (dropout(torch.ones(n), share) != 0).double()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_the_share_of_zeros(share: float) -> None:
    """Within five standard deviations. 8 bits per element would make 26 / 256 of 0.1, which is eight of them away."""
    sigma = math.sqrt(share * (1 - share) / N)
    assert abs(1 - float(kept(share).mean()) - share) < 5 * sigma + 2**-17


@TYPES
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_expectation_stays(dtype: torch.dtype, share: float) -> None:
    """What is kept is divided by the share kept, in bfloat16 too: a mask that is scaled first, as torch's, is rounded
    to 1.109 for 0.1, and all results are 0.16 % too small."""
    torch.manual_seed(0)
    x = random(N, dtype=dtype)
    y = dropout(x, share)
    assert y.dtype == dtype
    x, y = x[y != 0].double(), y[y != 0].double()
    assert float((x * y).sum() / x.square().sum()) * (1 - share) == pytest.approx(1.0, abs=2e-4)
    assert torch.allclose(y, x / (1 - share), rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-4)


def test_elements_are_independent() -> None:
    """Of one draw of 64 bits, of neighbouring draws, and of two masks in a row: no correlation by five sigma."""
    mask = kept(0.5) - 0.5
    for lag in range(1, 9):
        for start in range(4):
            pairs = mask[start:-lag:4] * mask[start + lag :: 4][: len(mask[start:-lag:4])]
            assert abs(float(pairs.mean())) < 5 * 0.25 / math.sqrt(len(pairs)), (lag, start)
    torch.manual_seed(0)
    one, other = ((dropout(torch.ones(N), 0.5) != 0).double() - 0.5 for _ in range(2))
    assert abs(float((one * other).mean())) < 5 * 0.25 / math.sqrt(N)


@TYPES
def test_the_gradient_takes_the_same_mask(dtype: torch.dtype) -> None:
    x, weights = random(3, 5, 7, dtype=dtype).requires_grad_(), random(3, 5, 7, dtype=dtype)
    torch.manual_seed(0)
    y = dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y, x, weights)
    assert 0 < int((y == 0).sum()) < y.numel()
    torch.manual_seed(0)
    assert torch.equal(gradient, dropout(weights, 0.4))


def test_the_generator_decides() -> None:
    """A mask is a function of the state of torch's generator, and moves it on; no dropout leaves it as it is."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert dropout(torch.ones(10), 0.0).all()
    assert torch.equal(torch.get_rng_state(), state)
    one, other = dropout(torch.ones(101), 0.5), dropout(torch.ones(101), 0.5)
    assert not torch.equal(one, other)
    torch.set_rng_state(state)
    assert torch.equal(dropout(torch.ones(101), 0.5), one)


def test_the_largest_share_keeps_some() -> None:
    assert dropout(torch.ones(N), 0.999999).any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_the_same(backend: str) -> None:
    """The same masks: two of them in one graph are drawn one by one, and the backward pass takes those of the forward
    pass."""

    def twice(x: Tensor) -> Tensor:
        return dropout(x, 0.25) * 2.0 + dropout(x, 0.25)

    found = []
    for function in (twice, torch.compile(twice, backend=backend, fullgraph=True)):
        x = random(1000).requires_grad_()
        torch.manual_seed(0)
        y = function(x)
        found.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert len(set(found[0][1].tolist())) == 4  # neither, either or both kept
