"""Dictionary learning: each latent vector becomes a combination of a few learned atoms.

A VQ-VAE allows one vector per position; here z is approximated by z_dl = sum_k a_k d_k, with atoms d_k of length one
and at most `top` coefficients a_k that are not zero. The sparse coding objective is that of Olshausen and Field (1996),
and the loss is shaped as in van den Oord et al. 2017, equation 3:

    |sg[z] - z_dl|^2  (reconstruction)  +  2 * l1 * |a|_1  (sparsity)  +  beta * |z - sg[z_dl]|^2  (commitment)

each over D. Two ways to the coefficients:

    softmax   amplitude * softmax(logits), logits from a linear map of z / |z|, the amplitude >= 0 that suits z best
    ista      the minimum of 1/2 |z - a A|^2 + l1 |a|_1 by iterative shrinkage (Daubechies, Defrise and De Mol 2004)
"""

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Beta, Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.straight import straight_through
from stage1_tokenizer.config.value_types import CodebookSize
from stage1_tokenizer.engine.precision import float64


class DictionaryConfig(BaseBottleneckConfig):
    """Sparse combinations of learned atoms; the latent is continuous, so there are no codes and no prior over them."""

    kind: Literal["dictionary"] = "dictionary"
    atoms: CodebookSize = 512
    """Vectors in the dictionary."""
    top: CodebookSize = 100
    """Atoms per position that may have a coefficient other than 0: those with the largest ones."""
    code: Literal["softmax", "ista"] = "softmax"
    """How coefficients are found: a learned linear map and a softmax (fast, never negative), or ISTA."""
    ista_steps: PositiveInt = Field(10, le=100_000)
    """Iterations from zero (code: ista)."""
    l1: NonNegativeFloat = 0.1
    """Weight of a position's sum of |a| against half its squared error; both ISTA's threshold and the loss have it."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to z_dl; it does not touch atoms and coefficients."""

    @model_validator(mode="after")
    def _check(self) -> "DictionaryConfig":
        if self.top > self.atoms:
            raise ValueError(f"top ({self.top}) must not be more than atoms ({self.atoms})")
        return self


class Dictionary(Bottleneck):
    """z (B, D, h, w) -> the sparse combination of atoms that stands for it."""

    def __init__(self, config: DictionaryConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.raw_atoms = nn.Parameter(torch.randn(config.atoms, latent_channels))
        if config.code == "softmax":
            self.map = nn.Linear(latent_channels, config.atoms)
            with torch.no_grad():  # begin with the atoms nearest to z; from random ones, z_dl would be next to nothing
                self.map.weight.copy_(self.atoms)
                self.map.bias.zero_()

    @property
    def atoms(self) -> Tensor:
        """(atoms, D), each of length one: of longer atoms smaller coefficients would do, and l1 would cost nothing."""
        return F.normalize(self.raw_atoms.float(), dim=-1)

    def forward(self, z: Tensor) -> Bottlenecked:
        # float32 with autocast off: in bf16 other atoms would be the largest.
        with torch.autocast(z.device.type, enabled=False):
            vectors = rearrange(z.float(), "B d h w -> (B h w) d")
            atoms = self.atoms  # (atoms, D)
            target = vectors.detach()
            match self.config.code:
                case "softmax":
                    coefficients = self._softmax(target, atoms)
                case "ista":
                    coefficients = self._ista(target, atoms)
                case code:
                    assert_never(code)
            z_dl = coefficients @ atoms  # (B*h*w, D)
            commitment = F.mse_loss(vectors, z_dl.detach())
            size = coefficients.abs()  # (B*h*w, atoms)
            # Over D as the squared errors are, so that it is 2/D of the objective in the module's docstring.
            sparsity = 2.0 * self.config.l1 * size.sum(dim=-1).mean() / z.shape[1]
            loss = F.mse_loss(z_dl, target) + sparsity + self.config.beta * commitment
            through = straight_through(vectors, z_dl)
            active = size.detach() > 0
            stats = {
                "commitment": commitment.detach(),
                "active_atoms_per_position": active.float().sum(dim=-1).mean(),
                "atoms_in_use": active.any(dim=0).float().mean(),
                "mean_coefficient": size.detach().mean(),
            }
        B, _, h, w = z.shape
        return Bottlenecked(rearrange(through, "(B h w) d -> B d h w", B=B, h=h, w=w), None, loss, stats)

    def _softmax(self, vectors: Tensor, atoms: Tensor) -> Tensor:
        """vectors (N, D), atoms (atoms, D) -> coefficients (N, atoms) >= 0, of which at most `top` are not 0."""
        # Of the direction alone, lest the softmax become one-hot where the encoder's latents are long.
        logits = self.map(F.rms_norm(vectors, vectors.shape[-1:]))  # (N, atoms)
        largest, chosen = logits.topk(self.config.top, dim=-1)  # (N, top)
        # The softmax of the largest logits alone is that of all of them, cut off and renormalised.
        shares = torch.zeros_like(logits).scatter(-1, chosen, largest.softmax(dim=-1))
        # Shares of unit vectors make a u with |u| <= 1, which reaches no longer z. So they are scaled by the c >= 0
        # that minimises 1/2 |z - c u|^2 + l1 c; there the derivative by c is zero, and c needs no gradient.
        u = (shares @ atoms).detach()  # (N, D)
        along = (vectors * u).sum(dim=-1, keepdim=True) - self.config.l1  # (N, 1)
        return shares * (along.clamp_min(0.0) / u.square().sum(dim=-1, keepdim=True).clamp_min(1e-6))

    @torch.no_grad()
    def _ista(self, vectors: Tensor, atoms: Tensor) -> Tensor:
        """vectors (N, D), atoms (atoms, D) -> coefficients (N, atoms), of which at most `top` are not 0.

        Without gradient: at the minimum over the coefficients, the objective's derivative by the atoms is that at fixed
        coefficients (the envelope theorem), and z gets its gradient from decoder and commitment alone.
        """
        step = 1.0 / largest_eigenvalue(atoms.T @ atoms)  # A^T A and A A^T share theirs, and D is the smaller side
        threshold = self.config.l1 * step
        coefficients = vectors.new_zeros(len(vectors), len(atoms))
        for _ in range(self.config.ista_steps):
            # By way of the residual: the Gram matrix of the atoms would cost atoms / (2 D) times as much.
            residual = vectors - coefficients @ atoms  # (N, D)
            moved = coefficients + step * residual @ atoms.T
            coefficients = moved - moved.clamp(-threshold, threshold)  # soft shrinkage
        chosen = coefficients.abs().topk(self.config.top, dim=-1).indices  # (N, top)
        return torch.zeros_like(coefficients).scatter(-1, chosen, coefficients.gather(-1, chosen))


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """A bound () of the largest eigenvalue of a positive semi-definite matrix (D, D), never below it.

    (sum_i lambda_i^32)^(1/32), at most D^(1/32) times too large: 1.19 for D = 256. Power iteration would come from
    below, and ISTA could diverge.
    """
    scale = float64(matrix.norm())
    power = float64(matrix) / scale  # lambda_max is now between D^(-1/2) and 1, so that its power does not underflow
    for _ in range(4):
        power = power @ power
    return (scale * power.norm() ** (1.0 / 16.0)).float().to(matrix.device)
