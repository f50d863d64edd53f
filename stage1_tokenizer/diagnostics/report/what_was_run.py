"""What was run: with which settings, on which data, by which versions, on what machine."""

import shlex
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.bad_files import BAD_FILES
from stage1_tokenizer.data.record import DataRecord
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, escaped, fold, join, listed, table, tag
from stage1_tokenizer.diagnostics.report.numbers import plain, plural
from stage1_tokenizer.diagnostics.report.page import note
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder

LONGEST = 300
"""Characters of a value that are shown."""
LONGEST_COMMAND = 2000
MOST_KEYS = 400
MOST_LINES = 60


def what_was_run(run: RunFolder, facts: Iterable[tuple[Child, Child]], command: str) -> Markup:
    """`facts`: what the stage has to say; `command`: how such a run is started where nothing was noted."""
    parts: list[Child] = [listed([*facts, *_found(run), *_time(run)])]
    if run.config_trouble:
        parts.append(note(f"Its configuration is not known: {run.config_trouble[:LONGEST]}."))
    words = run.sessions[0].get("command") if run.sessions else None
    if isinstance(words, list) and words:
        parts += [tag("h3", "The same again"), _code(shlex.join(map(str, words)))]
    elif run.config:
        parts += [tag("h3", "The same again"), _code(command)]
        parts.append(tag("p", "Its own command line was not noted by the version that trained it.", class_="small"))
    if run.config:
        rows = [[key, setting(value)] for key, value in _flat(run.config)]
        count = plural(len(rows), "setting")
        parts.append(fold(f"All {count}, the defaults among them", table("Settings", ["key", "value"], rows, "config")))
    parts.append(_machine(run))
    return join(parts)


def data_facts(data: Tree) -> str:
    """A data set in a few words."""
    size = data.get("image_size")
    across = "x".join(map(str, size)) if isinstance(size, (list, tuple)) else "?"
    root = data.get("root")
    return f"{data.get('kind', 'unknown')}, {across} pixels{f', from {root}' if root else ''}"


def _found(run: RunFolder) -> Iterator[tuple[Child, Child]]:
    """What was found of the data when the run was begun or continued last."""
    record = DataRecord.saved_in(run.path)
    for number, line in enumerate(record.found[:MOST_LINES] if record else []):
        yield "" if number else "Found", line[:LONGEST]


def happened(run: RunFolder) -> Markup:
    """Alarms, steps left out, files that could not be read, and stops; what was done about each."""
    parts: list[Child] = []
    if run.alarms:
        rows = [
            [f"{entry['step']:,}", tag("strong", str(entry.get("alarm", "?"))[:LONGEST]), _message(entry)]
            for entry in run.alarms[:MOST_LINES]
        ]
        parts.append(table("Alarms", ["step", "alarm", "what was seen, and what to do"], rows, "alarms", hide=True))
        if len(run.alarms) > MOST_LINES:
            parts.append(note(f"And {plural(len(run.alarms) - MOST_LINES, 'more', 'more')} in alarms.jsonl."))
    else:
        parts.append(tag("p", "No alarm was raised." if run.curves else "There is no log yet."))
    skipped = sum(run.curves["train/skipped"].values) if "train/skipped" in run.curves else 0
    facts: list[tuple[Child, Child]] = []
    if skipped:
        facts.append(("Steps left out", f"{plain(skipped)}, whose loss or gradient was not finite"))
    clipped = run.curves.get("train/clipped")
    if clipped and sum(clipped.values):
        facts.append(("Gradients clipped", f"in {plain(sum(clipped.values))} steps"))
    resumed = [entry["step"] for entry in run.sessions[1:]]
    if resumed:
        facts.append(("Started again", f"at step {', '.join(f'{step:,}' for step in resumed[:20])}"))
    if (run.path / BAD_FILES).is_file():
        with (run.path / BAD_FILES).open("rb") as file:
            lines = sum(1 for _ in file)
        facts.append(("Pictures left out", f"{lines:,} could not be read; {BAD_FILES} lists them"))
    parts.append(listed(facts) if facts else None)
    return join(parts)


def _message(entry: Tree) -> Markup:
    return escaped(str(entry.get("message", ""))[:1500])


def _time(run: RunFolder) -> Iterator[tuple[Child, Child]]:
    total = f" of {run.steps:,}" if run.steps else ""
    unfinished = " (ended by --patience, or not finished)" if run.config.get("patience") else " (not finished)"
    state = " (in training now)" if run.in_use else "" if run.steps in (None, run.done) else unfinished
    yield "Steps", f"{run.done:,}{total}{state}"
    if run.sessions:
        first = run.sessions[0]
        begun = first["step"]  # an earlier version may have begun it, and noted nothing
        yield f"Continued at step {begun:,}" if begun else "Started", _moment(str(first.get("time", "unknown")))
    if run.weights.is_file():
        saved = datetime.fromtimestamp(run.weights.stat().st_mtime, UTC)
        yield "Weights saved", saved.strftime("%Y-%m-%d %H:%M UTC")
    rate = run.last("train/images_per_second")
    if rate:
        yield "Speed", f"{plain(rate, 3)} pictures a second on average, validation and saving included"


def _moment(time: str) -> str:
    """2026-01-31T12:00:00Z as people write it; what is none as it is."""
    try:
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError):
        return time[:LONGEST]


def _machine(run: RunFolder) -> Markup:
    """The environment of the newest session."""
    if not run.sessions:
        return note("Machine and versions were not noted: an earlier version of Tessera trained this run.")
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
    return join(tag("h3", "Machine"), listed(facts), fold("Versions of Python and packages", versions))


def _code(text: str) -> Markup:
    cut = note(f"It is cut off here, after {LONGEST_COMMAND:,} characters.") if len(text) > LONGEST_COMMAND else None
    box = tag("pre", tag("code", text[:LONGEST_COMMAND]), class_="scroll", data_label="The same again")
    return join(box, cut)


def _flat(tree: Tree) -> Iterator[tuple[str, Any]]:
    """The pairs, MOST_KEYS at most."""
    for number, (key, value) in enumerate(pairs(tree)):
        if number == MOST_KEYS:
            yield "...", "and more"
            return
        yield key, value


def pairs(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a configuration, and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from pairs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def setting(value: Any) -> str:
    """A value as a config file has it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return ", ".join(map(setting, value[:20]))[:LONGEST] or "[]"
        case _:
            return str(value)[:LONGEST]
