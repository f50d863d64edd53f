"""Sections that the page of every run has, of either stage: its metrics, its settings and its events."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, NamedTuple

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.record import DataRecord, format_count
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    Markup,
    description_list,
    fold,
    format_number,
    format_percent,
    join,
    table,
    tag,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.page import PageHead, Section, notice, render_page, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.engine.errors import shorten
from stage1_tokenizer.engine.log_file import Curve

LONGEST, LONGEST_MESSAGE, LONGEST_COMMAND = 300, 1500, 2000
"""Characters of a value, of an alarm's message and of a command that are shown, at most."""
MOST_KEYS = 400
MOST_LINES = 60


class MetricInfo(NamedTuple):
    """Name, meaning and format of one metric."""

    label: str
    meaning: str
    """A sentence."""
    better: Literal["higher", "lower"] | None
    """None: neither is better."""
    unit: str = ""
    digits: int = 4
    """Significant digits."""
    share: bool = False
    """True: show as per cent."""

    def format(self, value: float) -> str:
        """Format a value with its unit."""
        return format_percent(value) if self.share else f"{format_number(value, self.digits)} {self.unit}".rstrip()


class MetricValue(NamedTuple):
    """One metric of a run: its newest and its best value, with their steps."""

    name: str
    info: MetricInfo
    value: float
    step: int
    best: float
    best_step: int


def metric_values(curves: Mapping[str, Curve], infos: Mapping[str, MetricInfo]) -> list[MetricValue]:
    """Return the values of the metrics that a run has logged."""
    values = []
    for name, info in infos.items():
        curve = curves.get(name)
        if curve is None:
            continue
        choose = min if info.better == "lower" else max
        best = choose(curve.values) if info.better else curve.values[-1]
        last = len(curve.values) - 1 - curve.values[::-1].index(best)
        values.append(MetricValue(name, info, curve.values[-1], curve.steps[-1], best, curve.steps[last]))
    return values


def show_metrics(run: RunFolder, infos: Mapping[str, MetricInfo]) -> Markup:
    """Return the metrics of the last validation as cards, each with its meaning and its best value."""
    metrics = metric_values(run.curves, infos)
    if not metrics:
        return notice("There was no validation yet, so there are no metrics.")
    cards = []
    for metric in metrics:
        was_better = metric.info.better is not None and metric.best != metric.value
        best = f"best {metric.info.format(metric.best)} at step {metric.best_step:,}" if was_better else None
        cards.append(
            tag(
                "div",
                tag("dt", metric.info.label),
                tag("dd", metric.info.format(metric.value), class_="value"),
                tag("dd", best, class_="when") if best else None,
                tag("dd", metric.info.meaning, class_="means"),
            )
        )
    step = max(metric.step for metric in metrics)
    scope = tag("p", f"Measured on the whole validation split after step {step:,}.", class_="small")
    return join(scope, tag("dl", cards, class_="cards"))


def render_run(
    run: RunFolder,
    part: Literal["bottleneck", "prior"],
    sections: Sequence[Section],
    facts: Callable[[], Iterable[tuple[Child, Child]]],
    command: str,
) -> str:
    """Return the page of a run: the stage's sections, then the run's settings and its alarms.

    part: the configuration's part with the variant. facts, command: as in `show_run`.
    """
    variant = run.config_text(part, "kind")
    steps = f"{run.steps_done:,} of {run.planned_steps:,} steps" if run.planned_steps else f"{run.steps_done:,} steps"
    alarms = format_count(len(run.alarms), "alarm") if run.alarms else "no alarms"
    subject = f"{variant} bottleneck on {run.config_text('data', 'kind')}" if part == "bottleneck" else variant
    lead = [f"{subject}, {steps}, ", tag("a", alarms, href="#alarms"), "."]
    head = PageHead("Tokenizer" if part == "bottleneck" else "Prior", run.name, lead)
    last_sections = [
        try_section("run", "What was run", lambda: show_run(run, facts(), command)),
        try_section("alarms", "Alarms", lambda: show_events(run)),
    ]
    return render_page(head, [*sections, *last_sections], page_footer(run.name))


def page_footer(names: str) -> str:
    """Return the page's last line. `names`: of the runs."""
    return f"Written by Tessera from {names}. The page is one file and loads nothing from the network."


def start_command(run: RunFolder, script: str, needed: str = "") -> str:
    """Return a command that starts a similar run from its config file. `needed`: options that no file has."""
    config = run.config.get("config")
    given = f" --config {shlex.quote(config)}" if isinstance(config, str) else ""
    return f"accelerate launch {script}{given}{needed}    # and the settings below that differ"


def show_run(run: RunFolder, facts: Iterable[tuple[Child, Child]], command: str) -> Markup:
    """Return facts, command, settings and machine of a run.

    facts: names and values that the stage adds. command: shown if the run has not recorded its own.
    """
    parts: list[Child] = [description_list([*facts, *_data_found(run), *_progress_facts(run)])]
    if run.config_trouble:
        parts.append(notice(f"The configuration cannot be shown: {run.config_trouble[:LONGEST]}."))
    words = run.sessions[0].get("command") if run.sessions else None
    if isinstance(words, list) and words:
        parts += [tag("h3", "The same again"), _command_box(shlex.join(map(str, words)))]
    elif run.config:
        parts += [tag("h3", "The same again"), _command_box(command)]
        parts.append(tag("p", "The version that trained this run did not record its command.", class_="small"))
    if run.config:
        rows = [[key, format_setting(value)] for key, value in islice(flat_items(run.config), MOST_KEYS + 1)]
        rows[MOST_KEYS:] = [["...", "and more"]] if len(rows) > MOST_KEYS else []
        settings = table("Settings", ["key", "value"], rows, "config")
        parts.append(fold(f"All {format_count(len(rows), 'setting')}, with defaults", settings))
    parts.append(_show_machine(run))
    return join(parts)


