"""The report's sections on images and evaluations made with a run: generated, completed and reconstructed images.

    generated/NNN/, completed/NNN/, reconstructed/NNN/     settings.json, grid.png, images
    evaluation/NAME.json, NAME-nearest.png                 metrics with intervals, protocol, warnings

These files may come from anybody: a file that cannot be read is named, and the others are shown.
"""

import math
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from sampling.completion_source import CompleteConfig
from sampling.option_facts import AlwaysShown, facts_of_kind
from sampling.output import MAY_DIFFER, numbered_folders
from sampling.sampler import SamplingConfig
from sampling.saved_images import arrange_rows
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.yaml_and_json import LARGEST_JSON, parse_json
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.report.embedded_images import LARGEST_SIDE, grid
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    Markup,
    description_list,
    fold,
    format_number,
    join,
    table,
    tag,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.page import Section, notice, or_notice, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import format_setting
from stage1_tokenizer.engine.errors import shorten
from stage1_tokenizer.engine.model_files import find_name
from stage2_prior.report import run_kind

NEWEST = 3
"""Folders or evaluations of a kind that are shown."""
MOST_FILES = 64
"""Images of a folder that are shown if it has no grid, or too large a grid."""
LARGEST_GRID = 144
"""Images in a folder up to which its grid is shown; of a larger folder the first MOST_FILES images are shown."""
MOST_ENTRIES = 40
"""Metrics or warnings of an evaluation that are shown, at most."""
LONGEST, LONGEST_NOTE = 300, 1000
"""Characters of a value, and of a sentence, at most."""


def output_sections(run: RunFolder) -> list[Section]:
    """Return a section for each kind of output in the run's folder."""
    kinds = {"generated": "Generated", "completed": "Completed", "reconstructed": "Reconstructed"}
    sections = []
    for name, done in kinds.items():
        title, folders = f"{done} images", numbered_folders(run.outputs / name)
        if folders:
            sections.append(try_section(name, title, partial(_show_folders, folders, done)))
        elif name == "generated" and run_kind(run) == "prior":
            command = tag("code", f"python sampling/generate.py --prior {find_name(run.weights_file) or run.path}")
            sections.append(Section(name, title, notice("None yet; this command makes some: ", command)))
    if (run.outputs / "evaluation").is_dir():
        sections.append(try_section("evaluation", "Evaluation", lambda: show_evaluations(run.outputs / "evaluation")))
    return sections


