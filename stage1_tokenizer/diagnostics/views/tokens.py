"""The tokens of pictures laid over them: which code stands where, what it looks like, and where else it is used.

The codes are in the page as a table over each picture, which is all that is needed to read them. page.js makes of it a
grid to point at and to walk through, and looks up the other pictures in a sheet that the page carries.
"""

import torch
from einops import rearrange

from stage1_tokenizer.diagnostics.report.embedded_images import (
    Sprites,
    data_uri,
    enlargement,
    fitted,
    img,
    pixels,
    sheet,
    sprites_of,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, data_block, join, tag
from stage1_tokenizer.diagnostics.views.atlas import SHEET_SIDE, Choice, atlas_of_run, choice_of, means_of
from stage1_tokenizer.diagnostics.views.base import (
    EncodedImages,
    Subject,
    View,
    codes_of,
    decode_latents,
    encoded_images,
    look_up_vectors,
    once,
    pixels_for,
    tokenizer_device,
)  # fmt: skip

ROOM = 32
"""Digits in a row that can be read over a picture on a phone; where there are more, they stand below it."""
LARGE = 512
"""Pixels on the screen of the picture with the tokens."""
ALONE = 512
"""Codes that are decoded alone, at most."""
SHEET_COLUMNS = 8


@once
def alone_of(subject: Subject) -> Sprites | None:
    """The middle of the image that the decoder draws from one code alone, for each code that is shown; None where this
    would take long, or where a position has several codes."""
    encoded, codes = encoded_images(subject), choice_of(subject).codes[:ALONE]
    tokenizer = encoded.tokenizer
    H, W = encoded.image_size
    if tokenizer.bottleneck.depth != 1 or len(codes) * H * W > pixels_for(tokenizer_device(tokenizer)):
        return None
    h, w, _, _ = tokenizer.shape
    grids = torch.tensor(codes)[:, None, None, None].expand(-1, h, w, 1)
    factor = tokenizer.config.network.factor
    top, left = h // 2 * factor, w // 2 * factor
    drawn = decode_latents(tokenizer, look_up_vectors(tokenizer, grids))[:, :, top : top + factor, left : left + factor]
    return sprites_of("alone", codes, drawn)


def show_tokens(subject: Subject) -> Child:
    """The pictures with their codes over them, and what is known of each code."""
    encoded, atlas, own = encoded_images(subject), atlas_of_run(subject), alone_of(subject)
    places, number, rows, columns, _ = choice = choice_of(subject)
    pictures = fitted(encoded.x[places], SHEET_SIDE)
    depth, whole = encoded.tokenizer.bottleneck.depth, codes_of(encoded).shape[1:3]
    names = [_name(encoded, place, index) for index, place in enumerate(places[:number])]
    options = [
        tag("button", img(pixels(image), name, enlargement(max(image.shape[1:]), 56)), type="button",
            aria_pressed="true" if index == 0 else "false", data_picture=index)
        for index, (image, name) in enumerate(zip(pictures[:number], names, strict=True))
    ]  # fmt: skip
    overlays = [
        _overlay(encoded, place, index, name, choice)
        for index, (place, name) in enumerate(zip(places[:number], names, strict=True))
    ]
    return join(
        own.style if own else None,
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
        # All of them as one background, of which an element shows a part.
        Markup(f"<style>.elsewhere span{{background-image:url({data_uri(sheet(pictures, SHEET_COLUMNS))})}}</style>"),
        data_block("tokens-data", _script_data(subject)),
    )


def _overlay(encoded: EncodedImages, place: int, index: int, name: str, choice: Choice) -> Markup:
    """A picture, its reconstruction, and over them the table of its codes."""
    rows, columns, factor = choice.rows, choice.columns, encoded.tokenizer.config.network.factor
    both = [image[:, : rows * factor, : columns * factor] for image in (encoded.x[place], encoded.x_hat[place])]
    small = fitted(torch.stack(both), LARGE)
    scale = enlargement(max(small.shape[2:]), LARGE)
    codes: list[list[int]] = codes_of(encoded)[place, :rows, :columns, 0].tolist()
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


def _script_data(subject: Subject) -> dict[str, object]:
    """Data for page.js: the codes of the sheet's pictures, and for each of them how often it is used and where its
    patch is."""
    encoded, atlas, own, means = encoded_images(subject), atlas_of_run(subject), alone_of(subject), means_of(subject)
    places, number, rows, columns, _ = choice_of(subject)
    codes = codes_of(encoded)[places, ..., 0]  # (n, h, w)
    seen = set(codes.flatten().tolist())
    used = {
        code: [count, rank]
        for rank, (code, count) in enumerate(zip(atlas.ids.tolist(), atlas.counts.tolist(), strict=True), start=1)
        if code in seen
    }
    return {
        "codes": codes.flatten(1).tolist(),
        "start": [_first_position(encoded, place, rows, columns) for place in places[:number]],
        "grid": list(codes.shape[1:]),
        "shown": [rows, columns],
        "columns": SHEET_COLUMNS,
        "labels": [encoded.class_name(place) for place in places],
        "used": used,
        "distinct": len(atlas.ids),
        "total": int(atlas.counts.sum()),
        "pictures": encoded.count,
        "mean": {code: means.position(code) for code in means.places if code in seen},
        "alone": {code: own.position(code) for code in own.places} if own else {},
    }


def _first_position(encoded: EncodedImages, place: int, rows: int, columns: int) -> int:
    """The position, of those that are shown, whose patch has the most in it: there it is worth to begin."""
    factor = encoded.tokenizer.config.network.factor
    patches = rearrange(encoded.x[place], "C (h f) (w g) -> h w (C f g)", f=factor, g=factor)
    return int(patches[:rows, :columns].std(dim=-1).argmax()) if patches.shape[-1] > 1 else 0


def _name(encoded: EncodedImages, place: int, index: int) -> str:
    label = encoded.class_name(place)
    return f"Picture {index + 1}{f' ({label})' if label else ''}"


VIEW = View("tokens", "Tokens over a picture", show=show_tokens)
