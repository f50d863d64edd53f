"""The losses of stage one, for the generator (the tokenizer) and for the discriminator.

Esser, Rombach and Ommer, "Taming Transformers for High-Resolution Image Synthesis" (VQGAN, 2021), section 3.1:

    generator       pixel + perceptual + bottleneck + weight * lambda * adversarial             equations 4 and 6
    lambda          |grad_last(pixel + perceptual)| / (|grad_last(adversarial)| + delta)        equation 7
    discriminator   hinge or vanilla loss on images and on their reconstructions                equation 5

grad_last is the gradient with respect to the weight of the decoder's last layer.

The textbook way needs two backward passes through LPIPS, the discriminator and the last layer for lambda, and a third
one for the sum. Here each loss is differentiated once, with respect to the reconstruction (`pull_back`). The last
layer's gradients and the sum's backward pass start from these gradients.

`Objective` is used by the training loop, its guard and the benchmarks. The functions below it are its formulas. A loss
is a total and its named parts, so that the log shows each term.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config.base import Config
from stage1_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator, check_depth
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import Tokenizer

DELTA = 1e-6
"""delta of equation 7, which keeps lambda finite where the adversarial gradient is 0."""
LARGEST_WEIGHT = 1e4
"""Upper limit of lambda, as in the authors' code."""


class PixelConfig(Config):
    """Difference of pixels, on the scale of [-1, 1]."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error."""
    l2: NonNegativeFloat = 1.0
    """Weight of the mean squared error."""


