"""The curves of a training, from its log: one chart for each question."""

from collections.abc import Iterable, Mapping, Sequence

from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.report.charts import Chart, Series, chart_html, with_drawable_points
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, fold, join, tag
from stage1_tokenizer.diagnostics.report.page import NothingToShowError
from stage1_tokenizer.diagnostics.views.base import Subject, View, encoded_images, once
from stage1_tokenizer.diagnostics.views.sheet import MARGIN, TOP, WIDTH, Sheet
from stage1_tokenizer.engine.log_file import Curve

SMOOTHING = 0.6
PARTS = ("total", "l1", "l2", "perceptual", "adversarial", "bottleneck", "commitment")
LABELS = {"bottleneck": "bottleneck, as in the total", "commitment": "commitment, a part of the bottleneck's"}
TRAINING, VALIDATION = 0, 1
"""Colours of the two curves, the same in every chart."""
OTHER_UNITS = {
    "train/gradient_norm": "norm, before clipping",
    "train/lr": "learning rate",
    "train/images_per_second": "images a second",
}
"""Units of scalars without a chart of their own; these come first behind the fold."""
MOST_OTHERS = 24
"""Charts behind the fold, at most."""
NO_CURVES = "there is no metrics.jsonl with entries yet, so there are no curves"


def pair(
    curves: Mapping[str, Curve], name: str, title: str, unit: str, log: bool = False, from_zero: bool = False
) -> Chart:
    """Return a chart of one scalar, in training and in validation."""
    series = []
    if f"train/{name}" in curves:
        series.append(Series("training", curves[f"train/{name}"], colour=TRAINING))
    if f"validation/{name}" in curves:
        series.append(Series("validation", curves[f"validation/{name}"], dots=True, colour=VALIDATION))
    return Chart(title, unit, series, log=log, from_zero=from_zero)


@once
def charts_of(subject: Subject) -> list[Chart]:
    """Return the charts of a tokenizer, the most informative first; some may have no curve."""
    curves = subject.run.curves
    if not curves:
        raise NothingToShowError(NO_CURVES)
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


def smooth(values: Iterable[float], weight: float = SMOOTHING) -> list[float]:
    """Return a running mean that is not biased towards its start: s_t = sum_i w^(t-i) x_i / sum_i w^(t-i)."""
    smoothed: list[float] = []
    total = norm = 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        smoothed.append(total / norm)
    return smoothed


def draw_curves(subject: Subject) -> Sheet:
    """Draw the charts in two columns, training curves also smoothed."""
    charts = [chart for chart in map(with_drawable_points, charts_of(subject)) if chart]
    encoded = encoded_images(subject)
    width, height, gap = (WIDTH - 2 * MARGIN - 1.0) / 2, 2.4, 0.75
    bottleneck = encoded.tokenizer.bottleneck
    size = f" The codebook has {bottleneck.codebook_size:,} codes." if bottleneck.depth else ""
    sheet = Sheet(
        TOP - 0.05 + -(-len(charts) // 2) * (height + gap),
        "Curves of the training",
        f"Faint: as logged. Bold: exponential running mean with weight {SMOOTHING} per log entry, not biased towards "
        f"the start.\nDots: metrics of the whole validation split, not smoothed.{size}",
        encoded.footer,
    )
    for number, chart in enumerate(charts):
        row, column = divmod(number, 2)
        top = TOP + 0.25 + row * (height + gap)
        sheet.chart(MARGIN + 0.4 + column * (width + 0.6), top, width, height, chart, smooth)
    return sheet


def show_charts(curves: Mapping[str, Curve], charts: Sequence[Chart]) -> Markup:
    """Return the charts, and behind a fold all other scalars as charts. Raises NothingToShowError: no log."""
    if not curves:
        raise NothingToShowError(NO_CURVES)
    used = {id(series.curve) for chart in charts for series in chart.series}
    unused = {name.partition("/")[::2] for name, curve in curves.items() if id(curve) not in used}
    pairs = {name for kind, name in unused if kind in ("train", "validation")}
    others = [
        pair(curves, name, name.replace("_", " ").capitalize(), OTHER_UNITS.get(f"train/{name}", ""))
        for name in sorted(pairs, key=lambda name: (f"train/{name}" not in OTHER_UNITS, name))
    ]
    for kind, name in sorted(unused - {(kind, name) for kind in ("train", "validation") for name in pairs}):
        title = f"{kind} {name}".replace("_", " ").strip().capitalize()
        others.append(Chart(title, "", [Series("training", curves[f"{kind}/{name}" if name else kind])]))
    folded = [figure for figure in map(chart_html, others[:MOST_OTHERS]) if figure]
    return join(
        tag("div", [figure for figure in map(chart_html, charts) if figure], class_="charts"),
        fold(format_count(len(folded), "more curve"), tag("div", folded, class_="charts")) if folded else None,
    )


def show_curves(subject: Subject) -> Child:
    """Return all curves of the run's log as charts."""
    return show_charts(subject.run.curves, charts_of(subject))


VIEW = View("curves", "Curves", draw_curves, show_curves)
