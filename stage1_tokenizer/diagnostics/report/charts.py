"""Line charts as inline SVG with axes in HTML text, and the same numbers as a table.

The browser stretches the SVG to the width of the page, but not its strokes. Axis labels are HTML, so they keep their
size on a phone, and colours are CSS variables, so they follow the light or dark scheme. (An SVG of matplotlib has
neither, and takes more than ten times as long to make.) page.js adds a readout under the pointer.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stage1_tokenizer.diagnostics.report.markup import Markup, fold, format_number, join, table, tag
from stage1_tokenizer.engine.log_file import Curve

MOST_POINTS = 300
"""Points that are drawn of one curve, at most."""
TABLE_ROWS = 12
"""Rows in the table of numbers, at most."""
SMALLEST, LARGEST = 1e-100, 1e100
"""Absolute values that an axis can hold; others, as in a damaged log, are left out."""
SIDE = 1000
"""Width and height of the SVG's coordinate system."""


@dataclass(frozen=True)
class Series:
    """One curve of a chart."""

    name: str
    curve: Curve
    dots: bool = False
    """True: mark each point, for curves of few points such as validations."""
    colour: int | None = None
    """Number of the colour, 0..7, where other charts use the same for the same thing; None: the curve's number in the
    chart."""


@dataclass(frozen=True)
class Chart:
    """A line chart: its curves, axes and marks."""

    title: str
    unit: str
    """Label of the vertical axis."""
    series: Sequence[Series]
    log: bool = False
    """True: logarithmic vertical axis; only positive values are drawn."""
    from_zero: bool = False
    """True: the vertical axis starts at 0."""
    x_name: str = "step"
    level: tuple[str, float] | None = None
    """Name and height of a horizontal line."""
    fill: bool = False
    """True: fill the area below the (only) curve."""
    shade: tuple[str, float] | None = None
    """Name of the shaded area at the right, and the x at which it begins."""
    extent: tuple[float, float] | None = None
    """Limits of the horizontal axis; None: those of the curves."""


