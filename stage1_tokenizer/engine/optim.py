"""The update of weights: AdamW, a learning-rate schedule, and a running mean (EMA) of the weights."""

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
    """Peak learning rate. Lower it if the loss rises, jumps or becomes NaN."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of Adam's running means of the gradient and of its square, each in [0, 1)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of linear and convolution weights; biases, norms, embeddings and codebooks have none."""
    warmup_steps: NonNegativeInt = 50
    """Optimizer steps in which the learning rate rises linearly to its peak. Raise it if training diverges early."""
    final_lr: NonNegativeFloat = 0.01
    """Learning rate at the end of the cosine, as a share of the peak; 1: a constant rate after the warm-up."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient: larger gradients are scaled down to it. 0: no clipping."""
    ema_decay: float = Field(0.99, ge=0.0, lt=1.0)
    """Decay, in [0, 1), of the running mean of the weights, which is validated and saved; 0: the weights themselves."""


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of a step in 0..steps-1: linear warm-up, then half a cosine down to final_lr * peak.

    It is a pure function of the step, so a schedule has no state to save.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return peak * (config.final_lr + (1.0 - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build a fused AdamW. Only the weights of linear and convolution layers have weight decay."""
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
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Ema(Generic[ModuleT]):
    """A copy of a module. Its parameters are the running mean of the module's parameters, its buffers are equal.

    With a decay of 0 the parameters are equal too.
    """

    def __init__(self, module: ModuleT, decay: float) -> None:
        self.module: ModuleT = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, module: ModuleT, step: int) -> None:
        """Update the running mean after an optimizer step (counted from 0)."""
        # A smaller decay in the first steps: else the initial weights would dominate for 1 / (1 - decay) steps.
        decay = min(self._decay, (1 + step) / (10 + step)) if self._decay else 0.0
        means = [mean.detach() for mean in self.module.parameters()]
        torch._foreach_lerp_(means, [weight.detach() for weight in module.parameters()], 1.0 - decay)
        # Buffers such as the counts of a codebook have no meaningful mean.
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)
