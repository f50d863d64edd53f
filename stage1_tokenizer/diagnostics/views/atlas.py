"""The codebook atlas: the used codes, their mean patches and shares, and the codes nearest to each."""

import json
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.report.embedded_images import Sprites, fitted, sprites_of
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, fold, format_percent, join, tag
from stage1_tokenizer.diagnostics.views.base import Subject, View, codes_of, encoded_images, once
from stage1_tokenizer.diagnostics.views.sheet import FAINT, GREY, MARGIN, TOP, WIDTH, Sheet

CHUNK = 1024
"""Codes whose distances to all others are in memory at once."""
GAP = 0.1
"""Inches between the patches of the PNG."""
NEIGHBOURS = 3
SHOWN, FOLDED = 96, 416
"""Codes on the page, the most used ones first: visible at once, and after a click."""
MLP_NOTE = (
    "This network is an MLP: a code may describe any part of an image, not just the patch under it, so its mean patch "
    "says less. "
)
SHOWN_IMAGES = 8
"""Images whose tokens the page shows, at most."""
SHOWN_CELLS = 6000
"""Positions of these images together, at most: each is an element of the page."""
LARGEST_GRID = 64
"""Rows and columns of a latent grid that are shown, at most; the top left part of a larger one is shown."""
SEARCHED_IMAGES = 64
"""Images in which the page looks up a code, at most."""
SEARCHED_AREA = 1_000_000
"""Pixels of these images together, at most."""
SEARCHED_SIDE = 256
"""Pixels of a side of one of these images, at most."""


class Atlas(NamedTuple):
    """The used codes of one codebook, the most used first; among equals the lower id first."""

    ids: Tensor
    """(U,) int64."""
    counts: Tensor
    """(U,) int64."""
    patches: Tensor
    """(U, C, f, f) in [-1, 1], the mean of the image patches at the positions that have this code."""
    nearest: Tensor
    """(U, n) int64, the nearest other codes of the whole codebook, the nearest first."""
    distances: Tensor
    """(U, n) float32, Euclidean."""
    codebook_size: int

    def json(self) -> str:
        """Return the content of the JSON file beside the PNG."""
        share = self.counts.double() / self.counts.sum()
        codes = [
            {
                "id": self.ids[i].item(),
                "count": self.counts[i].item(),
                "share": round(share[i].item(), 8),
                "nearest": self.nearest[i].tolist(),
                "distances": [round(distance, 6) for distance in self.distances[i].tolist()],
                "mean_colour": [round(level, 5) for level in self.patches[i].mean(dim=(1, 2)).tolist()],
            }
            for i in range(len(self.ids))
        ]
        return json.dumps({"codebook_size": self.codebook_size, "used": len(self.ids), "codes": codes}, indent=1)


