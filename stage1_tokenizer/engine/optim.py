"""How weights are updated: AdamW, a schedule that is a function of the step, and a running mean of the weights."""

import copy
import math
from typing import Generic, TypeVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from stage1_tokenizer.config.base import Config


class OptimConfig(Config):
    """AdamW and its schedule."""

    lr: PositiveFloat = 2e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of Adam's running means."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, of matrices and kernels only: never of biases, norms, embeddings and codebooks."""
    warmup_steps: NonNegativeInt = 50
    """The learning rate rises linearly over this many steps."""
    final_lr: NonNegativeFloat = 0.01
    """Share of the peak that the cosine ends at; 1: a constant rate."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    ema_decay: float = Field(0.99, ge=0.0, lt=1.0)
    """Decay of the running mean of the weights, which is what is validated and saved; 0: the weights themselves."""


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int) -> float:
    """The rate at a step (counted from 0) of `steps`: linear warm-up, then half a cosine down to final_lr * peak.

    A pure function, so a schedule has no state to save and cannot be stepped twice.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return peak * (config.final_lr + (1.0 - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in its fused form. Weight decay applies to the weights of linear and convolution layers alone."""
    kernels = {
        id(layer.weight)
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and config.weight_decay > 0
    }
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in kernels], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in kernels], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Ema(Generic[ModuleT]):
    """A copy of a module: its parameters are the running mean of the module's, its buffers the module's own."""

    def __init__(self, module: ModuleT, decay: float) -> None:
        self.module: ModuleT = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, module: ModuleT, step: int) -> None:
        """To be called after optimizer step `step`, counted from 0."""
        # Early on the mean forgets faster, or it would be made of the initial weights for 1 / (1 - decay) steps.
        decay = min(self._decay, (1 + step) / (10 + step)) if self._decay else 0.0
        means = [mean.detach() for mean in self.module.parameters()]
        torch._foreach_lerp_(means, [weight.detach() for weight in module.parameters()], 1.0 - decay)
        # An EMA codebook, its counts and whether it was initialised are buffers: a mean of them would be none of them.
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
