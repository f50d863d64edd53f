"""Dictionary learning: each latent vector becomes a sparse combination of learned atoms.

A VQ-VAE uses one codebook vector per position. Here z is approximated by z_dl = sum_k a_k d_k, with atoms d_k of length
one and at most `top` coefficients a_k that are not zero. The objective is sparse coding (Olshausen and Field,
"Emergence of simple-cell receptive field properties by learning a sparse code for natural images", 1996), with loss
terms as in van den Oord et al. 2017, equation 3:

    (|sg[z] - z_dl|^2  (reconstruction)  +  2 * l1 * |a|_1  (sparsity)  +  beta * |z - sg[z_dl]|^2  (commitment)) / D

Two ways to compute the coefficients a (A is the matrix of all atoms):

    softmax   amplitude * softmax(logits), with logits from a linear map of z / |z|, and the best amplitude >= 0 for z
    ista      the minimum of 1/2 |z - a A|^2 + l1 |a|_1 by iterative shrinkage: Daubechies, Defrise and De Mol, "An
              iterative thresholding algorithm for linear inverse problems with a sparsity constraint" (2004)
"""

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.base import BaseBottleneckConfig, Beta, Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.straight_through import straight_through
from stage1_tokenizer.config.value_types import CodebookSize
from stage1_tokenizer.engine.precision import to_float64


class DictionaryConfig(BaseBottleneckConfig):
    """Sparse combinations of learned atoms; the latent is continuous, so there are no codes and no prior over them."""

    kind: Literal["dictionary"] = "dictionary"
    atoms: CodebookSize = 512
    """Number of atoms in the dictionary."""
    top: CodebookSize = 100
    """Largest number of atoms per position with a coefficient other than 0; those with the largest ones are kept."""
    code: Literal["softmax", "ista"] = "softmax"
    """Method for the coefficients: `softmax`, a learned linear map and a softmax (fast, never negative), or `ista`."""
    ista_steps: PositiveInt = Field(10, le=100_000)
    """Iterations of ISTA, starting from zero (`code: ista`)."""
    l1: NonNegativeFloat = 0.1
    """Weight of a position's sum of |a| against half its squared error, in ISTA's threshold and in the loss; larger:
    fewer atoms per position."""
    beta: Beta = 0.25
    """Weight of the commitment term, which pulls the encoder to z_dl; it does not move the atoms."""

    @model_validator(mode="after")
    def _check(self) -> "DictionaryConfig":
        if self.top > self.atoms:
            raise ValueError(f"top ({self.top}) must not be more than atoms ({self.atoms})")
        return self


class Dictionary(Bottleneck):
    """The bottleneck that replaces z at each position by a sparse combination of atoms."""

    def __init__(self, config: DictionaryConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        self.raw_atoms = nn.Parameter(torch.randn(config.atoms, latent_channels))
        if config.code == "softmax":
            self.map = nn.Linear(latent_channels, config.atoms)
            with torch.no_grad():  # so the atoms nearest to z come first; with random ones, z_dl would be almost 0
                self.map.weight.copy_(self.atoms)
                self.map.bias.zero_()

    @property
    def atoms(self) -> Tensor:
        """Atoms (atoms, D) of length one. With free lengths, longer atoms and smaller coefficients would evade l1."""
        return F.normalize(self.raw_atoms.float(), dim=-1)

    def forward(self, z: Tensor) -> Bottlenecked:
        """Approximate z (B, D, h, w) by atoms. The result has no codes."""
        # float32, with autocast off: in bfloat16 other atoms would have the largest coefficients.
        with torch.autocast(z.device.type, enabled=False):
            vectors = rearrange(z.float(), "B d h w -> (B h w) d")  # (B*h*w, D)
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
            # Divided by D, as the mean squared errors are.
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
        """Return coefficients (N, atoms) >= 0 of vectors (N, D) for atoms (atoms, D), at most `top` per row not 0."""
        # From the direction of z only: for long latents the softmax would become one-hot.
        logits = self.map(F.rms_norm(vectors, vectors.shape[-1:]))  # (N, atoms)
        largest, chosen = logits.topk(self.config.top, dim=-1)  # (N, top)
        # The softmax over the largest logits equals the softmax over all, cut off and renormalised.
        shares = torch.zeros_like(logits).scatter(-1, chosen, largest.softmax(dim=-1))
        # These shares of unit vectors give a u with |u| <= 1, which cannot reach a longer z. So they are scaled by the
        # c >= 0 that minimises 1/2 |z - c u|^2 + l1 c. There the derivative by c is zero, so c needs no gradient.
        u = (shares @ atoms).detach()  # (N, D)
        along = (vectors * u).sum(dim=-1, keepdim=True) - self.config.l1  # (N, 1)
        return shares * (along.clamp_min(0.0) / u.square().sum(dim=-1, keepdim=True).clamp_min(1e-6))

    @torch.no_grad()
    def _ista(self, vectors: Tensor, atoms: Tensor) -> Tensor:
        """Return coefficients (N, atoms), as `_softmax` does, but of any sign and without a gradient.

        At the minimum over the coefficients, the derivative of the objective with respect to the atoms is that for
        fixed coefficients (envelope theorem). z gets its gradient only from the decoder and the commitment.
        """
        step = 1.0 / largest_eigenvalue(atoms.T @ atoms)  # (D, D) is smaller than A A^T and has the same
        threshold = self.config.l1 * step
        coefficients = vectors.new_zeros(vectors.shape[0], atoms.shape[0])
        for _ in range(self.config.ista_steps):
            # Not by the Gram matrix of the atoms, which would cost atoms / (2 D) times as much.
            residual = vectors - coefficients @ atoms  # (N, D)
            moved = coefficients + step * residual @ atoms.T
            coefficients = moved - moved.clamp(-threshold, threshold)  # soft shrinkage
        chosen = coefficients.abs().topk(self.config.top, dim=-1).indices  # (N, top)
        return torch.zeros_like(coefficients).scatter(-1, chosen, coefficients.gather(-1, chosen))


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Compute an upper bound () of the largest eigenvalue of a positive semi-definite matrix (D, D).

    The bound is (sum_i lambda_i^32)^(1/32), at most D^(1/32) times too large: 1.19 for D = 256. Power iteration would
    give a lower bound, with which ISTA could diverge.
    """
    scale = to_float64(matrix.norm())
    power = to_float64(matrix) / scale  # its largest eigenvalue is in [D^(-1/2), 1], so its power does not underflow
    for _ in range(4):
        power = power @ power
    return (scale * power.norm() ** (1.0 / 16.0)).float().to(matrix.device)
