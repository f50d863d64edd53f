"""The codebook atlas: which codes are used, what they look like on average, and which are their nearest."""

import json
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.diagnostics.report.embedded_images import Sprites, fitted, sprites_of
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, fold, format_percent, join, plural, tag
from stage1_tokenizer.diagnostics.views.base import Subject, View, codes_of, encoded_images, once
from stage1_tokenizer.diagnostics.views.sheet import FAINT, GREY, MARGIN, TOP, WIDTH, Sheet

CHUNK = 1024
"""Codes whose distances to all others are held at once."""
GAP = 0.1
NEIGHBOURS = 3
SHOWN, FOLDED = 96, 416
"""Codes of the atlas on the page, the most used ones, and how many more behind a fold."""
MIXED = (
    "This network is an MLP: a code may describe any part of a picture, not just the patch under it, so its mean patch "
    "says less. "
)
PICTURES = 8
"""Images whose tokens the page shows, at most."""
CELLS = 6000
"""Positions of all of these: each is an element of the page."""
LARGEST_GRID = 64
"""Rows and columns of a grid that is shown; of a larger one the top left part."""
ELSEWHERE = 64
"""Images in which the codes are looked up."""
SHEET_AREA = 1_000_000
SHEET_SIDE = 256
"""Pixels: of all of those, and of a side of one."""


