"""The report page of a tokenizer's run."""

from collections.abc import Sequence

import torch

from stage1_tokenizer.data.record import format_count
from stage1_tokenizer.diagnostics.report import run_sections
from stage1_tokenizer.diagnostics.report.markup import Child
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, Section, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import MetricInfo
from stage1_tokenizer.diagnostics.views import VIEWS
from stage1_tokenizer.diagnostics.views.base import EncodedImages, Subject, encoded_images

TOKENIZER_METRICS = {
    "validation/psnr": MetricInfo(
        "PSNR", "How similar reconstructions and originals are, pixel by pixel; 3 dB more is half the squared error.",
        "higher", "dB",
    ),
    "validation/nmse": MetricInfo(
        "NMSE", "Squared error as a share of the data's variance: a uniformly grey image has 1, a perfect one has 0.",
        "lower", digits=3,
    ),
    "validation/perceptual": MetricInfo(
        "LPIPS", "Distance between original and reconstruction in the features of a trained network; 0 is no "
        "difference.", "lower", digits=3,
    ),
    "validation/code_usage": MetricInfo(
        "Codes in use", "Share of the codebook that occurs at least once in the validation images.", "higher",
        share=True,
    ),
    "validation/code_perplexity": MetricInfo(
        "Perplexity", "Number of equally frequent codes that are as hard to predict as the codes of the validation "
        "images.", "higher",
    ),
    "validation/bits_per_image": MetricInfo(
        "Bits per image", "Positions times log2 of the codebook's size: the size of an image's codes, each stored with "
        "the same number of bits.", None,
    ),
    "validation/kl": MetricInfo(
        "KL divergence", "Distance of the latents from the normal noise from which images can be sampled, in nats per "
        "image.", None,
    ),
}  # fmt: skip
"""The metrics of a tokenizer in the order of the page. A run has those of its bottleneck and its losses."""
FIRST_VIEWS = ("reconstructions", "failures")
"""Views that come before the sections on samples and evaluations."""


def tokenizer_page(run: RunFolder, device: torch.device, root: str | None = None, more: Sequence[Section] = ()) -> str:
    """Return the page of a tokenizer's run. `more`: sections on samples and evaluations that were made with it."""
    subject = Subject(run, device, root)
    views = {view.name: view.section(subject) for view in VIEWS if view.show}
    command = run_sections.start_command(run, "stage1_tokenizer/train.py")
    sections = [
        try_section("figures", "Metrics", lambda: run_sections.show_metrics(run, TOKENIZER_METRICS)),
        *(views.pop(name) for name in FIRST_VIEWS),
        *more,
        *views.values(),
    ]
    return run_sections.render_run(run, "bottleneck", sections, lambda: tokenizer_facts(subject), command)


def describe_latent(encoded: EncodedImages) -> str:
    """Describe the latent grid of one image in words."""
    if encoded.codes is None:
        return "continuous"
    h, w, K, V = encoded.tokenizer.shape
    several = f", {format_count(K, 'code')} each," if K > 1 else ""
    return f"{h} x {w} positions{several} of a codebook of {V:,}"


def tokenizer_facts(subject: Subject) -> list[tuple[Child, Child]]:
    """Return names and values that describe the tokenizer and its training."""
    run = subject.run
    data = run.config.get("data")
    facts: list[tuple[Child, Child]] = []
    if isinstance(data, dict):
        facts.append(("Data", run_sections.describe_data(data)))
    try:
        encoded = encoded_images(subject)
    except EXPECTED_ERRORS:  # other sections show the reason
        pass
    else:
        facts.append(("Validation split", f"{encoded.split_size:,} images"))
        if encoded.classes:
            facts.append(("Classes", run_sections.describe_classes(encoded.classes)))
        parameters = sum(parameter.numel() for parameter in encoded.tokenizer.parameters())
        facts += [("Latent", describe_latent(encoded)), ("Parameters", f"{parameters:,}")]
        facts.append(("Weights", f"step {encoded.loaded.step:,}, fingerprint {encoded.loaded.fingerprint}"))
    facts.append(("Network", f"{run.config_text('network', 'kind')}, factor {run.config_text('network', 'factor')}"))
    facts.append(("Bottleneck", run.config_text("bottleneck", "kind")))
    facts += [("Batch size", run.config_text("batch_size")), ("Learning rate", run.config_text("optim", "lr"))]
    return facts
