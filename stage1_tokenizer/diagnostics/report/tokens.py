"""The tokens of pictures laid over them: which code stands where, what it looks like, and where else it is used.

The codes are in the page as a table over each picture, which is all that is needed to read them. page.js makes of it a
grid to point at and to walk through, and looks up the other pictures in a sheet that the page carries.
"""

import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.diagnostics.analysis.atlas import Atlas
from stage1_tokenizer.diagnostics.analysis.encoded import decode, vectors
from stage1_tokenizer.diagnostics.report.codebook import no_codes
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, data_block, join, tag
from stage1_tokenizer.diagnostics.report.measured import Measured, pixels_for
from stage1_tokenizer.diagnostics.report.numbers import plural
from stage1_tokenizer.diagnostics.report.pictures import data_uri, enlargement, fitted, img, pixels, sheet
from stage1_tokenizer.diagnostics.report.sprites import Sprites, sprites_of

PICTURES = 8
"""To choose from, at most."""
CELLS = 6000
"""Positions of all of them: each is an element of the page."""
LARGEST_GRID = 64
"""Rows and columns of a grid that is shown; of a larger one the top left part."""
ELSEWHERE = 64
"""Pictures in which the codes are looked up."""
SHEET_AREA = 1_000_000
SHEET_SIDE = 256
"""Pixels: of all of those, and of a side of one."""
ROOM = 32
"""Digits in a row that can be read over a picture on a phone; where there are more, they stand below it."""
LARGE = 512
"""Pixels on the screen of the picture with the tokens."""
ALONE = 512
"""Codes that are decoded alone, at most."""


