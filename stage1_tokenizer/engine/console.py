"""What a command says while it works: progress bars that all look alike, a line per validation, a summary at the end.

Bars are for people: they are drawn on a terminal alone, by the main process alone. Elsewhere there are plain lines.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from stage1_tokenizer.engine.log_file import log_entries

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
"""What the commands' names are relative to."""
FORMAT = "{desc}{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} UNITS, {rate_noinv_fmt}, {remaining} left{postfix}"
WITHIN_DELAY = 2.0
"""Seconds before a bar is drawn below another one: most such tasks are over by then."""


class Figure(NamedTuple):
    """A figure that a training logs, as people read it."""

    name: str
    label: str
    form: str
    sign: int
    """1: more is better; -1: less is; 0: neither is, so none is the best."""


def bar(total: int, unit: str, what: str = "", initial: int = 0, within: bool = False) -> "tqdm[Any]":
    """A progress bar with rate and time left. within: it is a part of what another one counts, and goes when done."""
    elsewhere = os.environ.get("RANK", "0") != "0"
    return tqdm(
        total=total,
        initial=initial,
        unit=f" {unit}",
        desc=f"{what} " if what else "",
        bar_format=FORMAT.replace("UNITS", f"{unit}es" if unit.endswith("ch") else f"{unit}s"),
        dynamic_ncols=True,
        smoothing=0.0,  # the average: of the last steps alone, the time left would jump with each validation
        leave=not within,
        delay=WITHIN_DELAY if within else 0.0,
        disable=True if elsewhere else None,
    )


def counted(things: Iterable[T], total: int, unit: str, what: str = "", within: bool = False) -> Iterable[T]:
    """The things, with a bar that counts them."""
    with bar(total, unit, what, within=within) as shown:
        for thing in things:
            yield thing
            shown.update()


def say(message: str, error: bool = False) -> None:
    """One line, above a bar if there is one."""
    file = sys.stderr if error else sys.stdout
    tqdm.write(message, file=file)
    file.flush()


def note(message: str) -> None:
    """One line on stderr, by the main process alone: something that was given is not used as it may seem."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {message}", error=True)


def validation_line(
    step: int, steps: int, scalars: Mapping[str, float], figures: Sequence[Figure], seconds: float
) -> str:
    """A validation in one line: those of the figures that are among its scalars."""
    values = {name.removeprefix("validation/"): value for name, value in scalars.items()}
    parts = [f"{each.label} {each.form.format(values[each.name])}" for each in figures if each.name in values]
    return f"step {step}/{steps}  {', '.join(parts)}  (validation, {duration(seconds)})"


def label(name: str, figures: Sequence[Figure]) -> str:
    """A scalar's name in the log -> what people call it."""
    last = name.rpartition("/")[2]
    return next((figure.label for figure in figures if figure.name == last), last)


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def command(script: str, *arguments: object) -> str:
    """A command that can be copied: a script of ours, run by the interpreter that runs this."""
    found = shutil.which("python")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        python = "python"
    else:
        python = near(Path(sys.executable))
    return shlex.join([python, near(ROOT / script), *map(str, arguments)])


def near(path: Path) -> str:
    """A path as it is called from here: relative where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def summary(
    folder: Path,
    figures: Sequence[Figure],
    first: int,
    steps: int,
    seconds: float,
    weights: str,
    after: Sequence[tuple[str, str]],
) -> str:
    """What a training came to: figures, alarms, files, and the commands to go on with.

    first: the step that this process began with, `seconds` ago. weights: the name of the file that was trained. after:
    commands, each with what it does.
    """
    entries = log_entries(folder / "metrics.jsonl")
    done = f"{steps:,} steps"
    if first < steps:  # else there was nothing left to do
        part = f", the last {steps - first:,} of them" if first else ""
        done += f"{part} in {duration(seconds)}"
    rows = [*_figure_rows(entries, figures), ("alarms", _alarms(folder))]
    if left_out := int(sum(entry.get("train/skipped", 0.0) for entry in entries)):
        rows.append(("left out", f"{left_out:,} steps that were not finite"))
    rows.append(("files", f"{folder}: {weights}, metrics.jsonl, samples/"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{folder.name}: {done}", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    return "\n".join(["", *lines, *(f"{what}: {line}" for what, line in after)])


def _figure_rows(entries: Sequence[Mapping[str, Any]], figures: Sequence[Figure]) -> list[tuple[str, str]]:
    rows = []
    for figure in figures:
        name = f"validation/{figure.name}"
        found = [(entry[name], int(entry["step"])) for entry in entries if name in entry]
        if not found:
            continue
        last, at = found[-1]
        text = figure.form.format(last)
        best, best_at = max(found, key=lambda pair: (figure.sign * pair[0], pair[1]))
        if figure.sign and best_at != at:
            text += f" (best {figure.form.format(best)} at step {best_at})"
        rows.append((figure.label, text))
    return rows


def _alarms(folder: Path) -> str:
    alarms = log_entries(folder / "alarms.jsonl")
    if not alarms:
        return "none"
    named = ", ".join(f"{alarm.get('alarm')} at step {alarm['step']}" for alarm in alarms[:3])
    more = ", ..." if len(alarms) > 3 else ""
    return f"{len(alarms)}: {named}{more}; alarms.jsonl says what to change"
