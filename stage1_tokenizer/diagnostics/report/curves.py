"""The curves of a training, a chart for each question."""

from collections.abc import Mapping, Sequence

from stage1_tokenizer.diagnostics.report.charts import Chart, Series, draw
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, fold, join, tag
from stage1_tokenizer.diagnostics.report.numbers import plural
from stage1_tokenizer.diagnostics.report.page import note
from stage1_tokenizer.engine.log_file import Curve

PARTS = ("total", "l1", "l2", "perceptual", "adversarial", "bottleneck", "commitment")
LABELS = {"bottleneck": "bottleneck, as it is in the total", "commitment": "commitment, a part of the bottleneck's"}
TRAINING, VALIDATION = 0, 1
"""Their colours, in every chart that has both or one of them."""
OTHERS = {
    "train/gradient_norm": "norm, before clipping",
    "train/lr": "learning rate",
    "train/images_per_second": "pictures a second",
}
MOST_OTHERS = 24
"""Charts of scalars that have no place of their own."""


def pair(
    curves: Mapping[str, Curve], name: str, title: str, unit: str, log: bool = False, from_zero: bool = False
) -> Chart:
    """A scalar in training and in validation."""
    series = []
    if f"train/{name}" in curves:
        series.append(Series("training", curves[f"train/{name}"], colour=TRAINING))
    if f"validation/{name}" in curves:
        series.append(Series("validation", curves[f"validation/{name}"], dots=True, colour=VALIDATION))
    return Chart(title, unit, series, log=log, from_zero=from_zero)


def tokenizer_charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """Of stage one, the most telling first; those without a curve are left out later."""
    parts = [Series(LABELS.get(name, name), curves[f"train/{name}"]) for name in PARTS if f"train/{name}" in curves]
    error = "nmse" if "validation/nmse" in curves or "train/nmse" in curves else "l2"
    return [
        pair(curves, error, "Error", "squared error over the data's variance" if error == "nmse" else "squared error",
             log=True),
        pair(curves, "psnr", "PSNR", "dB, higher is better"),
        Chart("Loss and its parts", "in training; parts before their weights", parts, log=True),
        pair(curves, "perceptual", "LPIPS", "perceptual distance, lower is better", log=True),
        pair(curves, "code_perplexity", "Perplexity of the codes", "codes", from_zero=True),
        pair(curves, "code_usage", "Codebook in use", "share of the codes", from_zero=True),
        pair(curves, "kl", "KL divergence", "nats", log=True),
    ]  # fmt: skip


def draw_curves(curves: Mapping[str, Curve], charts: Sequence[Chart], others: Mapping[str, str] = OTHERS) -> Markup:
    """These charts, and behind a fold all scalars that are in none of them."""
    if not curves:
        return note("There is no metrics.jsonl with entries yet, so there are no curves.")
    drawn = [figure for figure in map(draw, charts) if figure]
    used = {id(series.curve) for chart in charts for series in chart.series}
    unused = {name.partition("/")[::2] for name, curve in curves.items() if id(curve) not in used}
    names = {name for kind, name in unused if kind in ("train", "validation")}
    rest = [
        pair(curves, name, name.replace("_", " ").capitalize(), others.get(f"train/{name}", ""))
        for name in sorted(names, key=lambda name: (f"train/{name}" not in others, name))
    ]
    for kind, name in sorted(unused - {(kind, name) for kind in ("train", "validation") for name in names}):
        words = f"{kind} {name}".replace("_", " ").strip().capitalize()
        rest.append(Chart(words, "", [Series("training", curves[f"{kind}/{name}" if name else kind])]))
    shown: list[Child] = [figure for figure in map(draw, rest[:MOST_OTHERS]) if figure]
    more = fold(plural(len(shown), "more curve"), tag("div", shown, class_="charts")) if shown else None
    return join(tag("div", drawn, class_="charts"), more)
