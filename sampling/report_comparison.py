"""Several runs on one page: their figures in a table, their curves in one chart, what differs, and their pictures."""

import json
from collections.abc import Sequence
from functools import partial

import torch

from stage1_tokenizer.diagnostics.report.charts import Chart, Series, chart_html
from stage1_tokenizer.diagnostics.report.embedded_images import enlargement, fitted, grid, img, pixels, read
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, join, plural, table, tag
from stage1_tokenizer.diagnostics.report.page import (
    EXPECTED_ERRORS,
    PageHead,
    notice,
    or_notice,
    render_page,
    try_section,
)
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import MetricInfo, flat_items, format_setting, metric_values
from stage1_tokenizer.diagnostics.report.tokenizer import TOKENIZER_METRICS
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, encoded_images
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.report import PRIOR_METRICS, inspect_prior, run_kind

METRICS: dict[str, MetricInfo] = TOKENIZER_METRICS | PRIOR_METRICS
CURVES = {
    "validation/psnr": ("PSNR in validation", "dB, higher is better", False),
    "validation/nmse": ("NMSE in validation", "squared error over the data's variance", True),
    "validation/perceptual": ("LPIPS in validation", "perceptual distance, lower is better", True),
    "validation/code_perplexity": ("Perplexity of the codes", "codes", False),
    "validation/bits_per_token": ("Bits per token in validation", "bits for a code, lower is better", False),
    "train/total": ("Loss in training", "weighted loss", True),
    "train/bits_per_token": ("Bits per token in training", "bits for a code", False),
}
ROWS = 6
"""Pictures that all runs reconstruct."""
MOST_DIFFERENCES = 200
CODEBOOK_METRICS = {"validation/code_usage", "validation/code_perplexity", "validation/bits_per_image"}
"""Figures that mean something else with another number of codes."""
NO_VALUE = "\N{EN DASH}"
NOT_COMPARED = {"config", "out", "report", "resume", "allow_changed"}


def comparison_page(runs: Sequence[RunFolder], device: torch.device, root: str | None) -> str:
    """The page."""
    names = names_of(runs)
    sections = [
        try_section("figures", "Figures", lambda: _show_metrics(runs, names)),
        try_section("curves", "Curves", lambda: _show_curves(runs, names)),
        try_section("settings", "What differs", lambda: _show_differences(runs, names)),
        try_section("pictures", "Pictures", lambda: _show_images(runs, names, device, root)),
    ]
    lead = f"{plural(len(runs), 'run')} side by side."
    footer = f"Written by Tessera from {', '.join(names)}. Everything is in this file; it asks the network for nothing."
    return render_page(
        PageHead("Comparison", " and ".join(names) if len(names) < 4 else "Comparison", lead), sections, footer
    )


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names, with as many of the folders above them as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]

    def name(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own) + 1)
        apart = (length for length in lengths if sum(each[-length:] == own[-length:] for each in parts) == 1)
        return "/".join(own[-next(apart, len(own)) :])

    return [name(own) for own in parts]


def ground_of(run: RunFolder) -> tuple[str, ...] | None:
    """What a run's figures were measured on: only where it is the same can one be better. None: it is not known."""
    if run_kind(run) == "tokenizer":
        data = run.config.get("data")
        return ("tokenizer", json.dumps(data, sort_keys=True)) if isinstance(data, dict) else None
    try:
        described = inspect_prior(run.path / PRIOR_FILE)
    except EXPECTED_ERRORS:
        return None
    return ("prior", described.header.tokenizer, json.dumps(described.data, sort_keys=True))


def codebook_settings(run: RunFolder) -> tuple[str, ...]:
    """What decides how many codes there are."""
    return tuple(run.config_text("bottleneck", key) for key in ("codebook_size", "levels", "depth"))


def _show_metrics(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    """A row for each figure that a run has."""
    of_runs = [{each.name: each for each in metric_values(run.curves, METRICS)} for run in runs]
    grounds = [ground_of(run) for run in runs]
    head = ["figure", *(f"{name} ({run_kind(run)})" for name, run in zip(names, runs, strict=True))]
    rows: list[tuple[str, list[tuple[str, bool]]]] = []
    for name, meaning in METRICS.items():
        values = [found[name].value if name in found else None for found in of_runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = {"higher": max(known), "lower": min(known), None: None}[meaning.better]
        having = [place for place, value in enumerate(values) if value is not None]
        alike = len({grounds[place] for place in having}) == 1 and grounds[having[0]] is not None
        if name in CODEBOOK_METRICS:
            alike = alike and len({codebook_settings(runs[place]) for place in having}) == 1
        marked = alike and len(set(known)) > 1
        shown = [
            (meaning.shown(value) if value is not None else NO_VALUE, marked and value is not None and value == best)
            for value in values
        ]
        rows.append((meaning.label, shown))
    steps = [f"{run.steps_done:,}{f' of {run.planned_steps:,}' if run.planned_steps else ''}" for run in runs]
    rows.append(("Steps", [(text, False) for text in steps]))
    words = (
        "Of the last validation of each run. The best is marked where figures can be compared: those of tokenizers on "
        "the same data (and, of the use of the codes, with as many codes), those of priors over the same tokenizer's "
        "codes of the same data."
    )
    caption = "Figures of the last validation of each run"
    return join(tag("p", words), _side_by_side(caption, head, names, rows, "compare", hide=True))


def _side_by_side(
    caption: str,
    head: Sequence[str],
    names: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[str, bool]]]],
    class_: str,
    hide: bool = False,
) -> Markup:
    """A table with a column for each run; on a narrow screen each cell stands on a line of its own, after the run's
    name. `rows`: a label, and for each run what it has and whether that is the best."""
    body = [
        [label, *(tag("td", text, class_="best" if best else None, data_run=name)
                  for name, (text, best) in zip(names, cells, strict=True))]
        for label, cells in rows
    ]  # fmt: skip
    return table(caption, head, body, f"{class_} stacked", hide)


