"""Our layer equals the library's: the same numbers and gradients from the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from x_transformers import Decoder
from x_transformers.x_transformers import RMSNorm

from stage2_prior.gpt import fused
from stage2_prior.gpt.fused import SHORT
from stage2_prior.gpt.layer import DecoderLayer, build_layer

WIDTH, HEADS = 24, 2
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def random_layer(dropout: float = 0.0, **options: Any) -> DecoderLayer:
    torch.manual_seed(0)
    made = build_layer(WIDTH, HEADS, WIDTH // HEADS, 40, dropout, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def angles_of(n: int) -> Tensor:
    """(n, head width / 2)."""
    return torch.randn(n, WIDTH // HEADS // 2, generator=torch.Generator().manual_seed(2))


def library(made: DecoderLayer, x: Tensor, angles: Tensor | None) -> Tensor:
    """x-transformers' own layer, with its form of the angles: two neighbouring channels have the same."""
    rotation = None if angles is None else (angles.repeat_interleave(2, dim=-1)[None], 1.0)
    y: Tensor = Decoder.forward(made, x, rotary_pos_emb=rotation)
    return y


def ours(made: DecoderLayer, x: Tensor, angles: Tensor | None) -> Tensor:
    return made(x, None if angles is None else torch.stack([angles.cos(), angles.sin()], dim=-1))


def gradients(made: DecoderLayer, forward: Any, x: Tensor, angles: Tensor | None) -> dict[str, Tensor]:
    """The output, and the gradients of a loss in which no two outputs count the same."""
    x = x.clone().requires_grad_()
    y = forward(made, x, angles)
    loss = (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
    names, parameters = zip(*made.named_parameters(), strict=True)
    return dict(zip(("output", "input", *names), (y, *torch.autograd.grad(loss, (x, *parameters))), strict=True))


def compiled(made: DecoderLayer, x: Tensor, angles: Tensor | None) -> Tensor:
    """Return the layer as the compiler runs it; it must take the whole layer as one graph."""
    torch.compiler.reset()  # it counts how often it compiles a function, and gives up
    y: Tensor = torch.compile(ours, backend="aot_eager", fullgraph=True)(made, x, angles)
    return y


@pytest.mark.parametrize("n", [1, 7, SHORT[torch.float32] + 1])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("way", ["passes", "operators", "compiled", pytest.param("cuda", marks=ON_GPU)])
def test_numbers_and_gradients_are_the_library_s(
    n: int, rotated: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same results on all paths: our backward passes, torch's operators as on a GPU, compiled; each way of attention.
    To 1e-6 of a tensor's norm: the last rounding errors come from sums over all positions."""
    if way == "operators":
        monkeypatch.setattr(fused, "_uses_cpu_path", lambda x: False)
    device = way if way == "cuda" else "cpu"
    made, angles = random_layer().to(device), angles_of(n).to(device) if rotated else None
    x = torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    found = gradients(made, compiled if way == "compiled" else ours, x, angles)
    wanted = gradients(made, library, x, angles)
    share = 1e-5 if device == "cuda" else 2e-6  # a GPU sums in no fixed order
    for name, value in wanted.items():
        apart = (found[name] - value).norm()
        # One key gets all attention whatever the query says: then these gradients are zero, up to rounding.
        floor = 1e-6 if n == 1 and ("qk_norm" in name or "to_q" in name or "to_k" in name) else 0.0
        assert float(apart.detach()) <= share * float(value.detach().norm()) + floor, name


def rms_with_eps(eps: float) -> Any:
    """Return the library's RMSNorm with a number added to the mean square."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * (norm.g + float(norm.unit_offset))

    return forward


@pytest.mark.parametrize("options", [{"qk_norm": False}, {"norm_eps": 0.1}, {"feed_forward_bias": False}], ids=str)
@pytest.mark.parametrize("way", ["passes", "operators", "compiled"])
@pytest.mark.parametrize("rotated", [True, False])
def test_options_are_the_library_s_too(
    options: dict[str, Any], way: str, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer has all options; with each of them the library computes the same numbers and gradients."""
    if way == "operators":
        monkeypatch.setattr(fused, "_uses_cpu_path", lambda x: False)
    made, angles = random_layer(**options), angles_of(7) if rotated else None
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    found = gradients(made, compiled if way == "compiled" else ours, x, angles)
    monkeypatch.setattr(RMSNorm, "forward", rms_with_eps(options.get("norm_eps", 0.0)))
    wanted = gradients(made, library, x, angles)
    assert ("bias" in "".join(wanted)) == options.get("feed_forward_bias", True)
    assert ("qk_norm" in "".join(wanted)) == options.get("qk_norm", True)
    for name, value in wanted.items():
        assert float((found[name] - value).detach().norm()) <= 2e-6 * float(value.detach().norm()), name
    plain = gradients(random_layer(), ours, x, angles)["output"]
    assert not torch.allclose(found["output"], plain, atol=1e-3)


def test_names_of_weights_are_the_library_s() -> None:
    """Our layer and the library's read the same weights files."""
    plain = Decoder(
        dim=WIDTH, depth=1, heads=HEADS, attn_dim_head=WIDTH // HEADS, pre_norm_has_final_norm=False, use_rmsnorm=True,
        ff_mult=40.5 / WIDTH, ff_swish=True, ff_glu=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
    )  # fmt: skip
    assert {name: value.shape for name, value in random_layer().state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }


def test_autocast_computes_products_in_bfloat16() -> None:
    """The output stays float32, as the residual stream is, and is near the exact one."""
    made, angles = random_layer(), angles_of(7)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    exact = gradients(made, ours, x, angles)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(made, ours, x, angles)
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
