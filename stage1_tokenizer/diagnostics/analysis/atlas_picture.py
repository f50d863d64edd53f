"""The codebook atlas as a picture: each code's mean patch, its use, and its nearest codes."""

from stage1_tokenizer.diagnostics.analysis.atlas import Atlas
from stage1_tokenizer.diagnostics.analysis.sheet import FAINT, GREY, MARGIN, TOP, WIDTH, Sheet, pixels

GAP = 0.1
NEIGHBOURS = 3


def draw_atlas(atlas: Atlas, depth: int, at_most: int, images: int, footer: str) -> Sheet:
    """The `at_most` most used codes."""
    shown = min(at_most, len(atlas.ids))
    places = {code: place for place, code in enumerate(atlas.ids.tolist())}
    columns = 16 if shown > 96 else 12 if shown > 32 else 8
    cell = (WIDTH - 2 * MARGIN + GAP) / columns - GAP
    small = (cell - 0.04 * (NEIGHBOURS - 1)) / NEIGHBOURS
    letters = 6.5 if columns > 8 else 8
    factor_y, factor_x = atlas.patches.shape[2:]
    step = cell * factor_y / factor_x + 0.25 + small * factor_y / factor_x + 0.14
    rows = -(-shown // columns)
    first = f"Of the {depth} codes of a position the first (coarsest). " if depth > 1 else ""
    rest = f" (the {shown} most used of {len(atlas.ids)})" if shown < len(atlas.ids) else ""
    sheet = Sheet(
        TOP + 0.05 + rows * step,
        f"Codebook atlas: what each of {len(atlas.ids)} used codes stands for",
        f"{first}Large: mean of the patches of {images} validation images on which the code falls{rest}; below, its id "
        f"and share of all\npositions; small: the {NEIGHBOURS} codes nearest to it in the codebook (crossed: dead, has "
        f"no patch). {atlas.codebook_size - len(atlas.ids)} of {atlas.codebook_size} codes are dead.",
        footer,
    )
    with sheet:
        total = int(atlas.counts.sum())
        for place in range(shown):
            row, column = divmod(place, columns)
            left, top = MARGIN + column * (cell + GAP), TOP + 0.05 + row * step
            height = sheet.image(pixels(atlas.patches[place]), left, top, cell, interpolation="nearest")
            sheet.box(left, top, cell, height, edgecolor=FAINT)
            sheet.text(left, top + height + 0.13, str(int(atlas.ids[place])), size=letters, weight="bold")
            share = int(atlas.counts[place]) / total
            sheet.text(left + cell, top + height + 0.13, percent(share), size=letters - 0.5, color=GREY, ha="right")
            for number, other in enumerate(atlas.nearest[place].tolist()):
                x, y = left + number * (small + 0.04), top + height + 0.19
                if other in places:
                    tall = sheet.image(pixels(atlas.patches[places[other]]), x, y, small, interpolation="nearest")
                    sheet.box(x, y, small, tall, edgecolor=FAINT, lw=0.5)
                else:
                    tall = small * factor_y / factor_x
                    sheet.box(x, y, small, tall, edgecolor=FAINT, lw=0.6, hatch="xxxx")
    return sheet


def percent(share: float) -> str:
    """A share in as many characters as stand under a patch: 12%, 3.4%, .56%, <.01%."""
    if share >= 0.0995:
        return f"{share:.0%}"
    if share >= 0.00995:
        return f"{share:.1%}"
    return f"{share:.2%}".removeprefix("0") if share >= 0.00005 else "<.01%"
