"""The page about a prior's run: its sections, on the machinery of stage1_tokenizer/diagnostics."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from stage1_tokenizer.config.base import Tree, config_from_json
from stage1_tokenizer.diagnostics.report.charts import Chart, Series
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, join, listed, percent, plain, tag
from stage1_tokenizer.diagnostics.report.page import TROUBLE, Section, attempt, note, render
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import (
    Meaning,
    command_of,
    data_facts,
    footer_of,
    happened,
    head_of,
    readings,
    show_figures,
    what_was_run,
)  # fmt: skip
from stage1_tokenizer.diagnostics.report.tokenizer import describe
from stage1_tokenizer.diagnostics.views import atlas, tokens
from stage1_tokenizer.diagnostics.views.base import Subject, measured_of
from stage1_tokenizer.diagnostics.views.curves import VALIDATION, pair, show_charts
from stage1_tokenizer.diagnostics.views.reconstructions import over_training, triple
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.engine.model_files import read_data_tree, read_step
from stage2_prior.best_weights import BEST_BY
from stage2_prior.prior import PRIOR_FILE, PriorHeader

METRICS = {
    "validation/bits_per_token": Meaning(
        "Bits per token", "What the prior needs on average for one code of a picture that it has not seen.", "lower"
    ),
    "validation/unigram_bits_per_token": Meaning(
        "Unigram", "What it would take knowing only how frequent each code is.", None, "bits"
    ),
    "validation/bigram_bits_per_token": Meaning(
        "Bigram", "What it would take knowing the code before, too. A prior has to be below this.", None, "bits"
    ),
    "validation/code_bits_per_dim": Meaning(
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
    command = command_of(run, "stage2_prior/train.py", " --tokenizer TOKENIZER")
    sections = [
        attempt("figures", "Figures", lambda: join(in_words(run), show_figures(run, METRICS))),
        *more,
        attempt("samples", "Samples over the training", lambda: _samples(run)),
        attempt("curves", "Curves", lambda: show_charts(run.curves, charts(run))),
        attempt("tokenizer", "Its tokenizer", lambda: _tokenizer(subject)),
        atlas.VIEW.section(subject),
        tokens.VIEW.section(subject),
        attempt("run", "What was run", lambda: what_was_run(run, facts_of(run), command)),
        attempt("alarms", "Alarms", lambda: happened(run)),
    ]
    return render(head_of(run, "Prior", "prior"), sections, footer_of(run))


def kind_of(run: RunFolder) -> Literal["tokenizer", "prior"]:
    """The stage of a run, by the weights in its folder or by its configuration."""
    is_prior = (run.path / PRIOR_FILE).exists() or isinstance(run.config.get("prior"), dict)
    return "prior" if is_prior else "tokenizer"


def in_words(run: RunFolder) -> Markup | None:
    """The prior beside the two simplest models."""
    found = {each.name.partition("/")[2]: each.value for each in readings(run.curves, METRICS)}
    bits = found.get("bits_per_token")
    if bits is None:
        return None
    words = [f"The prior needs {plain(bits)} bits for a code."]
    for name, knows in (("unigram", "how frequent each code is"), ("bigram", "the code before")):
        other = found.get(f"{name}_bits_per_token")
        if other is not None and other > 0:
            apart = 1 - bits / other
            less = f"{percent(apart)} less" if apart >= 0 else f"{percent(-apart)} more"
            words.append(f"That is {less} than a model that knows only {knows} ({name}, {plain(other)} bits).")
    bigram = found.get("bigram_bits_per_token")
    if bigram is not None and bits > bigram:
        words.append("It is worse than a bigram: it has not learned yet what pictures look like.")
    return tag("p", " ".join(words))


def charts(run: RunFolder) -> list[Chart]:
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


def facts_of(run: RunFolder) -> list[tuple[Child, Child]]:
    """What a prior is, in a few lines."""
    config = run.config
    facts: list[tuple[Child, Child]] = [("Prior", run.text("prior", "kind"))]
    try:
        described = described_prior(run.path / PRIOR_FILE)
    except TROUBLE as error:
        if isinstance(data := config.get("data"), dict):
            facts.append(("Data", data_facts(data)))
        facts.append(("Weights", f"cannot be read: {error}" if (run.path / PRIOR_FILE).exists() else "not written yet"))
    else:
        header = described.header
        h, w, K, V = header.shape
        facts += [("Data", data_facts(described.data)), ("Parameters", f"{described.parameters:,}")]
        facts.append(("Sequence", f"{h * w * K:,} tokens out of {V:,}"))
        names = ", ".join(header.classes[:12]) + (", ..." if len(header.classes) > 12 else "")
        facts.append(("Classes", f"{len(header.classes):,}: {shorten(names)}" if header.classes else "none"))
        facts.append(("Tokenizer", header.tokenizer))
        chosen = "the best on validation" if described.is_best else "the last"
        facts.append(("Weights", f"of step {described.step:,}, {chosen}"))
    if isinstance(prior := config.get("prior"), dict):
        sizes = [f"{key} {prior[key]}" for key in ("layers", "width", "heads") if key in prior]
        facts.append(("Size", ", ".join(sizes)))
    facts += [("Batch size", run.text("batch_size")), ("Learning rate", run.text("optim", "lr"))]
    return facts


class Described(NamedTuple):
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


def described_prior(file: Path) -> Described:
    """What a prior's file says of it; the weights stay on disk.

    Raises:
        BadFileError: it is damaged, or not there.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            sizes = [math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadFileError(f"{file}: {shorten(error)}") from None
    header = config_from_json(PriorHeader, metadata.get("config"), str(file))
    data, step = read_data_tree(metadata, str(file)), read_step(metadata, str(file))
    return Described(header, data, sum(sizes), step, BEST_BY in metadata)


def _samples(run: RunFolder) -> Child:
    strips = over_training(run, "samples", "Samples")
    if strips is None:
        return note("There are none: the training has not come to a validation yet, or samples was 0.")
    words = [
        "Sampled at the validations without any filter or guidance, from the same random numbers each time. What "
        "changes is what the prior has learned."
    ]
    try:
        classes = len(described_prior(run.path / PRIOR_FILE).header.classes)
    except TROUBLE:  # the section on what was run says so
        classes = 0
    if classes > 1:
        columns = "each column is of one class" if COLUMNS % classes == 0 else "row by row, the classes take turns"
        words.append(f" In reading order the classes are drawn in turn: {columns}.")
    return join(tag("p", words), strips)


def _tokenizer(subject: Subject) -> Markup:
    """The limit of what the prior can draw."""
    measured = measured_of(subject)
    loaded, psnr = measured.loaded, measured.psnr
    facts: list[tuple[Child, Child]] = [
        ("Kind", f"{loaded.tokenizer.config.bottleneck.kind}, trained for {loaded.step:,} steps"),
        ("Latent", describe(measured)),
        ("PSNR", f"{float(psnr.mean()):.2f} dB on {measured.pictures}"),
        ("Fingerprint", loaded.fingerprint),
    ]
    shown = [triple(measured, place, f"{psnr[place]:.2f} dB") for place in measured.spread(LIMITS)]
    return join(
        tag("p", "Samples are drawn by this tokenizer's decoder, and can be no better than its reconstructions: "
            "original, reconstruction, error."),
        listed(facts),
        tag("div", shown, class_="triples"),
    )  # fmt: skip
