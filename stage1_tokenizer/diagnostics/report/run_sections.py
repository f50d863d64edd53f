"""The sections that the page of any run has, of either stage: its figures, what was run, and what show_events."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, NamedTuple

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.record import DataRecord
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    Markup,
    description_list,
    fold,
    format_number,
    format_percent,
    join,
    plural,
    table,
    tag,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.page import PageHead, notice
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.engine.log_file import Curve

LONGEST = 300
"""Characters of a value that are shown."""
LONGEST_MESSAGE, LONGEST_COMMAND = 1500, 2000
MOST_KEYS = 400
MOST_LINES = 60
Better = Literal["higher", "lower"] | None


class MetricInfo(NamedTuple):
    """The meaning of one scalar of the log, and which way is better."""

    label: str
    sentence: str
    better: Better
    unit: str = ""
    digits: int = 4
    share: bool = False
    """Shown in per cent."""

    def shown(self, value: float) -> str:
        return format_percent(value) if self.share else f"{format_number(value, self.digits)} {self.unit}".rstrip()


class MetricValue(NamedTuple):
    """A figure of a run: the newest value, the best one, and where that was."""

    name: str
    meaning: MetricInfo
    value: float
    step: int
    best: float
    best_step: int


def metric_values(curves: Mapping[str, Curve], meanings: Mapping[str, MetricInfo]) -> list[MetricValue]:
    """Those of the figures that a run has."""
    found = []
    for name, meaning in meanings.items():
        curve = curves.get(name)
        if curve is None:
            continue
        choose = min if meaning.better == "lower" else max
        best = choose(curve.values) if meaning.better else curve.values[-1]
        place = len(curve.values) - 1 - curve.values[::-1].index(best)
        found.append(MetricValue(name, meaning, curve.values[-1], curve.steps[-1], best, curve.steps[place]))
    return found


def show_metrics(run: RunFolder, meanings: Mapping[str, MetricInfo]) -> Markup:
    """The last validation in large numbers, with a sentence each."""
    found = metric_values(run.curves, meanings)
    if not found:
        return notice("There was no validation yet, so there are no figures.")
    items = []
    for each in found:
        better_before = each.meaning.better is not None and each.best != each.value
        when = f"best {each.meaning.shown(each.best)} at step {each.best_step:,}" if better_before else None
        items.append(
            tag(
                "div",
                tag("dt", each.meaning.label),
                tag("dd", each.meaning.shown(each.value), class_="value"),
                tag("dd", when, class_="when") if when else None,
                tag("dd", each.meaning.sentence, class_="means"),
            )
        )
    step = max(each.step for each in found)
    words = tag("p", f"On the whole validation split, after step {step:,}.", class_="small")
    return join(words, tag("dl", items, class_="cards"))


def page_head(run: RunFolder, kind: str, part: str) -> PageHead:
    """The title, and a sentence on how far the run is."""
    how = run.config_text(part, "kind")
    done = f"{run.steps_done:,} of {run.planned_steps:,} steps" if run.planned_steps else f"{run.steps_done:,} steps"
    alarms = plural(len(run.alarms), "alarm") if run.alarms else "no alarms"
    what = f"{how} bottleneck on {run.config_text('data', 'kind')}" if part == "bottleneck" else how
    return PageHead(kind, run.name, [f"{what}, {done}, ", tag("a", alarms, href="#alarms"), "."])


def page_footer(run: RunFolder) -> str:
    return f"Written by Tessera from {run.name}/. Everything is in this file; it asks the network for nothing."


def start_command(run: RunFolder, script: str, needed: str = "") -> str:
    """The command that starts a run like this one, by its configuration. `needed`: options that no file has."""
    config = run.config.get("config")
    given = f" --config {shlex.quote(config)}" if isinstance(config, str) else ""
    return f"accelerate launch {script}{given}{needed}    # and the settings below that differ"


def show_run(run: RunFolder, facts: Iterable[tuple[Child, Child]], command: str) -> Markup:
    """`facts`: what the stage has to say; `command`: how such a run is started where nothing was noted."""
    parts: list[Child] = [description_list([*facts, *_data_found(run), *_progress_facts(run)])]
    if run.config_trouble:
        parts.append(notice(f"Its configuration is not known: {run.config_trouble[:LONGEST]}."))
    words = run.sessions[0].get("command") if run.sessions else None
    if isinstance(words, list) and words:
        parts += [tag("h3", "The same again"), _command_box(shlex.join(map(str, words)))]
    elif run.config:
        parts += [tag("h3", "The same again"), _command_box(command)]
        parts.append(tag("p", "Its own command line was not noted by the version that trained it.", class_="small"))
    if run.config:
        rows = [[key, format_setting(value)] for key, value in islice(flat_items(run.config), MOST_KEYS + 1)]
        rows[MOST_KEYS:] = [["...", "and more"]] if len(rows) > MOST_KEYS else []
        count = plural(len(rows), "setting")
        parts.append(fold(f"All {count}, the defaults among them", table("Settings", ["key", "value"], rows, "config")))
    parts.append(_show_machine(run))
    return join(parts)


def describe_data(data: Tree) -> str:
    """A data set in a few words."""
    size = data.get("image_size")
    across = "x".join(map(str, size)) if isinstance(size, (list, tuple)) else "?"
    root = data.get("root")
    return f"{data.get('kind', 'unknown')}, {across} pixels{f', from {root}' if root else ''}"


def _data_found(run: RunFolder) -> Iterator[tuple[Child, Child]]:
    """What was found of the data when the run was begun or continued last."""
    record = DataRecord.saved_in(run.path)
    for number, line in enumerate(record.found[:MOST_LINES] if record else []):
        yield "" if number else "Found", line[:LONGEST]


def show_events(run: RunFolder) -> Markup:
    """Alarms, steps left out, files that could not be read, and stops; what was done about each."""
    parts: list[Child] = []
    if run.alarms:
        rows = []
        for entry in run.alarms[:MOST_LINES]:
            name, message = str(entry.get("alarm", "?"))[:LONGEST], str(entry.get("message", ""))[:LONGEST_MESSAGE]
            rows.append([f"{entry['step']:,}", tag("strong", name), message])
        parts.append(table("Alarms", ["step", "alarm", "what was seen, and what to do"], rows, "alarms", hide=True))
        if len(run.alarms) > MOST_LINES:
            parts.append(notice(f"And {plural(len(run.alarms) - MOST_LINES, 'more', 'more')} in alarms.jsonl."))
    else:
        parts.append(tag("p", "No alarm was raised." if run.curves else "There is no log yet."))
    skipped = sum(run.curves["train/skipped"].values) if "train/skipped" in run.curves else 0
    facts: list[tuple[Child, Child]] = []
    if skipped:
        facts.append(("Steps left out", f"{format_number(skipped)}, whose loss or gradient was not finite"))
    clipped = run.curves.get("train/clipped")
    if clipped and sum(clipped.values):
        facts.append(("Gradients clipped", f"in {format_number(sum(clipped.values))} steps"))
    resumed = [entry["step"] for entry in run.sessions[1:]]
    if resumed:
        facts.append(("Started again", f"at step {', '.join(f'{step:,}' for step in resumed[:20])}"))
    if (run.path / BAD_FILES).is_file():
        with (run.path / BAD_FILES).open("rb") as file:
            lines = sum(1 for _ in file)
        facts.append(("Pictures left out", f"{lines:,} could not be read; {BAD_FILES} lists them"))
    parts.append(description_list(facts) if facts else None)
    return join(parts)


def _progress_facts(run: RunFolder) -> Iterator[tuple[Child, Child]]:
    total = f" of {run.planned_steps:,}" if run.planned_steps else ""
    unfinished = " (ended by --patience, or not finished)" if run.config.get("patience") else " (not finished)"
    state = " (in training now)" if run.is_in_use else "" if run.planned_steps in (None, run.steps_done) else unfinished
    yield "Steps", f"{run.steps_done:,}{total}{state}"
    if run.sessions:
        first = run.sessions[0]
        begun = first["step"]  # an earlier version may have begun it, and noted nothing
        yield f"Continued at step {begun:,}" if begun else "Started", _format_time(str(first.get("time", "unknown")))
    if run.weights_file.is_file():
        saved = datetime.fromtimestamp(run.weights_file.stat().st_mtime, UTC)
        yield "Weights saved", saved.strftime("%Y-%m-%d %H:%M UTC")
    rate = run.last_value("train/images_per_second")
    if rate:
        yield "Speed", f"{format_number(rate, 3)} pictures a second on average, validation and saving included"


def _format_time(time: str) -> str:
    """2026-01-31T12:00:00Z as people write it; what is none as it is."""
    try:
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError):
        return time[:LONGEST]


def _show_machine(run: RunFolder) -> Markup:
    """The environment of the newest session."""
    if not run.sessions:
        return notice("Machine and versions were not noted: an earlier version of Tessera trained this run.")
    newest = run.sessions[-1]
    packages = newest.get("packages")
    names = {"tessera": newest.get("tessera"), "Python": newest.get("python")}
    names |= packages if isinstance(packages, dict) else {}
    facts: list[tuple[Child, Child]] = [
        (label, str(newest.get(key, "unknown"))[:LONGEST])
        for key, label in (
            ("device", "Device"),
            ("precision", "Mixed precision"),
            ("processes", "Processes"),
            ("threads", "Threads each"),
            ("processor", "Processor"),
            ("system", "System"),
        )
    ]
    versions = table("Versions", ["package", "version"], [[k, str(v)[:LONGEST]] for k, v in names.items()], "config")
    return join(tag("h3", "Machine"), description_list(facts), fold("Versions of Python and packages", versions))


def _command_box(text: str) -> Markup:
    cut = notice(f"It is cut off here, after {LONGEST_COMMAND:,} characters.") if len(text) > LONGEST_COMMAND else None
    box = tag("pre", tag("code", text[:LONGEST_COMMAND]), class_="scroll", data_label="The same again")
    return join(box, cut)


def flat_items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a configuration, and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def format_setting(value: Any) -> str:
    """A value as a config file has it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return ", ".join(map(format_setting, value[:20]))[:LONGEST] or "[]"
        case _:
            return str(value)[:LONGEST]
