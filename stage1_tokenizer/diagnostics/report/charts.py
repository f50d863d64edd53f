"""Line charts as inline SVG, with axes of plain text around them, and the same numbers as a table.

The SVG is stretched to the width that there is, with strokes that are not; words and numbers are HTML, so they keep
their size. page.js adds a readout under the pointer; nothing else needs it.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from stage1_tokenizer.diagnostics.report.markup import Markup, fold, format_number, join, table, tag
from stage1_tokenizer.engine.log_file import Curve

POINTS = 300
"""Points of a curve that are drawn, at most."""
ROWS = 12
"""Rows of its table."""
SMALLEST, LARGEST = 1e-100, 1e100
"""No axis holds more: what lies beyond, in a damaged log, is left out."""
SIDE = 1000
"""Units of the drawing, in either direction."""


@dataclass(frozen=True)
class Series:
    """One curve of a chart."""

    name: str
    curve: Curve
    dots: bool = False
    """Few and whole, as the figures of validations: each is marked."""
    colour: int | None = None
    """Its number, where others on the page stand for the same; None: its place in the chart."""


@dataclass(frozen=True)
class Chart:
    """What is drawn, and in which frame."""

    title: str
    unit: str
    """What the vertical axis measures."""
    series: Sequence[Series]
    log: bool = False
    """A logarithmic vertical axis; the values are positive then."""
    from_zero: bool = False
    x_name: str = "step"
    level: tuple[str, float] | None = None
    """A horizontal line, and what it stands for."""
    fill: bool = False
    """The area below the (only) curve is filled."""
    shade: tuple[str, float] | None = None
    """What is from this x on to the right."""
    extent: tuple[float, float] | None = None
    """Of the horizontal axis; None: as far as the curves go."""


@dataclass(frozen=True)
class Frame:
    """From values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def across(self, x: float) -> float:
        """0 at the left edge, 1 at the right one."""
        return (x - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, y: float) -> float:
        """0 at the bottom, 1 at the top."""
        low, high, value = (math.log(each) for each in (*self.y, y)) if self.log else (*self.y, y)
        return (value - low) / (high - low)

    def place(self, x: float, y: float) -> str:
        return f"{SIDE * self.across(x):.1f} {SIDE * (1 - self.up(y)):.1f}"

    def ticks(self) -> tuple[list[float], list[float]]:
        """Round numbers on the horizontal axis and on the vertical one."""
        return linear_ticks(*self.x, most=5), log_ticks(*self.y) if self.log else linear_ticks(*self.y)


