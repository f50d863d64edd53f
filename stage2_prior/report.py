"""The page about a prior's run: its sections, on the machinery of stage1_tokenizer/diagnostics."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from stage1_tokenizer.config.base import Tree, config_from_json
from stage1_tokenizer.diagnostics.report.charts import Chart, Series
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    Markup,
    description_list,
    format_number,
    format_percent,
    join,
    tag,
)
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, Section, notice, render_page, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import (
    MetricInfo,
    describe_data,
    metric_values,
    page_footer,
    page_head,
    show_events,
    show_metrics,
    show_run,
    start_command,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.tokenizer import describe_latent
from stage1_tokenizer.diagnostics.views import atlas, tokens
from stage1_tokenizer.diagnostics.views.base import Subject, encoded_images
from stage1_tokenizer.diagnostics.views.curves import VALIDATION, pair, show_charts
from stage1_tokenizer.diagnostics.views.reconstructions import over_training, triple
from stage1_tokenizer.engine.checkpoint import brief
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.tokenizer import config_tree, saved_step
from stage2_prior.best import BEST_BY
from stage2_prior.prior import PRIOR_FILE, PriorHeader

PRIOR_METRICS = {
    "validation/bits_per_token": MetricInfo(
        "Bits per token", "What the prior needs on average for one code of a picture that it has not seen.", "lower"
    ),
    "validation/unigram_bits_per_token": MetricInfo(
        "Unigram", "What it would take knowing only how frequent each code is.", None, "bits"
    ),
    "validation/bigram_bits_per_token": MetricInfo(
        "Bigram", "What it would take knowing the code before, too. A prior has to be below this.", None, "bits"
    ),
    "validation/code_bits_per_dim": MetricInfo(
        "Code bits per dimension", "Bits of a picture's codes for each of its colour values; not a likelihood of "
        "pixels.", "lower", digits=3,
    ),
}  # fmt: skip
COLUMNS = 10
"""Of the grids of samples."""
LIMITS = 4
"""Reconstructions that show what the tokenizer allows."""


def prior_page(run: RunFolder, device: torch.device, root: str | None = None, more: Sequence[Section] = ()) -> str:
    """The page; `more`: sections on what was made with the prior since."""
    run = RunFolder(run.path, PRIOR_FILE)
    subject = Subject(run, device, root)
    command = start_command(run, "stage2_prior/train.py", " --tokenizer TOKENIZER")
    sections = [
        try_section("figures", "Figures", lambda: join(describe_bits(run), show_metrics(run, PRIOR_METRICS))),
        *more,
        try_section("samples", "Samples over the training", lambda: _show_samples(run)),
        try_section("curves", "Curves", lambda: show_charts(run.curves, prior_charts(run))),
        try_section("tokenizer", "Its tokenizer", lambda: _show_tokenizer(subject)),
        atlas.VIEW.section(subject),
        tokens.VIEW.section(subject),
        try_section("run", "What was run", lambda: show_run(run, prior_facts(run), command)),
        try_section("alarms", "Alarms", lambda: show_events(run)),
    ]
    return render_page(page_head(run, "Prior", "prior"), sections, page_footer(run))


def run_kind(run: RunFolder) -> Literal["tokenizer", "prior"]:
    """The stage of a run, by the weights in its folder or by its configuration."""
    is_prior = (run.path / PRIOR_FILE).exists() or isinstance(run.config.get("prior"), dict)
    return "prior" if is_prior else "tokenizer"


def describe_bits(run: RunFolder) -> Markup | None:
    """The prior beside the two simplest models."""
    found = {each.name.partition("/")[2]: each.value for each in metric_values(run.curves, PRIOR_METRICS)}
    bits = found.get("bits_per_token")
    if bits is None:
        return None
    words = [f"The prior needs {format_number(bits)} bits for a code."]
    for name, knows in (("unigram", "how frequent each code is"), ("bigram", "the code before")):
        other = found.get(f"{name}_bits_per_token")
        if other is not None and other > 0:
            apart = 1 - bits / other
            less = f"{format_percent(apart)} less" if apart >= 0 else f"{format_percent(-apart)} more"
            words.append(f"That is {less} than a model that knows only {knows} ({name}, {format_number(other)} bits).")
    bigram = found.get("bigram_bits_per_token")
    if bigram is not None and bits > bigram:
        words.append("It is worse than a bigram: it has not learned yet what pictures look like.")
    return tag("p", " ".join(words))


def prior_charts(run: RunFolder) -> list[Chart]:
    """The likelihood, beside what simple models have, and what else was logged."""
    curves = run.curves
    bits = pair(curves, "bits_per_token", "Bits per token", "bits for a code, lower is better")
    levels = [
        Series(f"{name}, validation", curves[f"validation/{name}_bits_per_token"], colour=colour)
        for colour, name in enumerate(("unigram", "bigram"), start=VALIDATION + 1)
        if f"validation/{name}_bits_per_token" in curves
    ]
    return [
        Chart(bits.title, bits.unit, [*bits.series, *levels]),
        Chart("Speed", "pictures a second", _one(run, "train/images_per_second"), from_zero=True),
        Chart("Norm of the gradient", "before clipping", _one(run, "train/gradient_norm"), log=True),
        Chart("Learning rate", "", _one(run, "train/lr"), from_zero=True),
    ]


def _one(run: RunFolder, name: str) -> list[Series]:
    return [Series("training", run.curves[name])] if name in run.curves else []


def prior_facts(run: RunFolder) -> list[tuple[Child, Child]]:
    """What a prior is, in a few lines."""
    config = run.config
    facts: list[tuple[Child, Child]] = [("Prior", run.config_text("prior", "kind"))]
    try:
        described = inspect_prior(run.path / PRIOR_FILE)
    except EXPECTED_ERRORS as error:
        if isinstance(data := config.get("data"), dict):
            facts.append(("Data", describe_data(data)))
        facts.append(("Weights", f"cannot be read: {error}" if (run.path / PRIOR_FILE).exists() else "not written yet"))
    else:
        header = described.header
        h, w, K, V = header.shape
        facts += [("Data", describe_data(described.data)), ("Parameters", f"{described.parameters:,}")]
        facts.append(("Sequence", f"{h * w * K:,} tokens out of {V:,}"))
        names = ", ".join(header.classes[:12]) + (", ..." if len(header.classes) > 12 else "")
        facts.append(("Classes", f"{len(header.classes):,}: {brief(names)}" if header.classes else "none"))
        facts.append(("Tokenizer", header.tokenizer))
        chosen = "the best on validation" if described.is_best else "the last"
        facts.append(("Weights", f"of step {described.step:,}, {chosen}"))
    if isinstance(prior := config.get("prior"), dict):
        sizes = [f"{key} {prior[key]}" for key in ("layers", "width", "heads") if key in prior]
        facts.append(("Size", ", ".join(sizes)))
    facts += [("Batch size", run.config_text("batch_size")), ("Learning rate", run.config_text("optim", "lr"))]
    return facts


class PriorFile(NamedTuple):
    """What a prior's file says of it."""

    header: PriorHeader
    data: Tree
    """The data whose codes it models: its own, or those of its tokenizer."""
    parameters: int
    """Their number."""
    step: int
    """Optimizer steps that the weights have learned from."""
    is_best: bool
    """True if the weights were chosen by validation; False: the last ones, as earlier versions wrote them."""


