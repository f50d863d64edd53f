"""Latents as colours: their first three principal components as red, green and blue."""

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.views.base import Subject, View, encoded_images
from stage1_tokenizer.diagnostics.views.projection import pca
from stage1_tokenizer.diagnostics.views.sheet import GREY, MARGIN, TOP, WIDTH, Sheet, fitting

COLUMNS, ROWS = 8, 2


def latent_colours(z_q: Tensor) -> tuple[Tensor, Tensor]:
    """z_q (N, D, h, w) -> colours (N, h, w, 3) in 0..1 (half where a component does not vary), and the share of the
    variance (3,) that each shows."""
    N, _, h, w = z_q.shape
    flat = z_q.permute(0, 2, 3, 1).flatten(0, 2)  # (N h w, D)
    components = pca(flat, 3)
    placed = components(flat)  # (N h w, 3)
    # Each from its 2nd to its 98th percentile. A quantile takes at most 2**24 numbers; evenly spaced ones do.
    some = placed[:: max(1, len(placed) // 100_000)]
    low, high = (some.quantile(share, dim=0) for share in (0.02, 0.98))
    scaled = torch.where(high - low > 1e-12, (placed - low) / (high - low).clamp_min(1e-12), 0.5).clamp(0, 1)
    return scaled.reshape(N, h, w, 3), components.explained


def draw_latent_maps(subject: Subject) -> Sheet:
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
        "What the latent keeps: its principal components as colours",
        f"The {encoded.z_q.shape[1]} channels of z_q, a grid of {h}x{w}, on three principal components shown as red, "
        f"green and blue:\n{', '.join(f'{share:.1%}' for share in explained.tolist())} of the variance. Equal colours "
        "are nearly equal latents, in all images alike.",
        encoded.footer,
    )
    for row in range(rows):
        top = TOP + 0.1 + row * step
        for line, name in enumerate(("image", "latent", "decoded")):
            sheet.text(MARGIN, top + line * (height + 0.05) + height / 2, name, color=GREY, va="center")
    for place, image in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        left, top = MARGIN + 0.75 + column * cell, TOP + 0.1 + row * step
        sheet.image(encoded.x[image], left, top, width)
        sheet.image(maps[image].numpy(), left, top + height + 0.05, width, interpolation="nearest")
        sheet.image(encoded.x_hat[image], left, top + 2 * (height + 0.05), width)
    return sheet


VIEW = View("latent_maps", "Latents as colours", draw_latent_maps)
