"""What an evaluation found, as JSON for programs, as Markdown for people, and as lines on the console.

A figure without its protocol is a rumour: the same pictures give another distance with another resize, extractor or
number of pictures. So what a figure follows from stands in the same file.
"""

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sampling.evaluation.intervals import Interval
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.lock import mark_folder

FORMAT = 1
PACKAGES = ("tessera-images", "torch", "torchvision", "torch-fidelity", "lpips", "numpy", "pillow")
"""Whose versions may change a figure."""
NOT_TOLD = ("processes", "machine", "versions", "date")
"""Parts of a protocol that another evaluation of the same may have different."""
Kind = Literal["tokenizer", "prior", "samples"]
Protocol = Mapping[str, Any]


class Figure(NamedTuple):
    """One measured number."""

    name: str
    """In the JSON file, for programs."""
    label: str
    """For people."""
    value: float
    interval: Interval | None = None
    """Of 95 % confidence; None where nothing is estimated, as with a count."""
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    note: str = ""


class Evaluation(NamedTuple):
    """All figures of one evaluation, and what they follow from."""

    kind: Kind
    figures: Sequence[Figure]
    protocol: Protocol
    warnings: Sequence[str]
    """What a reader must know before believing a figure."""


def versions() -> dict[str, str]:
    """Of all that may change a figure."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # ours, in a checkout that was never installed
            found[name] = version(name)
    return found


def digest_of(protocol: Protocol) -> str:
    """Six letters that differ between results of different protocols, for the names of their files."""
    told = {key: value for key, value in protocol.items() if key not in NOT_TOLD}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:6]


def described_machine(device: torch.device) -> str:
    """What computed, for figures of speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def write_results(stem: Path, evaluation: Evaluation) -> None:
    """STEM.json and STEM.md. Raises StorageError where they cannot be written."""
    mark_folder(stem.parent)
    write_file(stem.with_name(stem.name + ".json"), as_json(evaluation).encode())
    write_file(stem.with_name(stem.name + ".md"), as_markdown(evaluation).encode())


def as_json(evaluation: Evaluation) -> str:
    """The file for programs; a figure that is not a number is null."""
    figures = [
        {
            "name": figure.name,
            "label": figure.label,
            "value": _number(figure.value),
            "low": None if figure.interval is None else _number(figure.interval.low),
            "high": None if figure.interval is None else _number(figure.interval.high),
            "unit": figure.unit,
            "better": figure.better,
            "note": figure.note,
        }
        for figure in evaluation.figures
    ]
    tree = {
        "format": FORMAT,
        "kind": evaluation.kind,
        "figures": figures,
        "protocol": evaluation.protocol,
        "warnings": list(evaluation.warnings),
    }
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def as_markdown(evaluation: Evaluation) -> str:
    """The page for people: the figures as a table, then the protocol, a line for each of its parts."""
    lines = [f"# {evaluation.protocol['subject']}", ""]
    lines += [f"> {text}" for text in evaluation.warnings] + [""] * bool(evaluation.warnings)
    lines += ["| figure | value | 95 % interval | |", "|---|---:|---:|---|"]
    for figure in evaluation.figures:
        better = f"{figure.better} is better" if figure.better else ""
        remark = "; ".join(filter(None, (better, figure.note)))
        lines.append(f"| {_cell(figure.label)} | {shown(figure)} | {shown_interval(figure)} | {_cell(remark)} |")
    lines += ["", "## Protocol", ""]
    lines += [f"- **{key}**: {_text(value)}" for key, value in evaluation.protocol.items()]
    return "\n".join(lines) + "\n"


def console_lines(evaluation: Evaluation) -> list[str]:
    """The figures, one a line, then the warnings."""
    width = max(len(figure.label) for figure in evaluation.figures)
    lines = []
    for figure in evaluation.figures:
        interval = shown_interval(figure)
        between = f"   95 % {interval}" if interval else ""
        lines.append(f"  {figure.label:<{width}}  {shown(figure):>12}{between}")
    return lines + [f"note: {text}" for text in evaluation.warnings]


def shown(figure: Figure) -> str:
    """The value with its unit, in as many digits as are of use."""
    return f"{_digits(figure.value, figure)}{' ' + figure.unit if figure.unit else ''}"


def shown_interval(figure: Figure) -> str:
    if figure.interval is None:
        return ""
    return f"{_digits(figure.interval.low, figure)} to {_digits(figure.interval.high, figure)}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digits(value: float, figure: Figure) -> str:
    """As many decimals as the interval's width makes sense of; of a count none."""
    if not math.isfinite(value):
        return "not a number"
    if figure.interval is not None and math.isfinite(width := figure.interval.high - figure.interval.low) and width > 0:
        return f"{value:,.{min(6, max(0, 2 - math.floor(math.log10(width))))}f}"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value).replace("\n", " ")
