"""Many small patches in one picture, of which each element shows its own."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.analysis.atlas import Atlas
from stage1_tokenizer.diagnostics.report.markup import Markup, tag
from stage1_tokenizer.diagnostics.report.pictures import LARGEST_AREA, data_uri, fitted, sheet

SIDE = 16
"""Pixels of a patch, at most."""
COLUMNS = 32
AREA = LARGEST_AREA // 2
"""Pixels of them all, which are lossless."""


class Sprites(NamedTuple):
    """Patches of some codes."""

    name: str
    """The class of the elements."""
    places: dict[int, int]
    """Of each code that is there."""
    rows: int
    style: Markup

    def position(self, code: int) -> str:
        """As CSS has it, in per cent of what the picture is larger than the element."""
        row, column = divmod(self.places[code], COLUMNS)
        down = 100 * row / (self.rows - 1) if self.rows > 1 else 0
        return f"{100 * column / (COLUMNS - 1):.4g}% {down:.5g}%"

    def patch(self, code: int, alt: str) -> Markup:
        """An element that shows a code's patch."""
        place = f"background-position:{self.position(code)}"
        return tag("span", role="img", aria_label=alt, class_=f"patch {self.name}", style=place)


def sprites_of(name: str, codes: list[int], patches: Tensor) -> Sprites:
    """codes and their patches (n, C, f, g) in [-1, 1], as many as there is room for."""
    small = fitted(patches, SIDE)
    room = AREA // (small.shape[2] * small.shape[3])
    codes, small = codes[:room], small[:room]
    rows = -(-len(codes) // COLUMNS)
    picture = sheet(small, COLUMNS)
    ratio = f"{small.shape[3]} / {small.shape[2]}"
    style = Markup(
        f"<style>.{name}{{background-image:url({data_uri(picture, lossless=sys.maxsize)});"
        f"background-size:{100 * COLUMNS}% {100 * rows}%;aspect-ratio:{ratio}}}</style>"
    )
    return Sprites(name, {code: place for place, code in enumerate(codes)}, rows, style)


def mean_sprites(atlas: Atlas, wanted: list[int]) -> Sprites:
    """The mean patches of the wanted codes, and after them of the most used ones."""
    order = list(dict.fromkeys([*wanted, *atlas.ids.tolist()]))[: max(len(wanted), 1024)]
    place = {code: number for number, code in enumerate(atlas.ids.tolist())}
    return sprites_of("mean", order, atlas.patches[torch.tensor([place[code] for code in order])])
