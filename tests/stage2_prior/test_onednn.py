"""Linear maps by oneDNN: equal to torch's, with the same names, and unused where oneDNN is missing."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.engine import processor
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior import fast_linear
from stage2_prior.fast_linear import MIN_ROWS, OneDnnLinear, use_onednn_linear
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.likelihood import token_loss

SHAPE = TokenShape(8, 9, 1, 33)


@pytest.fixture
def _preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this processor's float32 products are faster by oneDNN."""
    if not processor.has_onednn():
        pytest.skip("this build of torch has no such operators")
    monkeypatch.setenv(processor.FAST_PATHS_VARIABLE, "onednn")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that oneDNN computes."""
    seen: list[int] = []
    multiply = processor.multiply

    def counted(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(len(x))
        return multiply(x, packed, bias)

    monkeypatch.setattr(fast_linear, "multiply", counted)
    return seen


def loss_and_gradients(checkpoint: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = Gpt(GptConfig(layers=2, width=32, heads=2, checkpoint=checkpoint), SHAPE, classes=2).train()
    codes = torch.randint(SHAPE.V, (3, *SHAPE[:3]), generator=torch.Generator().manual_seed(1))
    loss = token_loss(model(codes, torch.tensor([0, 1, 2])), codes)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("_preferred")
def test_equal_to_torch_s(bias: bool, calls: list[int]) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(24, 40, bias=bias), torch.randn(2, MIN_ROWS, 24, requires_grad=True)
    ours = OneDnnLinear(24, 40, bias=bias)
    ours.load_state_dict(plain.state_dict())
    found = []
    for linear in (plain, ours):
        y = linear(x)
        found.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *linear.parameters()])])
    assert len(calls) == 3, "forward, and two products backward"
    for one, other in zip(*found, strict=True):
        assert float((one - other).detach().norm()) <= 1e-6 * float(one.detach().norm())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.usefixtures("_preferred")
def test_a_prior_s_gradients_are_equal(checkpoint: bool, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """All of its linear maps go that way: four in a layer and the head, in a checkpointed layer once more."""
    found = loss_and_gradients(checkpoint)
    assert len(calls) == (2 * 4 + 1) * 3 + 2 * 4 * checkpoint
    monkeypatch.setenv(processor.FAST_PATHS_VARIABLE, "-onednn")
    wanted = loss_and_gradients(checkpoint)
    assert len(calls) == (2 * 4 + 1) * 3 + 2 * 4 * checkpoint
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm())


@pytest.mark.usefixtures("_preferred")
def test_what_it_leaves_to_torch(calls: list[int]) -> None:
    """Few rows, other dtypes, autocast."""
    linear, x = OneDnnLinear(8, 8), torch.randn(MIN_ROWS, 8)
    linear(x[1:])
    with torch.autocast("cpu", torch.bfloat16):
        linear(x)
    linear.double()(x.double())
    assert calls == []


def test_without_the_operators_torch_computes(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """They are private, so another version may have neither."""
    linear, x = OneDnnLinear(8, 8), torch.randn(MIN_ROWS, 8)
    monkeypatch.delenv(processor.FAST_PATHS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(processor, "is_amd", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert not processor.has_onednn()
    linear(x)
    assert calls == []


def test_another_library_s_module_keeps_its_weights() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5, bias=False)))
    before = dict(module.state_dict())
    use_onednn_linear(module)
    assert [type(part) for part in module.modules()].count(OneDnnLinear) == 2
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == value.data_ptr() for name, value in before.items())
