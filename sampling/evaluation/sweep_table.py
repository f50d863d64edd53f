"""The measured settings of a sweep, in RUN/sweeps/NAME/sweep.json for programs and sweep.md for people.

All settings in one table have one protocol, so they can be compared. The file is written after each setting, and a
later sweep with this protocol reads it, so no setting is measured twice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from sampling.evaluation.results import (
    FORMAT,
    Metric,
    format_interval,
    format_value,
    metric_of_tree,
    metric_tree,
    protocol_lines,
)
from sampling.prior_defaults import ALWAYS_SHOWN, DrawConfig, describe_draw, option_word
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.lock import lock_folder


class MeasuredSetting(NamedTuple):
    """The metrics of the samples of one setting."""

    samples: str
    """Name of the folder of the samples, in the run's folder evaluation/."""
    metrics: Sequence[Metric]
    """The Fréchet distance first."""

    @property
    def distance(self) -> Metric:
        """The Fréchet distance to the reference, by which settings are compared."""
        return self.metrics[0]


@dataclass
class Sweep:
    """A locked folder for the results of settings of one protocol."""

    folder: Path
    protocol: Mapping[str, Any]
    warnings: Sequence[str]
    """Facts that limit the meaning of a metric."""
    measured: dict[DrawConfig, MeasuredSetting] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, protocol: Mapping[str, Any], warnings: Sequence[str]) -> Self:
        """Lock the folder, and read the settings that former sweeps have measured.

        Raises:
            ConfigError: another sweep writes to the folder, or it cannot be written to.
        """
        lock_folder(folder)
        return cls(folder, protocol, warnings, _read_settings(folder / "sweep.json"))

    @property
    def ranked(self) -> list[DrawConfig]:
        """The settings, the one with the smallest distance first."""
        return sorted(self.measured, key=lambda draw: self.measured[draw].distance.value)

    def line(self, draw: DrawConfig) -> str:
        """Return a setting and its distance in one line."""
        distance = self.measured[draw].distance
        interval = f" (95 % {format_interval(distance)})" if distance.interval else ""
        return f"{label(draw)}: {distance.label} {format_value(distance)}{interval}"

    def conclusion(self) -> str:
        """Name the best setting, and the number of settings whose intervals overlap with its interval."""
        best, *others = self.ranked
        interval = self.measured[best].distance.interval
        if not others:
            return f"{self.line(best)}; there is no other setting"
        if interval is None:
            return f"{self.line(best)}; so few samples have no intervals, and the difference may be chance"
        intervals = [self.measured[draw].distance.interval for draw in others]
        close = sum(1 for other in intervals if other and other.low <= interval.high)
        return f"{self.line(best)}; the intervals of {close} of {len(others)} others overlap with its own"

    def write(self) -> None:
        """Write sweep.json and sweep.md. Raises StorageError."""
        settings = [
            {
                "sampling": draw.tree(),
                "samples": self.measured[draw].samples,
                "figures": [metric_tree(metric) for metric in self.measured[draw].metrics],
            }
            for draw in self.ranked
        ]
        tree = {"format": FORMAT, "settings": settings, "protocol": self.protocol, "warnings": self.warnings}
        write_file(self.folder / "sweep.json", (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())
        write_file(self.folder / "sweep.md", self._markdown().encode())

    def _markdown(self) -> str:
        """Return the page: the best setting, a table with a row for each setting, the protocol."""
        ours, draws = DrawConfig(), self.ranked
        options = [
            name
            for name in DrawConfig.model_fields
            if name in ALWAYS_SHOWN or any(getattr(draw, name) != getattr(ours, name) for draw in draws)
        ]
        metrics = self.measured[draws[0]].metrics
        head = [*options, *(f"{metric.label}, {metric.better} is better" for metric in metrics)]
        lines = [f"# {self.protocol['subject']}", "", *(f"> {text}" for text in self.warnings)]
        lines += ["", f"Best: {self.conclusion()}.", ""]
        lines += [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
        for draw in draws:
            cells = [option_word(getattr(draw, name)) for name in options]
            for metric in self.measured[draw].metrics:
                interval = f" ({format_interval(metric)})" if metric.interval else ""
                cells.append(format_value(metric) + interval)
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *protocol_lines(self.protocol)]) + "\n"


def label(draw: DrawConfig) -> str:
    """Return the options of a setting in words."""
    return describe_draw(draw.defaults_beside({}), ALWAYS_SHOWN)


def _read_settings(path: Path) -> dict[DrawConfig, MeasuredSetting]:
    """Read the settings of a sweep.json; none if there is no such file, or if it cannot be read, which is said."""
    if not path.exists():
        return {}
    try:
        measured = {}
        for row in parse_json(path.read_text(encoding="utf-8"))["settings"]:
            first, *rest = (metric_of_tree(tree) for tree in row["figures"])
            measured[DrawConfig.from_tree(row["sampling"])] = MeasuredSetting(str(row["samples"]), [first, *rest])
        return measured
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"{path}: cannot be read ({error}); its settings are measured again")
        return {}
