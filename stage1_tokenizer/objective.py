"""What the generator (the tokenizer) and the discriminator minimise. A loss is named parts and a visible sum.

Esser et al. 2021, section 3.1:

    generator       pixel + perceptual + bottleneck + lambda * adversarial
    lambda          weight * |grad_last(pixel + perceptual)| / (|grad_last(adversarial)| + delta)      equation 7
    discriminator   hinge or vanilla loss on real images and (detached) reconstructions

With lambda, each loss is differentiated once, at the reconstruction (`pulled_back`); the last layer's gradients follow
from there, and the sum goes on into the decoder. Written out as above it would be two passes back through LPIPS, the
discriminator and the last layer for lambda, and a third for the sum.

`Objective` is what train.py, its guard and the benchmarks compute; the functions below it are its formulas.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator, check_depth
from stage1_tokenizer.perceptual import Perceptual
from stage1_tokenizer.tokenizer import Tokenizer

DELTA = 1e-6
LARGEST_WEIGHT = 1e4


class PixelConfig(Config):
    """Distance of pixels, on the scale of [-1, 1]."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error."""
    l2: NonNegativeFloat = 1.0
    """Weight of the mean squared error."""


class AdversarialConfig(Config):
    """The discriminator as a term of the generator's loss."""

    weight: NonNegativeFloat = 0.0
    """Weight of the adversarial term (multiplied by the adaptive lambda); 0: there is no discriminator."""
    start: NonNegativeInt = 0
    """Optimizer steps of the generator before the discriminator starts; neither it nor lambda is computed before."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """`hinge`, or the original GAN's cross entropy (`vanilla`)."""
    adaptive: bool = True
    """Balance the adversarial term against the others at the decoder's last layer (lambda); else lambda is 1."""
    lr: PositiveFloat | None = None
    """The discriminator's learning rate; null: that of the generator."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def check(self, image_size: tuple[int, int]) -> None:
        """Raises ConfigError where the discriminator, if there is one, has more layers than the images allow."""
        if self.weight:
            check_depth(self.discriminator, image_size)


class Loss(NamedTuple):
    """A loss to call backward on, and its parts for the log."""

    total: Tensor
    """() with a graph."""
    parts: dict[str, Tensor]
    """Each (), detached; `total` among them."""


class Reconstruction(NamedTuple):
    """One pass of the tokenizer, and the generator's loss of it."""

    x_hat: Tensor
    """(B, C, H, W)."""
    bottlenecked: Bottlenecked
    loss: Loss