def read_json(path: Path) -> Tree | str:
    """Return the object in a JSON file, or a sentence that says why it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        tree = parse_json(data.decode("utf-8"))
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{path.name} cannot be read: {shorten(error)}"
    return tree if isinstance(tree, dict) else f"{path.name} is no JSON object"


def _show_folders(folders: list[Path], done: str) -> Child:
    """Return settings and images of the newest folders."""
    parts: list[Child] = []
    for folder in folders[:NEWEST]:
        parts.append(tag("h3", f"{folder.parent.name}/{folder.name}"))
        settings = read_json(folder / "settings.json")
        if isinstance(settings, str):
            parts.append(notice(settings))
            settings = {}
        elif settings.get("finished") is False:
            parts.append(notice("Not finished; the same command makes the missing images."))
        parts += [_show_settings(folder, settings), or_notice(partial(_show_folder_images, folder, settings, done))]
    if len(folders) > NEWEST:
        parts.append(notice(f"And {format_count(len(folders) - NEWEST, 'older folder')}."))
    return join(parts)


def _show_settings(folder: Path, settings: Tree) -> Markup | None:
    """Return the settings that differ from their defaults, and all settings behind a fold."""
    facts = [(key.replace("_", " "), format_setting(value)) for key, value in shown_settings(settings).items()]
    if not facts:
        return None
    pairs = ((str(key)[:LONGEST], format_setting(value)) for key, value in islice(settings.items(), 100))
    all_settings = table(f"Settings of {folder.parent.name}/{folder.name}", ["key", "value"], pairs, "config")
    words = ", ".join(f"{key} {value}" for key, value in facts)
    return join(tag("p", words, class_="small"), fold("All settings", all_settings))


def shown_settings(settings: Tree) -> Tree:
    """Return the options that differ from their defaults or are always shown, and the step of the weights.

    The command's own options come first, then those of sampling from a prior.
    """
    defaults = CompleteConfig().tree()  # has all options that affect images, those of generate.py too
    always = {CompleteConfig.model_fields[name].alias or name for name in facts_of_kind(CompleteConfig, AlwaysShown)}
    given = [key for key in sorted(defaults, key=SamplingConfig.model_fields.__contains__) if key not in MAY_DIFFER]
    shown = {key: settings.get(key) for key in given if key in always or settings.get(key) != defaults[key]}
    return {key: value for key, value in {**shown, "step": settings.get("step")}.items() if value is not None}


def _show_folder_images(folder: Path, settings: Tree, done: str) -> Child:
    """Return the grid of a folder, or its first images if there are very many."""
    paths = folder.rglob("*.png") if "files" in settings else folder.glob("[0-9]*.png")
    files = [path for path in islice(sorted(paths), LARGEST_GRID + 1) if "files" in settings or "-" not in path.stem]
    if (folder / "grid.png").is_file() and len(files) <= LARGEST_GRID:
        image = read_image(folder / "grid.png", 3)
        what = f"{done}: {_describe_grid(settings)}"
    elif files:
        images = [read_image(path, 3) for path in files[:MOST_FILES]]
        room = max(1, min(16, LARGEST_SIDE // (images[0].shape[1] + 2)))
        columns = min(room, max(1, round(len(images) ** 0.5)))
        image = arrange_rows([images[start : start + columns] for start in range(0, len(images), columns)])
        what = f"{done}: the first {format_count(len(images), 'image')}"
    else:
        return notice("The folder has no images.")
    return tag("figure", grid(image, f"{what}, from {folder.parent.name}/{folder.name}"))


def _describe_grid(settings: Tree) -> str:
    if "variants" in settings:
        return "in each row an original, the part of it that was kept, and completions"
    return f"{format_setting(settings.get('n', 'some'))} images"


def show_evaluations(folder: Path) -> Child:
    """Return the newest evaluations, each with the training images nearest to the samples if there are any."""
    files = sorted(folder.glob("*.json"), key=_modified_at, reverse=True)
    parts: list[Child] = []
    for path in files[:NEWEST]:
        tree = read_json(path)
        parts.append(tag("h3", path.stem) if len(files) > 1 else None)
        parts.append(notice(tree) if isinstance(tree, str) else show_evaluation(tree, path.stem))
        nearest = path.with_name(f"{path.stem}-nearest.png")
        if nearest.is_file():
            words = (
                "The samples nearest to training images, by pixels on the left and by features on the right, each with "
                "its three nearest training images. A sample that looks like one of them is probably a copy."
            )
            parts += [tag("h4", "Nearest training images"), tag("p", words), or_notice(partial(_show_nearest, nearest))]
    if len(files) > NEWEST:
        parts.append(notice(f"And {format_count(len(files) - NEWEST, 'older file')}."))
    return join(parts) if files else notice("The folder evaluation/ has no results.")


def _modified_at(path: Path) -> float:
    """Return the time of the last change; a broken link counts as the newest, so that the page names it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


def _show_nearest(path: Path) -> Markup:
    return grid(read_image(path, 3), "Samples beside their nearest training images")


def show_evaluation(tree: Tree, name: str) -> Markup:
    """Return warnings, metrics with intervals, and protocol of one evaluation."""
    rows = [_metric_row(entry) for entry in _first_entries(tree.get("figures"))]
    readable = [row for row in rows if row]
    parts: list[Child] = [
        tag("p", tag("strong", "Beware: "), str(words)[:LONGEST_NOTE], class_="warning")
        for words in _first_entries(tree.get("warnings"))
    ]
    if readable:
        head = ["metric", "value and 95 % interval", "better", "meaning"]
        parts.append(table(f"Metrics of the evaluation {name}", head, readable, "measured", hide=True))
    if len(readable) < len(rows) or not rows:
        parts.append(notice("Some of its metrics cannot be read." if readable else "It has no readable metrics."))
    protocol = tree.get("protocol")
    if isinstance(protocol, dict) and protocol:
        facts: list[tuple[Child, Child]] = [
            (str(key)[:60].replace("_", " "), format_setting(value)) for key, value in islice(protocol.items(), 60)
        ]
        parts.append(fold("Protocol", description_list(facts)))
    return join(parts)


def _first_entries(value: Any) -> Iterable[Any]:
    return value[:MOST_ENTRIES] if isinstance(value, list) else []


def _metric_row(entry: Any) -> list[Child] | None:
    """Return a row of the table; None if the entry is no metric."""
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
