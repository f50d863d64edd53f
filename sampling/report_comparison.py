"""Several runs on one page: their figures in a table, their curves in one chart, what differs, and their pictures."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from sampling.report_outputs import or_note
from stage1_tokenizer.report.charts import Chart, Series, draw
from stage1_tokenizer.report.markup import Child, Markup, join, table, tag
from stage1_tokenizer.report.meanings import TOKENIZER_FIGURES, Meaning, readings
from stage1_tokenizer.report.measured import Measured, measure
from stage1_tokenizer.report.numbers import plural
from stage1_tokenizer.report.page import TROUBLE, Head, attempt, note, render
from stage1_tokenizer.report.pictures import enlargement, fitted, grid, img, pixels, read
from stage1_tokenizer.report.run_folder import RunFolder
from stage1_tokenizer.report.what_was_run import setting
from stage2_prior.report import FIGURES

MEANINGS: dict[str, Meaning] = TOKENIZER_FIGURES | FIGURES
CURVES = {
    "validation/psnr": ("PSNR in validation", "dB, higher is better", False),
    "validation/nmse": ("NMSE in validation", "squared error over the data's variance", True),
    "validation/code_perplexity": ("Perplexity of the codes", "codes", False),
    "validation/bits_per_token": ("Bits per token in validation", "bits for a code, lower is better", False),
    "train/total": ("Loss in training", "weighted loss", True),
    "train/bits_per_token": ("Bits per token in training", "bits for a code", False),
}
ROWS = 6
"""Pictures that all runs reconstruct."""
MOST_DIFFERENCES = 200
NOT_COMPARED = {"config", "out", "report", "resume", "allow_changed"}


def comparison_page(runs: Sequence[RunFolder], device: torch.device, root: str | None) -> str:
    """The page."""
    names = names_of(runs)
    sections = [
        attempt("figures", "Figures", lambda: _figures(runs, names)),
        attempt("curves", "Curves", lambda: _curves(runs, names)),
        attempt("settings", "What differs", lambda: _settings(runs, names)),
        attempt("pictures", "Pictures", lambda: _pictures(runs, names, device, root)),
    ]
    lead = f"{plural(len(runs), 'run')} side by side."
    footer = f"Written by Tessera from {', '.join(names)}. Everything is in this file; it asks the network for nothing."
    return render(Head("Comparison", " and ".join(names) if len(names) < 4 else "Comparison", lead), sections, footer)


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names, with the folders above them where two are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else ["/".join(run.path.resolve().parts[-3:]) for run in runs]


def _figures(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    """A row for each figure that a run has."""
    of_runs = [{each.name: each for each in readings(run.curves, MEANINGS)} for run in runs]
    head = ["figure", *(f"{name} ({run.kind})" for name, run in zip(names, runs, strict=True))]
    alike = all(run.config.get("data") == runs[0].config.get("data") for run in runs)
    body = []
    for name, meaning in MEANINGS.items():
        values = [found[name].value if name in found else None for found in of_runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = {"higher": max(known), "lower": min(known), None: None}[meaning.better]
        tie = len(known) < 2 or len(set(known)) == 1 or not alike
        cells = [
            tag("td", meaning.shown(value) if value is not None else "\N{EN DASH}",
                class_="best" if value is not None and value == best and not tie else None)
            for value in values
        ]  # fmt: skip
        body.append(tag("tr", tag("th", meaning.label, scope="row"), cells))
    steps = [tag("td", f"{run.done:,}{f' of {run.steps:,}' if run.steps else ''}") for run in runs]
    body.append(tag("tr", tag("th", "Steps", scope="row"), steps))
    inner = tag(
        "table",
        tag("caption", "Figures of the last validation of each run", class_="unseen"),
        tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])),
        tag("tbody", body),
        class_="compare",
    )
    words = "Of the last validation of each run. The best is marked where the data are the same in all."
    return join(tag("p", words), tag("div", inner, class_="scroll", role="region", aria_label="Figures", tabindex="0"))


def _curves(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    charts = [
        Chart(
            title,
            unit,
            [
                Series(label, run.curves[name], dots=name.startswith("validation/"))
                for label, run in zip(names, runs, strict=True)
                if name in run.curves
            ],
            log=log,
        )
        for name, (title, unit, log) in CURVES.items()
    ]
    drawn = [figure for figure in map(draw, charts) if figure]
    return tag("div", drawn, class_="charts") if drawn else note("None of them has a log yet.")


def _settings(runs: Sequence[RunFolder], names: Sequence[str]) -> Child:
    """The keys of their configurations that are not the same in all; those of one stage with one another."""
    parts: list[Child] = []
    for kind in ("tokenizer", "prior"):
        flat = {name: dict(_flat(run.config)) for name, run in zip(names, runs, strict=True) if run.kind == kind}
        if len(flat) < 2:
            continue
        keys = [key for key in dict.fromkeys(key for tree in flat.values() for key in tree) if key not in NOT_COMPARED]
        rows = [
            [key, *(setting(tree[key]) if key in tree else "\N{EN DASH}" for tree in flat.values())] for key in keys
        ]
        rows = [row for row in rows if len(set(row[1:])) > 1][:MOST_DIFFERENCES]
        caption = f"Settings of the {kind}s that differ"
        parts.append(
            table(caption, ["key", *flat], rows, "config") if rows else note(f"The {kind}s have the same settings.")
        )
    return parts or note("They are of different stages, and have no settings to compare.")


def _flat(tree: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pictures(runs: Sequence[RunFolder], names: Sequence[str], device: torch.device, root: str | None) -> Child:
    parts: list[Child] = []
    tokenizers = [(name, run) for name, run in zip(names, runs, strict=True) if run.kind == "tokenizer"]
    priors = [(name, run) for name, run in zip(names, runs, strict=True) if run.kind == "prior"]
    if tokenizers:
        parts += [tag("h3", "Reconstructions"), _reconstructions(tokenizers, device, root)]
    if priors:
        parts += [tag("h3", "Samples at the end of the training"), _samples(priors)]
    return join(parts)


def _reconstructions(runs: Sequence[tuple[str, RunFolder]], device: torch.device, root: str | None) -> Child:
    """The same pictures through each tokenizer, where their data are the same; else each with its own."""
    measured: list[tuple[str, Measured]] = []
    troubles: list[Child] = []
    for name, run in runs:
        try:
            measured.append((name, measure(run.path, root, device)))
        except TROUBLE as error:
            troubles.append(note(f"{name}: {error}"))
    if not measured:
        return troubles
    first = measured[0][1]
    same = all(one.data.tree() == first.data.tree() and one.number == first.number for _, one in measured)
    columns = [_column("original", first, first.encoded.x, None)] if same else []
    for name, one in measured:
        columns += [] if same else [_column(f"{name}, original", one, one.encoded.x, None)]
        columns.append(_column(name, one, one.encoded.x_hat, float(one.psnr.mean())))
    words = "The same pictures through each of them." if same else "Their data differ, so each has its own pictures."
    return join(tag("p", words), tag("div", columns, class_="side"), troubles)


def _column(title: str, measured: Measured, images: torch.Tensor, psnr: float | None) -> Markup:
    places = measured.encoded.spread(ROWS)
    small = fitted(images[places], 128)
    scale = enlargement(max(small.shape[2:]), 80)
    shown = [img(pixels(image), f"{title}, picture {number}", scale) for number, image in enumerate(small, start=1)]
    how = f" {psnr:.2f} dB on {measured.pictures}" if psnr is not None else None
    return tag("figure", tag("figcaption", tag("strong", title), how), tag("div", shown, class_="grid-of"))


def _samples(runs: Sequence[tuple[str, RunFolder]]) -> Markup:
    def last(name: str, run: RunFolder) -> Child:
        found = run.pictures("samples")
        if not found:
            return note(f"{name} has none.")
        step, path = found[-1]
        picture = grid(read(path), f"Samples of {name} after {step:,} steps")
        caption = tag("figcaption", tag("strong", name), f" after {step:,} steps")
        return tag("figure", picture, caption, class_="strip")

    return tag("div", [or_note(partial(last, name, run)) for name, run in runs], class_="strips")
