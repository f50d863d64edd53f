"""The page about a tokenizer's run."""

from collections.abc import Sequence

import torch

from stage1_tokenizer.diagnostics.report.markup import Child, plural
from stage1_tokenizer.diagnostics.report.page import TROUBLE, Section, attempt, render
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.run_sections import (
    Meaning,
    command_of,
    data_facts,
    footer_of,
    happened,
    head_of,
    show_figures,
    what_was_run,
)  # fmt: skip
from stage1_tokenizer.diagnostics.views import VIEWS
from stage1_tokenizer.diagnostics.views.base import Measured, Subject, measured_of

TOKENIZER_FIGURES = {
    "validation/psnr": Meaning(
        "PSNR", "How near the reconstructions are to the originals, pixel by pixel; 3 dB more is half the squared "
        "error.", "higher", "dB",
    ),
    "validation/nmse": Meaning(
        "NMSE", "Squared error as a share of the data's variance: 1 is a plain grey picture, 0 a perfect one.", "lower",
        digits=3,
    ),
    "validation/perceptual": Meaning(
        "LPIPS", "Distance between original and reconstruction as a trained network sees it; 0 is none.", "lower",
        digits=3,
    ),
    "validation/code_usage": Meaning(
        "Codes in use", "Share of the codebook that occurs at least once in the validation pictures.", "higher",
        share=True,
    ),
    "validation/code_perplexity": Meaning(
        "Perplexity", "How many codes, used equally often, would be as unpredictable as the ones that are used.",
        "higher", digits=4,
    ),
    "validation/bits_per_image": Meaning(
        "Bits per picture", "Positions times log2 of the codebook's size: what the codes of a picture take at a fixed "
        "length.", None,
    ),
    "validation/kl": Meaning(
        "KL divergence", "How far the latents are from the normal noise that pictures can be sampled from.", None,
    ),
}  # fmt: skip
"""In the order of the page. A run has those that its bottleneck and losses give."""
BEFORE_MORE = ("reconstructions", "failures")
"""Views that stand before what was made with the tokenizer since."""


def tokenizer_page(run: RunFolder, device: torch.device, root: str | None = None, more: Sequence[Section] = ()) -> str:
    """The page; `more`: sections on what was made with the tokenizer since."""
    subject = Subject(run, device, root)
    views = {view.name: view.section(subject) for view in VIEWS if view.show}
    command = command_of(run, "stage1_tokenizer/train.py")
    sections = [
        attempt("figures", "Figures", lambda: show_figures(run, TOKENIZER_FIGURES)),
        *(views.pop(name) for name in BEFORE_MORE),
        *more,
        *views.values(),
        attempt("run", "What was run", lambda: what_was_run(run, facts_of(subject), command)),
        attempt("alarms", "Alarms", lambda: happened(run)),
    ]
    return render(head_of(run, "Tokenizer", "bottleneck"), sections, footer_of(run))


def describe(measured: Measured) -> str:
    """The code of an image, in words."""
    if measured.codes is None:
        return "continuous"
    h, w, K, V = measured.tokenizer.shape
    each = f", {plural(K, 'code')} each," if K > 1 else ""
    return f"{h} x {w} positions{each} of a codebook of {V:,}"


def facts_of(subject: Subject) -> list[tuple[Child, Child]]:
    """The tokenizer in a few lines."""
    run = subject.run
    data = run.config.get("data")
    facts: list[tuple[Child, Child]] = []
    if isinstance(data, dict):
        facts.append(("Data", data_facts(data)))
    try:
        measured = measured_of(subject)
    except TROUBLE:  # the other sections say so
        pass
    else:
        facts.append(("Validation split", f"{measured.total:,} pictures"))
        if measured.classes:
            names = ", ".join(measured.classes[:12]) + (", ..." if len(measured.classes) > 12 else "")
            facts.append(("Classes", f"{len(measured.classes):,}: {names}"))
        count = sum(parameter.numel() for parameter in measured.tokenizer.parameters())
        facts += [("Latent", describe(measured)), ("Parameters", f"{count:,}")]
        facts.append(("Weights", f"step {measured.loaded.step:,}, fingerprint {measured.loaded.fingerprint}"))
    facts.append(("Network", f"{run.text('network', 'kind')}, factor {run.text('network', 'factor')}"))
    batch, rate = run.text("batch_size"), run.text("optim", "lr")
    facts += [("Bottleneck", run.text("bottleneck", "kind")), ("Batch size", batch), ("Learning rate", rate)]
    return facts