@dataclass(frozen=True)
class Objective:
    """Both losses of a training, from the tokenizer that learns and, where there is one, its discriminator.

    `model` is the same tokenizer, or discriminator, as Accelerate has wrapped it; without it the module itself.
    """

    tokenizer: Tokenizer
    pixel: PixelConfig
    perceptual: Perceptual | None
    perceptual_weight: float
    adversarial: AdversarialConfig
    critic: PatchDiscriminator | None
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient
    """The mean of a tensor over all processes."""
    loss_scale: Callable[[], float] = lambda: 1.0
    """The factor that keeps float16's gradients from vanishing."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """For LPIPS; its distances are taken in float32 all the same."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All that takes part, by name; the tokenizer, which learns, first."""
        modules = {"tokenizer": self.tokenizer, "discriminator": self.critic, "perceptual": self.perceptual}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def is_adaptive(self) -> bool:
        """True if lambda balances the adversarial term."""
        return self.critic is not None and self.adversarial.adaptive

    def is_adversarial(self, step: int) -> bool:
        """True if the discriminator takes part in a step, counted from 0."""
        return self.critic is not None and step >= self.adversarial.start

    def distance(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum () of pixel and perceptual terms of x, x_hat (B, C, H, W), and the terms by themselves."""
        return reconstruction_loss(x, x_hat, self.pixel, self.perceptual, self.perceptual_weight)

    def generator(self, x: Tensor, is_adversarial: bool, model: nn.Module | None = None) -> Reconstruction:
        """Reconstruct x (B, C, H, W), and take the tokenizer's loss."""
        x_hat, bottlenecked = (self.tokenizer if model is None else model)(x)
        image = x_hat.detach().requires_grad_() if is_adversarial and self.is_adaptive else x_hat
        with self.autocast():
            reconstruction, terms = self.distance(x, image)
        if not is_adversarial:
            return Reconstruction(x_hat, bottlenecked, generator_loss(reconstruction, terms, bottlenecked))
        assert self.critic is not None
        adversarial = adversarial_loss(self.critic, image, self.adversarial.loss)
        weight = torch.full((), self.adversarial.weight, device=x.device)
        if self.is_adaptive:
            scale = self.loss_scale()
            reconstruction = pulled_back(reconstruction, image, x_hat, scale)
            adversarial = pulled_back(adversarial, image, x_hat, scale)
            last = self.tokenizer.decoder.last_weight
            weight = weight * adaptive_weight(reconstruction, adversarial, last, self.average, loss_scale=scale)
        loss = generator_loss(reconstruction, terms, bottlenecked, adversarial, weight)
        return Reconstruction(x_hat, bottlenecked, loss)

    def discriminator(self, x: Tensor, x_hat: Tensor, model: nn.Module | None = None) -> Loss:
        """The discriminator's loss on images and on their reconstructions (B, C, H, W), through which no gradient goes
        on."""
        assert self.critic is not None
        real, fake = (self.critic if model is None else model)(x, x_hat.detach())
        return discriminator_loss(real, fake, self.adversarial.loss)


def reconstruction_loss(
    x: Tensor,
    x_hat: Tensor,
    pixel: PixelConfig,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    perceptual_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """x, x_hat (B, C, H, W) -> weighted sum () of the pixel and perceptual terms, and the terms before weighting."""
    l1, l2 = F.l1_loss(x_hat, x), F.mse_loss(x_hat, x)
    total = pixel.l1 * l1 + pixel.l2 * l2
    parts = {"l1": l1, "l2": l2}
    if perceptual is not None:
        parts["perceptual"] = perceptual(x, x_hat)
        total = total + perceptual_weight * parts["perceptual"]
    return total, parts


def generator_loss(
    reconstruction: Tensor,
    parts: dict[str, Tensor],
    bottlenecked: Bottlenecked,
    adversarial: Tensor | None = None,
    adversarial_weight: Tensor | float = 0.0,
) -> Loss:
    """The generator's total; without an adversarial term (), its weight plays no part."""
    total = reconstruction + bottlenecked.loss
    parts = {**parts, "bottleneck": bottlenecked.loss, **bottlenecked.stats}
    if adversarial is not None:
        total = total + adversarial_weight * adversarial
        parts |= {"adversarial": adversarial, "lambda": torch.as_tensor(adversarial_weight)}
    return Loss(total, {"total": total.detach(), **{name: part.detach() for name, part in parts.items()}})


def adversarial_loss(discriminator: nn.Module, x_hat: Tensor, kind: Literal["hinge", "vanilla"]) -> Tensor:
    """How little the discriminator takes x_hat (B, C, H, W) for real: (). Leaves no gradient in the discriminator."""
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        (logits,) = discriminator(x_hat)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    match kind:
        case "hinge":  # linear for the generator
            return -logits.float().mean()
        case "vanilla":  # the non-saturating form (Goodfellow et al. 2014)
            return F.softplus(-logits.float()).mean()
        case _:
            assert_never(kind)


def discriminator_loss(real: Tensor, fake: Tensor, kind: Literal["hinge", "vanilla"]) -> Loss:
    """Logits of real images and of reconstructions, any shape -> loss (). At logits 0: hinge 1, vanilla ln 2."""
    real, fake = real.float(), fake.float()
    match kind:
        case "hinge":
            total = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        case "vanilla":
            total = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        case _:
            assert_never(kind)
    parts = {"total": total, "logits_real": real.mean(), "logits_fake": fake.mean()}
    return Loss(total, {name: part.detach() for name, part in parts.items()})


def pulled_back(loss: Tensor, image: Tensor, x_hat: Tensor, loss_scale: float = 1.0) -> Tensor:
    """A loss () of `image`, which is x_hat (B, C, H, W) cut from its graph, as a loss of x_hat.

    It has the loss's value and its gradient, but a graph that begins at x_hat: the loss's own is run here, once, and
    freed. `loss_scale` keeps float16 gradients from vanishing on the way; it is divided out again.
    """
    (gradient,) = torch.autograd.grad(loss * loss_scale, image)
    product = (x_hat * gradient).sum() / loss_scale
    return loss.detach() + (product - product.detach())


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_weight: Tensor,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    loss_scale: float = 1.0,
) -> Tensor:
    """lambda () of equation 7, in [0, 1e4], detached. Both losses () stay differentiable.

    `average` must give the mean of a tensor over all processes: `autograd.grad` goes past DistributedDataParallel, so
    without it each process would weigh by its own share of the batch. `loss_scale` keeps float16 gradients from
    vanishing; the ratio does not depend on it.
    """
    gradients = [
        average(torch.autograd.grad(loss * loss_scale, last_weight, retain_graph=True)[0].detach()) / loss_scale
        for loss in (reconstruction, adversarial)
    ]
    return (gradients[0].norm() / (gradients[1].norm() + DELTA)).clamp(0.0, LARGEST_WEIGHT).detach()
