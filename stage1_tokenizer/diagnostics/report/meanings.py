"""What the figures of a log mean, in a sentence each, and which way is better."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from stage1_tokenizer.diagnostics.report.markup import Markup, tag
from stage1_tokenizer.diagnostics.report.numbers import percent, plain
from stage1_tokenizer.engine.log_file import Curve

Better = Literal["higher", "lower"] | None


class Meaning(NamedTuple):
    """Of one scalar of the log."""

    label: str
    sentence: str
    better: Better
    unit: str = ""
    digits: int = 4
    share: bool = False
    """Shown in per cent."""

    def shown(self, value: float) -> str:
        return percent(value) if self.share else f"{plain(value, self.digits)} {self.unit}".rstrip()


TOKENIZER_FIGURES = {
    "validation/psnr": Meaning(
        "PSNR", "How near the reconstructions are to the originals, pixel by pixel; 3 dB more is half the squared "
        "error.", "higher", "dB",
    ),
    "validation/nmse": Meaning(
        "NMSE", "Squared error as a share of the data's variance: 1 is a plain grey picture, 0 a perfect one.", "lower",
        digits=3,
    ),
    "validation/perceptual": Meaning(
        "LPIPS", "Distance between original and reconstruction as a trained network sees it; 0 is none.", "lower",
        digits=3,
    ),
    "validation/code_usage": Meaning(
        "Codes in use", "Share of the codebook that occurs at least once in the validation pictures.", "higher",
        share=True,
    ),
    "validation/code_perplexity": Meaning(
        "Perplexity", "How many codes, used equally often, would be as unpredictable as the ones that are used.",
        "higher", digits=4,
    ),
    "validation/bits_per_image": Meaning(
        "Bits per picture", "Positions times log2 of the codebook's size: what the codes of a picture take at a fixed "
        "length.", None,
    ),
    "validation/kl": Meaning(
        "KL divergence", "How far the latents are from the normal noise that pictures can be sampled from.", None,
    ),
}  # fmt: skip
"""In the order of the page. A run has those that its bottleneck and losses give."""


class Reading(NamedTuple):
    """A figure of a run: the newest value, the best one, and where that was."""

    name: str
    meaning: Meaning
    value: float
    step: int
    best: float
    best_step: int


def readings(curves: Mapping[str, Curve], meanings: Mapping[str, Meaning]) -> list[Reading]:
    """Those of the figures that a run has."""
    found = []
    for name, meaning in meanings.items():
        curve = curves.get(name)
        if curve is None:
            continue
        choose = min if meaning.better == "lower" else max
        best = choose(curve.values) if meaning.better else curve.values[-1]
        place = len(curve.values) - 1 - curve.values[::-1].index(best)
        found.append(Reading(name, meaning, curve.values[-1], curve.steps[-1], best, curve.steps[place]))
    return found


def cards(found: Sequence[Reading]) -> Markup:
    """Figures as large numbers with a sentence each."""
    items = []
    for each in found:
        better_before = each.meaning.better is not None and each.best != each.value
        when = f"best {each.meaning.shown(each.best)} at step {each.best_step:,}" if better_before else None
        items.append(
            tag(
                "div",
                tag("dt", each.meaning.label),
                tag("dd", each.meaning.shown(each.value), class_="value"),
                tag("dd", when, class_="when") if when else None,
                tag("dd", each.meaning.sentence, class_="means"),
            )
        )
    return tag("dl", items, class_="cards")
