"""The report page of a prior's run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from stage1_tokenizer.config.base import Tree, config_from_json
from stage1_tokenizer.diagnostics.report import run_sections
from stage1_tokenizer.diagnostics.report.charts import Chart, Series
from stage1_tokenizer.diagnostics.report.markup import (
    Child,
    Markup,
    description_list,
    format_number,
    format_percent,
    join,
    tag,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, Section, notice, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import MetricInfo
from stage1_tokenizer.diagnostics.report.tokenizer import describe_latent
from stage1_tokenizer.diagnostics.views import atlas, tokens
from stage1_tokenizer.diagnostics.views.base import Subject, encoded_images
from stage1_tokenizer.diagnostics.views.curves import VALIDATION, pair, show_charts
from stage1_tokenizer.diagnostics.views.reconstructions import over_training, triple
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.engine.model_files import read_data_tree, read_step
from stage2_prior.best_weights import BEST_BY
from stage2_prior.prior import PRIOR_FILE, PriorHeader

PRIOR_METRICS = {
    "validation/bits_per_token": MetricInfo(
        "Bits per token", "Average number of bits that the prior needs for one code of a new image.", "lower"
    ),
    "validation/unigram_bits_per_token": MetricInfo(
        "Unigram", "Bits per token of a model that knows only how frequent each code is.", None, "bits"
    ),
    "validation/bigram_bits_per_token": MetricInfo(
        "Bigram", "Bits per token of a model that knows also the previous code. A prior must be below this.", None,
        "bits",
    ),
    "validation/code_bits_per_dim": MetricInfo(
        "Code bits per dimension", "Bits of an image's codes divided by its number of colour values; not a likelihood "
        "of pixels.", "lower", digits=3,
    ),
}  # fmt: skip
"""The metrics of a prior in the order of the page."""
COLUMNS = 10
"""Columns in the grids of samples."""
RECONSTRUCTIONS = 4
"""Reconstructions that show the best quality that the tokenizer allows."""


def prior_page(run: RunFolder, device: torch.device, root: str | None = None, more: Sequence[Section] = ()) -> str:
    """Return the page of a prior's run. `more`: sections on samples and evaluations that were made with it."""
    run = RunFolder(run.path, PRIOR_FILE)
    subject = Subject(run, device, root)
    command = run_sections.start_command(run, "stage2_prior/train.py", " --tokenizer TOKENIZER")
    sections = [
        try_section("figures", "Metrics", lambda: _show_metrics(run)),
        *more,
        try_section("samples", "Samples during the training", lambda: _show_samples(run)),
        try_section("curves", "Curves", lambda: show_charts(run.curves, prior_charts(run))),
        try_section("tokenizer", "Its tokenizer", lambda: _show_tokenizer(subject)),
        atlas.VIEW.section(subject),
        tokens.VIEW.section(subject),
    ]
    return run_sections.render_run(run, "prior", sections, lambda: prior_facts(run), command)


def run_kind(run: RunFolder) -> Literal["tokenizer", "prior"]:
    """Return what a run trains, by the weights in its folder or by its configuration."""
    is_prior = (run.path / PRIOR_FILE).exists() or isinstance(run.config.get("prior"), dict)
    return "prior" if is_prior else "tokenizer"


def describe_bits(run: RunFolder) -> Markup | None:
    """Compare the prior's bits per token with the two simplest models, in words; None before the first validation."""
    metrics = run_sections.metric_values(run.curves, PRIOR_METRICS)
    values = {metric.name.partition("/")[2]: metric.value for metric in metrics}
    bits = values.get("bits_per_token")
    if bits is None:
        return None
    words = [f"The prior needs {format_number(bits)} bits for a code."]
    for name, knowledge in (("unigram", "how frequent each code is"), ("bigram", "the code before")):
        other = values.get(f"{name}_bits_per_token")
        if other is not None and other > 0:
            saved = 1 - bits / other
            less = f"{format_percent(saved)} less" if saved >= 0 else f"{format_percent(-saved)} more"
            words.append(
                f"That is {less} than a model that knows only {knowledge} ({name}, {format_number(other)} bits)."
            )
    bigram = values.get("bigram_bits_per_token")
    if bigram is not None and bits > bigram:
        words.append("It is worse than the bigram model, so it has not yet learned how codes depend on each other.")
    return tag("p", " ".join(words))