def inspect_prior(file: Path) -> PriorFile:
    """What a prior's file says of it; the weights stay on disk.

    Raises:
        BadFileError: it is damaged, or not there.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            sizes = [math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadFileError(f"{file}: {brief(error)}") from None
    header = config_from_json(PriorHeader, metadata.get("config"), str(file))
    data, step = config_tree(metadata.get("data"), str(file)), saved_step(metadata, str(file))
    return PriorFile(header, data, sum(sizes), step, BEST_BY in metadata)


def _show_samples(run: RunFolder) -> Child:
    strips = over_training(run, "samples", "Samples")
    if strips is None:
        return notice("There are none: the training has not come to a validation yet, or samples was 0.")
    words = [
        "Sampled at the validations without any filter or guidance, from the same random numbers each time. What "
        "changes is what the prior has learned."
    ]
    try:
        classes = len(inspect_prior(run.path / PRIOR_FILE).header.classes)
    except EXPECTED_ERRORS:  # the section on what was run says so
        classes = 0
    if classes > 1:
        columns = "each column is of one class" if COLUMNS % classes == 0 else "row by row, the classes take turns"
        words.append(f" In reading order the classes are drawn in turn: {columns}.")
    return join(tag("p", words), strips)


def _show_tokenizer(subject: Subject) -> Markup:
    """The limit of what the prior can draw."""
    encoded = encoded_images(subject)
    loaded, psnr = encoded.loaded, encoded.psnr
    facts: list[tuple[Child, Child]] = [
        ("Kind", f"{loaded.tokenizer.config.bottleneck.kind}, trained for {loaded.step:,} steps"),
        ("Latent", describe_latent(encoded)),
        ("PSNR", f"{float(psnr.mean()):.2f} dB on {encoded.description}"),
        ("Fingerprint", loaded.fingerprint),
    ]
    shown = [triple(encoded, place, f"{psnr[place]:.2f} dB") for place in encoded.spaced_indices(LIMITS)]
    return join(
        tag("p", "Samples are drawn by this tokenizer's decoder, and can be no better than its reconstructions: "
            "original, reconstruction, error."),
        description_list(facts),
        tag("div", shown, class_="triples"),
    )  # fmt: skip
