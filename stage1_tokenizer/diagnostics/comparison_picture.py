"""The picture of a comparison: some validation images, and below them what each preset makes of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from stage1_tokenizer.data.pictures import to_uint8
from stage1_tokenizer.diagnostics.comparison import Reconstructions

INCHES = 0.9
"""Of an image; the labels stand in as much as three of them."""


def draw(measured: Sequence[Reconstructions], path: Path) -> None:
    """Write the picture. Presets of the same data set stand under one row of its images."""
    rows = labelled_rows(measured)
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(INCHES * (columns + 3), INCHES * len(rows)), dpi=120, layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        strip = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=255)  # (3, height, width)
        axes.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.savefig(path, bbox_inches="tight")


def labelled_rows(measured: Sequence[Reconstructions]) -> list[tuple[str, Tensor]]:
    """(label, images (n, C, H, W)) from top to bottom: each data set's images, then the presets trained on it."""
    groups: list[list[Reconstructions]] = []
    for one in measured:
        same = [group for group in groups if torch.equal(group[0].originals, one.originals)]
        if same:
            same[0].append(one)
        else:
            groups.append([one])
    rows = []
    for group in groups:
        rows.append((f"{group[0].row.data}, validation", group[0].originals))
        rows += [(f"{one.row.preset}\n{one.row.psnr:.2f} dB", one.images) for one in group]
    return rows