def prior_charts(run: RunFolder) -> list[Chart]:
    """Return the charts of a prior: bits per token beside the simplest models, speed, gradient and learning rate."""
    curves = run.curves
    bits = pair(curves, "bits_per_token", "Bits per token", "bits for a code, lower is better")
    simple_models = [
        Series(f"{name}, validation", curves[f"validation/{name}_bits_per_token"], colour=colour)
        for colour, name in enumerate(("unigram", "bigram"), start=VALIDATION + 1)
        if f"validation/{name}_bits_per_token" in curves
    ]
    return [
        Chart(bits.title, bits.unit, [*bits.series, *simple_models]),
        pair(curves, "images_per_second", "Speed", "images a second", from_zero=True),
        pair(curves, "gradient_norm", "Norm of the gradient", "before clipping", log=True),
        pair(curves, "lr", "Learning rate", "", from_zero=True),
    ]


def prior_facts(run: RunFolder) -> list[tuple[Child, Child]]:
    """Return names and values that describe the prior and its training."""
    config = run.config
    facts: list[tuple[Child, Child]] = [("Prior", run.config_text("prior", "kind"))]
    try:
        prior = inspect_prior(run.path / PRIOR_FILE)
    except EXPECTED_ERRORS as error:
        if isinstance(data := config.get("data"), dict):
            facts.append(("Data", run_sections.describe_data(data)))
        facts.append(("Weights", f"cannot be read: {error}" if (run.path / PRIOR_FILE).exists() else "not written yet"))
    else:
        h, w, K, V = prior.header.shape
        facts += [("Data", run_sections.describe_data(prior.data)), ("Parameters", f"{prior.parameters:,}")]
        facts.append(("Sequence", f"{h * w * K:,} tokens out of {V:,}"))
        classes = prior.header.classes
        facts.append(("Classes", run_sections.describe_classes(classes) if classes else "none"))
        facts.append(("Tokenizer", prior.header.tokenizer))
        chosen = "the best on validation" if prior.is_best else "the last"
        facts.append(("Weights", f"of step {prior.step:,}, {chosen}"))
    if isinstance(sizes := config.get("prior"), dict):
        words = [f"{key} {sizes[key]}" for key in ("layers", "width", "heads") if key in sizes]
        facts.append(("Size", ", ".join(words)))
    facts += [("Batch size", run.config_text("batch_size")), ("Learning rate", run.config_text("optim", "lr"))]
    return facts


class PriorFile(NamedTuple):
    """The facts in the header of a prior's weights file."""

    header: PriorHeader
    data: Tree
    """Config of the data whose codes the prior models: its own data, or those of its tokenizer."""
    parameters: int
    """Number of parameters."""
    step: int
    """Optimizer steps that the weights have learned from."""
    is_best: bool
    """True if validation chose the weights; False: they are the last ones, as former versions wrote them."""


def inspect_prior(file: Path) -> PriorFile:
    """Read the header of a prior's weights file, without loading the weights.

    Raises:
        BadFileError: the file is damaged or missing.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            sizes = [math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadFileError(f"{file}: {shorten(error)}") from None
    header = config_from_json(PriorHeader, metadata.get("config"), str(file))
    data, step = read_data_tree(metadata, str(file)), read_step(metadata, str(file))
    return PriorFile(header, data, sum(sizes), step, BEST_BY in metadata)


def _show_metrics(run: RunFolder) -> Child:
    return join(describe_bits(run), run_sections.show_metrics(run, PRIOR_METRICS))


def _show_samples(run: RunFolder) -> Child:
    strips = over_training(run, "samples", "Samples")
    if strips is None:
        return notice("There are no samples: there was no validation yet, or --samples was 0.")
    words = [
        "Sampled at the validations without any filter or guidance, each time from the same random numbers, so what "
        "changes is the prior."
    ]
    try:
        classes = len(inspect_prior(run.path / PRIOR_FILE).header.classes)
    except EXPECTED_ERRORS:  # the section on what was run shows the reason
        classes = 0
    if classes > 1:
        columns = "each column has one class" if COLUMNS % classes == 0 else "row by row, the classes take turns"
        words.append(f" The classes are in turn: {columns}.")
    return join(tag("p", words), strips)


def _show_tokenizer(subject: Subject) -> Markup:
    """Return the tokenizer's quality, which limits that of the prior's samples."""
    encoded = encoded_images(subject)
    loaded, psnr = encoded.loaded, encoded.psnr
    facts: list[tuple[Child, Child]] = [
        ("Kind", f"{loaded.tokenizer.config.bottleneck.kind}, trained for {loaded.step:,} steps"),
        ("Latent", describe_latent(encoded)),
        ("PSNR", f"{float(psnr.mean()):.2f} dB on {encoded.description}"),
        ("Fingerprint", loaded.fingerprint),
    ]
    indices = encoded.spaced_indices(RECONSTRUCTIONS)
    triples = [triple(encoded, index, f"{psnr[index]:.2f} dB") for index in indices]
    words = (
        "This tokenizer decodes the samples, so they can be no better than its reconstructions: original, "
        "reconstruction, error."
    )
    return join(tag("p", words), description_list(facts), tag("div", triples, class_="triples"))
