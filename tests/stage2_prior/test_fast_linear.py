"""Linear maps prepared for generation: against F.linear, and what their rounding may depend on."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior import fast_linear
from stage2_prior.fast_linear import Precision, prepare

SIZES = pytest.mark.parametrize("size", [(1, 8, 8), (3, 20, 33), (16, 64, 192), (64, 192, 64)], ids=str)


def case(size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, i), weight (o, i) with outputs of very different sizes, bias (o,)."""
    n, i, o = size
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((n, i), (o, i), (o,)))
    return x, weight * torch.logspace(-2, 2, o)[:, None], bias


@SIZES
@pytest.mark.parametrize("packed", [True, False])
def test_float32_is_the_linear_layer(size: tuple[int, int, int], packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever library multiplies."""
    if packed and not processor.has_onednn():
        pytest.skip("this build of torch has no such operators")
    monkeypatch.setenv(processor.FAST_PATHS_VARIABLE, "packed" if packed else "-packed")
    x, weight, bias = case(size)
    for given in (None, bias):
        wanted = F.linear(x.double(), weight.double(), None if given is None else given.double())
        found = prepare(weight, given, "float32")(x)
        assert ((found - wanted).norm(dim=0) / wanted.norm(dim=0)).max() < 1e-6


@SIZES
@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 1e-2), ("int8", 2e-2)])
def test_rounding_is_relative_to_each_output(size: tuple[int, int, int], precision: Precision, most: float) -> None:
    """An output with small weights is as exact as one with large weights: each has its own scale."""
    x, weight, bias = case(size)
    wanted = F.linear(x, weight, bias)
    found = prepare(weight, bias, precision)(x)
    assert found.dtype == x.dtype
    assert 0 < ((found - wanted).norm(dim=0) / (wanted - bias).norm(dim=0).clamp_min(1e-3)).median() < most


@pytest.mark.parametrize("precision", ["int8"])
def test_a_row_does_not_depend_on_the_others(precision: Precision) -> None:
    """Trap 35: what an image becomes must not depend on its batch; torch's dynamic quantization takes one scale for all
    rows. The sums are of integers, so a row is the same to the bit."""
    x, weight, bias = case((16, 64, 192))
    x[3] *= 1000.0
    product = prepare(weight, bias, precision)
    together = product(x)
    for row in range(16):
        assert torch.equal(product(x[row : row + 1])[0], together[row])


def test_int8_sums_never_saturate() -> None:
    """All inputs and weights at their largest: without VNNI two fast_linear are added in 16 bits."""
    x, weight = torch.ones(2, 512), torch.ones(8, 512)
    x[1] = -1.0
    found = prepare(weight, None, "int8")(x)
    assert torch.allclose(found, torch.tensor([[512.0], [-512.0]]).expand(2, 8), rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_zeros(precision: Precision) -> None:
    """A row of zeros has no largest number to be relative to."""
    x, weight, bias = case((4, 8, 8))
    x[1] = 0.0
    weight[2] = 0.0
    found = prepare(weight, bias, precision)(x)
    assert torch.allclose(found[1], bias)
    assert torch.allclose(found[:, 2], bias[2])


def test_without_onednns_private_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may go with any release of torch; the plain product takes their place."""
    monkeypatch.delenv(processor.FAST_PATHS_VARIABLE, raising=False)
    monkeypatch.setattr(processor, "is_amd", lambda: True)
    x, weight, bias = case((3, 20, 33))
    wanted = F.linear(x, weight, bias)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert torch.equal(prepare(weight, bias, "float32")(x), wanted)


def test_int8_without_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every build of torch has it: ARM's has not."""
    monkeypatch.setattr(fast_linear, "_quantized_engines", lambda: ["qnnpack"])
    with pytest.raises(ConfigError, match=r"precision int8: .*FBGEMM.*float32"):
        prepare(torch.ones(2, 2), None, "int8")