class Atlas(NamedTuple):
    """The used codes of one codebook, the most used first (ties: the lower id first)."""

    ids: Tensor
    """(U,) int64."""
    counts: Tensor
    """(U,) int64."""
    patches: Tensor
    """(U, C, f, f) in [-1, 1]: the mean of the image patches at the positions that have this code."""
    nearest: Tensor
    """(U, n) int64: the nearest other codes of the whole codebook, the nearest first."""
    distances: Tensor
    """(U, n) float32."""
    codebook_size: int

    def json(self) -> str:
        """Return the file that is written beside the PNG."""
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
    """Images x (N, C, H, W) and codes (N, h, w) -> used ids (U,) ascending, their counts (U,), and the mean
    (U, C, f, f) of the patches under each."""
    h, w = codes.shape[1:]
    patches = rearrange(x, "N C (h f) (w g) -> (N h w) (C f g)", h=h, w=w)
    flat = codes.flatten().contiguous()
    counts = torch.bincount(flat)
    ids = counts.nonzero()[:, 0]
    counts, places = counts[ids], torch.searchsorted(ids, flat)
    sums = torch.zeros(len(ids), patches.shape[1], dtype=torch.float64)
    sums.index_add_(0, places, patches.double())
    means = (sums / counts[:, None]).float()
    return ids, counts, rearrange(means, "U (C f g) -> U C f g", C=x.shape[1], f=x.shape[2] // h)


def nearest_codes(codebook: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n codes of codebook (V, d) that lie nearest to each of the ids (U,), other than itself, and how far away:
    (U, n) twice, or fewer where there are not n others."""
    n = min(n, len(codebook) - 1)
    found, apart = [], []
    for part in ids.chunk(-(-len(ids) // CHUNK)):
        distances = torch.cdist(codebook[part], codebook, compute_mode="donot_use_mm_for_euclid_dist")  # (u, V)
        distances[torch.arange(len(part)), part] = torch.inf
        ordered = distances.topk(n, dim=1, largest=False)
        found.append(ordered.indices)
        apart.append(ordered.values)
    return torch.cat(found), torch.cat(apart)


def atlas_of(x: Tensor, codes: Tensor, codebook: Tensor, neighbours: int) -> Atlas:
    """x (N, C, H, W), codes (N, h, w) of one codebook (V, d)."""
    ids, counts, patches = mean_patches(x, codes)
    order = counts.argsort(descending=True, stable=True)
    ids, counts, patches = ids[order], counts[order], patches[order]
    return Atlas(ids, counts, patches, *nearest_codes(codebook, ids, neighbours), len(codebook))


@once
def atlas_of_run(subject: Subject) -> Atlas:
    """The atlas of the first codebook."""
    encoded = encoded_images(subject)
    codes = codes_of(encoded)[..., 0]  # (N, h, w)
    return atlas_of(encoded.x, codes, encoded.tokenizer.bottleneck.codebooks()[0].float().cpu(), NEIGHBOURS)


def draw_atlas(subject: Subject) -> Sheet:
    """The most used codes: mean patch, share of the positions, and nearest codes."""
    atlas, encoded = atlas_of_run(subject), encoded_images(subject)
    depth, shown = encoded.tokenizer.bottleneck.depth, min(subject.codes, len(atlas.ids))
    places = {code: place for place, code in enumerate(atlas.ids.tolist())}
    columns = 16 if shown > 96 else 12 if shown > 32 else 8
    cell = (WIDTH - 2 * MARGIN + GAP) / columns - GAP
    small = (cell - 0.04 * (NEIGHBOURS - 1)) / NEIGHBOURS
    letters = 6.5 if columns > 8 else 8
    ratio = atlas.patches.shape[2] / atlas.patches.shape[3]
    step = cell * ratio + 0.25 + small * ratio + 0.14
    first = f"Of the {depth} codes of a position the first (coarsest). " if depth > 1 else ""
    rest = f" (the {shown} most used of {len(atlas.ids)})" if shown < len(atlas.ids) else ""
    sheet = Sheet(
        TOP + 0.05 + -(-shown // columns) * step,
        f"Codebook atlas: what each of {len(atlas.ids)} used codes stands for",
        f"{first}Large: mean of the patches of {encoded.count} validation images on which the code falls{rest}; "
        f"below, its id and share of all\npositions; small: the {NEIGHBOURS} codes nearest to it in the codebook "
        f"(crossed: dead, has no patch). {atlas.codebook_size - len(atlas.ids)} of {atlas.codebook_size} codes are "
        "dead.",
        encoded.footer,
    )
    total = int(atlas.counts.sum())
    for place in range(shown):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * (cell + GAP), TOP + 0.05 + row * step
        height = sheet.image(atlas.patches[place], left, top, cell, interpolation="nearest")
        sheet.box(left, top, cell, height, edgecolor=FAINT)
        sheet.text(left, top + height + 0.13, str(int(atlas.ids[place])), size=letters, weight="bold")
        share = short_percent(int(atlas.counts[place]) / total)
        sheet.text(left + cell, top + height + 0.13, share, size=letters - 0.5, color=GREY, ha="right")
        for number, other in enumerate(atlas.nearest[place].tolist()):
            x, y = left + number * (small + 0.04), top + height + 0.19
            if other in places:
                tall = sheet.image(atlas.patches[places[other]], x, y, small, interpolation="nearest")
                sheet.box(x, y, small, tall, edgecolor=FAINT, lw=0.5)
            else:
                sheet.box(x, y, small, small * ratio, edgecolor=FAINT, lw=0.6, hatch="xxxx")
    return sheet


def short_percent(share: float) -> str:
    """A share in as many characters as stand under a patch: 12%, 3.4%, .56%, <.01%."""
    if share >= 0.0995:
        return f"{share:.0%}"
    if share >= 0.00995:
        return f"{share:.1%}"
    return f"{share:.2%}".removeprefix("0") if share >= 0.00005 else "<.01%"


class Choice(NamedTuple):
    """The images whose tokens the page lays over them (tokens.py). Their codes must be among the mean patches."""

    places: list[int]
    """Images in which a code is looked up; those to choose from come first."""
    shown: int
    """Number of images to choose from."""
    rows: int
    columns: int
    """Size of the part of the grid that is shown."""
    codes: list[int]
    """Codes that occur in it."""


@once
def choice_of(subject: Subject) -> Choice:
    encoded = encoded_images(subject)
    codes = codes_of(encoded)[..., 0]  # (N, h, w)
    rows, columns = (min(side, LARGEST_GRID) for side in codes.shape[1:])
    height, width = fitted(encoded.x[:1], SHEET_SIDE).shape[2:]
    many = max(1, min(ELSEWHERE, SHEET_AREA // (height * width)))
    few = encoded.spaced_indices(max(1, min(PICTURES, CELLS // (rows * columns), many)))
    others = [place for place in encoded.spaced_indices(many) if place not in few]
    wanted = sorted(set(codes[few, :rows, :columns].flatten().tolist()))
    return Choice([*few, *others[: many - len(few)]], len(few), rows, columns, wanted)


@once
def means_of(subject: Subject) -> Sprites:
    """The mean patches of the codes in the images to choose from, and after them of the most used ones."""
    atlas, wanted = atlas_of_run(subject), choice_of(subject).codes
    order = list(dict.fromkeys([*wanted, *atlas.ids.tolist()]))[: max(len(wanted), 1024)]
    place = {code: number for number, code in enumerate(atlas.ids.tolist())}
    return sprites_of("mean", order, atlas.patches[torch.tensor([place[code] for code in order])])


def show_atlas(subject: Subject) -> Child:
    """Each code's mean patch, the most used first."""
    encoded, atlas, sprites = encoded_images(subject), atlas_of_run(subject), means_of(subject)
    tokenizer = encoded.tokenizer
    depth = tokenizer.bottleneck.depth
    first = "Of the several codes of a position this is the first, the coarsest. " if depth > 1 else ""
    codes = [code for code in atlas.ids.tolist() if code in sprites.places][: SHOWN + FOLDED]
    left = len(atlas.ids) - len(codes)
    others = f"{plural(len(codes) - SHOWN, 'more code')}{f' (and {left:,} that are not shown)' if left else ''}"
    return join(
        sprites.style,
        tag(
            "p",
            first,
            MIXED if tokenizer.config.network.kind == "mlp" else None,
            "The mean of the image patches on which each code falls, its number, its share of all positions, and how "
            f"many these are; the most used first. {len(atlas.ids):,} of {atlas.codebook_size:,} codes occur here. "
            "Codes may look alike: their differences may show only together with those around them.",
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
