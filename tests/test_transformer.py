"""A layer of ours is the library's: the same numbers and gradients from the same weights, in fewer passes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from x_transformers import Decoder

from stage2_prior.fused import SHORT
from stage2_prior.transformer import DecoderLayer, Rotation, layer

WIDTH, HEADS = 24, 2


def random_layer(dropout: float = 0.0) -> DecoderLayer:
    torch.manual_seed(0)
    made = layer(WIDTH, HEADS, WIDTH // HEADS, 40, dropout)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def rotation_of(n: int) -> Rotation:
    angles = torch.randn(1, n, WIDTH // HEADS // 2, generator=torch.Generator().manual_seed(2))
    return angles.repeat_interleave(2, dim=-1), 1.0


def gradients(made: DecoderLayer, forward: Any, x: Tensor, rotation: Rotation | None) -> dict[str, Tensor]:
    """The output, and the gradients of a loss in which no two outputs count the same."""
    x = x.clone().requires_grad_()
    y = forward(made, x, rotary_pos_emb=rotation)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    names, parameters = zip(*made.named_parameters(), strict=True)
    return dict(zip(("output", "input", *names), (y, *torch.autograd.grad(loss, (x, *parameters))), strict=True))


@pytest.mark.parametrize("n", [1, 7, SHORT + 1])
@pytest.mark.parametrize("rotated", [True, False])
def test_numbers_and_gradients_are_the_library_s(n: int, rotated: bool) -> None:
    """Whichever way attention is computed, to 1e-6 of a tensor's norm; its last rounding errors come from sums over
    all positions."""
    made, rotation = random_layer(), rotation_of(n) if rotated else None
    x = torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(1))
    found = gradients(made, DecoderLayer.forward, x, rotation)
    wanted = gradients(made, Decoder.forward, x, rotation)
    for name, value in wanted.items():
        apart = (found[name] - value).norm()
        # One key gets all attention whatever the query says: then these gradients are zero, up to rounding.
        floor = 1e-6 if n == 1 and ("qk_norm" in name or "to_q" in name or "to_k" in name) else 0.0
        assert float(apart.detach()) <= 2e-6 * float(value.detach().norm()) + floor, name


def test_names_of_weights_are_the_library_s() -> None:
    """So weights files are read by both."""
    plain = Decoder(
        dim=WIDTH, depth=1, heads=HEADS, attn_dim_head=WIDTH // HEADS, pre_norm_has_final_norm=False, use_rmsnorm=True,
        ff_mult=40.5 / WIDTH, ff_swish=True, ff_glu=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
    )  # fmt: skip
    assert {name: value.shape for name, value in random_layer().state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }


def test_autocast_computes_products_in_bfloat16() -> None:
    """The output stays float32, as the residual stream is, and is near the exact one."""
    made, rotation = random_layer(), rotation_of(7)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    exact = gradients(made, DecoderLayer.forward, x, rotation)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(made, DecoderLayer.forward, x, rotation)
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        apart = float((rounded[name] - value).detach().norm() / value.detach().norm())
        assert 1e-4 < apart < 0.1, name


def test_dropout_is_for_training() -> None:
    made, x = random_layer(dropout=0.5), torch.randn(1, 9, WIDTH)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    assert torch.allclose(made(x), Decoder.forward(made, x), atol=1e-4)
