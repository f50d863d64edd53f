"""One-pixel holes in a rotated object, enlarged: a test of whether the tokenizer keeps the finest details."""

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.diagnostics.report.page import NothingToShowError
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, View, encoded_images
from stage1_tokenizer.diagnostics.views.sheet import DPI, MARGIN, TOP, WIDTH, Sheet, fitting

WINDOW = 24
"""Pixels of a side of the enlarged window around the holes."""
MIN_HOLES = 10
"""Fewer holes in all images of a folder are taken for chance, as a black pixel in a photograph is."""


class Holes(NamedTuple):
    """The image with the most one-pixel holes in an object, and their positions."""

    image: int
    """Its index."""
    mask: Tensor
    """(H, W) bool, True at the holes."""


def hole_masks(x: Tensor) -> Tensor:
    """Return the holes (N, H, W) bool of images (N, C, H, W): black pixels with four neighbours of one other colour.

    Rotation by forward mapping (data/shapes.py) leaves holes of one pixel. A black pixel between two objects is not a
    hole: its neighbours have two colours.
    """
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)  # (N, C, H + 2, W + 2)
    up, down, left, right = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    same = ((up == down) & (up == left) & (up == right)).all(dim=1)
    return same & (x <= -1).all(dim=1) & (up > -1).any(dim=1)


def find_holes(x: Tensor, labels: Tensor) -> Holes | None:
    """Return the image of x (N, C, H, W) with the most holes; None if no image has any.

    Images whose last object is a rectangle (label 0) are preferred.
    """
    masks = hole_masks(x)
    counts = masks.sum(dim=(1, 2))
    rectangles = torch.where(labels == 0, counts, 0)
    image = int((rectangles if rectangles.any() else counts).argmax())
    return Holes(image, masks[image]) if counts[image] else None


def depth_kept(x: Tensor, x_hat: Tensor, mask: Tensor) -> float:
    """Return the depth of the holes (H, W) in x_hat (C, H, W) divided by that in x: 1 is kept, 0 is filled in.

    Depth is the neighbours' mean minus the pixel, averaged over channels and holes.
    """

    def depth(image: Tensor) -> float:
        cross = image.new_tensor([[0.0, 0.25, 0.0], [0.25, -1.0, 0.25], [0.0, 0.25, 0.0]])
        around = F.conv2d(image[:, None], cross[None, None], padding=1)[:, 0]  # (C, H, W)
        return float(around[:, mask].mean())

    return depth(x_hat) / depth(x)


def count_kept(x: Tensor, x_hat: Tensor) -> tuple[int, int]:
    """Count the holes of images x (N, C, H, W) in [-1, 1], and those that the reconstructions x_hat keep.

    A hole is kept if the reconstruction is darker there than half the level of the shape around it. Levels are means
    over the channels, counted from black; the shape's is that of the hole's neighbours in the original.
    """
    masks = hole_masks(x)
    levels, levels_hat = (image.mean(dim=1) + 1.0 for image in (x, x_hat))  # (N, H, W), black is 0
    shape = levels.roll(1, dims=2)  # the left neighbour; all four are equal at a hole
    is_kept = masks & (levels_hat < shape / 2)
    return int(masks.sum()), int(is_kept.sum())


def images_with_holes(subject: Subject) -> tuple[EncodedImages, Holes]:
    """Return the images, and the one of them to show. Raises NothingToShowError: they have no holes."""
    encoded = encoded_images(subject)
    holes = find_holes(encoded.x, encoded.labels)
    has_holes = bool(encoded.loaded.data.get("holes"))  # drawn shapes
    if holes is None or (not has_holes and int(hole_masks(encoded.x).sum()) < MIN_HOLES):
        raise NothingToShowError("the images are not shapes with one-pixel holes (data.holes)")
    return encoded, holes


def holes_json(subject: Subject) -> str:
    """Return the number of holes in all images and hole recall, the share of them that the reconstructions keep."""
    encoded, _ = images_with_holes(subject)
    total, kept = count_kept(encoded.x, encoded.x_hat)
    return json.dumps({"images": encoded.count, "holes": total, "hole_recall": kept / total}, indent=1)


def draw_holes(subject: Subject) -> Sheet:
    """Draw the holes of one image: original, reconstruction and error. State the hole recall over all images."""
    encoded, holes = images_with_holes(subject)
    total, kept_holes = count_kept(encoded.x, encoded.x_hat)
    x, x_hat = encoded.x[holes.image], encoded.x_hat[holes.image]
    H, W = encoded.image_size
    side_y, side_x = min(WINDOW, H), min(WINDOW, W)
    centre = torch.nonzero(holes.mask).double().median(dim=0).values
    top = min(max(0, int(centre[0]) - side_y // 2), H - side_y)
    left = min(max(0, int(centre[1]) - side_x // 2), W - side_x)
    window = (slice(None), slice(top, top + side_y), slice(left, left + side_x))
    width, height = fitting((side_y, side_x), (WIDTH - 2 * MARGIN - 0.4) / 3)
    kept = depth_kept(x, x_hat, holes.mask)
    sheet = Sheet(
        TOP + 0.4 + height + 0.15,
        "One-pixel holes in a rotated object",
        f"{side_y}x{side_x} pixels of image {holes.image + 1}, enlarged {round(width * DPI / side_x)} times; "
        f"boxes mark its {int(holes.mask.sum())} holes. The reconstruction keeps {kept:.0%} of their depth "
        "(100%: black, 0%: filled in).\n"
        f"Of the {total:,} holes of {encoded.count:,} images, {kept_holes / total:.1%} are kept (darker than half the "
        "shape's level).",
        encoded.footer,
    )
    for column, name in enumerate(("original", "reconstruction", "absolute error")):
        x0, y0 = MARGIN + column * (width + 0.2), TOP + 0.35
        sheet.text(x0, TOP + 0.25, name, size=11, weight="bold")
        if name == "absolute error":
            sheet.error(encoded.errors[holes.image][window[1:]], x0, y0, width)
        else:
            sheet.image((x if name == "original" else x_hat)[window], x0, y0, width)
        dot = width / side_x
        for row, col in torch.nonzero(holes.mask[window[1:]]).tolist():
            sheet.box(x0 + col * dot, y0 + row * dot, dot, dot, edgecolor="white", lw=0.8)
    return sheet


VIEW = View("holes", "Holes", draw_holes, json=holes_json)
