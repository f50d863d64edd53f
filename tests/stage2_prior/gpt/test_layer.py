"""One layer: its options, against a layer written from the papers, and what the library makes of it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from x_transformers import Decoder

from stage2_prior.gpt.generation import normalise_rms
from stage2_prior.gpt.layer import LONG, DecoderLayer, LayerWeights, build_layer

WIDTH, HEADS = 24, 2
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def random_layer(dropout: float = 0.0, **options: Any) -> DecoderLayer:
    torch.manual_seed(0)
    made = build_layer(WIDTH, HEADS, WIDTH // HEADS, 40, dropout, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def inputs(n: int, rotated: bool = True) -> tuple[Tensor, Tensor | None]:
    """(2, n, WIDTH), and angles (n, head width / 2)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, n, WIDTH, generator=generator)
    return x, torch.randn(n, WIDTH // HEADS // 2, generator=generator) if rotated else None


def from_the_papers(layer: DecoderLayer, x: Tensor, angles: Tensor | None, zero_first: bool = False) -> Tensor:
    """The layer in few lines, with the weights that generation reads."""
    weights = LayerWeights.of(layer)
    B, n, _ = x.shape

    def normalise(v: Tensor, eps: float) -> Tensor:
        return v / (v.square().mean(dim=-1, keepdim=True) + eps).sqrt()

    q, k, v = F.linear(normalise(x, weights.norm_eps), weights.query_key_value).view(B, n, 3, HEADS, -1).unbind(dim=2)
    if weights.has_qk_norm:
        q, k = normalise(q, 0.0), normalise(k, 0.0)
    q, k = q * weights.gains[:HEADS], k * weights.gains[HEADS:]
    if angles is not None:
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (n, 1, d / 2)
        q, k = (
            torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)  # type: ignore[no-untyped-call]
            for part in (q, k)
        )
    if zero_first:
        k = torch.cat([0.0 * k[:, :1], k[:, 1:]], dim=1)
    logits = torch.einsum("bihd,bjhd->bhij", q, k)
    attention = logits.masked_fill(torch.ones(n, n, device=x.device).triu(1).bool(), -torch.inf).softmax(dim=-1)
    assert weights.out is not None
    x = x + F.linear(torch.einsum("bhij,bjhd->bihd", attention, v).flatten(-2), *weights.out)
    up, gate = F.linear(normalise(x, weights.norm_eps), *weights.up_gate).chunk(2, dim=-1)
    return x + F.linear(up * F.silu(gate), *weights.down)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"qk_norm": False},
    {"norm_eps": 0.1},
    {"feed_forward_bias": False},
    {"start_rotation": "zero"},
    {"length": LONG + 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_it_is_the_paper_s_layer(options: dict[str, Any], n: int, rotated: bool, device: str) -> None:
    """Numbers, and gradients of input and weights, of a loss in which no two outputs count the same."""
    layer, (x, angles) = random_layer(**options).to(device), inputs(n, rotated)
    x, angles, zero_first = x.to(device), None if angles is None else angles.to(device), "start_rotation" in options
    found = []
    for by_library in (True, False):
        given = x.clone().requires_grad_()
        y = layer(given, angles) if by_library else from_the_papers(layer, given, angles, zero_first)
        weights = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
        found.append((y, *torch.autograd.grad((y * weights).sum(), (given, *layer.parameters()))))
    for name, ours, wanted in zip(("y", "x", *dict(layer.named_parameters())), *found, strict=True):
        # One key gets all attention whatever the query says: then these gradients are zero, up to rounding.
        floor = 1e-6 if n == 1 and ("qk_norm" in name or "to_q" in name or "to_k" in name) else 0.0
        assert float((ours - wanted).detach().norm()) <= 1e-5 * float(wanted.detach().norm()) + floor, name


@pytest.mark.parametrize("options", OPTIONS[1:-1], ids=str)
def test_each_option_has_an_effect(options: dict[str, Any]) -> None:
    x, angles = inputs(7)
    assert not torch.allclose(random_layer(**options)(x, angles), random_layer()(x, angles), atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_compiler_takes_it_as_one_graph(options: dict[str, Any]) -> None:
    torch.compiler.reset()  # it counts how often it compiles a function, and gives up
    layer, (x, angles) = random_layer(**options), inputs(7)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, angles), layer(x, angles), atol=1e-5)


def test_names_of_weights_are_the_library_s() -> None:
    """Our layer and the library's read the same weights files, whatever the options."""
    plain = Decoder(
        dim=WIDTH, depth=1, heads=HEADS, attn_dim_head=WIDTH // HEADS, pre_norm_has_final_norm=False, use_rmsnorm=True,
        ff_mult=40.5 / WIDTH, ff_swish=True, ff_glu=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
    )  # fmt: skip
    wanted = {name: value.shape for name, value in plain.state_dict().items()}
    varied: list[dict[str, Any]] = [{}, {"dropout": 0.1, "norm_eps": 0.1, "start_rotation": "zero", "length": LONG + 1}]
    for options in varied:
        assert {name: value.shape for name, value in random_layer(**options).state_dict().items()} == wanted


def test_autocast_computes_products_in_bfloat16() -> None:
    """The output stays float32, as the residual stream is, and is near the exact one."""
    layer, (x, angles) = random_layer(), inputs(7)
    exact = layer(x, angles)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x, angles)
    assert rounded.dtype == torch.float32
    assert 1e-4 < float(((rounded - exact).norm() / exact.norm()).detach()) < 0.1


@pytest.mark.parametrize("length", [0, LONG + 1])
def test_dropout_is_for_training(length: int) -> None:
    """Both in the attention and behind SwiGLU, and each alone changes the output."""
    made, (x, angles) = random_layer(dropout=0.5, length=length), inputs(9)
    assert not torch.equal(made(x, angles), made(x, angles))
    exact = random_layer()(x, angles)
    torch.testing.assert_close(made.eval()(x, angles), exact)
    for part in ("attention", "feed-forward"):
        one = random_layer(dropout=0.5, length=length)
        (_, attention, _), (_, feed_forward, _) = one.layers
        if part == "attention":
            feed_forward.ff[1].p = 0.0
        else:
            attention.attend.dropout, attention.attend.attn_dropout.p = 0.0, 0.0
        assert not torch.allclose(one(x, angles), exact), part


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_normalise_rms(eps: float) -> None:
    """A mean square of 1; with a number added to it, less; vectors of zeros stay as they are."""
    x = inputs(7)[0].double()
    assert torch.allclose(normalise_rms(x, eps), x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt(), rtol=1e-12)
    assert not normalise_rms(torch.zeros(2, 3), eps).any()
