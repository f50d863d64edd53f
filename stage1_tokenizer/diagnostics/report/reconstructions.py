"""Originals, reconstructions and errors; and the pictures at which a tokenizer fails, with what is odd about them."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.report.markup import Child, Markup, join, tag
from stage1_tokenizer.diagnostics.report.measured import Measured
from stage1_tokenizer.diagnostics.report.numbers import percent
from stage1_tokenizer.diagnostics.report.page import or_note
from stage1_tokenizer.diagnostics.report.pictures import enlargement, fitted, grid, heat, img, pixels, read
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder

SHOWN = 8
WORST = 6
BRIGHTEST = 0.5
"""The error, as a share of the whole range of values, that is drawn brightest."""
SIDE = 192
"""Pixels of a picture on the page, at most."""
WANTED = 128
"""Pixels on the screen to which small ones are enlarged."""
OFF = 0.1
"""A share of the range by which a pixel is plainly wrong."""
UNUSUAL = 0.8
"""A picture that has more of something than this share of the others is unusual in it."""
SHIFTED = 0.2
"""A share of the squared error that is worth a word."""


def show_reconstructions(measured: Measured) -> Markup:
    """Pictures from all over the split."""
    parts = [triple(measured, place, _caption(measured, place)) for place in measured.encoded.spread(SHOWN)]
    return join(
        tag(
            "p",
            "Each time: original, reconstruction, and the absolute error between them (black: none; brightest: ",
            f"{percent(BRIGHTEST)} of the range and above). They are spread over the split, not chosen.",
        ),
        tag("div", parts, class_="triples"),
    )


def show_failures(measured: Measured) -> Markup:
    """The pictures with the least PSNR, the worst first."""
    psnr, x = measured.psnr, measured.encoded.x
    worst = psnr.argsort(stable=True)[:WORST].tolist()
    odd = oddities(measured)
    together = rank_correlation(detail_of(x), psnr)
    rows = [triple(measured, place, _reasons(measured, place, odd)) for place in worst]
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
        figures.append(or_note(partial(_strip, what, *found[place])))
    return tag("div", figures, class_="strips")


def _strip(what: str, step: int, path: Path) -> Markup:
    picture = grid(read(path), f"{what} after {step:,} steps")
    return tag("figure", picture, tag("figcaption", tag("strong", f"Step {step:,}")), class_="strip")


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


class Oddity(NamedTuple):
    """What may be odd about a picture, and how much of it each picture has."""

    words: str
    amounts: Tensor
    """(N,)."""


def oddities(measured: Measured) -> list[Oddity]:
    """What can be measured of the pictures themselves. Each can be why one of them fails."""
    x = measured.encoded.x
    found = [Oddity("more detail", detail_of(x)), Oddity("more contrast", x.flatten(1).std(dim=1))]
    if x.shape[1] == 3:
        found.append(Oddity("more vivid colours", (x.amax(dim=1) - x.amin(dim=1)).flatten(1).mean(dim=1)))
    if measured.codes is not None:
        counts = torch.bincount(measured.codes.flatten()).double()
        found.append(Oddity("rarer codes", -counts[measured.codes].log().flatten(1).mean(dim=1)))
    return found


def _reasons(measured: Measured, place: int, odd: list[Oddity]) -> list[Child]:
    """What is measured of a failure, and in what it differs from the others."""
    difference = (measured.encoded.x_hat[place] - measured.encoded.x[place]) / 2.0  # (C, H, W)
    off = float((difference.abs().mean(dim=0) > OFF).double().mean())
    shift = float(difference.mean(dim=(1, 2)).square().mean() / difference.square().mean().clamp_min(1e-12))
    words = [f"{percent(off)} of the pixels are off by more than {percent(OFF)}"]
    if shift > SHIFTED:
        words.append(f"{percent(shift)} of the squared error is one shift of the whole picture's colour")
    ranks = {each.words: float((each.amounts < each.amounts[place]).double().mean()) for each in odd}
    most = sorted((name for name, rank in ranks.items() if rank >= UNUSUAL), key=lambda name: -ranks[name])[:2]
    unusual = " and ".join(f"{name} than {percent(ranks[name])}" for name in most)
    words.append(f"it has {unusual} of the pictures" if most else "nothing measured here is unusual about it")
    return [*_caption(measured, place), tag("span", "; ".join(words) + ".", class_="why")]
