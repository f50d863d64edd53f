"""Images with their tokens on top: the code at each position, its patch, and other positions that have it.

The page has the codes as a table over each image, which can be read without a script. page.js turns the table into a
grid to point at and to walk through with the arrow keys, and finds the code in other images, which are tiled in one.
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
    sprites_of,
    tiled,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, data_block, join, tag
from stage1_tokenizer.diagnostics.views.atlas import SEARCHED_SIDE, Choice, atlas_of_run, choice_of, means_of
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

READABLE_DIGITS = 32
"""Digits in a row that can be read over an image on a phone; if there are more, the codes are below the image."""
LARGE = 512
"""Pixels on the screen of the image with the tokens."""
MOST_ALONE = 512
"""Codes that are decoded alone, at most."""
TILE_COLUMNS = 8


@once
def alone_of(subject: Subject) -> Sprites | None:
    """Decode each shown code alone (a grid of this code only) and return the middle patches as sprites.

    None if this would take long, or if a position has several codes.
    """
    encoded, codes = encoded_images(subject), choice_of(subject).codes[:MOST_ALONE]
    tokenizer = encoded.tokenizer
    H, W = encoded.image_size
    if tokenizer.bottleneck.depth != 1 or len(codes) * H * W > pixels_for(tokenizer_device(tokenizer)):
        return None
    h, w, _, _ = tokenizer.shape
    grids = torch.tensor(codes)[:, None, None, None].expand(-1, h, w, 1)
    factor = tokenizer.config.network.factor
    top, left = h // 2 * factor, w // 2 * factor
    images = decode_latents(tokenizer, look_up_vectors(tokenizer, grids))
    return sprites_of("alone", codes, images[:, :, top : top + factor, left : left + factor])


def show_tokens(subject: Subject) -> Child:
    """Return the images with their codes on top, and data about each code."""
    encoded, atlas, alone, choice = (
        encoded_images(subject), atlas_of_run(subject), alone_of(subject), choice_of(subject),
    )  # fmt: skip
    rows, columns = choice.rows, choice.columns
    images = fitted(encoded.x[choice.images], SEARCHED_SIDE)
    depth, (h, w) = encoded.tokenizer.bottleneck.depth, codes_of(encoded).shape[1:3]
    shown = choice.images[: choice.shown]
    names = [_image_name(encoded, index, number) for number, index in enumerate(shown, start=1)]
    buttons = [
        tag("button", img(pixels(image), name, enlargement(max(image.shape[1:]), 56)), type="button",
            aria_pressed="true" if number == 0 else "false", data_picture=number)
        for number, (image, name) in enumerate(zip(images[: choice.shown], names, strict=True))
    ]  # fmt: skip
    overlays = [
        _overlay(encoded, index, number, name, choice)
        for number, (index, name) in enumerate(zip(shown, names, strict=True))
    ]
    return join(
        alone.style if alone else None,
        tag(
            "p",
            f"Each image has {h} by {w} positions with codes out of {atlas.codebook_size:,}. ",
            f"Of the {depth} codes of a position the first one is shown. " if depth > 1 else None,
            f"Only the top left {rows} by {columns} positions are shown. " if (rows, columns) != (h, w) else None,
            tag("span", "Point at a position, tap it, or move with the arrow keys.", class_="js-only"),
            tag("span", "The numbers are the codes.", class_="no-js"),
        ),
        tag("div", buttons, class_="picker js-only", role="group", aria_label="Image to look at"),
        tag(
            "div",
            tag("div", overlays, class_="overlays"),
            _inspector(alone is not None),
            class_=f"tokens{' dense' if columns * len(str(atlas.codebook_size)) > READABLE_DIGITS else ''}",
            data_columns=columns,
        ),
        # All images in one background, of which each element shows a part.
        Markup(f"<style>.elsewhere span{{background-image:url({data_uri(tiled(images, TILE_COLUMNS))})}}</style>"),
        data_block("tokens-data", _script_data(subject)),
    )


def _overlay(encoded: EncodedImages, index: int, number: int, name: str, choice: Choice) -> Markup:
    """Return an image, its reconstruction, and the table of its codes on top of them."""
    rows, columns, factor = choice.rows, choice.columns, encoded.tokenizer.config.network.factor
    both = torch.stack([encoded.x[index], encoded.x_hat[index]])[..., : rows * factor, : columns * factor]
    small = fitted(both, LARGE)
    scale = enlargement(max(small.shape[2:]), LARGE)
    codes: list[list[int]] = codes_of(encoded)[index, :rows, :columns, 0].tolist()
    cells = [
        tag("tr", [tag("td", tag("span", str(code))) for code in row]) for row in codes
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
    return tag("figure", stage, tag("figcaption", name), class_="overlay", data_picture=number)


def _inspector(has_alone: bool) -> Markup:
    """Return the empty elements that page.js fills with the data of the current code."""
    patches: list[Child] = [tag("figure", tag("span", class_="patch mean"), tag("figcaption", "its mean patch"))]
    if has_alone:
        patches.append(tag("figure", tag("span", class_="patch alone"), tag("figcaption", "decoded alone")))
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
    """Return the data of page.js: the codes of the tiled images, and the count, rank and patches of each code."""
    encoded, atlas, alone, means = encoded_images(subject), atlas_of_run(subject), alone_of(subject), means_of(subject)
    choice = choice_of(subject)
    codes = codes_of(encoded)[choice.images, ..., 0]  # (n, h, w)
    occurring = set(codes.flatten().tolist())
    used = {
        code: [count, rank]
        for rank, (code, count) in enumerate(zip(atlas.ids.tolist(), atlas.counts.tolist(), strict=True), start=1)
        if code in occurring
    }
    return {
        "codes": codes.flatten(1).tolist(),
        "start": [_first_position(encoded, index, choice) for index in choice.images[: choice.shown]],
        "grid": list(codes.shape[1:]),
        "shown": [choice.rows, choice.columns],
        "columns": TILE_COLUMNS,
        "labels": [encoded.class_name(index) for index in choice.images],
        "used": used,
        "distinct": len(atlas.ids),
        "total": int(atlas.counts.sum()),
        "images": encoded.count,
        "mean": {code: means.position(code) for code in means.indices if code in occurring},
        "alone": {code: alone.position(code) for code in alone.indices} if alone else {},
    }


def _first_position(encoded: EncodedImages, index: int, choice: Choice) -> int:
    """Return the shown position whose patch has the most contrast, at which the view begins."""
    factor = encoded.tokenizer.config.network.factor
    patches = rearrange(encoded.x[index], "C (h f) (w g) -> h w (C f g)", f=factor, g=factor)
    shown = patches[: choice.rows, : choice.columns]
    return int(shown.std(dim=-1).argmax()) if patches.shape[-1] > 1 else 0


def _image_name(encoded: EncodedImages, index: int, number: int) -> str:
    class_name = encoded.class_name(index)
    return f"Image {number}{f' ({class_name})' if class_name else ''}"


VIEW = View("tokens", "Tokens over an image", show=show_tokens)
