"""Best, median and worst reconstructions; and the lecture's one-pixel holes, enlarged."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.diagnostics.analysis.encoded import Encoded
from stage1_tokenizer.diagnostics.analysis.sheet import COLOURS, DPI, GREY, MARGIN, TOP, WIDTH, Sheet, pixels, width_of

ROWS = 4
WHITE_AT = 0.5
"""The absolute error, as a share of the whole range, that is drawn brightest."""
WINDOW = 24
"""Pixels of the enlarged window around holes."""


def groups_by_psnr(psnr: Tensor, n: int) -> dict[str, list[int]]:
    """Places of the n best, n middle and n worst of psnr (N,), the best first in each; fewer where there are not so
    many, never one twice."""
    order = psnr.argsort(descending=True, stable=True).tolist()
    n = max(1, min(n, len(order) // 3))
    middle = max(n, (len(order) - n) // 2)
    groups = {"best": order[:n], "median": order[middle : middle + n], "worst": order[max(2 * n, len(order) - n) :]}
    return {name: places for name, places in groups.items() if places}


def error_map(x: Tensor, x_hat: Tensor) -> Tensor:
    """Absolute error (N, H, W) of images (N, C, H, W) in [-1, 1], mean over channels, as a share of the range."""
    return (x_hat - x).abs().mean(dim=1) / 2.0


def draw_reconstructions(encoded: Encoded, footer: str) -> Sheet:
    psnr = encoded.psnr
    groups = groups_by_psnr(psnr, ROWS)
    errors = error_map(encoded.x, encoded.x_hat)
    cell = (WIDTH - 2 * MARGIN - 2 * 0.5) / 9 - 0.05
    width = width_of(encoded.image_size, cell)
    height = width * encoded.image_size[0] / encoded.image_size[1]
    rows = max(len(places) for places in groups.values())
    step = 3 * (cell + 0.05) + 0.5
    bottom = TOP + 0.45 + rows * (height + 0.3)
    sheet = Sheet(
        bottom + 1.6,
        "Reconstructions: the best, the middle and the worst",
        f"{len(psnr)} validation images by PSNR. In each triple: original, reconstruction, absolute error (mean over "
        f"channels;\nblack: none, brightest: {WHITE_AT:.0%} of the range and above).",
        footer,
    )
    with sheet:
        for column, (name, places) in enumerate(groups.items()):
            left = MARGIN + column * step
            sheet.text(left, TOP + 0.25, name, size=11, weight="bold", color=COLOURS[column])
            for row, place in enumerate(places):
                top = TOP + 0.4 + row * (height + 0.3)
                sheet.image(pixels(encoded.x[place]), left, top, width)
                sheet.image(pixels(encoded.x_hat[place]), left + width + 0.05, top, width)
                error = {"cmap": "inferno", "vmin": 0.0, "vmax": WHITE_AT}
                sheet.image(errors[place].numpy(), left + 2 * (width + 0.05), top, width, **error)
                sheet.text(left, top + height + 0.16, f"{psnr[place]:.2f} dB", size=8, color=GREY)
        axes = sheet.plot(MARGIN + 0.1, bottom + 0.3, WIDTH - 2 * MARGIN - 0.2, 0.8)
        axes.hist(psnr.numpy(), bins=min(60, max(5, len(psnr) // 6)), color="#b9c6d6")
        axes.set(xlabel="PSNR in dB, all of these images", yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False)
        for column, places in enumerate(groups.values()):
            axes.plot(psnr[places], np.zeros(len(places)), "^", color=COLOURS[column], ms=6, clip_on=False, zorder=3)
        axes.axvline(float(psnr.mean()), color=GREY, lw=1, ls="--")
        axes.text(float(psnr.mean()), 1.02, f"mean {psnr.mean():.2f} dB", color=GREY, ha="center", va="bottom", size=8,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    return sheet


class Holes(NamedTuple):
    """The image with the most one-pixel holes in an object, and where they are."""

    place: int
    mask: Tensor
    """(H, W) bool."""


def hole_masks(x: Tensor) -> Tensor:
    """(N, H, W) bool: black pixels all four of whose neighbours are of one colour that is not black.

    A hole of the lecture's forward mapping is of one pixel; black between two objects has neighbours of two colours.
    """
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)  # (N, C, H + 2, W + 2)
    up, down, left, right = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    same = ((up == down) & (up == left) & (up == right)).all(dim=1)
    return same & (x <= -1).all(dim=1) & (up > -1).any(dim=1)


def find_holes(x: Tensor, labels: Tensor) -> Holes | None:
    """The image (of x (N, C, H, W)) whose last object is a rectangle (label 0) and which has the most holes; where no
    rectangle has any, any image; None where there are none at all."""
    masks = hole_masks(x)
    counts = masks.sum(dim=(1, 2))
    rectangles = torch.where(labels == 0, counts, 0)
    place = int((rectangles if rectangles.any() else counts).argmax())
    return Holes(place, masks[place]) if counts[place] else None


def depth_kept(x: Tensor, x_hat: Tensor, mask: Tensor) -> float:
    """How deep holes (H, W) are in x_hat (C, H, W), as a share of their depth in x: 1 reproduced, 0 filled in. Depth is
    the mean over channels and holes of the neighbours' mean less the pixel."""

    def depth(image: Tensor) -> float:
        cross = image.new_tensor([[0.0, 0.25, 0.0], [0.25, -1.0, 0.25], [0.0, 0.25, 0.0]])
        around = F.conv2d(image[:, None], cross[None, None], padding=1)[:, 0]  # (C, H, W)
        return float(around[:, mask].mean())

    return depth(x_hat) / depth(x)


