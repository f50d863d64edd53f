"""Reconstructions beside their originals, with maps of the error."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.diagnostics.report.embedded_images import (
    BRIGHTEST,
    enlargement,
    fitted,
    grid,
    heat,
    img,
    pixels,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, format_percent, join, tag
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, notice, or_notice
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, View, encoded_images
from stage1_tokenizer.diagnostics.views.sheet import COLOURS, GREY, MARGIN, TOP, WIDTH, Sheet, fitting

ROWS = 4
"""Images in each group of the PNG."""
SHOWN = 8
"""Images on the page."""
SIDE = 192
"""Pixels of an image's side on the page, at most."""
WANTED = 128
"""Pixels on the screen to which small images are enlarged."""


def groups_by_psnr(psnr: Tensor, n: int) -> dict[str, list[int]]:
    """Return indices of the n best, n middle and n worst of psnr (N,), the best first in each group.

    Groups are smaller if there are fewer than 3n images; no image is in two groups.
    """
    order = psnr.argsort(descending=True, stable=True).tolist()
    n = max(1, min(n, len(order) // 3))
    middle = max(n, (len(order) - n) // 2)
    groups = {"best": order[:n], "median": order[middle : middle + n], "worst": order[max(2 * n, len(order) - n) :]}
    return {name: indices for name, indices in groups.items() if indices}


def draw_reconstructions(subject: Subject) -> Sheet:
    """Draw the best, middle and worst reconstructions, and a histogram of PSNR."""
    encoded = encoded_images(subject)
    psnr, groups = encoded.psnr, groups_by_psnr(encoded.psnr, ROWS)
    cell = (WIDTH - 2 * MARGIN - 2 * 0.5) / 9 - 0.05
    width, height = fitting(encoded.image_size, cell)
    step = 3 * (cell + 0.05) + 0.5
    bottom = TOP + 0.45 + max(map(len, groups.values())) * (height + 0.3)
    sheet = Sheet(
        bottom + 1.6,
        "Reconstructions: the best, the middle and the worst",
        f"{len(psnr)} validation images by PSNR. In each triple: original, reconstruction, absolute error (mean over "
        f"channels;\nblack: none, brightest: {BRIGHTEST:.0%} of the range and above).",
        encoded.footer,
    )
    axes = sheet.plot(MARGIN + 0.1, bottom + 0.3, WIDTH - 2 * MARGIN - 0.2, 0.8)
    axes.hist(psnr.numpy(), bins=min(60, max(5, len(psnr) // 6)), color="#b9c6d6")
    axes.set(xlabel="PSNR in dB, all of these images", yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    for column, (name, indices) in enumerate(groups.items()):
        left = MARGIN + column * step
        sheet.text(left, TOP + 0.25, name, size=11, weight="bold", color=COLOURS[column])
        axes.plot(psnr[indices], np.zeros(len(indices)), "^", color=COLOURS[column], ms=6, clip_on=False, zorder=3)
        for row, index in enumerate(indices):
            top = TOP + 0.4 + row * (height + 0.3)
            sheet.image(encoded.x[index], left, top, width)
            sheet.image(encoded.x_hat[index], left + width + 0.05, top, width)
            sheet.error(encoded.errors[index], left + 2 * (width + 0.05), top, width)
            sheet.text(left, top + height + 0.16, f"{psnr[index]:.2f} dB", size=8, color=GREY)
    axes.axvline(float(psnr.mean()), color=GREY, lw=1, ls="--")
    axes.text(float(psnr.mean()), 1.02, f"mean {psnr.mean():.2f} dB", color=GREY, ha="center", va="bottom", size=8,
              transform=axes.get_xaxis_transform())  # fmt: skip
    return sheet


def show_reconstructions(subject: Subject) -> Child:
    """Return reconstructions from all over the split, and the grids that the training saved; these need no data."""
    now: Child
    try:
        encoded = encoded_images(subject)
        triples = [triple(encoded, index, caption(encoded, index)) for index in encoded.spaced_indices(SHOWN)]
        now = join(
            tag(
                "p",
                "In each row: original, reconstruction, and the absolute error between them (black: none; brightest: ",
                f"{format_percent(BRIGHTEST)} of the range and above). The images are evenly spaced over the split.",
            ),
            tag("div", triples, class_="triples"),
        )
    except EXPECTED_ERRORS as error:
        now = notice(f"They cannot be made again: {error}")
    saved = over_training(subject.run, "reconstructions", "Originals and reconstructions, side by side,", most=3)
    if saved is None:
        return now
    words = tag("p", "Each original is on the left of its reconstruction; the images are the same each time.")
    return join(now, tag("h3", "During the training"), words, saved)


def triple(encoded: EncodedImages, index: int, words: Child) -> Markup:
    """Return original, reconstruction and error of an image in a row, with a caption."""
    error = encoded.errors[index]  # (H, W)
    small = fitted(torch.stack([encoded.x[index], encoded.x_hat[index]]), SIDE)
    scale = enlargement(max(small.shape[2:]), WANTED)
    class_name = encoded.class_name(index)
    original = f"Original: a validation image{f' of class {class_name}' if class_name else ''}"
    worst = f"Its error, {format_percent(float(error.max()))} of the range at the worst pixel"
    parts = [
        img(pixels(small[0]), original, scale),
        img(pixels(small[1]), f"Reconstruction of it, PSNR {encoded.psnr[index]:.2f} dB", scale),
        img(heat(fitted(error[None, None], SIDE)[0, 0]), worst, scale),
    ]
    return tag("figure", tag("div", parts, class_="three"), tag("figcaption", words), class_="triple")


def caption(encoded: EncodedImages, index: int) -> list[Child]:
    """Return PSNR and class of an image."""
    class_name = encoded.class_name(index)
    return [tag("strong", f"{encoded.psnr[index]:.2f} dB"), f" {class_name}" if class_name else None]


def over_training(run: RunFolder, prefix: str, what: str, most: int = 6) -> Markup | None:
    """Return the grids that the training saved in samples/: first, last and some between. None if there are none."""
    saved = run.logged_images(prefix)
    if not saved:
        return None
    most = min(most, len(saved))
    chosen = sorted({round(number * (len(saved) - 1) / max(1, most - 1)) for number in range(most)})
    return tag("div", [or_notice(partial(_strip, what, *saved[index])) for index in chosen], class_="strips")


def _strip(what: str, step: int, path: Path) -> Markup:
    image = grid(read_image(path, 3), f"{what} after {step:,} steps")
    return tag("figure", image, tag("figcaption", tag("strong", f"Step {step:,}")), class_="strip")


VIEW = View("reconstructions", "Reconstructions", draw_reconstructions, show_reconstructions)
