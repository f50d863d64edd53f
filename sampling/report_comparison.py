"""The page that compares several runs: a table of metrics, curves in shared charts, different settings, and images."""

import json
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.report.charts import Chart, Series, chart_html
from stage1_tokenizer.diagnostics.report.embedded_images import enlargement, fitted, grid, img, pixels
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, join, table, tag
from stage1_tokenizer.diagnostics.report.page import (
    EXPECTED_ERRORS,
    PageHead,
    notice,
    or_notice,
    render_page,
    try_section,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import (
    MetricInfo,
    flat_items,
    format_setting,
    metric_values,
    page_footer,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.tokenizer import TOKENIZER_METRICS
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, encoded_images
from stage2_prior.prior import PRIOR_FILE
from stage2_prior.report import PRIOR_METRICS, inspect_prior, run_kind

COMPARED_METRICS: dict[str, MetricInfo] = TOKENIZER_METRICS | PRIOR_METRICS
CURVES = {
    "validation/psnr": ("PSNR in validation", "dB, higher is better", False),
    "validation/nmse": ("NMSE in validation", "squared error over the data's variance", True),
    "validation/perceptual": ("LPIPS in validation", "perceptual distance, lower is better", True),
    "validation/code_perplexity": ("Perplexity of the codes", "codes", False),
    "validation/bits_per_token": ("Bits per token in validation", "bits for a code, lower is better", False),
    "train/total": ("Loss in training", "weighted loss", True),
    "train/bits_per_token": ("Bits per token in training", "bits for a code", False),
}
"""Title, unit and logarithmic axis of each chart, by the name of its scalar."""
ROWS = 6
"""Images that all runs reconstruct."""
MOST_DIFFERENCES = 200
CODEBOOK_METRICS = {"validation/code_usage", "validation/code_perplexity", "validation/bits_per_image"}
"""Metrics that can be compared only between codebooks of one size."""
NO_VALUE = "\N{EN DASH}"
NOT_COMPARED = {"config", "out", "report", "resume", "allow_changed"}
Runs = Mapping[str, RunFolder]
"""Runs by the names that tell them apart."""
Row = tuple[str, Sequence[tuple[str, bool]]]
"""A label, and for each run its text and True if it is the best."""


def comparison_page(folders: Sequence[RunFolder], device: torch.device, root: str | None) -> str:
    """Return the page that compares runs of either stage."""
    names = unique_names(folders)
    runs = dict(zip(names, folders, strict=True))
    sections = [
        try_section("figures", "Metrics", lambda: _show_metrics(runs)),
        try_section("curves", "Curves", lambda: _show_curves(runs)),
        try_section("settings", "What differs", lambda: _show_differences(runs)),
        try_section("pictures", "Images", lambda: _show_images(runs, device, root)),
    ]
    title = " and ".join(names) if len(names) < 4 else "Comparison"
    head = PageHead("Comparison", title, f"{format_count(len(runs), 'run')} side by side.")
    return render_page(head, sections, page_footer(", ".join(names)))


def unique_names(runs: Sequence[RunFolder]) -> list[str]:
    """Return the names of the runs' folders, with as many parent folders as are needed to tell them apart."""
    paths = [run.path.resolve().parts for run in runs]

    def name(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own) + 1)
        unique = (length for length in lengths if sum(path[-length:] == own[-length:] for path in paths) == 1)
        return "/".join(own[-next(unique, len(own)) :])

    return [name(own) for own in paths]


def measured_on(run: RunFolder) -> tuple[str, ...] | None:
    """Return the stage, tokenizer and data of a run's metrics: only equal ones can be compared. None: unknown."""
    if run_kind(run) == "tokenizer":
        data = run.config.get("data")
        return ("tokenizer", json.dumps(data, sort_keys=True)) if isinstance(data, dict) else None
    try:
        prior = inspect_prior(run.path / PRIOR_FILE)
    except EXPECTED_ERRORS:
        return None
    return ("prior", prior.header.tokenizer, json.dumps(prior.data, sort_keys=True))


def codebook_settings(run: RunFolder) -> tuple[str, ...]:
    """Return the settings that determine the number of codes."""
    return tuple(run.config_text("bottleneck", key) for key in ("codebook_size", "levels", "depth"))


def _of_kind(runs: Runs, kind: str) -> Runs:
    return {name: run for name, run in runs.items() if run_kind(run) == kind}


def _show_metrics(runs: Runs) -> Child:
    """Return the table of metrics, with the best value of a row marked where the runs can be compared."""
    all_values = [
        {metric.name: metric.value for metric in metric_values(run.curves, COMPARED_METRICS)} for run in runs.values()
    ]
    grounds = [measured_on(run) for run in runs.values()]
    codebooks = [codebook_settings(run) for run in runs.values()]
    rows: list[Row] = []
    for name, info in COMPARED_METRICS.items():
        values = [own.get(name) for own in all_values]
        known = {number: value for number, value in enumerate(values) if value is not None}
        if not known:
            continue
        best = {"higher": max(known.values()), "lower": min(known.values()), None: None}[info.better]
        known_grounds = {grounds[number] for number in known}
        is_comparable = len(known_grounds) == 1 and None not in known_grounds and len(set(known.values())) > 1
        if name in CODEBOOK_METRICS:
            is_comparable = is_comparable and len({codebooks[number] for number in known}) == 1
        cells = [
            (NO_VALUE, False) if value is None else (info.format(value), is_comparable and value == best)
            for value in values
        ]
        rows.append((info.label, cells))
    steps = [f"{run.steps_done:,}{f' of {run.planned_steps:,}' if run.planned_steps else ''}" for run in runs.values()]
    rows.append(("Steps", [(text, False) for text in steps]))
    words = (
        "From the last validation of each run. The best value is marked where runs can be compared: tokenizers on the "
        "same data (for metrics of code use, with codebooks of one size), and priors over the codes of one tokenizer "
        "and the same data."
    )
    head = ["metric", *(f"{name} ({run_kind(run)})" for name, run in runs.items())]
    caption = "Metrics of the last validation of each run"
    return join(tag("p", words), _side_by_side(caption, head, list(runs), rows, "compare", hide=True))


def _side_by_side(
    caption: str, head: Sequence[str], names: Sequence[str], rows: Sequence[Row], class_: str, hide: bool = False
) -> Markup:
    """Return a table with a column for each run; a narrow screen shows each cell on a line with the run's name."""
    body = [
        [label, *(tag("td", text, class_="best" if is_best else None, data_run=name)
                  for name, (text, is_best) in zip(names, cells, strict=True))]
        for label, cells in rows
    ]  # fmt: skip
    return table(caption, head, body, f"{class_} stacked", hide)


def _show_curves(runs: Runs) -> Child:
    charts = []
    for scalar, (title, unit, log) in CURVES.items():
        series = [
            Series(name, run.curves[scalar], dots=scalar.startswith("validation/"), colour=number)
            for number, (name, run) in enumerate(runs.items())
            if scalar in run.curves
        ]
        charts.append(chart_html(Chart(title, unit, series, log=log)))
    return tag("div", charts, class_="charts") if any(charts) else notice("None of them has a log yet.")


def _show_differences(runs: Runs) -> Child:
    """Return a table of the settings that differ, for each stage of which there are several runs."""
    parts: list[Child] = []
    for kind in ("tokenizer", "prior"):
        configs = {name: dict(flat_items(run.config)) for name, run in _of_kind(runs, kind).items()}
        if len(configs) < 2:
            continue
        rows: list[Row] = []
        for key in dict.fromkeys(key for tree in configs.values() for key in tree if key not in NOT_COMPARED):
            values = [format_setting(tree[key]) if key in tree else NO_VALUE for tree in configs.values()]
            if len(set(values)) > 1:
                rows.append((key, [(value, False) for value in values]))
        caption = f"Settings of the {kind}s that differ"
        parts.append(
            _side_by_side(caption, ["key", *configs], list(configs), rows[:MOST_DIFFERENCES], "config")
            if rows
            else notice(f"The {kind}s have the same settings.")
        )
    return parts or notice("They are of different stages, and have no settings to compare.")


def _show_images(runs: Runs, device: torch.device, root: str | None) -> Child:
    parts: list[Child] = []
    if tokenizers := _of_kind(runs, "tokenizer"):
        parts += [tag("h3", "Reconstructions"), _show_reconstructions(tokenizers, device, root)]
    if priors := _of_kind(runs, "prior"):
        samples = [or_notice(partial(_show_last_samples, name, run)) for name, run in priors.items()]
        parts += [tag("h3", "Samples at the end of the training"), tag("div", samples, class_="strips")]
    return join(parts)


def _show_reconstructions(runs: Runs, device: torch.device, root: str | None) -> Child:
    """Return reconstructions of the same images by each tokenizer; of different images if their data differ."""
    encoded: dict[str, EncodedImages] = {}
    notices: list[Child] = []
    for name, run in runs.items():
        try:
            encoded[name] = encoded_images(Subject(run, device, root))
        except EXPECTED_ERRORS as error:
            notices.append(notice(f"{name}: {error}"))
    if not encoded:
        return notices
    first = next(iter(encoded.values()))
    is_same = all(own.data.tree() == first.data.tree() and own.count == first.count for own in encoded.values())
    columns = [_column("original", first, first.x, None)] if is_same else []
    for name, own in encoded.items():
        columns += [] if is_same else [_column(f"{name}, original", own, own.x, None)]
        columns.append(_column(name, own, own.x_hat, float(own.psnr.mean())))
    same, different = (
        "The same images, reconstructed by each tokenizer.",
        "Each tokenizer shows images of its own data.",
    )
    return join(tag("p", same if is_same else different), tag("div", columns, class_="side"), notices)


def _column(title: str, encoded: EncodedImages, images: torch.Tensor, psnr: float | None) -> Markup:
    small = fitted(images[encoded.spaced_indices(ROWS)], 128)
    scale = enlargement(max(small.shape[2:]), 80)
    shown = [img(pixels(image), f"{title}, image {number}", scale) for number, image in enumerate(small, start=1)]
    quality = f" {psnr:.2f} dB on {encoded.description}" if psnr is not None else None
    return tag("figure", tag("figcaption", tag("strong", title), quality), tag("div", shown, class_="grid-of"))


def _show_last_samples(name: str, run: RunFolder) -> Child:
    samples = run.logged_images("samples")
    if not samples:
        return notice(f"{name} has no samples.")
    step, path = samples[-1]
    image = grid(read_image(path, 3), f"Samples of {name} after {step:,} steps")
    return tag("figure", image, tag("figcaption", tag("strong", name), f" after {step:,} steps"), class_="strip")
