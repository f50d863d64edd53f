"""Latents as colours: their first three principal components as red, green and blue."""

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.views.base import Subject, View, encoded_images
from stage1_tokenizer.diagnostics.views.projection import pca
from stage1_tokenizer.diagnostics.views.sheet import GREY, MARGIN, TOP, WIDTH, Sheet, fitting

COLUMNS, ROWS = 8, 2


def latent_colours(z_q: Tensor) -> tuple[Tensor, Tensor]:
    """Project latents z_q (N, D, h, w) on three principal components.

    Returns:
        Colours (N, h, w, 3) in 0..1, 0.5 where a component does not vary; and the components' shares of variance (3,).
    """
    N, _, h, w = z_q.shape
    flat = z_q.permute(0, 2, 3, 1).flatten(0, 2)  # (N h w, D)
    components = pca(flat, 3)
    projected = components(flat)  # (N h w, 3)
    # 0..1 is the range from the 2nd to the 98th percentile, from a sample: torch.quantile takes at most 2**24 numbers.
    some = projected[:: max(1, len(projected) // 100_000)]
    low, high = (some.quantile(share, dim=0) for share in (0.02, 0.98))
    scaled = torch.where(high - low > 1e-12, (projected - low) / (high - low).clamp_min(1e-12), 0.5).clamp(0, 1)
    return scaled.reshape(N, h, w, 3), components.explained


def draw_latent_maps(subject: Subject) -> Sheet:
    """Draw images, their latents as colours and their reconstructions."""
    encoded = encoded_images(subject)
    maps, explained = latent_colours(encoded.z_q)
    chosen = encoded.spaced_indices(COLUMNS * ROWS)
    cell = (WIDTH - 2 * MARGIN - 0.75) / COLUMNS
    width, height = fitting(encoded.image_size, cell - 0.06)
    rows = -(-len(chosen) // COLUMNS)
    step = 3 * (height + 0.05) + 0.2
    h, w = encoded.z_q.shape[2:]
    sheet = Sheet(
        TOP + 0.1 + rows * step,
        "The latents: their principal components as colours",
        f"The {encoded.z_q.shape[1]} channels of z_q, a grid of {h}x{w}, projected on three principal components, "
        f"shown as red, green and blue:\n{', '.join(f'{share:.1%}' for share in explained.tolist())} of the variance. "
        "Equal colours are nearly equal latents, also in different images.",
        encoded.footer,
    )
    for row in range(rows):
        top = TOP + 0.1 + row * step
        for line, name in enumerate(("image", "latent", "decoded")):
            sheet.text(MARGIN, top + line * (height + 0.05) + height / 2, name, color=GREY, va="center")
    for number, index in enumerate(chosen):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + 0.75 + column * cell, TOP + 0.1 + row * step
        sheet.image(encoded.x[index], left, top, width)
        sheet.image(maps[index].numpy(), left, top + height + 0.05, width, interpolation="nearest")
        sheet.image(encoded.x_hat[index], left, top + 2 * (height + 0.05), width)
    return sheet


VIEW = View("latent_maps", "Latents as colours", draw_latent_maps)
