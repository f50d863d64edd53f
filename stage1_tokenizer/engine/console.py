"""Console output of commands: progress bars, one line per validation, a summary at the end.

Only the main process draws bars, and only on a terminal. In a file or a pipe there are plain lines without bars.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from stage1_tokenizer.engine.log_file import METRICS_FILE, read_log

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
"""The folder that the scripts' names are relative to."""
BAR_FORMAT = (
    "{desc}{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} UNITS, {rate_noinv_fmt}, {remaining} left{postfix}"
)
NESTED_DELAY = 2.0
"""Seconds before a nested bar is drawn; most nested tasks end sooner."""


class ConsoleMetric(NamedTuple):
    """A logged metric that the console shows."""

    name: str
    """Its name in the log, without `validation/`."""
    label: str
    template: str
    """Format string for its value, e.g. `{:.2f} dB`."""
    direction: int
    """1: higher is better; -1: lower is better; 0: neither, so the summary names no best value."""


def progress_bar(total: int, unit: str, description: str = "", initial: int = 0, nested: bool = False) -> "tqdm[Any]":
    """Make a progress bar with the rate and the time left.

    nested: it counts a part of one step of another bar, and is erased when it is done.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    return tqdm(
        total=total,
        initial=initial,
        unit=f" {unit}",
        desc=f"{description} " if description else "",
        bar_format=BAR_FORMAT.replace("UNITS", f"{unit}es" if unit.endswith("ch") else f"{unit}s"),
        dynamic_ncols=True,
        smoothing=0.0,  # the mean rate over all steps: the rate of the last steps would jump at each validation
        leave=not nested,
        delay=NESTED_DELAY if nested else 0.0,
        disable=None if is_main else True,  # None: draw on a terminal only
    )


def show_progress(
    items: Iterable[T], total: int, unit: str, description: str = "", nested: bool = False
) -> Iterable[T]:
    """Yield the items, and count them with a progress bar."""
    with progress_bar(total, unit, description, nested=nested) as bar:
        for item in items:
            yield item
            bar.update()


def say(message: str, error: bool = False) -> None:
    """Print a line above the progress bar, if there is one. error: on stderr."""
    file = sys.stderr if error else sys.stdout
    tqdm.write(message, file=file)
    file.flush()


def print_note(message: str) -> None:
    """Print a line on stderr, in the main process only: an option has another effect than the user may expect."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {message}", error=True)


def format_validation(
    step: int, steps: int, scalars: Mapping[str, float], metrics: Sequence[ConsoleMetric], seconds: float
) -> str:
    """Return the line of one validation, with those of the metrics that are among its scalars."""
    values = {name.removeprefix("validation/"): value for name, value in scalars.items()}
    parts = [
        f"{metric.label} {metric.template.format(values[metric.name])}" for metric in metrics if metric.name in values
    ]
    return f"step {step}/{steps}  {', '.join(parts)}  (validation, {format_duration(seconds)})"


def metric_label(name: str, metrics: Sequence[ConsoleMetric]) -> str:
    """Return the label of a scalar by its name in the log; the last part of the name if no metric has it."""
    last = name.rpartition("/")[2]
    return next((metric.label for metric in metrics if metric.name == last), last)


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, e.g. `3 min 20 s`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_command(script: str, *arguments: object) -> str:
    """Return the shell command that runs one of our scripts with this interpreter, ready to be copied."""
    found = shutil.which("python")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        python = "python"
    else:
        python = relative_path(Path(sys.executable))
    return shlex.join([python, relative_path(ROOT / script), *map(str, arguments)])


def relative_path(path: Path) -> str:
    """Return a path relative to the current folder if it lies below, else as it is."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def format_summary(
    folder: Path,
    metrics: Sequence[ConsoleMetric],
    first_step: int,
    steps: int,
    seconds: float,
    weights: str,
    commands: Sequence[tuple[str, str]],
) -> str:
    """Return the summary of a finished training: metrics, alarms, files, and the commands that can follow.

    first_step: the step at which this process started, `seconds` ago. weights: name of the weights file. commands:
    pairs of a description and a command.
    """
    entries = read_log(folder / METRICS_FILE)
    done = f"{steps:,} steps"
    if first_step < steps:  # this process has trained
        part = f", the last {steps - first_step:,} of them" if first_step else ""
        done += f"{part} in {format_duration(seconds)}"
    rows = [*_metric_rows(entries, metrics), ("alarms", _summarise_alarms(folder))]
    if skipped := int(sum(entry.get("train/skipped", 0.0) for entry in entries)):
        rows.append(("skipped", f"{skipped:,} steps that were not finite"))
    rows.append(("files", f"{folder}: {weights}, metrics.jsonl, samples/"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{folder.name}: {done}", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    return "\n".join(["", *lines, *(f"{description}: {line}" for description, line in commands)])


def _metric_rows(entries: Sequence[Mapping[str, Any]], metrics: Sequence[ConsoleMetric]) -> list[tuple[str, str]]:
    """Return the label and the last value of each metric, with its best value if an earlier one was better."""
    rows = []
    for metric in metrics:
        name = f"validation/{metric.name}"
        values = [(entry[name], int(entry["step"])) for entry in entries if name in entry]
        if not values:
            continue
        last, last_step = values[-1]
        text = metric.template.format(last)
        best, best_step = max(values, key=lambda pair: (metric.direction * pair[0], pair[1]))
        if metric.direction and best_step != last_step:
            text += f" (best {metric.template.format(best)} at step {best_step})"
        rows.append((metric.label, text))
    return rows


def _summarise_alarms(folder: Path) -> str:
    alarms = read_log(folder / "alarms.jsonl")
    if not alarms:
        return "none"
    names = ", ".join(f"{alarm.get('alarm')} at step {alarm['step']}" for alarm in alarms[:3])
    more = ", ..." if len(alarms) > 3 else ""
    return f"{len(alarms)}: {names}{more}; alarms.jsonl says what to change"
