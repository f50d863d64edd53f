"""The codebook: how its codes are used, and what each stands for."""

import torch

from stage1_tokenizer.diagnostics.analysis.atlas import Atlas, atlas_of
from stage1_tokenizer.diagnostics.analysis.encoded import code_use
from stage1_tokenizer.diagnostics.report.charts import Chart, Series, draw
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, fold, join, listed, tag
from stage1_tokenizer.diagnostics.report.measured import Measured
from stage1_tokenizer.diagnostics.report.numbers import percent, plain, plural
from stage1_tokenizer.diagnostics.report.page import note
from stage1_tokenizer.diagnostics.report.sprites import Sprites
from stage1_tokenizer.engine.log_file import Curve

SHOWN, FOLDED = 96, 416
"""Codes of the atlas on the page, the most used ones, and how many more behind a fold."""
MIXED = (
    "This network is an MLP: a code may describe any part of a picture, not just the patch under it, so its mean patch "
    "says less. "
)
CONTINUOUS = "The latent of this bottleneck ({}) is continuous: there are no codes, and nothing to show here."


def no_codes(measured: Measured) -> Markup:
    return note(CONTINUOUS.format(measured.loaded.tokenizer.config.bottleneck.kind))


def atlas_for(measured: Measured) -> Atlas | None:
    """Of the first codebook; None where the latent is continuous."""
    if measured.codes is None:
        return None
    codebook = measured.loaded.tokenizer.bottleneck.codebooks()[0].float().cpu()
    return atlas_of(measured.encoded.x, measured.codes, codebook, neighbours=1)


def show_use(measured: Measured) -> Markup:
    """The histogram of the codes, sorted by use, and what follows from it."""
    codes = measured.encoded.codes
    if codes is None:
        return no_codes(measured)
    size = measured.loaded.tokenizer.bottleneck.codebook_size
    K, tokens = codes.shape[-1], codes[..., 0].numel()
    use = code_use(codes, size)
    dead = (use.counts == 0).sum(dim=1).tolist()
    each = f" ({', '.join(map(str, dead))})" if K > 1 else ""
    facts: list[tuple[Child, Child]] = [
        ("Codes in use", f"{percent(use.usage)} of {size:,}{f', in {K} codebooks' if K > 1 else ''}"),
        ("Dead codes", f"{sum(dead):,}{each}"),
        ("Perplexity", f"{plain(use.perplexity)}, as unpredictable as so many codes used alike"),
        ("Entropy", f"{plain(use.entropy_bits, 3)} of {plain(float(torch.tensor(size).log2()), 3)} bits a code"),
    ]
    series = []
    for k, counts in enumerate(use.counts[:8]):
        ordered = counts.sort(descending=True).values
        ordered = ordered[ordered > 0].tolist()
        name = f"code {k + 1} of {K}" if K > 1 else "uses of a code"
        series.append(Series(name, Curve(list(range(1, len(ordered) + 1)), [float(count) for count in ordered])))
    chart = Chart(
        "Uses of each code, the most used first",
        "uses, on a logarithmic axis",
        series,
        log=True,
        x_name="rank of the code",
        level=("all used alike", tokens / size),
        fill=K == 1,
        shade=(f"{plural(dead[0], 'dead code')}", size - dead[0]) if K == 1 and dead[0] else None,
        extent=(1, max(2, size)),
    )
    few = (
        f" {tokens:,} positions are too few to judge {size:,} codes by: those that are rare look dead."
        if tokens < 10 * size
        else ""
    )
    return join(
        tag("p", f"Counted over {measured.pictures}, {tokens:,} positions.{few}"),
        listed(facts),
        draw(chart),
    )


def show_atlas(measured: Measured, atlas: Atlas | None, sprites: Sprites | None) -> Markup:
    """Each code's mean patch, the most used first."""
    if atlas is None or sprites is None:
        return no_codes(measured)
    depth = measured.loaded.tokenizer.bottleneck.depth
    first = "Of the several codes of a position this is the first, the coarsest. " if depth > 1 else ""
    codes = [code for code in atlas.ids.tolist() if code in sprites.places][: SHOWN + FOLDED]
    left = len(atlas.ids) - len(codes)
    more = _patches(atlas, sprites, codes[SHOWN:])
    others = f"{plural(len(codes) - SHOWN, 'more code')}{f' (and {left:,} that are not shown)' if left else ''}"
    return join(
        tag(
            "p",
            first,
            MIXED if measured.loaded.tokenizer.config.network.kind == "mlp" else None,
            "The mean of the image patches on which each code falls, its number, its share of all positions, and how "
            f"many these are; the most used first. {len(atlas.ids):,} of {atlas.codebook_size:,} codes occur here. "
            "Codes may look alike: their differences may show only together with those around them.",
        ),
        _patches(atlas, sprites, codes[:SHOWN]),
        fold(others, more) if len(codes) > SHOWN else None,
    )


def _patches(atlas: Atlas, sprites: Sprites, codes: list[int]) -> Markup:
    counts = dict(zip(atlas.ids.tolist(), atlas.counts.tolist(), strict=True))
    total = int(atlas.counts.sum())
    items = [
        tag(
            "li",
            sprites.patch(code, f"mean patch of code {code}"),
            tag("span", str(code), class_="code"),
            tag("span", percent(counts[code] / total), class_="share"),
            tag("span", f"{counts[code]:,}x", class_="share"),
        )
        for code in codes
    ]
    return tag("ol", items, class_="atlas")
