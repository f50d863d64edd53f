"""The curves of a training, a chart for each question."""

from collections.abc import Iterable, Mapping, Sequence

from stage1_tokenizer.diagnostics.report.charts import Chart, Series, chart_html, with_drawable_points
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, fold, join, plural, tag
from stage1_tokenizer.diagnostics.report.page import notice
from stage1_tokenizer.diagnostics.views.base import NothingToShowError, Subject, View, encoded_images, once
from stage1_tokenizer.diagnostics.views.sheet import MARGIN, TOP, WIDTH, Sheet
from stage1_tokenizer.engine.log_file import Curve

SMOOTHING = 0.6
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
NO_CURVES = "there is no metrics.jsonl with entries yet, so there are no curves"


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


@once
def charts_of(subject: Subject) -> list[Chart]:
    """The charts of a tokenizer, the most telling first; those without a curve are left out later."""
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
    """s_t = sum_i weight^(t-i) x_i / sum_i weight^(t-i): a running mean without a pull to where it starts."""
    smoothed: list[float] = []
    total = norm = 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        smoothed.append(total / norm)
    return smoothed


def draw_curves(subject: Subject) -> Sheet:
    charts = [chart for chart in map(with_drawable_points, charts_of(subject)) if chart]
    encoded = encoded_images(subject)
    width, height, gap = (WIDTH - 2 * MARGIN - 1.0) / 2, 2.4, 0.75
    bottleneck = encoded.tokenizer.bottleneck
    size = f" The codebook has {bottleneck.codebook_size:,} codes." if bottleneck.depth else ""
    sheet = Sheet(
        TOP - 0.05 + -(-len(charts) // 2) * (height + gap),
        "How the training went",
        f"Faint: as logged. Bold: running mean, exponential with weight {SMOOTHING} per log entry, without bias at the "
        f"start.\nDots: figures of the whole validation split, not smoothed.{size}",
        encoded.footer,
    )
    for place, chart in enumerate(charts):
        row, column = divmod(place, 2)
        top = TOP + 0.25 + row * (height + gap)
        sheet.chart(MARGIN + 0.4 + column * (width + 0.6), top, width, height, chart, smooth)
    return sheet


def show_charts(curves: Mapping[str, Curve], charts: Sequence[Chart], others: Mapping[str, str] = OTHERS) -> Markup:
    """These charts, and behind a fold all scalars that are in none of them."""
    if not curves:
        return notice(f"{NO_CURVES.capitalize()}.")
    drawn = [figure for figure in map(chart_html, charts) if figure]
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
    shown: list[Child] = [figure for figure in map(chart_html, rest[:MOST_OTHERS]) if figure]
    more = fold(plural(len(shown), "more curve"), tag("div", shown, class_="charts")) if shown else None
    return join(tag("div", drawn, class_="charts"), more)


def show_curves(subject: Subject) -> Child:
    return show_charts(subject.run.curves, charts_of(subject))


VIEW = View("curves", "Curves", draw_curves, show_curves)
