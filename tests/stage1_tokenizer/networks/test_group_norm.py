"""The group norm of the networks: as exact as torch's in every layout and precision, and in channels_last."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.networks import group_norm
from stage1_tokenizer.networks.group_norm import GroupNorm

SHAPES = [(3, 32, 32, 32), (3, 64, 8, 8), (2, 96, 5, 7), (2, 512, 6, 6), (4, 64, 1, 1)]


def results(norm: torch.nn.GroupNorm, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of input, weight and bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), gradient)]


def make_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[GroupNorm, torch.nn.GroupNorm, Tensor, Tensor]:
    """Return the norm, torch's with the same weights in float64, an input whose mean is not 0, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    norm, exact = GroupNorm(32, shape[1], eps=1e-6), torch.nn.GroupNorm(32, shape[1], eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        norm.bias.copy_(torch.randn(shape[1], generator=generator))
        exact.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    x, gradient = (
        (torch.randn(shape, generator=generator) * 3.0 + 1.0).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    return norm, exact, x, gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_is_no_further_from_float64_than_torchs(shape: tuple[int, ...]) -> None:
    norm, exact, x, gradient = make_case(shape, torch.bfloat16)
    torchs = torch.nn.GroupNorm(32, shape[1], eps=1e-6)
    torchs.load_state_dict(norm.state_dict())
    true = results(exact, x.double(), gradient.double())
    for value, theirs, wanted in zip(results(norm, x, gradient), results(torchs, x, gradient), true, strict=True):
        assert value.dtype == theirs.dtype
        # One group of one number has variance 0: there its gradient is rounding alone.
        assert (value - wanted).norm() <= 1.01 * (theirs - wanted).norm() + 1e-5 * wanted.norm() + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_it_is_torchs(shape: tuple[int, ...]) -> None:
    norm, _, x, gradient = make_case(shape, torch.float32)
    torchs = torch.nn.GroupNorm(32, shape[1], eps=1e-6)
    torchs.load_state_dict(norm.state_dict())
    for value, wanted in zip(results(norm, x, gradient), results(torchs, x, gradient), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_memory_layout_stays(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    norm, _, x, gradient = make_case(shape, torch.bfloat16)
    y, of_x, *_ = results(norm, x.contiguous(memory_format=layout), gradient.contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    assert of_x.is_contiguous(memory_format=layout)


def test_narrow_norms_in_bfloat16_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 channels in 32 groups take it, 512 do not, nor does anything that is traced."""

    class TakenError(Exception):
        """Raised by the fast way."""

    def take(*arguments: object) -> None:
        raise TakenError

    monkeypatch.setattr(group_norm._NarrowGroupNorm, "apply", take)
    narrow, _, x, _ = make_case(SHAPES[0], torch.bfloat16)
    wide, _, wide_x, _ = make_case(SHAPES[3], torch.bfloat16)
    with pytest.raises(TakenError):
        narrow(x)
    assert torch.equal(wide(wide_x), F.group_norm(wide_x, 32, wide.weight, wide.bias, 1e-6))
    narrow(x.float()), narrow(x.contiguous())
    torch.export.export(narrow, (x,))