@dataclass(frozen=True)
class Frame:
    """The limits of both axes, which map values to positions in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def across(self, x: float) -> float:
        """Return the horizontal position, 0 at the left edge and 1 at the right one."""
        return (x - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, y: float) -> float:
        """Return the vertical position, 0 at the bottom and 1 at the top."""
        low, high, value = (math.log(number) for number in (*self.y, y)) if self.log else (*self.y, y)
        return (value - low) / (high - low)

    def point(self, x: float, y: float) -> str:
        """Return the SVG coordinates of a point."""
        return f"{SIDE * self.across(x):.1f} {SIDE * (1 - self.up(y)):.1f}"

    def ticks(self) -> tuple[list[float], list[float]]:
        """Return round numbers for the horizontal and the vertical axis."""
        return linear_ticks(*self.x, most=5), log_ticks(*self.y) if self.log else linear_ticks(*self.y)


def thin_curve(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """Return at most `most` points: the first, lowest, highest and last of each section, so that no peak is lost."""
    n = len(curve.steps)
    if n <= most:
        return curve
    kept: set[int] = set()
    values = np.array(curve.values)
    for section in np.array_split(np.arange(n), max(1, most // 4)):
        kept |= {section[0], section[-1], section[values[section].argmin()], section[values[section].argmax()]}
    return Curve([curve.steps[index] for index in sorted(kept)], [curve.values[index] for index in sorted(kept)])


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return up to `most` round numbers between two limits."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return up to 7 round numbers between two positive limits: powers of ten, and multiples where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= 6:
            return ticks if len(ticks) > 1 else [low, high]
    return ticks[:: -(-len(ticks) // 6)]


def tick_label(tick: float) -> str:
    """Format a round number in few characters."""
    if abs(tick) >= 1e6 or 0 < abs(tick) < 1e-4:
        return f"{tick:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{tick:,.6f}".rstrip("0").rstrip(".") if abs(tick) < 1000 else f"{tick:,.0f}"


def fit_frame(chart: Chart) -> Frame:
    """Return axis limits that hold all curves, with a margin above and below."""
    xs = [float(x) for series in chart.series for x in series.curve.steps]
    ys = [y for series in chart.series for y in series.curve.values] + ([chart.level[1]] if chart.level else [])
    left, right = chart.extent or (min(0.0, *xs) if len(xs) > 1 else 0.0, max(xs))
    low, high = min(ys), max(ys)
    if chart.log:
        low, high = low / (high / low) ** 0.05, high * (high / low) ** 0.05
        if high / low < 1.2:
            low, high = low / 1.1, high * 1.1
    else:
        low = min(0.0, low) if chart.from_zero else low
        margin = 0.06 * ((high - low) or abs(high) or 1.0)
        high += margin
        low -= 0.0 if chart.from_zero and low >= 0 else margin
    return Frame((left, right if right > left else left + 1.0), (low, high), chart.log)


def with_drawable_points(chart: Chart) -> Chart | None:
    """Return the chart with sorted points that its axes can hold and a colour for each curve; None without points."""
    kept = []
    for number, series in enumerate(chart.series):
        points = sorted((s, v) for s, v in zip(*series.curve, strict=True) if _is_drawable(v, chart.log))
        if points:
            curve = Curve(*map(list, zip(*points, strict=True)))
            kept.append(replace(series, curve=curve, colour=number if series.colour is None else series.colour))
    return replace(chart, series=kept) if kept else None


def _is_drawable(value: float, log: bool) -> bool:
    return (value >= SMALLEST if log else value == 0 or abs(value) >= SMALLEST) and abs(value) <= LARGEST


def chart_html(chart: Chart) -> Markup | None:
    """Return the chart as a figure element; None if no point can be drawn."""
    full = with_drawable_points(chart)
    if full is None:
        return None
    frame = fit_frame(full)
    thin = replace(full, series=[replace(series, curve=thin_curve(series.curve)) for series in full.series])
    swatches = [(f"c{series.colour}{' dotted' if series.dots else ''}", series.name) for series in full.series]
    swatches += [("level", full.level[0])] if full.level else []
    swatches += [("shade", full.shade[0])] if full.shade else []
    x_ticks, y_ticks = frame.ticks()
    y_labels = [tag("span", tick_label(tick), style=f"bottom:{100 * frame.up(tick):.2f}%") for tick in y_ticks]
    x_labels = [
        tag("span", tick_label(tick), style=f"left:{100 * left:.2f}%", class_="last" if left > 0.95 else None)
        for tick, left in ((tick, frame.across(tick)) for tick in x_ticks)
    ]
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.title), tag("p", chart.unit, class_="unit")),
        tag(
            "ul",
            [tag("li", tag("span", class_=f"swatch {style}"), name) for style, name in swatches],
            class_="legend",
        ),
        tag("p", class_="readout", hidden=True),
        tag(
            "div",
            tag("div", y_labels, class_="y-axis", aria_hidden="true"),
            tag("div", _svg(thin, frame), class_="area", data_chart=_readout_data(thin, frame)),
            tag("div", x_labels, class_="x-axis", aria_hidden="true"),
            class_="plot",
        ),
        tag("p", chart.x_name, class_="x-name", aria_hidden="true"),
        fold("The numbers", _number_table(full)),
        class_="chart",
    )


def describe_series(series: Series) -> str:
    """Describe a curve in words: its first, last, lowest and highest value, each with its step."""
    steps, values = series.curve
    low, high = min(values), max(values)

    def point(value: float, step: int) -> str:
        return f"{format_number(value)} at {step:,}"

    return (
        f"{series.name}: {point(values[0], steps[0])}, {point(values[-1], steps[-1])}; "
        f"lowest {point(low, steps[values.index(low)])}, highest {point(high, steps[values.index(high)])}"
    )


def _svg(chart: Chart, frame: Frame) -> Markup:
    parts = []
    if chart.shade:
        left = SIDE * frame.across(chart.shade[1])
        parts.append(tag("rect", x=f"{left:.1f}", y=0, width=f"{SIDE - left:.1f}", height=SIDE, class_="shade"))
    x_ticks, y_ticks = frame.ticks()
    grid = [f"M0 {SIDE * (1 - frame.up(tick)):.1f}H{SIDE}" for tick in y_ticks]
    grid += [f"M{SIDE * frame.across(tick):.1f} 0V{SIDE}" for tick in x_ticks]
    parts.append(tag("path", d="".join(grid), class_="grid"))
    if chart.level:
        parts.append(tag("path", d=f"M0 {SIDE * (1 - frame.up(chart.level[1])):.1f}H{SIDE}", class_="level"))
    for series in chart.series:
        points = [frame.point(x, y) for x, y in zip(*series.curve, strict=True)]
        line = f"M{'L'.join(points)}"
        if chart.fill:
            first, last = points[0].split()[0], points[-1].split()[0]
            parts.append(tag("path", d=f"{line}L{last} {SIDE}L{first} {SIDE}Z", class_=f"below c{series.colour}"))
        parts.append(tag("path", d=line, class_=f"line c{series.colour}"))
        if series.dots or len(points) == 1:
            parts.append(tag("path", d="".join(f"M{point}h0" for point in points), class_=f"dots c{series.colour}"))
    scale = " on a logarithmic axis" if frame.log else ""
    words = "; ".join(map(describe_series, chart.series))
    label = f"{chart.title}. Line chart of {chart.unit}{scale} over {chart.x_name}. {words}."
    return tag("svg", parts, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", role="img", aria_label=label)


def _readout_data(chart: Chart, frame: Frame) -> str:
    """Return JSON for the readout of page.js: the axes and the points."""
    curves = [
        {"name": series.name, "x": series.curve.steps, "y": [float(f"{value:.5g}") for value in series.curve.values]}
        for series in chart.series
    ]
    return json.dumps({"x": frame.x, "y": frame.y, "log": frame.log, "series": curves}, separators=(",", ":"))


def _number_table(chart: Chart) -> Markup:
    """Return a table of up to TABLE_ROWS evenly spaced steps, the last one included, and the extremes in words.

    The steps are those of curves with dots (validations) if there are any. If steps had to be left out, a curve without
    a value at a row's step shows its nearest one.
    """
    marked = [series for series in chart.series if series.dots] or chart.series
    steps = sorted({step for series in marked for step in series.curve.steps})
    reach, nearest = 0.0, ""
    if len(steps) > TABLE_ROWS:
        reach = (steps[-1] - steps[0]) / (TABLE_ROWS - 1) / 2
        nearest = f", at this {chart.x_name} or the nearest one of the curve"
        steps = [steps[round(row * (len(steps) - 1) / (TABLE_ROWS - 1))] for row in range(TABLE_ROWS)]

    def value_at(curve: Curve, step: int) -> str:
        after = bisect_left(curve.steps, step)
        candidates = [index for index in (after - 1, after) if 0 <= index < len(curve.steps)]
        index = min(candidates, key=lambda index: abs(curve.steps[index] - step))
        return format_number(curve.values[index]) if abs(curve.steps[index] - step) <= reach else "\N{EN DASH}"

    rows = [[f"{step:,}", *(value_at(series.curve, step) for series in chart.series)] for step in steps]
    head = [chart.x_name, *(series.name for series in chart.series)]
    extremes = tag("ul", [tag("li", describe_series(series)) for series in chart.series], class_="small")
    return join(table(f"{chart.title}: {chart.unit}{nearest}", head, rows, class_="numbers"), extremes)
