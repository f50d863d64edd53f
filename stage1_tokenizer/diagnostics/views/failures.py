"""The images at which a tokenizer fails, with what is odd about them."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.report.markup import Child, format_percent, join, tag
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, View, encoded_images
from stage1_tokenizer.diagnostics.views.reconstructions import caption, triple

WORST = 6
OFF = 0.1
"""A share of the range by which a pixel is plainly wrong."""
UNUSUAL = 0.8
"""An image that has more of something than this share of the others is unusual in it."""
SHIFTED = 0.2
"""A share of the squared error that is worth a word."""


class Oddity(NamedTuple):
    """Something of which an image may have much, and how much of it each image has."""

    words: str
    amounts: Tensor
    """(N,)."""


def show_failures(subject: Subject) -> Child:
    """The images with the least PSNR, the worst first."""
    encoded = encoded_images(subject)
    psnr, odd = encoded.psnr, oddities(encoded)
    worst = psnr.argsort(stable=True)[:WORST].tolist()
    together = rank_correlation(detail_of(encoded.x), psnr)
    rows = [triple(encoded, place, _reasons(encoded, place, odd)) for place in worst]
    if together < -0.3:
        verdict = "the more detail a picture has, the worse it becomes"
    elif together > 0.3:
        verdict = "pictures with more detail do not suffer; look at what else these have in common"
    else:
        verdict = "detail alone does not explain which ones fail"
    return join(
        tag(
            "p",
            f"The worst of {encoded.description}: PSNR goes from {psnr.min():.2f} dB here to {psnr.max():.2f} dB at best",
            f", {psnr.mean():.2f} dB on average. Rank correlation of PSNR with detail: ",
            f"{together:+.2f}; {verdict}." if encoded.count > 2 else "too few pictures to say.",
        ),
        tag("div", rows, class_="triples"),
    )


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


def oddities(encoded: EncodedImages) -> list[Oddity]:
    """What can be measured of the pictures themselves. Each can be why one of them fails."""
    x = encoded.x
    found = [Oddity("more detail", detail_of(x)), Oddity("more contrast", x.flatten(1).std(dim=1))]
    if x.shape[1] == 3:
        found.append(Oddity("more vivid colours", (x.amax(dim=1) - x.amin(dim=1)).flatten(1).mean(dim=1)))
    if encoded.codes is not None:
        codes = encoded.codes[..., 0]  # (N, h, w)
        counts = torch.bincount(codes.flatten()).double()
        found.append(Oddity("rarer codes", -counts[codes].log().flatten(1).mean(dim=1)))
    return found


def _reasons(encoded: EncodedImages, place: int, odd: list[Oddity]) -> list[Child]:
    """What is measured of a failure, and in what it differs from the others."""
    difference = (encoded.x_hat[place] - encoded.x[place]) / 2.0  # (C, H, W)
    off = float((difference.abs().mean(dim=0) > OFF).double().mean())
    shift = float(difference.mean(dim=(1, 2)).square().mean() / difference.square().mean().clamp_min(1e-12))
    words = [f"{format_percent(off)} of the pixels are off by more than {format_percent(OFF)}"]
    if shift > SHIFTED:
        words.append(f"{format_percent(shift)} of the squared error is one shift of the whole picture's colour")
    ranks = {each.words: float((each.amounts < each.amounts[place]).double().mean()) for each in odd}
    most = sorted((name for name, rank in ranks.items() if rank >= UNUSUAL), key=lambda name: -ranks[name])[:2]
    unusual = " and ".join(f"{name} than {format_percent(ranks[name])}" for name in most)
    words.append(f"it has {unusual} of the pictures" if most else "nothing measured here is unusual about it")
    return [*caption(encoded, place), tag("span", "; ".join(words) + ".", class_="why")]


VIEW = View("failures", "Failures", show=show_failures)