def _show_curves(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    charts = [
        Chart(
            title,
            unit,
            [
                Series(label, run.curves[name], dots=name.startswith("validation/"), colour=number)
                for number, (label, run) in enumerate(zip(names, runs, strict=True))
                if name in run.curves
            ],
            log=log,
        )
        for name, (title, unit, log) in CURVES.items()
    ]
    drawn = [figure for figure in map(chart_html, charts) if figure]
    return tag("div", drawn, class_="charts") if drawn else notice("None of them has a log yet.")


def _show_differences(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    """The keys of their configurations that are not the same in all; those of one stage with one another."""
    parts: list[Child] = []
    for kind in ("tokenizer", "prior"):
        alike = [
            (name, dict(flat_items(run.config))) for name, run in zip(names, runs, strict=True) if run_kind(run) == kind
        ]
        if len(alike) < 2:
            continue
        keys = [key for key in dict.fromkeys(key for _, tree in alike for key in tree) if key not in NOT_COMPARED]
        rows = [(key, [format_setting(tree[key]) if key in tree else NO_VALUE for _, tree in alike]) for key in keys]
        differing = [(key, values) for key, values in rows if len(set(values)) > 1]
        shown = [(key, [(value, False) for value in values]) for key, values in differing[:MOST_DIFFERENCES]]
        those = [name for name, _ in alike]
        caption = f"Settings of the {kind}s that differ"
        parts.append(
            _side_by_side(caption, ["key", *those], those, shown, "config")
            if shown
            else notice(f"The {kind}s have the same settings.")
        )
    return parts or notice("They are of different stages, and have no settings to compare.")


def _show_images(runs: Sequence[RunFolder], names: Sequence[str], device: torch.device, root: str | None) -> Child:
    parts: list[Child] = []
    tokenizers = [(name, run) for name, run in zip(names, runs, strict=True) if run_kind(run) == "tokenizer"]
    priors = [(name, run) for name, run in zip(names, runs, strict=True) if run_kind(run) == "prior"]
    if tokenizers:
        parts += [tag("h3", "Reconstructions"), _show_reconstructions(tokenizers, device, root)]
    if priors:
        parts += [tag("h3", "Samples at the end of the training"), _show_samples(priors)]
    return join(parts)


def _show_reconstructions(runs: Sequence[tuple[str, RunFolder]], device: torch.device, root: str | None) -> Child:
    """The same pictures through each tokenizer, where their data are the same; else each with its own."""
    encoded: list[tuple[str, EncodedImages]] = []
    troubles: list[Child] = []
    for name, run in runs:
        try:
            encoded.append((name, encoded_images(Subject(run, device, root))))
        except EXPECTED_ERRORS as error:
            troubles.append(notice(f"{name}: {error}"))
    if not encoded:
        return troubles
    first = encoded[0][1]
    same = all(one.data.tree() == first.data.tree() and one.count == first.count for _, one in encoded)
    columns = [_column("original", first, first.x, None)] if same else []
    for name, one in encoded:
        columns += [] if same else [_column(f"{name}, original", one, one.x, None)]
        columns.append(_column(name, one, one.x_hat, float(one.psnr.mean())))
    words = "The same pictures through each of them." if same else "Their data differ, so each has its own pictures."
    return join(tag("p", words), tag("div", columns, class_="side"), troubles)


def _column(title: str, encoded: EncodedImages, images: torch.Tensor, psnr: float | None) -> Markup:
    places = encoded.spaced_indices(ROWS)
    small = fitted(images[places], 128)
    scale = enlargement(max(small.shape[2:]), 80)
    shown = [img(pixels(image), f"{title}, picture {number}", scale) for number, image in enumerate(small, start=1)]
    how = f" {psnr:.2f} dB on {encoded.description}" if psnr is not None else None
    return tag("figure", tag("figcaption", tag("strong", title), how), tag("div", shown, class_="grid-of"))


def _show_samples(runs: Sequence[tuple[str, RunFolder]]) -> Markup:
    def last(name: str, run: RunFolder) -> Child:
        found = run.logged_images("samples")
        if not found:
            return notice(f"{name} has none.")
        step, path = found[-1]
        picture = grid(read(path), f"Samples of {name} after {step:,} steps")
        caption = tag("figcaption", tag("strong", name), f" after {step:,} steps")
        return tag("figure", picture, caption, class_="strip")

    return tag("div", [or_notice(partial(last, name, run)) for name, run in runs], class_="strips")
