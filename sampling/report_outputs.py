"""The report's sections on what was made of a run since its training: samples, completions, and evaluations.

    generated/NNN/, completed/NNN/, reconstructed/NNN/     settings.json, grid.png, pictures
    evaluation/NAME.json, NAME-nearest.png                 figures with intervals, the protocol, what to beware of

All of these files may come from anybody: what cannot be read is named, and the rest is shown.
"""

import math
import re
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from sampling.completion import CompleteConfig
from sampling.option_facts import AlwaysShown, facts_of
from sampling.output import NOT_COMPARED
from sampling.sampler import SamplingConfig
from sampling.saved_images import rows_of
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.trees import LARGEST_JSON, parse_json
from stage1_tokenizer.diagnostics.report.embedded_images import LARGEST_SIDE, grid, read
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    Markup,
    description_list,
    fold,
    format_number,
    join,
    plural,
    table,
    tag,
)
from stage1_tokenizer.diagnostics.report.page import Section, notice, or_notice, section, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.engine.checkpoint import brief
from stage2_prior.report import run_kind

NEWEST = 3
"""Folders of a kind that are shown."""
MOST_FILES = 64
"""Pictures of one, where it has no grid that could be shown."""
LARGEST_GRID = 144
"""Pictures up to which the grid of them all is shown; of more, the first MOST_FILES."""
MOST_FIGURES = 40
LONGEST, LONGEST_NOTE = 300, 1000
"""Characters of a value, and of a sentence."""


def output_sections(run: RunFolder) -> list[Section]:
    """One for each kind of thing that is there."""
    kinds = {"generated": "Generated", "completed": "Completed", "reconstructed": "Reconstructed"}
    sections = []
    for name, done in kinds.items():
        title, folders = f"{done} pictures", numbered(run.path / name)
        if folders:
            sections.append(try_section(name, title, partial(_show_folders, folders, done)))
        elif name == "generated" and run_kind(run) == "prior":
            command = tag("code", f"python sampling/generate.py --prior {run.path}")
            sections.append(section(name, title, notice("None yet; this makes some: ", command)))
    if (run.path / "evaluation").is_dir():
        sections.append(try_section("evaluation", "Evaluation", lambda: show_evaluations(run.path / "evaluation")))
    return sections


def numbered(folder: Path) -> list[Path]:
    """The numbered folders in it, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"\d{1,9}", path.name, re.ASCII)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def json_file(path: Path) -> Tree | str:
    """What a JSON file says, or what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        tree = parse_json(data.decode("utf-8"))
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{path.name} cannot be read: {brief(error)}"
    return tree if isinstance(tree, dict) else f"{path.name} is no JSON object"


def _show_folders(folders: list[Path], done: str) -> Child:
    """The newest of them."""
    parts: list[Child] = []
    for folder in folders[:NEWEST]:
        parts.append(tag("h3", f"{folder.parent.name}/{folder.name}"))
        settings = json_file(folder / "settings.json")
        if isinstance(settings, str):
            parts.append(notice(settings))
            settings = {}
        elif settings.get("finished") is False:
            parts.append(notice("These are not finished; the same command makes the rest."))
        parts += [_show_settings(folder, settings), or_notice(partial(_show_images, folder, settings, done))]
    if len(folders) > NEWEST:
        parts.append(notice(f"And {plural(len(folders) - NEWEST, 'older folder')}."))
    return join(parts)


def _show_settings(folder: Path, settings: Tree) -> Markup | None:
    """Those that make a difference, and all of them behind a fold."""
    facts = [(key.replace("_", " "), _shortened(value)) for key, value in shown_settings(settings).items()]
    if not facts:
        return None
    pairs = ((str(key)[:LONGEST], _shortened(value)) for key, value in islice(settings.items(), 100))
    return join(
        tag("p", ", ".join(f"{key} {value}" for key, value in facts), class_="small"),
        fold(
            "All settings", table(f"Settings of {folder.parent.name}/{folder.name}", ["key", "value"], pairs, "config")
        ),
    )


def shown_settings(settings: Tree) -> Tree:
    """The options that differ from their defaults or are always shown: the command's own first, then those of drawing
    from a prior, and the step of the weights."""
    defaults = CompleteConfig().tree()  # which has all options that decide pictures, those of generate.py too
    always = {CompleteConfig.model_fields[name].alias or name for name in facts_of(CompleteConfig, AlwaysShown)}
    given = [key for key in sorted(defaults, key=SamplingConfig.model_fields.__contains__) if key not in NOT_COMPARED]
    shown = {key: settings.get(key) for key in given if key in always or settings.get(key) != defaults[key]}
    return {key: value for key, value in {**shown, "step": settings.get("step")}.items() if value is not None}


def _shortened(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shortened(each)}" for key, each in islice(value.items(), 20) if each)[:LONGEST]
    if isinstance(value, list):
        more = ", ..." if len(value) > 12 else ""
        return (", ".join(_shortened(each) for each in value[:12]) + more)[:LONGEST]
    return str(value)[:LONGEST]


