"""The page about a tokenizer's run."""

from collections.abc import Sequence

import torch

from stage1_tokenizer.diagnostics.report.markup import Child, plural
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, Section, render_page, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import (
    MetricInfo,
    describe_data,
    page_footer,
    page_head,
    show_events,
    show_metrics,
    show_run,
    start_command,
)  # fmt: skip
from stage1_tokenizer.diagnostics.views import VIEWS
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, encoded_images

TOKENIZER_METRICS = {
    "validation/psnr": MetricInfo(
        "PSNR", "How near the reconstructions are to the originals, pixel by pixel; 3 dB more is half the squared "
        "error.", "higher", "dB",
    ),
    "validation/nmse": MetricInfo(
        "NMSE", "Squared error as a share of the data's variance: 1 is a plain grey picture, 0 a perfect one.", "lower",
        digits=3,
    ),
    "validation/perceptual": MetricInfo(
        "LPIPS", "Distance between original and reconstruction as a trained network sees it; 0 is none.", "lower",
        digits=3,
    ),
    "validation/code_usage": MetricInfo(
        "Codes in use", "Share of the codebook that occurs at least once in the validation pictures.", "higher",
        share=True,
    ),
    "validation/code_perplexity": MetricInfo(
        "Perplexity", "How many codes, used equally often, would be as unpredictable as the ones that are used.",
        "higher", digits=4,
    ),
    "validation/bits_per_image": MetricInfo(
        "Bits per picture", "Positions times log2 of the codebook's size: what the codes of a picture take at a fixed "
        "length.", None,
    ),
    "validation/kl": MetricInfo(
        "KL divergence", "How far the latents are from the normal noise that pictures can be sampled from.", None,
    ),
}  # fmt: skip
"""In the order of the page. A run has those that its bottleneck and losses give."""
FIRST_VIEWS = ("reconstructions", "failures")
"""Views that stand before what was made with the tokenizer since."""


def tokenizer_page(run: RunFolder, device: torch.device, root: str | None = None, more: Sequence[Section] = ()) -> str:
    """The page; `more`: sections on what was made with the tokenizer since."""
    subject = Subject(run, device, root)
    views = {view.name: view.section(subject) for view in VIEWS if view.show}
    command = start_command(run, "stage1_tokenizer/train.py")
    sections = [
        try_section("figures", "Figures", lambda: show_metrics(run, TOKENIZER_METRICS)),
        *(views.pop(name) for name in FIRST_VIEWS),
        *more,
        *views.values(),
        try_section("run", "What was run", lambda: show_run(run, tokenizer_facts(subject), command)),
        try_section("alarms", "Alarms", lambda: show_events(run)),
    ]
    return render_page(page_head(run, "Tokenizer", "bottleneck"), sections, page_footer(run))


def describe_latent(encoded: EncodedImages) -> str:
    """The code of an image, in words."""
    if encoded.codes is None:
        return "continuous"
    h, w, K, V = encoded.tokenizer.shape
    each = f", {plural(K, 'code')} each," if K > 1 else ""
    return f"{h} x {w} positions{each} of a codebook of {V:,}"


def tokenizer_facts(subject: Subject) -> list[tuple[Child, Child]]:
    """The tokenizer in a few lines."""
    run = subject.run
    data = run.config.get("data")
    facts: list[tuple[Child, Child]] = []
    if isinstance(data, dict):
        facts.append(("Data", describe_data(data)))
    try:
        encoded = encoded_images(subject)
    except EXPECTED_ERRORS:  # the other sections say so
        pass
    else:
        facts.append(("Validation split", f"{encoded.split_size:,} pictures"))
        if encoded.classes:
            names = ", ".join(encoded.classes[:12]) + (", ..." if len(encoded.classes) > 12 else "")
            facts.append(("Classes", f"{len(encoded.classes):,}: {names}"))
        count = sum(parameter.numel() for parameter in encoded.tokenizer.parameters())
        facts += [("Latent", describe_latent(encoded)), ("Parameters", f"{count:,}")]
        facts.append(("Weights", f"step {encoded.loaded.step:,}, fingerprint {encoded.loaded.fingerprint}"))
    facts.append(("Network", f"{run.config_text('network', 'kind')}, factor {run.config_text('network', 'factor')}"))
    batch, rate = run.config_text("batch_size"), run.config_text("optim", "lr")
    facts += [("Bottleneck", run.config_text("bottleneck", "kind")), ("Batch size", batch), ("Learning rate", rate)]
    return facts
