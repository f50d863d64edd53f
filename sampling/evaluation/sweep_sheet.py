"""The picture of a sweep: the distance over the option with the most values, and the same samples of each setting.

chart      distance over that option, one curve for each combination of the other options
rows       one setting each, the best first: its options, its distance, its first samples; a column has one noise
"""

import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sampling.evaluation.results import format_value
from sampling.evaluation.sweep_table import Sweep, label
from sampling.output import numbered_names
from sampling.prior_defaults import DrawConfig, describe_draw
from sampling.saved_images import read_png
from stage1_tokenizer.diagnostics.views.sheet import COLOURS, GREY, MARGIN, STYLE, TOP, WIDTH, Sheet, fitting

LABELS = 2.6
"""Width in inches of the column of labels."""
LARGEST = 0.6
"""Height and width in inches of a sample, at most."""
GAP = 0.06
LINES = 0.45
"""Height of a label in inches: two lines of options and one of the distance."""
CHART = 2.6
"""Height of the chart in inches."""
MOST_ROWS, MOST_COLUMNS, MOST_CURVES = 40, 16, len(COLOURS)
"""Settings, samples of each, and curves that are shown."""


def draw_sweep(sweep: Sweep, samples: Path) -> bytes:
    """Return the PNG file. samples: the folder that has the folders of samples."""
    from matplotlib import rc_context  # noqa: PLC0415 (why: sheet.py)

    with rc_context(STYLE):
        return _draw(sweep, samples).png()


def curves(sweep: Sweep) -> tuple[str, dict[str, list[DrawConfig]]]:
    """Return the numeric option with the most values, and by the other options the settings that differ in it.

    Curves of fewer than two settings are left out, and the best curve is the first one. "": no option has two values.
    """
    draws = sweep.ranked
    values = {name: {getattr(draw, name) for draw in draws} for name in DrawConfig.model_fields}
    numbers = {name: each for name, each in values.items() if all(isinstance(value, int | float) for value in each)}
    option = max(numbers, key=lambda name: len(numbers[name]))
    found = defaultdict(list)
    for draw in draws:
        rest = {name: getattr(draw, name) for name in values if name != option and len(values[name]) > 1}
        found[describe_draw(rest, always=rest)].append(draw)
    kept = [(name, each) for name, each in found.items() if len(each) > 1][:MOST_CURVES]
    return (option if kept else ""), dict(kept)


def _draw(sweep: Sweep, samples: Path) -> Sheet:
    draws, (option, found) = sweep.ranked[:MOST_ROWS], curves(sweep)
    images = [_first_images(samples / sweep.measured[draw].samples) for draw in draws]
    shape = next((each[0].shape for each in images if each), (1, 1))
    width, height = fitting((shape[0], shape[1]), LARGEST)
    row = max(height + GAP, LINES)
    top = TOP + (CHART + 0.8 if option else 0.0)
    caption = f"{len(sweep.measured)} settings, {sweep.protocol['samples']}: a column has one noise. The best is first."
    sheet = Sheet(
        top + len(draws) * row,
        str(sweep.protocol["subject"]),
        f"{caption}\nShaded: 95 % intervals." if option else caption,
        sweep.folder.name,
    )
    if option:
        _draw_chart(sheet, sweep, option, found)
    for number, draw in enumerate(draws):
        y = top + number * row
        sheet.text(MARGIN, y + 0.02, textwrap.fill(label(draw), 42), va="top", size=7.5)
        sheet.text(MARGIN, y + row - 0.06, format_value(sweep.measured[draw].distance), size=7.5, color=GREY)
        for column, image in enumerate(images[number]):
            x = MARGIN + LABELS + column * (width + GAP)
            if x + width <= WIDTH - MARGIN:
                sheet.image(image, x, y, width)
    return sheet


def _draw_chart(sheet: Sheet, sweep: Sweep, option: str, found: Mapping[str, list[DrawConfig]]) -> None:
    """Draw the distances of the curves over an option, with their 95 % intervals."""
    axes = sheet.plot(MARGIN + 0.5, TOP + 0.25, WIDTH - 2 * MARGIN - 0.5, CHART - 0.25)
    for (name, unsorted), colour in zip(found.items(), COLOURS, strict=False):
        draws = sorted(unsorted, key=lambda draw: float(getattr(draw, option)))
        distances = [sweep.measured[draw].distance for draw in draws]
        x, y = [float(getattr(draw, option)) for draw in draws], [distance.value for distance in distances]
        axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.4, label=name or None)
        if all(distance.interval for distance in distances):
            low, high = zip(*(distance.interval for distance in distances if distance.interval), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.set_title(f"{distances[0].label} over {option}")
    axes.set_xlabel(option, loc="right", color=GREY)
    if any(found):
        axes.legend(loc="best")


def _first_images(folder: Path) -> list[NDArray[np.uint8]]:
    """Return the first samples of a setting; none if the user has deleted them."""
    paths = [folder / name for name in numbered_names(MOST_COLUMNS)]
    return [read_png(path) for path in paths if path.is_file()]