def draw_holes(encoded: Encoded, holes: Holes, footer: str) -> Sheet:
    x, x_hat = encoded.x[holes.place], encoded.x_hat[holes.place]
    H, W = encoded.image_size
    side_y, side_x = min(WINDOW, H), min(WINDOW, W)
    centre = torch.nonzero(holes.mask).double().median(dim=0).values
    top = min(max(0, int(centre[0]) - side_y // 2), H - side_y)
    left = min(max(0, int(centre[1]) - side_x // 2), W - side_x)
    window = (slice(None), slice(top, top + side_y), slice(left, left + side_x))
    width = width_of((side_y, side_x), (WIDTH - 2 * MARGIN - 0.4) / 3)
    height = width * side_y / side_x
    kept = depth_kept(x, x_hat, holes.mask)
    sheet = Sheet(
        TOP + 0.4 + height + 0.15,
        "One-pixel holes in a rotated object: the lecture's test",
        f"{side_y}x{side_x} pixels of image {holes.place + 1}, enlarged {round(width * DPI / side_x)} times; "
        f"boxes mark its {int(holes.mask.sum())} holes.\nThe reconstruction keeps {kept:.0%} of their depth "
        "(100%: as dark as in the original, 0%: filled in).",
        footer,
    )
    with sheet:
        error = error_map(x[None], x_hat[None])[0]
        panels = {
            "original": pixels(x[window]),
            "reconstruction": pixels(x_hat[window]),
            "absolute error": error[window[1:]].numpy(),
        }
        for column, (name, picture) in enumerate(panels.items()):
            x0, y0 = MARGIN + column * (width + 0.2), TOP + 0.35
            sheet.text(x0, TOP + 0.25, name, size=11, weight="bold")
            scale = {"cmap": "inferno", "vmin": 0.0, "vmax": WHITE_AT} if name == "absolute error" else {}
            sheet.image(picture, x0, y0, width, **scale)
            dot = width / side_x
            for row, col in torch.nonzero(holes.mask[window[1:]]).tolist():
                sheet.box(x0 + col * dot, y0 + row * dot, dot, dot, edgecolor="white", lw=0.8)
    return sheet
