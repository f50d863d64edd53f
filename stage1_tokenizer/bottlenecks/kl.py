"""The bottleneck of a variational autoencoder: a latent drawn from a normal distribution that is kept near N(0, I).

Kingma and Welling, "Auto-Encoding Variational Bayes" (2013), equation 10 and appendix B; as a grid of latents: Rombach
et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.1.

    z = mean + std * eps,  eps ~ N(0, I)        KL = 1/2 * sum(mean^2 + var - 1 - log var)
"""

from typing import Annotated, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import Advice, BaseBottleneckConfig, Bottleneck, Bottlenecked
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Channels

LOG_VARIANCE = (-30.0, 20.0)
"""Range to which log variances are clamped, as in the latent diffusion code; exp stays finite in float32."""
ACTIVE = 0.01
"""Nats per position above which a channel counts as active (the same limit as Burda et al. 2016)."""


class KlConfig(BaseBottleneckConfig):
    """The normal latent of a variational autoencoder; images are sampled from N(0, I), without a prior of stage two."""

    kind: Literal["kl"] = "kl"
    channels: Channels | None = None
    """Channels of the latent that is drawn; null: those of the network's latent."""
    project: bool = False
    """Pass the drawn latent through a 1x1 convolution also if it has the channels of the network's latent."""
    weight: Annotated[NonNegativeFloat, Advice("posterior", "lower --bottleneck.weight")] = 1e-3
    """Weight of the KL in nats per position: a sum over channels, and a mean over positions and images. Next to a mean
    squared error over pixels, 2 * s^2 / (C * factor^2) gives the ELBO for pixels of variance s^2. A larger weight makes
    images smoother, and samples from N(0, I) better."""
    warmup_steps: Annotated[
        NonNegativeInt, Mark.SCHEDULE, Advice("posterior", "let it rise slowly (--bottleneck.warmup_steps)")
    ] = 0
    """Optimizer steps over which the weight rises linearly from 0, so that channels do not collapse before they are
    used; 0: full weight from the start."""


class KlBottleneck(Bottleneck):
    """The bottleneck that replaces z by a random draw in train mode, and by the mean in eval mode."""

    finished_steps: Tensor
    """() int64, a buffer so that a resumed run continues with the same weight."""

    def __init__(self, config: KlConfig, latent_channels: int, encoded_channels: int | None = None) -> None:
        """encoded_channels: channels of the encoder's output, if they are not those of the latent."""
        super().__init__()
        self.config = config
        self.noise_channels = config.channels or latent_channels
        same = self.noise_channels == latent_channels and not config.project
        self.project_in = nn.Conv2d(encoded_channels or latent_channels, 2 * self.noise_channels, 1)
        self.project_out = nn.Identity() if same else nn.Conv2d(self.noise_channels, latent_channels, 1)
        self.register_buffer("finished_steps", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> Tensor:
        """Weight () float32 of the KL in the present step: 0 at the first step, the full weight after the warm-up."""
        risen = (self.finished_steps / max(1, self.config.warmup_steps)).clamp(max=1.0)
        return self.config.weight * (risen if self.config.warmup_steps else torch.ones_like(risen))

    def forward(self, z: Tensor) -> Bottlenecked:
        """Draw from the distribution that z (B, D, h, w) describes. The result has no codes."""
        moments = self.project_in(z)  # (B, 2c, h, w), c = noise_channels
        # float32, with autocast off: near N(0, I) the terms of the KL cancel, and bfloat16 would leave nothing of it.
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = moments.float().chunk(2, dim=1)  # each (B, c, h, w)
            log_variance = log_variance.clamp(*LOG_VARIANCE)
            std = torch.exp(0.5 * log_variance)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)  # (B, c, h, w), nats
            loss = self.weight * kl.sum(dim=1).mean()  # ()
            drawn = mean + std * torch.randn_like(std) if self.training else mean  # section 2.4, the reparameterisation
        stats = {
            "kl": kl.sum(dim=(1, 2, 3)).mean(),  # nats per image
            "kl_weight": self.weight,
            "posterior_std": std.mean(),
            "active_channels": (kl.mean(dim=(0, 2, 3)) > ACTIVE).float().mean(),
        }
        return Bottlenecked(
            self.project_out(drawn), None, loss, {name: value.detach() for name, value in stats.items()}
        )

    def sample(self, noise: Tensor) -> Tensor:
        """Turn noise (B, noise_channels, h, w) from N(0, 1) into z_q (B, D, h, w)."""
        return self.project_out(noise)

    def finish_step(self) -> None:
        """Count the step, for the warm-up of the weight."""
        self.finished_steps += 1
