"""The normal latent: its KL, the draw and its gradient, the warm-up, and what the KL does to a latent when trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from stage1_tokenizer.bottlenecks.kl import LOG_VARIANCE, KlBottleneck, KlConfig
from stage1_tokenizer.engine.state import load_state, save_state

D = 6


def bottleneck(latent_channels: int = D, **options: Any) -> KlBottleneck:
    torch.manual_seed(0)
    return KlBottleneck(KlConfig(**options), latent_channels)


def latents(B: int = 4, h: int = 5, w: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def posterior(kl: KlBottleneck, z: Tensor) -> Normal:
    """The distribution (B, c, h, w) that the 1x1 convolution gives, in float64."""
    mean, log_variance = kl.project_in(z).double().chunk(2, dim=1)
    return Normal(mean, (0.5 * log_variance).exp())


@pytest.mark.parametrize("channels", [None, 3])
def test_the_kl_is_the_closed_form(channels: int | None) -> None:
    """Kingma and Welling, appendix B, against torch's own; the loss is the weight times nats per position, no other."""
    kl, z = bottleneck(channels=channels, weight=0.5), latents()
    expected = kl_divergence(posterior(kl, z), Normal(0.0, 1.0))  # (B, c, h, w)
    assert expected.shape[1] == (channels or D)
    out = kl(z)
    assert torch.allclose(out.stats["kl"].double(), expected.sum(dim=(1, 2, 3)).mean())
    assert torch.allclose(out.loss.double(), 0.5 * expected.sum() / (4 * 5 * 3))
    assert out.codes is None


def test_the_kl_is_the_mean_log_ratio_of_the_draws() -> None:
    """The KL equals its definition, computed from real draws: noise and KL must have the same variance."""
    kl, z = bottleneck(), latents(B=1, h=1, w=2)
    q = posterior(kl, z)
    drawn = kl(z.expand(40_000, -1, -1, -1)).z_q.double()
    # log q / p of normal densities: the constants cancel
    ratio = (0.5 * drawn.square() - 0.5 * ((drawn - q.mean) / q.stddev).square() - q.stddev.log()).sum(dim=(1, 2, 3))
    assert abs(ratio.mean() - kl(z).stats["kl"]) < 5 * ratio.std() / 200


def test_draws_have_the_posteriors_mean_and_spread() -> None:
    """The decoder gets sampled latents in train mode, with independent noise at each position."""
    kl, z = bottleneck(), latents(B=1, h=2, w=2)
    q = posterior(kl, z)
    drawn = kl(z.expand(20_000, -1, -1, -1)).z_q.double()  # (20000, D, 2, 2)
    apart = (drawn - q.mean) / q.stddev
    assert apart.mean(dim=0).abs().max() < 0.04
    assert (apart.std(dim=0) - 1).abs().max() < 0.04
    correlation = torch.corrcoef(apart.flatten(1).T)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.04


def test_eval_gives_the_mean() -> None:
    """Reconstructions for judging, and latents for later use, have no noise in them; and nothing is drawn for them."""
    kl, z = bottleneck(channels=3).eval(), latents()
    state = torch.get_rng_state()
    out = kl(z)
    assert torch.equal(out.z_q, kl.project_out(kl.project_in(z).chunk(2, dim=1)[0]))
    assert torch.equal(torch.get_rng_state(), state)
    assert out.z_q.shape == z.shape


def test_the_gradient_goes_through_the_draw() -> None:
    """Section 2.4: with the noise held fixed, z_q = mean + std * eps is differentiated, the variance too."""
    kl = bottleneck().double()
    z = latents(B=1, h=1, w=2).double().requires_grad_()
    towards = torch.randn(1, D, 1, 2, dtype=torch.float64)

    def value() -> Tensor:
        torch.manual_seed(3)
        drawn: Tensor = kl(z).z_q
        return (drawn * towards).sum()

    value().backward()  # type: ignore[no-untyped-call]
    weight = kl.project_in.weight
    assert weight.grad is not None
    for row in (0, D):  # the first row of the means, the first one of the log variances
        slope = weight.grad[row, 0, 0, 0].clone()
        with torch.no_grad():
            weight[row, 0] += 1e-2
            above = value()
            weight[row, 0] -= 2e-2
            below = value()
            weight[row, 0] += 1e-2
        assert abs(slope) > 1e-3
        assert abs((above - below) / 2e-2 - slope) < 1e-3


def test_the_variance_is_learned_against_the_noise() -> None:
    """A weight of 0 makes the variance shrink, since noise harms reconstruction; without a gradient it would stay."""
    kl, z = bottleneck(weight=0.0), latents(B=32)
    before = kl(z).stats["posterior_std"]
    optimizer = torch.optim.Adam(kl.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (kl(z).z_q - z).square().mean().backward()
        optimizer.step()
    assert kl(z).stats["posterior_std"] < 0.5 * before


def test_warm_up_weights_by_step() -> None:
    """0 at the first step, linear, the full weight from step `warmup_steps` on; micro-batches do not count as steps."""
    kl, z = bottleneck(weight=0.2, warmup_steps=4), latents()
    seen = []
    for _ in range(6):
        for _ in range(3):  # micro-batches
            out = kl(z)
        seen.append(float(out.stats["kl_weight"]))
        assert torch.allclose(out.loss, out.stats["kl_weight"] * out.stats["kl"] / 15)
        kl.finish_step()
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])
    assert float(bottleneck(weight=0.2)(z).stats["kl_weight"]) == pytest.approx(0.2)


