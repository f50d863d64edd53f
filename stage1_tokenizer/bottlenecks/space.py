"""The space in which codes are compared, and the way there and back."""

from einops import rearrange
from torch import Tensor, nn


class CodeSpace(nn.Module):
    """From latents of D channels to vectors of d dimensions and back: 1x1 convolutions where d differs from D, else
    nothing."""

    def __init__(self, latent_channels: int, code_dim: int | None) -> None:
        super().__init__()
        self.dim = code_dim or latent_channels
        same = self.dim == latent_channels
        self.project_in = nn.Identity() if same else nn.Conv2d(latent_channels, self.dim, 1)
        self.project_out = nn.Identity() if same else nn.Conv2d(self.dim, latent_channels, 1)

    def into(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> (B * h * w, d) float32: in bfloat16 the distances of near codes would be equal."""
        return rearrange(self.project_in(z).float(), "B d h w -> (B h w) d")

    def back(self, vectors: Tensor, grid: tuple[int, ...]) -> Tensor:
        """vectors (B * h * w, d), grid (B, h, w) -> z_q (B, D, h, w).

        In channels_last, whatever the strides of the vectors: the last bit of a convolution depends on its input's
        layout, and what the forward pass decodes must be what its codes decode to.
        """
        B, h, w = grid
        return self.project_out(rearrange(vectors.contiguous(), "(B h w) d -> B d h w", B=B, h=h, w=w))


def grid_of(z: Tensor) -> tuple[int, ...]:
    """z (B, D, h, w) -> (B, h, w)."""
    return z.shape[0], z.shape[2], z.shape[3]