class AdversarialConfig(Config):
    """The adversarial term of the generator's loss, and its discriminator."""

    weight: NonNegativeFloat = 0.0
    """Weight of the adversarial term, multiplied by lambda if `adaptive`; 0: no discriminator is built or trained."""
    start: NonNegativeInt = 0
    """Optimizer steps without the adversarial term; then it counts, and the discriminator learns too."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """`hinge` (as in the VQGAN paper's code), or the cross entropy of the original GAN (`vanilla`)."""
    adaptive: bool = True
    """Balance the adversarial term against the others at the decoder's last layer, by lambda; false: lambda is 1."""
    lr: PositiveFloat | None = None
    """Learning rate of the discriminator; null: that of the generator (optim.lr)."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def check(self, image_size: tuple[int, int]) -> None:
        """Raise ConfigError if there is a discriminator and it has too many layers for images of this (H, W)."""
        if self.weight:
            check_depth(self.discriminator, image_size)


class Loss(NamedTuple):
    """A loss to call backward on, and its parts for the log."""

    total: Tensor
    """() float32 with a graph."""
    parts: dict[str, Tensor]
    """Named terms before weighting, and `total`; each () and detached."""


class Reconstruction(NamedTuple):
    """One forward pass of the tokenizer, and the generator's loss."""

    x_hat: Tensor
    """(B, C, H, W), not clamped."""
    bottlenecked: Bottlenecked
    loss: Loss


@dataclass(frozen=True)
class Objective:
    """The losses of one training run: of its tokenizer and, if it has one, of its discriminator.

    In both methods `model` is the module as Accelerate has wrapped it (DistributedDataParallel, torch.compile); None:
    the plain module.
    """

    tokenizer: Tokenizer
    pixel: PixelConfig
    perceptual: Perceptual | None
    perceptual_weight: float
    adversarial: AdversarialConfig
    discriminator: PatchDiscriminator | None
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient
    """Function that returns the mean of a tensor over all processes."""
    loss_scale: Callable[[], float] = lambda: 1.0
    """Function that returns the present factor on losses, which keeps float16 gradients from underflow."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of mixed precision for LPIPS; the distance between its features is computed in float32."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules that take part, by name. The tokenizer, which learns from the generator's loss, is the first."""
        modules = {"tokenizer": self.tokenizer, "discriminator": self.discriminator, "perceptual": self.perceptual}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def is_adaptive(self) -> bool:
        """True if lambda balances the adversarial term."""
        return self.discriminator is not None and self.adversarial.adaptive

    def is_adversarial(self, step: int) -> bool:
        """Return True if the discriminator takes part in this step, counted from 0."""
        return self.discriminator is not None and step >= self.adversarial.start

    def reconstruction_loss(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum () of pixel and perceptual terms of x, x_hat (B, C, H, W), and the terms by name."""
        return reconstruction_loss(x, x_hat, self.pixel, self.perceptual, self.perceptual_weight)

    def reconstruct(self, x: Tensor, is_adversarial: bool, model: nn.Module | None = None) -> Reconstruction:
        """Reconstruct images x (B, C, H, W) in [-1, 1], and compute the generator's loss."""
        x_hat, bottlenecked = (self.tokenizer if model is None else model)(x)  # (B, C, H, W), z_q (B, D, h, w)
        # With lambda, the losses get an image that is cut from the tokenizer's graph; pull_back joins them again.
        image = x_hat.detach().requires_grad_() if is_adversarial and self.is_adaptive else x_hat  # (B, C, H, W)
        with self.autocast():
            reconstruction, terms = self.reconstruction_loss(x, image)  # (), {name: ()}
        if not is_adversarial:
            return Reconstruction(x_hat, bottlenecked, generator_loss(reconstruction, terms, bottlenecked))
        assert self.discriminator is not None
        adversarial = adversarial_loss(self.discriminator, image, self.adversarial.loss)  # ()
        weight = torch.full((), self.adversarial.weight, device=x.device)
        if self.is_adaptive:
            scale = self.loss_scale()
            reconstruction = pull_back(reconstruction, image, x_hat, scale)
            adversarial = pull_back(adversarial, image, x_hat, scale)
            last = self.tokenizer.decoder.last_weight
            weight = weight * adaptive_weight(reconstruction, adversarial, last, self.average, loss_scale=scale)  # ()
        loss = generator_loss(reconstruction, terms, bottlenecked, adversarial, weight)
        return Reconstruction(x_hat, bottlenecked, loss)

    def discriminate(self, x: Tensor, x_hat: Tensor, model: nn.Module | None = None) -> Loss:
        """Compute the discriminator's loss on images x and reconstructions x_hat (B, C, H, W).

        No gradient flows into x_hat.
        """
        assert self.discriminator is not None
        real, fake = (self.discriminator if model is None else model)(x, x_hat.detach())  # (B, 1, h', w') each
        return discriminator_loss(real, fake, self.adversarial.loss)


def build_objective(
    tokenizer: Tokenizer,
    pixel: PixelConfig,
    perceptual: PerceptualConfig,
    adversarial: AdversarialConfig,
    accelerator: Accelerator,
) -> Objective:
    """Build the losses of a training run on its device; LPIPS and the discriminator only if their weight is not 0.

    Raises:
        ConfigError or BadFileError: images too small for LPIPS, or its weights are missing, damaged or do not fit.
    """
    lpips = discriminator = None
    if perceptual.weight:
        lpips = Perceptual(perceptual, tokenizer.config.image_size).to(accelerator.device)
    if adversarial.weight:
        discriminator = PatchDiscriminator(adversarial.discriminator, tokenizer.config.image_channels)
        discriminator.to(accelerator.device)
    scaler = accelerator.scaler
    return Objective(
        tokenizer,
        pixel,
        lpips,
        perceptual.weight,
        adversarial,
        discriminator,
        average=partial(accelerator.reduce, reduction="mean"),
        loss_scale=scaler.get_scale if scaler else lambda: 1.0,
        autocast=accelerator.autocast,
    )


def reconstruction_loss(
    x: Tensor,
    x_hat: Tensor,
    pixel: PixelConfig,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    perceptual_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum () of pixel and perceptual terms of x, x_hat (B, C, H, W), and the terms by name."""
    l1, l2 = F.l1_loss(x_hat, x), F.mse_loss(x_hat, x)
    total = pixel.l1 * l1 + pixel.l2 * l2
    terms = {"l1": l1, "l2": l2}
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_hat)
        total = total + perceptual_weight * terms["perceptual"]
    return total, terms


def generator_loss(
    reconstruction: Tensor,
    terms: dict[str, Tensor],
    bottlenecked: Bottlenecked,
    adversarial: Tensor | None = None,
    adversarial_weight: Tensor | float = 0.0,
) -> Loss:
    """Add up the generator's loss from its terms (), equation 6. Without `adversarial`, its weight is ignored."""
    total = reconstruction + bottlenecked.loss
    terms = {**terms, "bottleneck": bottlenecked.loss, **bottlenecked.stats}
    if adversarial is not None:
        total = total + adversarial_weight * adversarial
        terms |= {"adversarial": adversarial, "lambda": torch.as_tensor(adversarial_weight)}
    return Loss(total, {"total": total.detach(), **{name: term.detach() for name, term in terms.items()}})


def adversarial_loss(discriminator: nn.Module, x_hat: Tensor, kind: Literal["hinge", "vanilla"]) -> Tensor:
    """Compute the generator's adversarial term () for x_hat (B, C, H, W): low if the discriminator takes it for real.

    The discriminator's parameters get no gradient from it.
    """
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        (logits,) = discriminator(x_hat)  # (B, 1, h', w')
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    match kind:
        case "hinge":  # Lim and Ye, "Geometric GAN" (2017): linear for the generator
            return -logits.float().mean()
        case "vanilla":  # Goodfellow et al., "Generative Adversarial Nets" (2014), section 3: the non-saturating form
            return F.softplus(-logits.float()).mean()
        case _:
            assert_never(kind)


def discriminator_loss(real: Tensor, fake: Tensor, kind: Literal["hinge", "vanilla"]) -> Loss:
    """Compute the discriminator's loss from logits of images and of reconstructions, of any shape.

    If all logits are 0, the loss is 1 for hinge and ln 2 for vanilla.
    """
    real, fake = real.float(), fake.float()
    match kind:
        case "hinge":  # Lim and Ye 2017
            total = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        case "vanilla":  # Goodfellow et al. 2014, equation 1
            total = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        case _:
            assert_never(kind)
    parts = {"total": total, "logits_real": real.mean(), "logits_fake": fake.mean()}
    return Loss(total, {name: part.detach() for name, part in parts.items()})


def pull_back(loss: Tensor, image: Tensor, x_hat: Tensor, loss_scale: float = 1.0) -> Tensor:
    """Return a loss () of `image` as a loss of x_hat (B, C, H, W), of which `image` is a detached copy.

    The result has the loss's value and its gradient with respect to x_hat. The loss's own graph is run backward here,
    once, and freed. `loss_scale` keeps float16 gradients from underflow on the way, and is divided out again.
    """
    (gradient,) = torch.autograd.grad(loss * loss_scale, image)  # (B, C, H, W)
    product = (x_hat * gradient).sum() / loss_scale  # ()
    return loss.detach() + (product - product.detach())


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_weight: Tensor,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    loss_scale: float = 1.0,
) -> Tensor:
    """Compute lambda () of equation 7, in [0, 1e4] and detached. The graphs of both losses () are kept.

    `average` must return the mean of a tensor over all processes: `autograd.grad` bypasses DistributedDataParallel, so
    without it each process would compute lambda from its own share of the batch. `loss_scale` keeps float16 gradients
    from underflow; it does not change the ratio.
    """
    gradients = [
        average(torch.autograd.grad(loss * loss_scale, last_weight, retain_graph=True)[0].detach()) / loss_scale
        for loss in (reconstruction, adversarial)
    ]
    return (gradients[0].norm() / (gradients[1].norm() + DELTA)).clamp(0.0, LARGEST_WEIGHT).detach()