def chosen(measured: Measured) -> list[int]:
    """The pictures of the sheet; those to choose from come first."""
    rows, columns = grid_of(measured)
    height, width = fitted(measured.encoded.x[:1], SHEET_SIDE).shape[2:]
    many = max(1, min(ELSEWHERE, SHEET_AREA // (height * width)))
    few = measured.encoded.spread(max(1, min(PICTURES, CELLS // (rows * columns), many)))
    others = [place for place in measured.encoded.spread(many) if place not in few]
    return [*few, *others[: many - len(few)]]


def grid_of(measured: Measured) -> tuple[int, int]:
    """Rows and columns that are shown."""
    assert measured.codes is not None
    h, w = measured.codes.shape[1:]
    return min(h, LARGEST_GRID), min(w, LARGEST_GRID)


def shown_first(measured: Measured) -> int:
    """How many pictures there are to choose from."""
    rows, columns = grid_of(measured)
    return min(max(1, min(PICTURES, CELLS // (rows * columns))), len(chosen(measured)))


def codes_in(measured: Measured) -> list[int]:
    """The codes of the pictures to choose from, which have to have a patch."""
    assert measured.codes is not None
    rows, columns = grid_of(measured)
    few = measured.codes[chosen(measured)[: shown_first(measured)], :rows, :columns]
    return sorted(set(few.flatten().tolist()))


def alone(measured: Measured, codes: list[int]) -> Sprites | None:
    """What the decoder draws in the middle of a picture of one code alone; None where this would take long, or where
    a position has several codes."""
    tokenizer = measured.loaded.tokenizer
    _, _, H, W = measured.encoded.x.shape
    device = next(tokenizer.parameters()).device
    codes = codes[:ALONE]
    if tokenizer.bottleneck.depth != 1 or len(codes) * H * W > pixels_for(device):
        return None
    h, w, _, _ = tokenizer.shape
    grids = torch.tensor(codes)[:, None, None, None].expand(-1, h, w, 1)
    factor = tokenizer.config.network.factor
    top, left = h // 2 * factor, w // 2 * factor
    drawn = decode(tokenizer, vectors(tokenizer, grids))[:, :, top : top + factor, left : left + factor]
    return sprites_of("alone", codes, drawn)


def show_tokens(measured: Measured, atlas: Atlas | None, means: Sprites | None, own: Sprites | None) -> Markup:
    """The pictures with their codes over them, and what is known of each code."""
    if measured.codes is None or atlas is None or means is None:
        return no_codes(measured)
    rows, columns = grid_of(measured)
    places, number = chosen(measured), shown_first(measured)
    pictures = fitted(measured.encoded.x[places], SHEET_SIDE)
    depth = measured.loaded.tokenizer.bottleneck.depth
    whole = measured.codes.shape[1:]
    names = [_name(measured, place, index) for index, place in enumerate(places[:number])]
    options = [
        tag("button", img(pixels(image), name, enlargement(max(image.shape[1:]), 56)), type="button",
            aria_pressed="true" if index == 0 else "false", data_picture=index)
        for index, (image, name) in enumerate(zip(pictures[:number], names, strict=True))
    ]  # fmt: skip
    overlays = [
        _overlay(measured, place, index, name, rows, columns)
        for index, (place, name) in enumerate(zip(places[:number], names, strict=True))
    ]
    return join(
        tag(
            "p",
            f"Each picture is {whole[0]} by {whole[1]} codes out of {atlas.codebook_size:,}. ",
            f"Of the {depth} codes of a position the first one is shown. " if depth > 1 else None,
            f"Only the top left {rows} by {columns} are shown. " if (rows, columns) != tuple(whole) else None,
            tag("span", "Point at a position, tap it, or walk with the arrow keys.", class_="js-only"),
            tag("span", "The numbers are the codes.", class_="no-js"),
        ),
        tag("div", options, class_="picker js-only", role="group", aria_label="Picture to look at"),
        tag(
            "div",
            tag("div", overlays, class_="overlays"),
            _inspector(own is not None),
            class_=f"tokens{' dense' if columns * len(str(atlas.codebook_size)) > ROOM else ''}",
            data_columns=columns,
        ),
        _sheet_style(pictures),
        data_block("tokens-data", _data(measured, atlas, means, own, places, rows, columns)),
    )


def _overlay(measured: Measured, place: int, index: int, name: str, rows: int, columns: int) -> Markup:
    """A picture, its reconstruction, and over them the table of its codes."""
    assert measured.codes is not None
    x, x_hat = measured.encoded.x[place], measured.encoded.x_hat[place]
    factor = measured.loaded.tokenizer.config.network.factor
    both = [image[:, : rows * factor, : columns * factor] for image in (x, x_hat)]
    small = fitted(torch.stack(both), LARGE)
    scale = enlargement(max(small.shape[2:]), LARGE)
    codes: list[list[int]] = measured.codes[place, :rows, :columns].tolist()
    cells = [
        tag("tr", [tag("td", tag("span", str(code))) for code in line]) for line in codes
    ]  # page.js adds the roles of a grid
    table = tag("table", tag("caption", f"Codes of {name}", class_="unseen"), tag("tbody", cells))
    stage = tag(
        "div",
        img(pixels(small[0]), f"{name}, the original", scale, "original"),
        img(pixels(small[1]), f"{name}, reconstructed from these codes", scale, "reconstruction"),
        table,
        class_="stage",
        style=f"--columns:{columns};--rows:{rows};--wide:{round(small.shape[3] * scale)}px",
    )
    return tag("figure", stage, tag("figcaption", name), class_="overlay", data_picture=index)


def _inspector(has_own: bool) -> Markup:
    """What page.js fills in."""
    patches: list[Child] = [tag("figure", tag("span", class_="patch mean"), tag("figcaption", "its mean patch"))]
    if has_own:
        drawn = tag("figure", tag("span", class_="patch alone"), tag("figcaption", "decoded alone"))
        patches.append(drawn)
    return tag(
        "div",
        tag("p", tag("span", "Code", class_="unit"), " ", tag("output", "", class_="number"), class_="heading"),
        tag("div", patches, class_="patches"),
        tag("p", "", class_="said", aria_live="polite"),
        tag("div", tag("p", "", class_="elsewhere-title"), tag("div", class_="elsewhere"), class_="others"),
        tag(
            "p",
            tag("label", tag("input", type="checkbox", class_="show-reconstruction"), " show the reconstruction"),
            tag("label", tag("input", type="checkbox", class_="show-numbers"), " show all numbers"),
            class_="switches",
        ),
        class_="inspector js-only",
    )


def _sheet_style(pictures: Tensor) -> Markup:
    """The sheet of pictures as a background, of which an element shows a part."""
    return Markup(f"<style>.elsewhere span{{background-image:url({data_uri(sheet(pictures, 8))})}}</style>")


def _data(
    measured: Measured,
    atlas: Atlas,
    means: Sprites,
    own: Sprites | None,
    places: list[int],
    rows: int,
    columns: int,
) -> dict[str, object]:
    """For page.js: the codes of the sheet's pictures, and for each of them how often it is used and where its patch
    is."""
    assert measured.codes is not None
    codes = measured.codes[places]
    seen = set(codes.flatten().tolist())
    used = {
        code: [count, rank]
        for rank, (code, count) in enumerate(zip(atlas.ids.tolist(), atlas.counts.tolist(), strict=True), start=1)
        if code in seen
    }
    return {
        "codes": codes.flatten(1).tolist(),
        "start": [_start(measured, place, rows, columns) for place in places[: shown_first(measured)]],
        "grid": list(codes.shape[1:]),
        "shown": [rows, columns],
        "columns": 8,
        "labels": [measured.label(place) for place in places],
        "used": used,
        "distinct": len(atlas.ids),
        "total": int(atlas.counts.sum()),
        "pictures": measured.number,
        "mean": {code: means.position(code) for code in means.places if code in seen},
        "alone": {code: own.position(code) for code in own.places} if own else {},
    }


def _start(measured: Measured, place: int, rows: int, columns: int) -> int:
    """The position, of those that are shown, whose patch has the most in it: there it is worth to begin."""
    factor = measured.loaded.tokenizer.config.network.factor
    patches = rearrange(measured.encoded.x[place], "C (h f) (w g) -> h w (C f g)", f=factor, g=factor)
    return int(patches[:rows, :columns].std(dim=-1).argmax()) if patches.shape[-1] > 1 else 0


def _name(measured: Measured, place: int, index: int) -> str:
    label = measured.label(place)
    return f"Picture {index + 1}{f' ({label})' if label else ''}"


def describe(measured: Measured) -> str:
    """How a picture is coded, in words."""
    if measured.codes is None:
        return "continuous"
    h, w, K, V = measured.loaded.tokenizer.shape
    each = f", {plural(K, 'code')} each," if K > 1 else ""
    return f"{h} x {w} positions{each} of a codebook of {V:,}"
