"""The generator's and the discriminator's losses: values, signs, gradients, and the adaptive weight."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from stage1_tokenizer.objective import (
    PixelConfig,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)

Kind = Literal["hinge", "vanilla"]
KINDS: tuple[Kind, ...] = ("hinge", "vanilla")


def bottlenecked(loss: float) -> Bottlenecked:
    return Bottlenecked(torch.zeros(1, 1, 1, 1), None, torch.tensor(loss), {"commitment": torch.tensor(7.0)})


def test_reconstruction_is_the_weighted_sum_of_its_terms() -> None:
    """Each weight scales its own term, and the terms are logged before weighting, so that runs compare."""
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), -0.5)

    def perceptual(real: Tensor, fake: Tensor) -> Tensor:
        return (real - 2 * fake).mean()  # 1.0, and -2 * 0.5 in the wrong order

    total, parts = reconstruction_loss(x, x_hat, PixelConfig(l1=3.0, l2=5.0), perceptual, 7.0)
    assert {name: float(value) for name, value in parts.items()} == {"l1": 0.5, "l2": 0.25, "perceptual": 1.0}
    assert float(total) == 3.0 * 0.5 + 5.0 * 0.25 + 7.0 * 1.0
    total, parts = reconstruction_loss(x, x_hat, PixelConfig(l1=0.0, l2=2.0), None, 7.0)
    assert float(total) == 0.5
    assert "perceptual" not in parts


def test_the_generators_total_is_the_sum_that_is_seen() -> None:
    """reconstruction + bottleneck + weight * adversarial, and nothing that is logged enters twice or in secret."""
    reconstruction = torch.tensor(2.0, requires_grad=True)
    loss = generator_loss(reconstruction, {"l1": reconstruction}, bottlenecked(0.5), torch.tensor(-3.0), 0.25)
    assert loss.total.item() == 2.0 + 0.5 - 0.25 * 3.0
    assert {name: float(value) for name, value in loss.parts.items()} == {
        "total": 1.75,
        "l1": 2.0,
        "bottleneck": 0.5,
        "commitment": 7.0,
        "adversarial": -3.0,
        "lambda": 0.25,
    }
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss.parts.values())


def test_without_an_adversarial_term_its_weight_plays_no_part() -> None:
    """Trap 16: before the discriminator starts neither the term nor lambda is in the sum or in the log."""
    loss = generator_loss(torch.tensor(2.0), {}, bottlenecked(0.5), None, float("nan"))
    assert float(loss.total) == 2.5
    assert not {"adversarial", "lambda"} & loss.parts.keys()


def test_losses_at_logits_of_zero() -> None:
    """Trap 19: a discriminator that knows nothing has a hinge loss of 1 and a cross entropy of ln 2."""
    zero = torch.zeros(2, 1, 3, 3)
    assert float(discriminator_loss(zero, zero, "hinge").total) == 1.0
    assert math.isclose(float(discriminator_loss(zero, zero, "vanilla").total), math.log(2), rel_tol=1e-6)


def test_losses_against_the_papers_formulas() -> None:
    """Trap 19: hinge 1/2 E[max(0, 1 - real)] + 1/2 E[max(0, 1 + fake)]; vanilla is binary cross entropy."""
    real, fake = torch.randn(2, 1, 4, 4), torch.randn(3, 1, 2, 2)
    hinge = 0.5 * (1 - real).clamp(min=0).mean() + 0.5 * (1 + fake).clamp(min=0).mean()
    cross_entropy = -0.5 * real.sigmoid().log().mean() - 0.5 * (1 - fake.sigmoid()).log().mean()
    assert torch.allclose(discriminator_loss(real, fake, "hinge").total, hinge)
    assert torch.allclose(discriminator_loss(real, fake, "vanilla").total, cross_entropy)


@pytest.mark.parametrize("kind", KINDS)
def test_signs_and_order_of_the_arguments(kind: Kind) -> None:
    """Trap 19: the discriminator gains where real logits rise and fake ones fall; swapped, it learns to be wrong."""
    real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loss = discriminator_loss(real, fake, kind)
    torch.autograd.backward(loss.total)
    assert real.grad is not None
    assert fake.grad is not None
    assert real.grad < 0 < fake.grad
    names = discriminator_loss(torch.tensor([2.0]), torch.tensor([-3.0]), kind).parts
    assert (float(names["logits_real"]), float(names["logits_fake"])) == (2.0, -3.0)


class Brightness(nn.Module):
    """A discriminator that takes bright images for real."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.scale * images.mean(dim=(1, 2, 3)) for images in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_is_paid_for_looking_real(kind: Kind) -> None:
    """Trap 19: its loss falls as the discriminator's logits on reconstructions rise."""
    x_hat = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = adversarial_loss(Brightness(), x_hat, kind)
    torch.autograd.backward(loss)
    assert math.isclose(loss.item(), {"hinge": 0.0, "vanilla": math.log(2)}[kind], abs_tol=1e-6)
    assert x_hat.grad is not None
    assert (x_hat.grad < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_step_leaves_no_gradient_in_the_discriminator(kind: Kind) -> None:
    """Trap 18: it would be added to the discriminator's own gradient, with the opposite sign."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=4, layers=1), image_channels=3)
    discriminator.layers[0].bias.requires_grad_(False)
    x_hat = torch.randn(2, 3, 16, 16, requires_grad=True)
    torch.autograd.backward(adversarial_loss(discriminator, x_hat, kind))
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() > 0
    frozen = [name for name, parameter in discriminator.named_parameters() if not parameter.requires_grad]
    assert frozen == ["layers.0.bias"], "what was trained is trained again, and what was not is not"
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def linear_decoder(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """x_hat = W h: both losses, W, and by hand the norms of their gradients at W."""
    torch.manual_seed(0)
    W = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    h, x = torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    v = scale * torch.randn(3, dtype=torch.float64)
    x_hat = W @ h
    reconstruction = (x_hat - x).square().sum() / 2  # gradient (W h - x) h^T
    adversarial = -(v @ x_hat).sum()  # gradient -v (sum of h)^T
    by_hand = ((x_hat - x) @ h.T).norm(), torch.outer(v, h.sum(1)).norm()
    return reconstruction, adversarial, W, by_hand[0].item(), by_hand[1].item()


def test_adaptive_weight_by_hand() -> None:
    """Trap 15: the ratio of the gradients' norms at the last layer, a constant to the optimizer; the graph lives."""
    reconstruction, adversarial, W, of_reconstruction, of_adversarial = linear_decoder()
    weight = adaptive_weight(reconstruction, adversarial, W)
    assert math.isclose(float(weight), of_reconstruction / (of_adversarial + 1e-6), rel_tol=1e-9)
    assert not weight.requires_grad
    assert weight.shape == ()
    assert W.grad is None
    torch.autograd.backward(reconstruction + weight * adversarial)
    scaled = adaptive_weight(*linear_decoder()[:3], loss_scale=65536.0)
    assert math.isclose(float(scaled), float(weight), rel_tol=1e-9), "float16's loss scale cancels"


def test_adaptive_weight_is_clamped() -> None:
    """Trap 15: where the adversarial gradient vanishes delta keeps lambda finite, and 10,000 is the most it can be."""
    reconstruction, adversarial, W, of_reconstruction, _ = linear_decoder(scale=0.0)
    assert float(adaptive_weight(reconstruction, adversarial, W)) == 1e4
    small = 3e-6 / of_reconstruction
    assert math.isclose(float(adaptive_weight(small * reconstruction, adversarial, W)), 3.0, rel_tol=1e-9)
    reconstruction, adversarial, W, _, _ = linear_decoder()
    assert float(adaptive_weight(0.0 * reconstruction, adversarial, W)) == 0.0


def test_both_gradients_are_averaged_before_their_norms() -> None:
    """Trap 15: the mean of gradients over processes and not of norms, for each of the two."""
    reconstruction, adversarial, W, *_ = linear_decoder()
    seen: list[Tensor] = []

    def average(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient * torch.tensor([2.0, 1.0])[len(seen) - 1]

    doubled = adaptive_weight(reconstruction, adversarial, W, average)
    assert [gradient.shape for gradient in seen] == [W.shape, W.shape]
    assert not any(gradient.requires_grad for gradient in seen)
    assert math.isclose(float(doubled), 2 * float(adaptive_weight(*linear_decoder()[:3])), rel_tol=1e-9)


def test_half_precision_logits_are_judged_in_float32() -> None:
    """Under autocast logits are bf16, whose mean over many patches would lose the loss's digits."""
    ask: list[Callable[[], Any]] = [
        lambda: discriminator_loss(torch.zeros(4).bfloat16(), torch.zeros(4).bfloat16(), "hinge").total,
        lambda: adversarial_loss(Brightness().bfloat16(), torch.zeros(1, 1, 2, 2).bfloat16(), "vanilla"),
    ]
    assert [loss().dtype for loss in ask] == [torch.float32, torch.float32]