def test_the_warm_up_survives_a_resume(tmp_path: Path) -> None:
    """Traps 24 and 41: a run that stops in its warm-up goes on with the weight it had, not again from 0."""
    kl = bottleneck(warmup_steps=8)
    for _ in range(3):
        kl.finish_step()
    state = save_state(tmp_path, 3, {"tokenizer": kl}, {})
    resumed = bottleneck(warmup_steps=8)
    load_state(state, {"tokenizer": resumed})
    for step in (3, 4):
        assert int(resumed.finished_steps) == step
        assert torch.equal(resumed.weight, kl.weight)
        kl.finish_step()
        resumed.finish_step()
    assert resumed.finished_steps.dtype == torch.int64


@pytest.mark.parametrize("channels", [None, 3])
def test_noise_is_taken_as_a_latent(channels: int | None) -> None:
    """An image sampled from the noise that the mean happens to be is the reconstruction: one decoder, one scale."""
    kl, z = bottleneck(channels=channels).eval(), latents()
    mean = kl.project_in(z).chunk(2, dim=1)[0]
    assert kl.noise_channels == mean.shape[1]
    assert torch.equal(kl.sample(mean), kl(z).z_q)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_log_variances_stay_finite(size: float) -> None:
    """exp overflows float32 at 89: one wild batch must not make the loss, or a gradient, infinite."""
    kl, z = bottleneck(), latents().requires_grad_()
    with torch.no_grad():
        assert kl.project_in.bias is not None
        kl.project_in.bias[D:] = size
    out = kl(z)
    (out.loss + out.z_q.square().mean()).backward()
    assert torch.isfinite(out.z_q).all()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    bound = LOG_VARIANCE[size > 0]
    assert float(out.stats["posterior_std"]) == pytest.approx(float(torch.tensor(bound / 2).exp()), rel=1e-4)


def test_autocast_leaves_the_kl_in_float32() -> None:
    """Near N(0, I) the terms of the KL cancel; in bf16 its value, and with it the gradient, would be rounding alone."""
    kl, z = bottleneck(weight=1.0), latents()
    with torch.no_grad():
        kl.project_in.weight.mul_(0.03)
        assert kl.project_in.bias is not None
        kl.project_in.bias.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kl(z)
        moments = kl.project_in(z)
    mean, log_variance = moments.double().chunk(2, dim=1)
    expected = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    rough = 0.5 * (moments[:, :D] ** 2 + moments[:, D:].exp() - 1 - moments[:, D:]).double().sum(1).mean()
    assert moments.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert abs(out.loss / expected - 1) < 1e-3 < abs(rough / expected - 1)


def test_trained_alone_the_kl_makes_the_latent_standard_normal() -> None:
    """The KL alone leads from any start to mean 0, std 1, no active channel, and draws that are noise."""
    kl, z = bottleneck(weight=1.0), 3 * latents(B=32)
    optimizer = torch.optim.Adam(kl.parameters(), lr=0.02)
    assert kl(z).stats["active_channels"] == 1
    for _ in range(250):
        optimizer.zero_grad()
        kl(z).loss.backward()
        optimizer.step()
    stats = kl(z).stats
    assert stats["kl"] < 0.01
    assert abs(stats["posterior_std"] - 1) < 0.01
    assert stats["active_channels"] == 0


def test_a_channel_without_use_is_given_up_and_one_with_use_is_kept() -> None:
    """The balance that the weight sets: of six channels, the two that are of use in reconstruction stay active."""
    kl, decoder = bottleneck(weight=0.02), nn.Conv2d(D, D, 1)
    z = torch.zeros(64, D, 3, 3)
    z[:, :2] = torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([*kl.parameters(), *decoder.parameters()], lr=0.04)
    for _ in range(300):
        optimizer.zero_grad()
        out = kl(z)
        ((decoder(out.z_q) - z).square().mean() + out.loss).backward()
        optimizer.step()
    mean, log_variance = kl.project_in(z).chunk(2, dim=1)
    nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(dim=(0, 2, 3))  # (D,)
    stats = kl.eval()(z).stats
    assert 0 < float(stats["active_channels"]) < 1, nats
    assert float(stats["active_channels"]) == pytest.approx(int((nats > 0.01).sum()) / D)
    error = (decoder(kl(z).z_q) - z).square().mean() / z.square().mean()
    assert error < 0.35, "what is active carries the two channels"


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"channels": 0}, {"warmup_steps": -1}], ids=str)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    """A negative weight would push latents away from what is sampled; the message names the key."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KlConfig(**wrong)
