"""Results of an evaluation: JSON for programs, Markdown for people, lines for the console.

A metric without its protocol means nothing: the same images have another Fréchet distance with another resize,
extractor or number of images. So the files contain both.
"""

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sampling.evaluation.intervals import Interval
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.lock import mark_folder

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
    better: Literal["lower", "higher"] | None = None
    note: str = ""


class Evaluation(NamedTuple):
    """The metrics of one evaluation, and the protocol that produced them."""

    kind: Literal["tokenizer", "prior", "samples"]
    metrics: Sequence[Metric]
    protocol: Mapping[str, Any]
    warnings: Sequence[str]
    """Facts that limit the meaning of a metric."""


def versions() -> dict[str, str]:
    """Return the versions of Python and PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # our own package, in a checkout that was never installed
            found[name] = version(name)
    return found


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """Return six characters that differ between protocols, for file names."""
    compared = {key: value for key, value in protocol.items() if key not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:6]


def machine_name(device: torch.device) -> str:
    """Return the name of the GPU, or the CPU's architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def write_results(stem: Path, evaluation: Evaluation) -> None:
    """Write STEM.json and STEM.md. Raises StorageError: they cannot be written."""
    mark_folder(stem.parent)
    write_file(stem.with_name(stem.name + ".json"), results_json(evaluation).encode())
    write_file(stem.with_name(stem.name + ".md"), results_markdown(evaluation).encode())


def metric_tree(metric: Metric) -> dict[str, Any]:
    """Return a metric for a JSON file. A value that is not finite becomes null."""
    low, high = metric.interval or (math.nan, math.nan)
    numbers = {"value": metric.value, "low": low, "high": high}
    return {
        "name": metric.name,
        "label": metric.label,
        **{key: float(number) if math.isfinite(number) else None for key, number in numbers.items()},
        "unit": metric.unit,
        "better": metric.better,
        "note": metric.note,
    }


def metric_of_tree(tree: Mapping[str, Any]) -> Metric:
    """Return the metric of a tree that `metric_tree` made; another tree raises LookupError, TypeError or ValueError."""
    value, low, high = (math.nan if tree[key] is None else float(tree[key]) for key in ("value", "low", "high"))
    interval = None if math.isnan(low) else Interval(low, high)
    return Metric(tree["name"], tree["label"], value, interval, tree["unit"], tree["better"], tree["note"])


def results_json(evaluation: Evaluation) -> str:
    """Return the JSON file for programs."""
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