def mean_patches(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average the patches of images x (N, C, H, W) under each code of codes (N, h, w).

    Returns:
        The used ids (U,), ascending, their counts (U,) and the mean patches (U, C, f, f).
    """
    h, w = codes.shape[1:]
    patches = rearrange(x, "N C (h f) (w g) -> (N h w) (C f g)", h=h, w=w)
    flat = codes.flatten().contiguous()
    counts = torch.bincount(flat)
    ids = counts.nonzero()[:, 0]
    counts, rows = counts[ids], torch.searchsorted(ids, flat)
    sums = torch.zeros(len(ids), patches.shape[1], dtype=torch.float64)
    sums.index_add_(0, rows, patches.double())
    means = (sums / counts[:, None]).float()
    return ids, counts, rearrange(means, "U (C f g) -> U C f g", C=x.shape[1], f=x.shape[2] // h)


def nearest_codes(codebook: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n codes of codebook (V, d) nearest to each of the ids (U,), without itself, and their distances.

    Both are (U, n), or narrower if the codebook has fewer than n other codes.
    """
    n = min(n, len(codebook) - 1)
    nearest, nearest_distances = [], []
    for part in ids.chunk(-(-len(ids) // CHUNK)):
        distances = torch.cdist(codebook[part], codebook, compute_mode="donot_use_mm_for_euclid_dist")  # (u, V)
        distances[torch.arange(len(part)), part] = torch.inf
        ordered = distances.topk(n, dim=1, largest=False)
        nearest.append(ordered.indices)
        nearest_distances.append(ordered.values)
    return torch.cat(nearest), torch.cat(nearest_distances)


def atlas_of(x: Tensor, codes: Tensor, codebook: Tensor, neighbours: int) -> Atlas:
    """Build the atlas of images x (N, C, H, W) with codes (N, h, w) of one codebook (V, d)."""
    ids, counts, patches = mean_patches(x, codes)
    order = counts.argsort(descending=True, stable=True)
    ids, counts, patches = ids[order], counts[order], patches[order]
    return Atlas(ids, counts, patches, *nearest_codes(codebook, ids, neighbours), len(codebook))


@once
def atlas_of_run(subject: Subject) -> Atlas:
    """Build the atlas of the first codebook."""
    encoded = encoded_images(subject)
    codes = codes_of(encoded)[..., 0]  # (N, h, w)
    return atlas_of(encoded.x, codes, encoded.tokenizer.bottleneck.codebooks()[0].float().cpu(), NEIGHBOURS)


def draw_atlas(subject: Subject) -> Sheet:
    """Draw the most used codes: mean patch, share of the positions and nearest codes."""
    atlas, encoded = atlas_of_run(subject), encoded_images(subject)
    depth, shown = encoded.tokenizer.bottleneck.depth, min(subject.codes, len(atlas.ids))
    atlas_rows = {code: index for index, code in enumerate(atlas.ids.tolist())}
    columns = 16 if shown > 96 else 12 if shown > 32 else 8
    cell = (WIDTH - 2 * MARGIN + GAP) / columns - GAP
    small = (cell - 0.04 * (NEIGHBOURS - 1)) / NEIGHBOURS
    letters = 6.5 if columns > 8 else 8
    ratio = atlas.patches.shape[2] / atlas.patches.shape[3]
    step = cell * ratio + 0.25 + small * ratio + 0.14
    first = f"Of the {depth} codes of a position the first (coarsest). " if depth > 1 else ""
    selection = f" (the {shown} most used of {len(atlas.ids)})" if shown < len(atlas.ids) else ""
    sheet = Sheet(
        TOP + 0.05 + -(-shown // columns) * step,
        f"Codebook atlas: the mean patch of each of {len(atlas.ids)} used codes",
        f"{first}Large: mean of the patches with this code in {encoded.count} validation images{selection}; below, its "
        f"id and its share of all\npositions; small: the {NEIGHBOURS} nearest codes in the codebook "
        f"(crossed: dead, has no patch). {atlas.codebook_size - len(atlas.ids)} of {atlas.codebook_size} codes are "
        "dead.",
        encoded.footer,
    )
    total = int(atlas.counts.sum())
    for index in range(shown):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (cell + GAP), TOP + 0.05 + row * step
        height = sheet.image(atlas.patches[index], left, top, cell, interpolation="nearest")
        sheet.box(left, top, cell, height, edgecolor=FAINT)
        sheet.text(left, top + height + 0.13, str(int(atlas.ids[index])), size=letters, weight="bold")
        share = short_percent(int(atlas.counts[index]) / total)
        sheet.text(left + cell, top + height + 0.13, share, size=letters - 0.5, color=GREY, ha="right")
        for number, other in enumerate(atlas.nearest[index].tolist()):
            x, y = left + number * (small + 0.04), top + height + 0.19
            if other in atlas_rows:
                tall = sheet.image(atlas.patches[atlas_rows[other]], x, y, small, interpolation="nearest")
                sheet.box(x, y, small, tall, edgecolor=FAINT, lw=0.5)
            else:
                sheet.box(x, y, small, small * ratio, edgecolor=FAINT, lw=0.6, hatch="xxxx")
    return sheet


def short_percent(share: float) -> str:
    """Format a share so that it fits under a patch: 12%, 3.4%, .56%, <.01%."""
    if share >= 0.0995:
        return f"{share:.0%}"
    if share >= 0.00995:
        return f"{share:.1%}"
    return f"{share:.2%}".removeprefix("0") if share >= 0.00005 else "<.01%"


class Choice(NamedTuple):
    """The images that the token view shows and searches (tokens.py). Their codes must be among the mean patches."""

    images: list[int]
    """Indices of the images in which the page looks up a code; those shown come first."""
    shown: int
    """Number of images that are shown."""
    rows: int
    columns: int
    """Size of the part of the grid that is shown."""
    codes: list[int]
    """Codes in that part of the shown images, ascending."""


@once
def choice_of(subject: Subject) -> Choice:
    """Choose the images of the token view, as many as a page has room for."""
    encoded = encoded_images(subject)
    codes = codes_of(encoded)[..., 0]  # (N, h, w)
    rows, columns = (min(side, LARGEST_GRID) for side in codes.shape[1:])
    height, width = fitted(encoded.x[:1], SEARCHED_SIDE).shape[2:]
    searched = max(1, min(SEARCHED_IMAGES, SEARCHED_AREA // (height * width)))
    shown = encoded.spaced_indices(max(1, min(SHOWN_IMAGES, SHOWN_CELLS // (rows * columns), searched)))
    others = [index for index in encoded.spaced_indices(searched) if index not in shown]
    shown_codes = sorted(set(codes[shown, :rows, :columns].flatten().tolist()))
    return Choice([*shown, *others[: searched - len(shown)]], len(shown), rows, columns, shown_codes)


@once
def means_of(subject: Subject) -> Sprites:
    """Build sprites of the mean patches: first those of the token view's codes, then those of the most used codes."""
    atlas, shown_codes = atlas_of_run(subject), choice_of(subject).codes
    order = list(dict.fromkeys([*shown_codes, *atlas.ids.tolist()]))[: max(len(shown_codes), 1024)]
    atlas_rows = {code: index for index, code in enumerate(atlas.ids.tolist())}
    return sprites_of("mean", order, atlas.patches[torch.tensor([atlas_rows[code] for code in order])])


def show_atlas(subject: Subject) -> Child:
    """Return the mean patch of each code, the most used first."""
    encoded, atlas, sprites = encoded_images(subject), atlas_of_run(subject), means_of(subject)
    tokenizer = encoded.tokenizer
    several = "A position has several codes; this is the atlas of the first, the coarsest. "
    codes = [code for code in atlas.ids.tolist() if code in sprites.indices][: SHOWN + FOLDED]
    left_out = len(atlas.ids) - len(codes)
    others = (
        f"{format_count(len(codes) - SHOWN, 'more code')}{f' ({left_out:,} others are not shown)' if left_out else ''}"
    )
    return join(
        sprites.style,
        tag(
            "p",
            several if tokenizer.bottleneck.depth > 1 else None,
            MLP_NOTE if tokenizer.config.network.kind == "mlp" else None,
            "For each code: the mean of the image patches at its positions, its number, its share of all positions, "
            f"and its count; the most used first. {len(atlas.ids):,} of {atlas.codebook_size:,} codes occur here. "
            "Codes may look alike: some differ only in combination with the codes around them.",
        ),
        _patches(atlas, sprites, codes[:SHOWN]),
        fold(others, _patches(atlas, sprites, codes[SHOWN:])) if len(codes) > SHOWN else None,
    )


def _patches(atlas: Atlas, sprites: Sprites, codes: list[int]) -> Markup:
    counts = dict(zip(atlas.ids.tolist(), atlas.counts.tolist(), strict=True))
    total = int(atlas.counts.sum())
    items = [
        tag(
            "li",
            sprites.patch(code, f"mean patch of code {code}"),
            tag("span", str(code), class_="code"),
            tag("span", format_percent(counts[code] / total), class_="share"),
            tag("span", f"{counts[code]:,}x", class_="share"),
        )
        for code in codes
    ]
    return tag("ol", items, class_="atlas")


VIEW = View("atlas", "Atlas of the codes", draw_atlas, show_atlas, json=lambda subject: atlas_of_run(subject).json())
