"""Masked latents: some positions are replaced, and the change of the decoded image shows how far each one reaches."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.diagnostics.report.embedded_images import BRIGHTEST
from stage1_tokenizer.diagnostics.views.base import (
    EncodedImages,
    Subject,
    View,
    code_use,
    decode_latents,
    encoded_images,
    error_map,
    look_up_vectors,
)  # fmt: skip
from stage1_tokenizer.diagnostics.views.sheet import COLOURS, GREY, MARGIN, TOP, WIDTH, Sheet, fitting

ROWS = 4
MEASURED = 64
"""Images over which the change by distance is averaged."""


def masks_of(h: int, w: int, seed: int) -> dict[str, Tensor]:
    """Return masks (h, w) bool of the positions to replace: a block in the middle, the right half, half at random."""
    block, half, scattered = (torch.zeros(h, w, dtype=torch.bool) for _ in range(3))
    side_y, side_x = -(-h // 4), -(-w // 4)
    top, left = (h - side_y) // 2, (w - side_x) // 2
    block[top : top + side_y, left : left + side_x] = True
    half[:, w // 2 :] = True
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
    scattered.view(-1)[order[: -(-h * w // 2)]] = True
    return {"a block": block, "the right half": half, "half at random": scattered}


def replacement(encoded: EncodedImages) -> Tensor:
    """Return the latent (D,) that replaces others: that of the most frequent codes; zeros if there are no codes."""
    if encoded.codes is None:
        return encoded.z_q.new_zeros(encoded.z_q.shape[1])
    common = code_use(encoded.codes, encoded.tokenizer.bottleneck.codebook_size).counts.argmax(dim=1)  # (K,)
    # A whole grid of this code, because a bottleneck's `vectors` may expect the grid's size.
    return look_up_vectors(encoded.tokenizer, common.expand(1, *encoded.codes.shape[1:]))[0, :, 0, 0]


def masked(z_q: Tensor, mask: Tensor, by: Tensor) -> Tensor:
    """Return z_q (N, D, h, w) with the vector `by` (D,) where mask (h, w) is True."""
    return torch.where(mask, by[:, None, None], z_q)


def change_by_distance(change: Tensor, mask: Tensor, factor: int) -> list[float]:
    """Average change (N, H, W) over pixels at each distance from the replaced positions (mask (h, w) bool).

    Distance 0 is inside them. Distance is the larger of the vertical and the horizontal one, in pixels.
    """
    inside = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)  # (H, W)
    means = [float(change[:, inside].mean())]
    within = inside
    while not within.all():
        grown = F.max_pool2d(within[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
        means.append(float(change[:, grown & ~within].mean()))
        within = grown
    return means


def draw_masked_latents(subject: Subject) -> Sheet:
    """Draw decoded images with replaced positions, the change of each pixel, and the mean change by distance."""
    encoded = encoded_images(subject)
    tokenizer, by = encoded.tokenizer, replacement(encoded)
    chosen, many = encoded.spaced_indices(ROWS), encoded.spaced_indices(MEASURED)
    h, w = encoded.z_q.shape[2:]
    factor = encoded.image_size[0] // h
    width, height = fitting(encoded.image_size, (WIDTH - 2 * MARGIN - 0.45) / 7 - 0.02)
    gap = (WIDTH - 2 * MARGIN - 7 * width - 3 * 0.04) / 3
    bottom = TOP + 0.4 + len(chosen) * (height + 0.06)
    replaced_by = "zeros" if encoded.codes is None else "the most frequent code"
    sheet = Sheet(
        bottom + 2.35,
        "Masked latents: how far the influence of a position reaches",
        f"Positions of the {h}x{w} latent, outlined, are replaced by {replaced_by}, then the grid is decoded.\n"
        "On the right of each image, the change of each pixel (mean over channels; black: none, brightest: "
        f"{BRIGHTEST:.0%} of the range and above).",
        encoded.footer,
    )
    sheet.text(MARGIN, TOP + 0.25, "no mask", size=10, weight="bold")
    axes = sheet.plot(MARGIN + 0.5, bottom + 0.4, WIDTH - 2 * MARGIN - 0.7, 1.4)
    axes.set_title(f"Mean change by distance from the replaced positions ({len(many)} images)")
    for row, index in enumerate(chosen):
        sheet.image(encoded.x_hat[index], MARGIN, TOP + 0.35 + row * (height + 0.06), width)
    for number, (name, mask) in enumerate(masks_of(h, w, subject.seed).items()):
        left = MARGIN + width + gap + number * (2 * width + 0.04 + gap)
        sheet.text(left, TOP + 0.25, name, size=10, weight="bold", color=COLOURS[number])
        rows, columns = torch.nonzero(mask).T
        x0, y0 = float(columns.min()) / w * width, float(rows.min()) / h * height
        size = (float(columns.max() + 1) / w * width - x0, float(rows.max() + 1) / h * height - y0)
        decoded = decode_latents(tokenizer, masked(encoded.z_q[chosen], mask, by))
        change = error_map(encoded.x_hat[chosen], decoded)
        for row in range(len(chosen)):
            top = TOP + 0.35 + row * (height + 0.06)
            sheet.image(decoded[row], left, top, width)
            sheet.error(change[row], left + width + 0.04, top, width)
            if name != "half at random":
                for start in (left, left + width + 0.04):
                    sheet.box(start + x0, top + y0, *size, edgecolor="#9fe870", lw=1.0)
        change = error_map(encoded.x_hat[many], decode_latents(tokenizer, masked(encoded.z_q[many], mask, by)))
        means = change_by_distance(change, mask, factor)
        axes.plot(range(len(means)), means, "o-", ms=3.5, lw=1.4, color=COLOURS[number], label=name)
    axes.axvline(factor, color=GREY, lw=1, ls="--")
    axes.text(factor, 0.97, f" one position: {factor} pixels", color=GREY, size=8, va="top",
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xlabel="pixels away from the nearest replaced position (0: inside)", ylim=(0, None))
    axes.set_ylabel("share of the range")
    axes.legend(loc="upper right")
    return sheet


VIEW = View("masked_latents", "Masked latents", draw_masked_latents)
