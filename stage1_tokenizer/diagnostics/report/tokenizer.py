"""The page about a tokenizer's run: which sections it has, and in which order."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from stage1_tokenizer.diagnostics.analysis.atlas import Atlas
from stage1_tokenizer.diagnostics.report.codebook import atlas_for, show_atlas, show_use
from stage1_tokenizer.diagnostics.report.curves import draw_curves, tokenizer_charts
from stage1_tokenizer.diagnostics.report.markup import Child, Markup, join, tag
from stage1_tokenizer.diagnostics.report.meanings import TOKENIZER_FIGURES, Meaning, cards, readings
from stage1_tokenizer.diagnostics.report.measured import Measured, measure
from stage1_tokenizer.diagnostics.report.numbers import plural
from stage1_tokenizer.diagnostics.report.page import TROUBLE, Head, Section, attempt, note, render
from stage1_tokenizer.diagnostics.report.reconstructions import over_training, show_failures, show_reconstructions
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.report.sprites import Sprites, mean_sprites
from stage1_tokenizer.diagnostics.report.tokens import alone, codes_in, describe, show_tokens
from stage1_tokenizer.diagnostics.report.what_was_run import data_facts, happened, what_was_run

Look = Callable[[], Measured]
T = TypeVar("T")


def tokenizer_page(run: RunFolder, device: torch.device, root: str | None = None, more: Sequence[Section] = ()) -> str:
    """The page; `more`: sections on what was made with the tokenizer since."""
    look = once(lambda: measure(run.path, root, device))
    sections = [
        attempt("figures", "Figures", lambda: show_figures(run, TOKENIZER_FIGURES)),
        attempt("reconstructions", "Reconstructions", lambda: _reconstructions(run, look)),
        attempt("failures", "Failures", lambda: show_failures(look())),
        *more,
        attempt("curves", "Curves", lambda: draw_curves(run.curves, tokenizer_charts(run.curves))),
        *token_sections(look),
        attempt("run", "What was run", lambda: what_was_run(run, facts_of(run, look), command_of(run))),
        attempt("alarms", "Alarms", lambda: happened(run)),
    ]
    return render(head_of(run, "Tokenizer", "bottleneck"), sections, footer_of(run))


def token_sections(look: Look) -> list[Section]:
    """The codebook, its atlas, and the tokens over pictures."""

    def sprites() -> tuple[Measured, Atlas | None, Sprites | None, Sprites | None]:
        measured = look()
        atlas = atlas_for(measured)
        wanted = codes_in(measured) if atlas else []
        return measured, atlas, mean_sprites(atlas, wanted) if atlas else None, alone(measured, wanted)

    def show_them() -> Child:
        measured, atlas, means, _ = made()
        return join(means.style if means else None, show_atlas(measured, atlas, means))

    def lay_over() -> Child:
        measured, atlas, means, own = made()
        return join(own.style if own else None, show_tokens(measured, atlas, means, own))

    made = once(sprites)
    return [
        attempt("codes", "Codes in use", lambda: show_use(look())),
        attempt("atlas", "Atlas of the codes", show_them),
        attempt("tokens", "Tokens over a picture", lay_over),
    ]


def once(action: Callable[[], T]) -> Callable[[], T]:
    """An action that several sections need: done once, and what it raises is raised to each of them."""
    answers: list[T] = []
    troubles: list[Exception] = []

    def ask() -> T:
        if troubles:
            raise troubles[0]
        if not answers:
            try:
                answers.append(action())
            except TROUBLE as error:
                troubles.append(error)
                raise
        return answers[0]

    return ask


def show_figures(run: RunFolder, meanings: Mapping[str, Meaning]) -> Markup:
    """The last validation in large numbers."""
    found = readings(run.curves, meanings)
    if not found:
        return note("There was no validation yet, so there are no figures.")
    step = max(each.step for each in found)
    return join(
        tag("p", f"On the whole validation split, after step {step:,}.", class_="small"),
        cards(found),
    )


def head_of(run: RunFolder, kind: str, part: str) -> Head:
    """The title, and a sentence on how far the run is."""
    how = run.text(part, "kind")
    done = f"{run.done:,} of {run.steps:,} steps" if run.steps else f"{run.done:,} steps"
    alarms = plural(len(run.alarms), "alarm") if run.alarms else "no alarms"
    what = f"{how} bottleneck on {run.text('data', 'kind')}" if part == "bottleneck" else how
    return Head(kind, run.name, [f"{what}, {done}, ", tag("a", alarms, href="#alarms"), "."])


def footer_of(run: RunFolder) -> str:
    return f"Written by Tessera from {run.name}/. Everything is in this file; it asks the network for nothing."


def command_of(run: RunFolder) -> str:
    """How a run like this one is started, by its configuration."""
    config = run.config.get("config")
    given = f" --config {shlex.quote(config)}" if isinstance(config, str) else ""
    return f"accelerate launch stage1_tokenizer/train.py{given}    # and the settings below that differ"


def facts_of(run: RunFolder, look: Look) -> list[tuple[Child, Child]]:
    """What a tokenizer is, in a few lines."""
    data = run.config.get("data")
    facts: list[tuple[Child, Child]] = []
    if isinstance(data, dict):
        facts.append(("Data", data_facts(data)))
    try:
        measured = look()
    except TROUBLE:  # the other sections say so
        pass
    else:
        facts.append(("Validation split", f"{measured.total:,} pictures"))
        if measured.classes:
            names = ", ".join(measured.classes[:12]) + (", ..." if len(measured.classes) > 12 else "")
            facts.append(("Classes", f"{len(measured.classes):,}: {names}"))
        tokenizer = measured.loaded.tokenizer
        count = sum(parameter.numel() for parameter in tokenizer.parameters())
        facts += [("Latent", describe(measured)), ("Parameters", f"{count:,}")]
        facts.append(("Weights", f"step {measured.loaded.step:,}, fingerprint {measured.loaded.fingerprint}"))
    facts.append(("Network", f"{run.text('network', 'kind')}, factor {run.text('network', 'factor')}"))
    batch, rate = run.text("batch_size"), run.text("optim", "lr")
    facts += [("Bottleneck", run.text("bottleneck", "kind")), ("Batch size", batch), ("Learning rate", rate)]
    return facts


def _reconstructions(run: RunFolder, look: Look) -> Child:
    """The tokenizer's pictures now, and those that the training left; the latter alone where there are no data."""
    try:
        now: Child = show_reconstructions(look())
    except TROUBLE as error:
        now = note(f"They cannot be made again: {error}")
    before = over_training(run, "reconstructions", "Originals and reconstructions, side by side,", most=3)
    if before is None:
        return now
    title = tag("h3", "While it trained")
    words = tag("p", "Each original stands on the left of its reconstruction; the same pictures each time.")
    return join(now, title, words, before)
