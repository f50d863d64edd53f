"""Originals, reconstructions and errors; and the pictures at which a tokenizer fails, with what is odd about them."""

import torch
from torch import Tensor

from stage1_tokenizer.report.markup import Child, Markup, join, tag
from stage1_tokenizer.report.measured import Measured
from stage1_tokenizer.report.numbers import percent, plain
from stage1_tokenizer.report.pictures import enlargement, fitted, heat, img, pixels, read
from stage1_tokenizer.report.run_folder import RunFolder

SHOWN = 8
WORST = 6
BRIGHTEST = 0.5
"""The error, as a share of the whole range of values, that is drawn brightest."""
SIDE = 192
"""Pixels of a picture on the page, at most."""
WANTED = 96
"""Pixels on the screen to which small ones are enlarged."""
OFF = 0.1
"""A share of the range by which a pixel is plainly wrong."""


def show_reconstructions(measured: Measured) -> Markup:
    """Pictures from all over the split."""
    parts = [triple(measured, place, _caption(measured, place)) for place in measured.encoded.spread(SHOWN)]
    return join(
        tag(
            "p",
            "Each row: original, reconstruction, and the absolute error between them (black: none; brightest: ",
            f"{percent(BRIGHTEST)} of the range and above). They are spread over the split, not chosen.",
        ),
        tag("div", parts, class_="triples"),
    )


def show_failures(measured: Measured) -> Markup:
    """The pictures with the least PSNR, the worst first."""
    psnr, x = measured.psnr, measured.encoded.x
    worst = psnr.argsort(stable=True)[:WORST].tolist()
    detail = detail_of(x)
    together = rank_correlation(detail, psnr)
    rows = [triple(measured, place, _reasons(measured, place, detail)) for place in worst]
    if together < -0.3:
        verdict = "the more detail a picture has, the worse it becomes"
    elif together > 0.3:
        verdict = "pictures with more detail do not suffer; look at what else these have in common"
    else:
        verdict = "detail alone does not explain which ones fail"
    return join(
        tag(
            "p",
            f"The worst of {measured.pictures}: PSNR goes from {psnr.min():.2f} dB here to {psnr.max():.2f} dB at best",
            f", {psnr.mean():.2f} dB on average. Rank correlation of PSNR with detail: ",
            f"{together:+.2f}; {verdict}." if measured.number > 2 else "too few pictures to say.",
        ),
        tag("div", rows, class_="triples"),
    )


def triple(measured: Measured, place: int, caption: Child) -> Markup:
    """Original, reconstruction and error in a row, with a caption."""
    x, x_hat = measured.encoded.x[place], measured.encoded.x_hat[place]
    error = (x_hat - x).abs().mean(dim=0) / 2.0  # (H, W), a share of the range
    small = fitted(torch.stack([x, x_hat]), SIDE)
    scale = enlargement(max(small.shape[2:]), WANTED)
    label = measured.label(place)
    of = f"a validation picture{f' of class {label}' if label else ''}"
    worst = f"Its error, {percent(float(error.max()))} of the range at the worst pixel"
    parts = [
        img(pixels(small[0]), f"Original: {of}", scale),
        img(pixels(small[1]), f"Reconstruction of it, PSNR {measured.psnr[place]:.2f} dB", scale),
        img(heat(fitted(error[None, None], SIDE)[0, 0] / BRIGHTEST), worst, scale),
    ]
    return tag("figure", tag("div", parts, class_="three"), tag("figcaption", caption), class_="triple")


def over_training(run: RunFolder, prefix: str, what: str, most: int = 6) -> Markup | None:
    """Grids that the training left in samples/, the first one, the last one and some between; None: there are none."""
    found = run.pictures(prefix)
    if not found:
        return None
    chosen = sorted({round(place * (len(found) - 1) / max(1, most - 1)) for place in range(most)})
    figures = []
    for place in chosen if len(found) > most else range(len(found)):
        step, path = found[place]
        picture = read(path)
        scale = enlargement(max(picture.shape[:2]), 680)
        figures.append(
            tag("figure", img(picture, f"{what} after {step:,} steps", min(scale, 4.0)),
                tag("figcaption", tag("strong", f"Step {step:,}")), class_="strip")
        )  # fmt: skip
    return tag("div", figures, class_="strips")


def detail_of(x: Tensor) -> Tensor:
    """Images (N, C, H, W) -> (N,), the mean difference of neighbouring pixels, 0..2."""
    down, right = x.diff(dim=2).abs().flatten(1), x.diff(dim=3).abs().flatten(1)
    return torch.cat([down, right], dim=1).mean(dim=1) if down.numel() or right.numel() else torch.zeros(len(x))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of (N,) and (N,); 0 where one of them is constant."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (a, b)])
    if len(a) < 3 or float(a.max()) == float(a.min()) or float(b.max()) == float(b.min()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _caption(measured: Measured, place: int) -> list[Child]:
    label = measured.label(place)
    return [tag("strong", f"{measured.psnr[place]:.2f} dB"), f" {label}" if label else None]


def _reasons(measured: Measured, place: int, detail: Tensor) -> list[Child]:
    """What is measured of a failure."""
    x, x_hat = measured.encoded.x[place], measured.encoded.x_hat[place]
    error = (x_hat - x).abs().mean(dim=0) / 2.0
    more = float((detail < detail[place]).double().mean())
    words = [
        f"{percent(float((error > OFF).double().mean()))} of the pixels are off by more than {percent(OFF)}",
        f"more detail than {percent(more)} of the pictures",
    ]
    if measured.codes is not None:
        counts = torch.bincount(measured.codes.flatten())[measured.codes[place]].double()
        average = float(torch.bincount(measured.codes.flatten())[measured.codes].double().mean())
        words.append(f"its codes are used {plain(float(counts.mean()) / average, 2)} times as often as the average")
    return [*_caption(measured, place), tag("span", "; ".join(words) + ".", class_="why")]