def _show_images(folder: Path, settings: Tree, done: str) -> Child:
    """The grid, or of very many pictures the first ones."""
    named = folder.rglob("*.png") if "files" in settings else folder.glob("[0-9]*.png")
    files = [path for path in islice(sorted(named), LARGEST_GRID + 1) if "files" in settings or "-" not in path.stem]
    whole = folder / "grid.png"
    if whole.is_file() and len(files) <= LARGEST_GRID:
        picture = read(whole)
        what = f"{done}: {_describe_grid(settings)}"
    elif files:
        pictures = [read(path) for path in files[:MOST_FILES]]
        side = max(1, min(16, LARGEST_SIDE // (pictures[0].shape[1] + 2)))
        columns = min(side, max(1, round(len(pictures) ** 0.5)))
        picture = rows_of([pictures[start : start + columns] for start in range(0, len(pictures), columns)])
        what = f"{done}: the first {plural(len(pictures), 'picture')}"
    else:
        return notice("There are no pictures in it.")
    return tag("figure", grid(picture, f"{what}, from {folder.parent.name}/{folder.name}"))


def _describe_grid(settings: Tree) -> str:
    if "variants" in settings:
        return "in each row an original, what was kept of it, and completions"
    return f"{_shortened(settings.get('n', 'some'))} pictures"


def show_evaluations(folder: Path) -> Child:
    """The newest results, and with those of samples the training pictures that are nearest to them."""
    files = sorted(folder.glob("*.json"), key=_modified_at, reverse=True)
    parts: list[Child] = []
    for path in files[:NEWEST]:
        tree = json_file(path)
        parts.append(tag("h3", path.stem) if len(files) > 1 else None)
        parts.append(notice(tree) if isinstance(tree, str) else show_evaluation(tree, path.stem))
        nearest = path.with_name(f"{path.stem}-nearest.png")
        if nearest.is_file():
            words = (
                "The samples that are nearest to training pictures, by pixels on the left and by features on the "
                "right, each with its three nearest: what looks like a copy would be one."
            )
            parts += [
                tag("h4", "Nearest training pictures"),
                tag("p", words),
                or_notice(partial(_show_nearest, nearest)),
            ]
    if len(files) > NEWEST:
        parts.append(notice(f"And {plural(len(files) - NEWEST, 'older file')}."))
    return join(parts) if files else notice("The folder evaluation/ has no results.")


def _modified_at(path: Path) -> float:
    """When; a link that leads nowhere counts as the newest, so that it is named."""
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


def _show_nearest(path: Path) -> Markup:
    return grid(read(path), "Samples beside their nearest training pictures")


def show_evaluation(tree: Tree, name: str) -> Markup:
    """Figures with their intervals, the protocol, and what to beware of."""
    figures = tree.get("figures")
    rows = [_metric_row(each) for each in (figures if isinstance(figures, list) else [])[:MOST_FIGURES]]
    known = [row for row in rows if row]
    parts: list[Child] = [
        tag("p", tag("strong", "Beware: "), str(words)[:LONGEST_NOTE], class_="warning")
        for words in _as_list(tree.get("warnings"))
    ]
    if known:
        head = ["figure", "value and 95 % interval", "better", "what it is"]
        parts.append(table(f"Figures of the evaluation {name}", head, known, "measured", hide=True))
    if len(known) < len(rows) or not rows:
        parts.append(notice("Some of its figures cannot be read." if known else "It has no figures that can be read."))
    protocol = tree.get("protocol")
    if isinstance(protocol, dict) and protocol:
        facts: list[tuple[Child, Child]] = [
            (str(key)[:60].replace("_", " "), _shortened(value)) for key, value in islice(protocol.items(), 60)
        ]
        parts.append(fold("Protocol", description_list(facts)))
    return join(parts)


def _as_list(value: Any) -> Iterable[Any]:
    return value[:20] if isinstance(value, list) else []


def _metric_row(entry: Any) -> list[Child] | None:
    """A row of the table; None where the entry is none."""
    if not isinstance(entry, dict):
        return None
    value = entry.get("value")
    if not _is_number(value):
        return None
    low, high = entry.get("low"), entry.get("high")
    interval = f"{format_number(low)} to {format_number(high)}" if _is_number(low) and _is_number(high) else ""
    unit = str(entry.get("unit") or "")[:40]
    better = entry.get("better") if entry.get("better") in ("lower", "higher") else ""
    label = str(entry.get("label") or entry.get("name") or "?")[:LONGEST]
    number = tag("strong", f"{format_number(value)} {unit}".rstrip(), class_="nowrap")
    shown = join(number, tag("br"), tag("span", interval, class_="small nowrap"))
    return [label, shown, better, str(entry.get("note") or "")[:LONGEST_NOTE]]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