def thin_curve(curve: Curve, most: int = POINTS) -> Curve:
    """At most `most` points, of each stretch the first, lowest, highest and last one: no peak is lost."""
    n = len(curve.steps)
    if n <= most:
        return curve
    stretches = max(1, most // 4)
    edges = [n * each // stretches for each in range(stretches + 1)]
    kept = set()
    for start, stop in pairwise(edges):
        places = range(start, stop)
        kept |= {start, stop - 1, min(places, key=curve.values.__getitem__), max(places, key=curve.values.__getitem__)}
    return Curve([curve.steps[place] for place in sorted(kept)], [curve.values[place] for place in sorted(kept)])


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two others, up to `most` of them."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or where these are too many the powers alone, or some of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= 6:
            return found if len(found) > 1 else [low, high]
    return found[:: -(-len(found) // 6)]


def tick_label(tick: float) -> str:
    """A round number in as few characters as it takes."""
    if abs(tick) >= 1e6 or 0 < abs(tick) < 1e-4:
        return f"{tick:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{tick:,.6f}".rstrip("0").rstrip(".") if abs(tick) < 1000 else f"{tick:,.0f}"


def fit_frame(chart: Chart) -> Frame:
    """Axes that hold all of the curves."""
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
        apart = (high - low) or abs(high) or 1.0
        high += 0.06 * apart
        low -= 0.0 if chart.from_zero and low >= 0 else 0.06 * apart
    return Frame((left, right if right > left else left + 1.0), (low, high), chart.log)


def with_drawable_points(chart: Chart) -> Chart | None:
    """The chart with the points that its axes can hold, in order, and a colour for each curve; None: there are none."""
    kept = []
    for number, series in enumerate(chart.series):
        points = sorted((s, v) for s, v in zip(*series.curve, strict=True) if _fits(v, chart.log))
        if points:
            curve = Curve(*map(list, zip(*points, strict=True)))
            kept.append(replace(series, curve=curve, colour=number if series.colour is None else series.colour))
    return replace(chart, series=kept) if kept else None


def chart_html(asked: Chart) -> Markup | None:
    """The chart as a figure; None where there is nothing to draw."""
    chart = with_drawable_points(asked)
    if chart is None:
        return None
    frame = fit_frame(chart)
    shown = [replace(each, curve=thin_curve(each.curve)) for each in chart.series]
    x_ticks, y_ticks = frame.ticks()
    legend = [
        tag("li", tag("span", class_=f"swatch c{each.colour}{' dotted' if each.dots else ''}"), each.name)
        for each in shown
    ]
    if chart.level:
        legend.append(tag("li", tag("span", class_="swatch level"), chart.level[0]))
    if chart.shade:
        legend.append(tag("li", tag("span", class_="swatch shade"), chart.shade[0]))
    y_labels = [tag("span", tick_label(tick), style=f"bottom:{100 * frame.up(tick):.2f}%") for tick in y_ticks]
    x_labels = [
        tag("span", tick_label(tick), style=f"left:{100 * place:.2f}%", class_="last" if place > 0.95 else None)
        for tick, place in ((tick, frame.across(tick)) for tick in x_ticks)
    ]
    area = tag(
        "div", _drawing(chart, shown, frame, x_ticks, y_ticks), class_="area", data_chart=_readout_data(shown, frame)
    )
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.title), tag("p", chart.unit, class_="unit")),
        tag("ul", legend, class_="legend"),
        tag("p", class_="readout", hidden=True),
        tag(
            "div",
            tag("div", y_labels, class_="y-axis", aria_hidden="true"),
            area,
            tag("div", x_labels, class_="x-axis", aria_hidden="true"),
            class_="plot",
        ),
        tag("p", chart.x_name, class_="x-name", aria_hidden="true"),
        fold("The numbers", _number_table(chart)),
        class_="chart",
    )


def _fits(value: float, log: bool) -> bool:
    return (value >= SMALLEST if log else value == 0 or abs(value) >= SMALLEST) and abs(value) <= LARGEST


def describe_series(series: Series) -> str:
    """A curve in words."""
    steps, values = series.curve
    low, high = min(values), max(values)
    return (
        f"{series.name}: {format_number(values[0])} at {steps[0]:,}, {format_number(values[-1])} at {steps[-1]:,}; lowest {format_number(low)} "
        f"at {steps[values.index(low)]:,}, highest {format_number(high)} at {steps[values.index(high)]:,}"
    )


def _drawing(
    chart: Chart, shown: Sequence[Series], frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]
) -> Markup:
    parts = []
    if chart.shade:
        left = SIDE * frame.across(chart.shade[1])
        parts.append(tag("rect", x=f"{left:.1f}", y=0, width=f"{SIDE - left:.1f}", height=SIDE, class_="shade"))
    grid = [f"M0 {SIDE * (1 - frame.up(tick)):.1f}H{SIDE}" for tick in y_ticks]
    grid += [f"M{SIDE * frame.across(tick):.1f} 0V{SIDE}" for tick in x_ticks]
    parts.append(tag("path", d="".join(grid), class_="grid"))
    if chart.level:
        parts.append(tag("path", d=f"M0 {SIDE * (1 - frame.up(chart.level[1])):.1f}H{SIDE}", class_="level"))
    for series in shown:
        places = [frame.place(x, y) for x, y in zip(*series.curve, strict=True)]
        line = f"M{'L'.join(places)}"
        if chart.fill:
            first, last = places[0].split()[0], places[-1].split()[0]
            parts.append(tag("path", d=f"{line}L{last} {SIDE}L{first} {SIDE}Z", class_=f"below c{series.colour}"))
        parts.append(tag("path", d=line, class_=f"line c{series.colour}"))
        if series.dots or len(places) == 1:
            parts.append(tag("path", d="".join(f"M{place}h0" for place in places), class_=f"dots c{series.colour}"))
    words = "; ".join(map(describe_series, shown))
    scale = " on a logarithmic axis" if frame.log else ""
    label = f"{chart.title}. Line chart of {chart.unit}{scale} over {chart.x_name}. {words}."
    return tag("svg", parts, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", role="img", aria_label=label)


def _readout_data(shown: Sequence[Series], frame: Frame) -> str:
    """What the readout needs."""
    curves = [
        {"name": each.name, "x": each.curve.steps, "y": [float(f"{value:.5g}") for value in each.curve.values]}
        for each in shown
    ]
    return json.dumps({"x": frame.x, "y": frame.y, "log": frame.log, "series": curves}, separators=(",", ":"))


def _number_table(chart: Chart) -> Markup:
    """A table of some of the steps, of validations where there are some, evenly spaced, the last one among them; and of
    the extremes in words. Where steps had to be left out, a curve without a value at a row's has its nearest one."""
    kept = chart.series
    marked = [series for series in kept if series.dots] or kept
    steps = sorted({step for series in marked for step in series.curve.steps})
    few = len(steps) <= ROWS
    rows = steps if few else [steps[round(place * (len(steps) - 1) / (ROWS - 1))] for place in range(ROWS)]
    reach = 0.0 if few else (steps[-1] - steps[0]) / (ROWS - 1) / 2

    def at(series: Series, step: int) -> str:
        after = bisect_left(series.curve.steps, step)
        places = [place for place in (after - 1, after) if 0 <= place < len(series.curve.steps)]
        place = min(places, key=lambda place: abs(series.curve.steps[place] - step))
        return (
            format_number(series.curve.values[place])
            if abs(series.curve.steps[place] - step) <= reach
            else "\N{EN DASH}"
        )

    body = [[f"{step:,}", *(at(series, step) for series in kept)] for step in rows]
    extremes = tag("ul", [tag("li", describe_series(series)) for series in kept], class_="small")
    head = [chart.x_name, *(series.name for series in kept)]
    nearest = "" if few else f", at the {chart.x_name} or the nearest one that a curve has"
    return join(table(f"{chart.title}: {chart.unit}{nearest}", head, body, class_="numbers"), extremes)