def describe_data(data: Tree) -> str:
    """Describe the data part of a configuration in a few words."""
    size = data.get("image_size")
    pixels = "x".join(map(str, size)) if isinstance(size, (list, tuple)) else "?"
    root = data.get("root")
    return f"{data.get('kind', 'unknown')}, {pixels} pixels{f', from {root}' if root else ''}"


def describe_classes(classes: Sequence[str]) -> str:
    """Return the number of classes and the names of the first twelve."""
    names = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    return f"{len(classes):,}: {shorten(names)}"


def _data_found(run: RunFolder) -> Iterator[tuple[Child, Child]]:
    """Yield the lines about the data set that the newest start of the training printed."""
    record = DataRecord.saved_in(run.path)
    for number, line in enumerate(record.found[:MOST_LINES] if record else []):
        yield "" if number else "Found", line[:LONGEST]


def show_events(run: RunFolder) -> Markup:
    """Return the alarms, skipped steps, clipped gradients, restarts and unreadable files of a run."""
    parts: list[Child] = []
    if run.alarms:
        rows = []
        for entry in run.alarms[:MOST_LINES]:
            name, message = str(entry.get("alarm", "?"))[:LONGEST], str(entry.get("message", ""))[:LONGEST_MESSAGE]
            rows.append([f"{entry['step']:,}", tag("strong", name), message])
        parts.append(table("Alarms", ["step", "alarm", "what happened, and what to try"], rows, "alarms", hide=True))
        if len(run.alarms) > MOST_LINES:
            parts.append(notice(f"{len(run.alarms) - MOST_LINES:,} more are in alarms.jsonl."))
    else:
        parts.append(tag("p", "No alarm was raised." if run.curves else "There is no log yet."))
    skipped, clipped = (sum(run.curves[name].values) if name in run.curves else 0
                        for name in ("train/skipped", "train/clipped"))  # fmt: skip
    facts: list[tuple[Child, Child]] = []
    if skipped:
        facts.append(("Steps skipped", f"{format_number(skipped)}, whose loss or gradient was not finite"))
    if clipped:
        facts.append(("Gradients clipped", f"in {format_number(clipped)} steps"))
    resumed = [entry["step"] for entry in run.sessions[1:]]
    if resumed:
        facts.append(("Started again", f"at step {', '.join(f'{step:,}' for step in resumed[:20])}"))
    if (run.path / BAD_FILES).is_file():
        with (run.path / BAD_FILES).open("rb") as file:
            count = sum(1 for _ in file)
        facts.append(("Images left out", f"{count:,} could not be read; {BAD_FILES} lists them"))
    parts.append(description_list(facts) if facts else None)
    return join(parts)


def _progress_facts(run: RunFolder) -> Iterator[tuple[Child, Child]]:
    total = f" of {run.planned_steps:,}" if run.planned_steps else ""
    unfinished = " (ended by --patience, or not finished)" if run.config.get("patience") else " (not finished)"
    is_complete = run.planned_steps in (None, run.steps_done)
    state = " (in training now)" if run.is_in_use else "" if is_complete else unfinished
    yield "Steps", f"{run.steps_done:,}{total}{state}"
    if run.sessions:
        first = run.sessions[0]
        begun = first["step"]  # above 0 if a former version, which recorded no sessions, trained the steps before
        yield f"Continued at step {begun:,}" if begun else "Started", _format_time(str(first.get("time", "unknown")))
    if run.weights_file.is_file():
        saved = datetime.fromtimestamp(run.weights_file.stat().st_mtime, UTC)
        yield "Weights saved", saved.strftime("%Y-%m-%d %H:%M UTC")
    rate = run.last_value("train/images_per_second")
    if rate:
        yield "Speed", f"{format_number(rate, 3)} images a second on average, validation and saving included"


def _format_time(time: str) -> str:
    """Format 2026-01-31T12:00:00Z as 2026-01-31 12:00 UTC; return other text unchanged."""
    try:
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError):
        return time[:LONGEST]


def _show_machine(run: RunFolder) -> Markup:
    """Return machine and package versions of the newest session."""
    if not run.sessions:
        return notice("Machine and versions were not recorded by the version of Tessera that trained this run.")
    newest = run.sessions[-1]
    packages = newest.get("packages")
    versions = {"tessera": newest.get("tessera"), "Python": newest.get("python")}
    versions |= packages if isinstance(packages, dict) else {}
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
    rows = [[name, str(version)[:LONGEST]] for name, version in versions.items()]
    packages_fold = fold("Versions of Python and packages", table("Versions", ["package", "version"], rows, "config"))
    return join(tag("h3", "Machine"), description_list(facts), packages_fold)


def _command_box(text: str) -> Markup:
    cut = notice(f"It is cut off here, after {LONGEST_COMMAND:,} characters.") if len(text) > LONGEST_COMMAND else None
    box = tag("pre", tag("code", text[:LONGEST_COMMAND]), class_="scroll", data_label="The same again")
    return join(box, cut)


def flat_items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a configuration and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def format_setting(value: Any) -> str:
    """Format a value as a config file writes it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return ", ".join(map(format_setting, value[:20]))[:LONGEST] or "[]"
        case dict():
            return ", ".join(f"{key} {format_setting(item)}" for key, item in islice(value.items(), 20))[:LONGEST]
        case _:
            return str(value)[:LONGEST]
