"""Results of an evaluation: JSON for programs, Markdown for people, lines for the console.

A metric without its protocol means nothing: the same images have another Fréchet distance with another resize,
extractor or number of images. So the files contain both.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from sampling.evaluation.intervals import Interval

FORMAT = 1
PACKAGES = ("tessera-images", "torch", "torchvision", "torch-fidelity", "lpips", "numpy", "pillow")
"""Packages whose versions can change a metric."""
NOT_COMPARED = ("processes", "machine", "versions", "date")
"""Keys of a protocol that may differ between two evaluations of the same kind."""


class Metric(NamedTuple):
    """A measured number with its name."""

    name: str
    """Name in the JSON file."""
    label: str
    """Name for people."""
    value: float
    interval: Interval | None = None
    """95 % confidence interval; None if there is none, for example for a count."""
    unit: str = ""
    return Metric(tree["name"], tree["label"], value, interval, tree["unit"], tree["better"], tree["note"])


def results_json(evaluation: Evaluation) -> str:
    """Return the JSON file for programs. A value that is not finite becomes null."""
    tree = {
        "format": FORMAT,
        "kind": evaluation.kind,
        "figures": [metric_tree(metric) for metric in evaluation.metrics],
        "protocol": evaluation.protocol,
        "warnings": list(evaluation.warnings),
    }
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def results_markdown(evaluation: Evaluation) -> str:
    """Return the Markdown page: a table of the metrics, then the protocol as a list."""
    lines = [f"# {evaluation.protocol['subject']}", ""]
    lines += [f"> {text}" for text in evaluation.warnings] + [""] * bool(evaluation.warnings)
    lines += ["| metric | value | 95 % interval | |", "|---|---:|---:|---|"]
    for metric in evaluation.metrics:
        better = f"{metric.better} is better" if metric.better else ""
        remark = "; ".join(filter(None, (better, metric.note)))
        cells = (_cell(metric.label), format_value(metric), format_interval(metric), _cell(remark))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *protocol_lines(evaluation.protocol)]) + "\n"


def protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    """Return the section of a Markdown page that lists a protocol."""
    return ["", "## Protocol", "", *(f"- **{key}**: {_text(value)}" for key, value in protocol.items())]


def console_lines(evaluation: Evaluation) -> list[str]:
    """Return one line per metric, then one per warning."""
    width = max(len(metric.label) for metric in evaluation.metrics)
    lines = []
    for metric in evaluation.metrics:
        interval = f"   95 % {format_interval(metric)}" if metric.interval else ""
        lines.append(f"  {metric.label:<{width}}  {format_value(metric):>12}{interval}")
    return lines + [f"note: {text}" for text in evaluation.warnings]


def format_value(metric: Metric) -> str:
    """Return the value with its unit, rounded to meaningful digits."""
    return f"{_digits(metric.value, metric)} {metric.unit}".rstrip()


def format_interval(metric: Metric) -> str:
    """Return "LOW to HIGH", or "" if there is no interval."""
    return " to ".join(_digits(end, metric) for end in metric.interval or ())


def _digits(value: float, metric: Metric) -> str:
    """Return the value with as many decimals as the interval's width justifies."""
    if not math.isfinite(value):
        return "not a number"
    width = metric.interval.high - metric.interval.low if metric.interval else 0.0
    if math.isfinite(width) and width > 0:
        return f"{value:,.{min(6, max(0, 2 - math.floor(math.log10(width))))}f}"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"


def _cell(text: str) -> str:
    """Return the text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    """Return a value of the protocol in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value).replace("\n", " ")
