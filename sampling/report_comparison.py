"""The page that compares several runs: a table of metrics, curves in shared charts, different settings, and images."""

import json
from collections.abc import Sequence
from functools import partial

import torch

from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.record import plural
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
"""Title, unit and logarithmic axis of each chart, by the name of its scalar."""
ROWS = 6
"""Images that all runs reconstruct."""
MOST_DIFFERENCES = 200
CODEBOOK_METRICS = {"validation/code_usage", "validation/code_perplexity", "validation/bits_per_image"}
"""Metrics that can be compared only between codebooks of one size."""
NO_VALUE = "\N{EN DASH}"
NOT_COMPARED = {"config", "out", "report", "resume", "allow_changed"}


def comparison_page(runs: Sequence[RunFolder], device: torch.device, root: str | None) -> str:
    """Return the page that compares runs of either stage."""
    names = names_of(runs)
    sections = [
        try_section("figures", "Metrics", lambda: _show_metrics(runs, names)),
        try_section("curves", "Curves", lambda: _show_curves(runs, names)),
        try_section("settings", "What differs", lambda: _show_differences(runs, names)),
        try_section("pictures", "Images", lambda: _show_images(runs, names, device, root)),
    ]
    title = " and ".join(names) if len(names) < 4 else "Comparison"
    head = PageHead("Comparison", title, f"{plural(len(runs), 'run')} side by side.")
    return render_page(head, sections, page_footer(", ".join(names)))


def names_of(runs: Sequence[RunFolder]) -> list[str]:
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


def _show_metrics(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    """Return the table of metrics, with the best value of a row marked where the runs can be compared."""
    all_values = [{metric.name: metric.value for metric in metric_values(run.curves, METRICS)} for run in runs]
    grounds = [measured_on(run) for run in runs]
    head = ["metric", *(f"{name} ({run_kind(run)})" for name, run in zip(names, runs, strict=True))]
    rows: list[tuple[str, list[tuple[str, bool]]]] = []
    for name, info in METRICS.items():
        values = [own.get(name) for own in all_values]
        known = {number: value for number, value in enumerate(values) if value is not None}
        if not known:
            continue
        best = {"higher": max(known.values()), "lower": min(known.values()), None: None}[info.better]
        known_grounds = {grounds[number] for number in known}
        is_comparable = len(known_grounds) == 1 and None not in known_grounds and len(set(known.values())) > 1
        if name in CODEBOOK_METRICS:
            is_comparable = is_comparable and len({codebook_settings(runs[number]) for number in known}) == 1
        cells = [
            (NO_VALUE, False) if value is None else (info.format(value), is_comparable and value == best)
            for value in values
        ]
        rows.append((info.label, cells))
    steps = [f"{run.steps_done:,}{f' of {run.planned_steps:,}' if run.planned_steps else ''}" for run in runs]
    rows.append(("Steps", [(text, False) for text in steps]))
    words = (
        "From the last validation of each run. The best value is marked where runs can be compared: tokenizers on the "
        "same data (for metrics of code use, with codebooks of one size), and priors over the codes of one tokenizer "
        "and the same data."
    )
    caption = "Metrics of the last validation of each run"
    return join(tag("p", words), _side_by_side(caption, head, names, rows, "compare", hide=True))


def _side_by_side(
    caption: str,
    head: Sequence[str],
    names: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[str, bool]]]],
    class_: str,
    hide: bool = False,
) -> Markup:
    """Return a table with a column for each run; a narrow screen shows each cell on a line with the run's name.

    rows: a label, and for each run its text and True if it is the best.
    """
    body = [
        [label, *(tag("td", text, class_="best" if is_best else None, data_run=name)
                  for name, (text, is_best) in zip(names, cells, strict=True))]
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
    figures = [figure for figure in map(chart_html, charts) if figure]
    return tag("div", figures, class_="charts") if figures else notice("None of them has a log yet.")


def _show_differences(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    """Return a table of the settings that differ, for each stage of which there are several runs."""
    parts: list[Child] = []
    for kind in ("tokenizer", "prior"):
        configs = {
            name: dict(flat_items(run.config)) for name, run in zip(names, runs, strict=True) if run_kind(run) == kind
        }
        if len(configs) < 2:
            continue
        keys = [key for key in dict.fromkeys(key for tree in configs.values() for key in tree)
                if key not in NOT_COMPARED]  # fmt: skip
        rows = [
            (key, [format_setting(tree[key]) if key in tree else NO_VALUE for tree in configs.values()]) for key in keys
        ]
        differing = [(key, [(value, False) for value in values]) for key, values in rows if len(set(values)) > 1]
        caption = f"Settings of the {kind}s that differ"
        parts.append(
            _side_by_side(caption, ["key", *configs], list(configs), differing[:MOST_DIFFERENCES], "config")
            if differing
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
    """Return reconstructions of the same images by each tokenizer; of different images if their data differ."""
    all_encoded: list[tuple[str, EncodedImages]] = []
    notices: list[Child] = []
    for name, run in runs:
        try:
            all_encoded.append((name, encoded_images(Subject(run, device, root))))
        except EXPECTED_ERRORS as error:
            notices.append(notice(f"{name}: {error}"))
    if not all_encoded:
        return notices
    first = all_encoded[0][1]
    is_same = all(
        encoded.data.tree() == first.data.tree() and encoded.count == first.count for _, encoded in all_encoded
    )
    columns = [_column("original", first, first.x, None)] if is_same else []
    for name, encoded in all_encoded:
        columns += [] if is_same else [_column(f"{name}, original", encoded, encoded.x, None)]
        columns.append(_column(name, encoded, encoded.x_hat, float(encoded.psnr.mean())))
    words = (
        "The same images, reconstructed by each tokenizer."
        if is_same
        else "The tokenizers have different data, so each one shows its own images."
    )
    return join(tag("p", words), tag("div", columns, class_="side"), notices)


def _column(title: str, encoded: EncodedImages, images: torch.Tensor, psnr: float | None) -> Markup:
    small = fitted(images[encoded.spaced_indices(ROWS)], 128)
    scale = enlargement(max(small.shape[2:]), 80)
    shown = [img(pixels(image), f"{title}, image {number}", scale) for number, image in enumerate(small, start=1)]
    quality = f" {psnr:.2f} dB on {encoded.description}" if psnr is not None else None
    return tag("figure", tag("figcaption", tag("strong", title), quality), tag("div", shown, class_="grid-of"))


def _show_samples(runs: Sequence[tuple[str, RunFolder]]) -> Markup:
    def last(name: str, run: RunFolder) -> Child:
        samples = run.logged_images("samples")
        if not samples:
            return notice(f"{name} has no samples.")
        step, path = samples[-1]
        image = grid(read_image(path, 3), f"Samples of {name} after {step:,} steps")
        caption = tag("figcaption", tag("strong", name), f" after {step:,} steps")
        return tag("figure", image, caption, class_="strip")

    return tag("div", [or_notice(partial(last, name, run)) for name, run in runs], class_="strips")
