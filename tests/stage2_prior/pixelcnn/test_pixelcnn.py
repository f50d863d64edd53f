"""The gated PixelCNN: which positions a position depends on, against Jacobians and masked full kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.pixelcnn.layer import GatedLayer, gate
from stage2_prior.pixelcnn.model import PixelCnn, PixelCnnConfig
from tests.helpers.artefacts import pixelcnn

V = 11
GRIDS = [(5, 7), (7, 4)]
KERNELS = pytest.mark.parametrize(("first_kernel", "kernel"), [(3, 3), (5, 3), (7, 3), (3, 5), (5, 5), (7, 5)])


def dense(shape: TokenShape, **options: int) -> PixelCnn:
    """Build it in float64, so that small influences differ from none; gates stay in their linear range."""
    model = pixelcnn(shape, **options).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    return model


def jacobian(model: PixelCnn, grid: tuple[int, int]) -> Tensor:
    """(i, j): how strongly the logits at position i move with the embedded input x[j]."""
    generator = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1]
    x = torch.randn(1, n, model.config.width, generator=generator, dtype=torch.float64).requires_grad_()
    label = torch.tensor([1])
    depths = torch.zeros(1, n, 1, model.config.width, dtype=torch.float64)
    logits = model.head(model.contexts(x, label, grid), depths)[0, :, 0]  # (n, V)
    # One random direction of each position's logits: a direction that by chance sees nothing has probability 0.
    outputs = (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64)).sum(dim=1)
    return torch.stack([torch.autograd.grad(out, x, retain_graph=True)[0][0].abs().amax(dim=1) for out in outputs])


def fields(grid: tuple[int, int], reach: int) -> tuple[Tensor, Tensor]:
    """(i, j): what comes before in row-major order, and which of that lies within `reach` rows and columns."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    before = torch.tensor([[j < i for j in range(len(places))] for i in range(len(places))])
    near = torch.tensor([[max(abs(a - c), abs(b - d)) <= reach for c, d in places] for a, b in places])
    return before, before & near


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@KERNELS
def test_a_position_sees_all_that_came_before_it(grid: tuple[int, int], first_kernel: int, kernel: int) -> None:
    """Trap 31: no later position and not itself, and every earlier one without a blind spot, which a single stack of
    masked kernels has to the upper right; exactly so where the layers reach just to the far corner."""
    reach = max(grid) - 1
    layers = 1 + -(-(reach - first_kernel // 2) // (kernel // 2))
    seen = jacobian(dense(TokenShape(*grid, 1, V), layers=layers, first_kernel=first_kernel, kernel=kernel), grid)
    before, _ = fields(grid, reach)
    assert (seen[~before] == 0).all()
    assert (seen[before] > 1e-12).all()


@pytest.mark.parametrize("grid", [(7, 8), (9, 5)], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3])
@KERNELS
def test_the_field_has_the_size_of_the_formula(
    grid: tuple[int, int], layers: int, first_kernel: int, kernel: int
) -> None:
    """Trap 31: first_kernel // 2 + (layers - 1) * (kernel // 2) rows up and columns to either side, a full rectangle:
    whoever sizes a model by the config's formula must get just that."""
    reach = first_kernel // 2 + (layers - 1) * (kernel // 2)
    seen = jacobian(dense(TokenShape(*grid, 1, V), layers=layers, first_kernel=first_kernel, kernel=kernel), grid)
    _, field = fields(grid, reach)
    assert (seen[~field] == 0).all()
    assert (seen[field] > 1e-12).all()


def test_tokens_see_just_those_before_them() -> None:
    """Traps 31 and 37: the same through codes, with several codes at each position, in row-major order."""
    shape = TokenShape(3, 4, 2, V)
    model, labels = pixelcnn(shape).double(), torch.tensor([0, 1, 2])
    codes = torch.randint(V, (3, *shape[:3]), generator=torch.Generator().manual_seed(0))
    before = model(codes, labels)
    for t in range(shape.length):
        changed = codes.clone()
        place = slice(None), t // (shape.w * shape.K), t // shape.K % shape.w, t % shape.K
        changed[place] = (changed[place] + 1) % V
        apart = (model(changed, labels) - before).abs().amax(dim=-1)  # (B, L)
        assert (apart[:, : t + 1] == 0).all(), f"a position up to {t} sees token {t}"
        assert (apart[:, t + 1 :] > 1e-7).all(), f"a position after {t} does not see token {t}"


def masked(layer: GatedLayer, above: Tensor, left: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The layer by full k x k kernels, centred on the position and masked by zeros, as equation and figure have it."""
    r = layer.reach
    side, middle = 2 * r + 1, r
    vertical = layer.vertical.weight.new_zeros(*layer.vertical.weight.shape[:2], side, side)
    vertical[:, :, : middle if layer.first else middle + 1] = layer.vertical.weight
    horizontal = torch.zeros_like(vertical)
    horizontal[:, :, middle, : middle if layer.first else middle + 1] = layer.horizontal.weight[:, :, 0]
    v = F.conv2d(above, vertical, layer.vertical.bias, padding=r)
    h = F.conv2d(left, horizontal, layer.horizontal.bias, padding=r) + F.conv2d(v, layer.across.weight)
    biases = layer.label.weight[labels][:, :, None, None]
    half = biases.shape[1] // 2
    v, h = v + biases[:, :half], h + biases[:, half:]
    n = v.shape[1] // 2
    v, h = (torch.tanh(both[:, :n]) * torch.sigmoid(both[:, n:]) for both in (v, h))
    out = F.conv2d(h, layer.residual.weight, layer.residual.bias)
    return v, out if layer.first else out + left


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_layer_is_that_of_masked_kernels(first: bool, kernel: int) -> None:
    """Trap 31: kernels that leave taps out and shift by padding are those of the paper, which masks full ones."""
    torch.manual_seed(0)
    layer = GatedLayer(6, kernel, 3, 0.0, first=first).double()
    torch.nn.init.normal_(layer.label.weight)
    above, left = torch.randn(2, 3, 6, 5, 4).double()
    labels = torch.tensor([0, 2, 1])
    for found, wanted in zip(layer(above, left, labels), masked(layer, above, left, labels), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_whole_model_is_that_of_masked_kernels() -> None:
    """Trap 31: mask A in the first layer and B in all others, and both stacks begin with the embedded codes."""
    shape = TokenShape(4, 5, 1, V)
    model = pixelcnn(shape, layers=3, first_kernel=5).double()
    x, labels = torch.randn(2, 20, 24).double(), torch.tensor([0, 2])
    above = left = x.mT.reshape(2, 24, 4, 5)
    for layer in model.layers:
        assert isinstance(layer, GatedLayer)
        above, left = masked(layer, above, left, labels)
    wanted = F.conv2d(left.relu(), model.output.weight, model.output.bias).relu().flatten(2).mT
    assert torch.allclose(model.contexts(x, labels, (4, 5)), wanted, rtol=1e-9, atol=1e-9)


def test_the_gate_is_equation_2() -> None:
    """The half that says what comes first, the half that says how much of it second, along any axis."""
    x = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    wanted = torch.tensor([[0.5, -1.0]]).tanh() * torch.tensor([[2.0, 0.0]]).sigmoid()
    assert torch.allclose(gate(x, dim=1), wanted)
    assert torch.allclose(gate(x.mT, dim=0), wanted.mT)


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_layer_has_no_shortcut(first: bool) -> None:
    """Trap 31: what stands at a position in the first layer is its own code, which a shortcut would show to it; a
    later layer without one would be no residual network."""
    layer = GatedLayer(4, 3, 1, 0.0, first=first)
    torch.nn.init.zeros_(layer.residual.weight)
    assert layer.residual.bias is not None
    torch.nn.init.zeros_(layer.residual.bias)
    left = torch.randn(1, 4, 3, 5)
    _, out = layer(torch.randn(1, 4, 3, 5), left, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(out, torch.zeros_like(left) if first else left)


def test_each_model_has_one_first_layer() -> None:
    """Trap 31: a second type-A layer would hide the nearest neighbours again, a first one of type B would leak."""
    model = pixelcnn(TokenShape(3, 4, 1, V), layers=4, first_kernel=7, kernel=3)
    layers = [layer for layer in model.layers if isinstance(layer, GatedLayer)]
    assert [layer.first for layer in layers] == [True, False, False, False]
    assert [layer.vertical.kernel_size for layer in layers] == [(3, 7), (2, 3), (2, 3), (2, 3)]
    assert [layer.horizontal.kernel_size for layer in layers] == [(1, 3), (1, 2), (1, 2), (1, 2)]


def test_every_position_knows_the_label() -> None:
    """Trap 32: the class, or that none is given, must reach the first position as well as the last."""
    shape = TokenShape(3, 4, 2, V)
    model = pixelcnn(shape, classes=2)
    codes = torch.randint(V, (3, *shape[:3]), generator=torch.Generator().manual_seed(0))
    logits = [model(codes, torch.full((3,), label)) for label in (0, 1, model.null_label)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert ((logits[one] - logits[other]).abs().amax(dim=-1) > 1e-3).all()


def test_every_layer_and_both_stacks_know_the_label() -> None:
    """Equation 4 conditions each layer; the last one's vertical stack goes nowhere and is the only exception."""
    model = pixelcnn(TokenShape(3, 4, 1, V), layers=3).requires_grad_(True)
    codes = torch.randint(V, (1, 3, 4, 1), generator=torch.Generator().manual_seed(0))
    model(codes, torch.tensor([1])).square().sum().backward()
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, GatedLayer)
        gradient = layer.label.weight.grad
        assert gradient is not None
        assert (gradient[[0, 2]] == 0).all()
        vertical, horizontal = gradient[1].chunk(2)
        assert (horizontal != 0).all()
        assert (vertical != 0).all() == (index < 2)


def test_eval_has_no_dropout() -> None:
    """Trap 25: samples and validation come from the whole network; only training drops parts of it, as was asked."""
    shape = TokenShape(3, 4, 1, V)
    codes, labels = torch.randint(V, (2, 3, 4, 1)), torch.tensor([0, 1])
    model = pixelcnn(shape, dropout=0.5)
    assert torch.equal(model(codes, labels), pixelcnn(shape, dropout=0.0)(codes, labels))
    model.train()
    assert not torch.allclose(model(codes, labels), model(codes, labels))


@pytest.mark.parametrize("options", [{"kernel": 4}, {"first_kernel": 6}, {"first_kernel": 1}], ids=str)
def test_a_kernel_without_a_middle_is_refused(options: dict[str, int]) -> None:
    """An even kernel would see further to one side, and a first kernel of 1 nothing at all."""
    with pytest.raises(ValueError, match=r"must be (odd|at least 3)"):
        PixelCnnConfig(**options)
