"""The images that a tokenizer reconstructs worst, and the properties that set them apart from the others."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.report.markup import Child, format_percent, join, tag
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, View, encoded_images
from stage1_tokenizer.diagnostics.views.reconstructions import caption, triple

WORST = 6
WRONG = 0.1
"""Absolute error from which a pixel counts as wrong, as a share of the range of values."""
UNUSUAL = 0.8
"""Share of the other images that an image must exceed in a property for the page to name it."""
SHIFTED = 0.2
"""Share of the squared error that a shift of the whole image's colour must have for the page to name it."""


class Property(NamedTuple):
    """A measurable property of images that may explain failures."""

    words: str
    amounts: Tensor
    """(N,)."""


def show_failures(subject: Subject) -> Child:
    """Return the images with the lowest PSNR, the worst first."""
    encoded = encoded_images(subject)
    psnr, properties = encoded.psnr, properties_of(encoded)
    worst = psnr.argsort(stable=True)[:WORST].tolist()
    correlation = rank_correlation(detail_of(encoded.x), psnr)
    rows = [triple(encoded, index, _describe_failure(encoded, index, properties)) for index in worst]
    if correlation < -0.3:
        verdict = "the more detail an image has, the worse its reconstruction"
    elif correlation > 0.3:
        verdict = "images with more detail are not worse; look for what these images have in common"
    else:
        verdict = "detail alone does not explain which images fail"
    lowest, highest = f"{psnr.min():.2f} dB here", f"{psnr.max():.2f} dB for the best image"
    return join(
        tag(
            "p",
            f"The worst of {encoded.description}: PSNR goes from {lowest} to {highest}, {psnr.mean():.2f} dB on "
            "average. Rank correlation of PSNR with detail: ",
            f"{correlation:+.2f}; {verdict}." if encoded.count > 2 else "too few images to say.",
        ),
        tag("div", rows, class_="triples"),
    )


def detail_of(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, (N,) in 0..2, of images (N, C, H, W)."""
    down, right = x.diff(dim=2).abs().flatten(1), x.diff(dim=3).abs().flatten(1)
    return torch.cat([down, right], dim=1).mean(dim=1) if down.numel() or right.numel() else torch.zeros(len(x))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of (N,) and (N,); 0 if one of them is constant."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    if len(a) < 3 or float(a.max()) == float(a.min()) or float(b.max()) == float(b.min()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def properties_of(encoded: EncodedImages) -> list[Property]:
    """Measure detail, contrast, colour and rarity of codes of the images."""
    x = encoded.x
    properties = [Property("more detail", detail_of(x)), Property("more contrast", x.flatten(1).std(dim=1))]
    if x.shape[1] == 3:
        properties.append(Property("more vivid colours", (x.amax(dim=1) - x.amin(dim=1)).flatten(1).mean(dim=1)))
    if encoded.codes is not None:
        codes = encoded.codes[..., 0]  # (N, h, w)
        counts = torch.bincount(codes.flatten()).double()
        properties.append(Property("rarer codes", -counts[codes].log().flatten(1).mean(dim=1)))
    return properties


def _describe_failure(encoded: EncodedImages, index: int, properties: list[Property]) -> list[Child]:
    """Return a caption: the share of wrong pixels, a shift of colour, and the properties that are unusual."""
    difference = (encoded.x_hat[index] - encoded.x[index]) / 2.0  # (C, H, W)
    wrong = float((difference.abs().mean(dim=0) > WRONG).double().mean())
    shift = float(difference.mean(dim=(1, 2)).square().mean() / difference.square().mean().clamp_min(1e-12))
    words = [f"{format_percent(wrong)} of the pixels are wrong by more than {format_percent(WRONG)}"]
    if shift > SHIFTED:
        words.append(f"{format_percent(shift)} of the squared error is one shift of the whole image's colour")
    ranks = {each.words: float((each.amounts < each.amounts[index]).double().mean()) for each in properties}
    most = sorted((name for name, rank in ranks.items() if rank >= UNUSUAL), key=lambda name: -ranks[name])[:2]
    unusual = " and ".join(f"{name} than {format_percent(ranks[name])}" for name in most)
    words.append(f"it has {unusual} of the images" if most else "none of its measured properties is unusual")
    return [*caption(encoded, index), tag("span", "; ".join(words) + ".", class_="why")]


VIEW = View("failures", "Failures", show=show_failures)
