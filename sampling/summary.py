"""Compare a run's metrics with those of the quickstart.   python sampling/summary.py [--prior runs/stage2/NAME]

Reads the metrics of the newest prior's run and of its tokenizer's run, samples images for a classifier to judge, and
prints each metric with its bar, the value that it should reach, and the images to look at.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from sampling.agreement import labels_in_data, measure_agreement
from sampling.sampler import Sampler
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import moved_data, parse_data_config
from stage1_tokenizer.diagnostics.report.run_folder import find_training
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.log_file import METRICS_FILE, read_log
from stage1_tokenizer.tokenizer import resolve_tokenizer
from stage2_prior.prior import LoadedPrior, find_newest_run, load_prior


class SummaryConfig(CommandConfig):
    """Print a run's metrics; for a data set with classes, also whether samples show the class that was asked for."""

    prior: str | None = None
    """Folder of a stage-two run, or a published model (pretrained:NAME, hf:OWNER/NAME), which has no metrics of its
    training; null: the newest run under runs/stage2."""
    tokenizer: str | None = None
    """Folder of the stage-one run, for its metrics; null: the run under runs/stage1 with this prior's tokenizer."""
    root: str | None = None
    """Folder of the training's images, if they were moved; null: the folder that the training used."""
    samples: NonNegativeInt = 500
    """Number of samples for the classifier, of all classes in turn; 0: no classifier."""
    classifier_steps: PositiveInt = 300
    """Steps for which the classifier is trained on the train split."""
    seed: int = 1
    """Seed of the samples and of the classifier; different from the default of `generate.py`, so that the images are
    different too."""


class SummaryLine(NamedTuple):
    """One line of the summary: a metric, its value, and the bar that it should reach."""

    name: str
    value: str
    bar: str
    is_reached: bool


def main() -> None:
    """Print the metrics, the images to look at, and the command for the curves."""
    config = parse_command_line(SummaryConfig)
    prior = load_prior(config.prior or find_newest_run(), "cuda" if torch.cuda.is_available() else "cpu")
    run = prior.path.parent
    stage1 = tokenizer_run(config, prior)
    is_logged = (run / METRICS_FILE).exists()  # a published model has no log
    lines = tokenizer_lines(stage1) + (prior_lines(run, prior.step) if is_logged else [])
    if config.samples and prior.classes:
        lines += class_lines(config, prior)
    if not lines:
        without = f"--samples is {config.samples}" if prior.classes else "the prior has no classes to judge samples by"
        raise ConfigError(
            f"{prior.source}: has no {METRICS_FILE} with the training's metrics, and {without}, so there is nothing to "
            "show"
        )
    width = max(len(line.name) for line in lines)
    print(f"\n{run if is_logged else prior.source}")
    for line in lines:
        missed = "" if line.is_reached else "   MISSED"
        print(f"  {line.name:<{width}}  {line.value:>10}   bar {line.bar}{missed}")
    grids = sorted(prior.outputs.glob("generated/*/grid.png"))
    samples = sorted(run.glob("samples/*.png"))
    reconstructions = sorted(stage1.glob("samples/*.png")) if stage1 else []
    if images := [*grids[-1:], *samples[-1:], *reconstructions[-1:]]:
        print("look at:", *images, sep="\n  ")
    if is_logged:
        print(f"curves:    .venv/bin/tensorboard --logdir {run.parent.parent}")


def last_metrics(run: Path, needed: str, step: int | None = None) -> dict[str, float]:
    """Return the newest entry of a run's metrics.jsonl that has the metric `needed`, that of `step` if it exists.

    Raises:
        ConfigError: no entry has it.
    """
    log = run / METRICS_FILE
    entries = [entry for entry in read_log(log) if needed in entry]
    if not entries:
        raise ConfigError(f"{log}: has no {needed}; the run has not been validated yet")
    return dict(([entry for entry in entries if entry["step"] == step] or entries)[-1])


def tokenizer_run(config: SummaryConfig, prior: LoadedPrior) -> Path | None:
    """Return the folder of the stage-one run that trained this prior's tokenizer, if it still exists."""
    if config.tokenizer:
        return resolve_tokenizer(config.tokenizer).parent
    found = find_training(prior.tokenizer.path)
    return found.path if found else None


def tokenizer_lines(run: Path | None) -> list[SummaryLine]:
    """Return the lines on the tokenizer's reconstructions and codebook; none without a run."""
    if run is None:
        return []
    metrics = last_metrics(run, "validation/psnr")
    psnr, usage = metrics["validation/psnr"], metrics["validation/code_usage"]
    return [
        SummaryLine("reconstruction, PSNR on validation", f"{psnr:.2f} dB", "24 dB", psnr >= 24.0),
        SummaryLine("codes in use on validation", f"{usage:.1%}", "95 %", usage >= 0.95),
    ]


def prior_lines(run: Path, step: int) -> list[SummaryLine]:
    """Return the line on the prior's likelihood at this step, that of the saved weights (the best on validation)."""
    metrics = last_metrics(run, "validation/bits_per_token", step)
    bits, unigram = metrics["validation/bits_per_token"], metrics["validation/unigram_bits_per_token"]
    bigram = metrics["validation/bigram_bits_per_token"]
    saved = 1.0 - bits / unigram if unigram else 0.0  # 0 if all images have the same code
    name = f"bits per token {bits:.2f} (bigram {bigram:.2f}), below the unigram's {unigram:.2f} by"
    return [SummaryLine(name, f"{saved:.1%}", "45 %", saved >= 0.45)]


def class_lines(config: SummaryConfig, prior: LoadedPrior) -> list[SummaryLine]:
    """Train a classifier and sample images. Return the lines on its accuracy and on the classes of the samples.

    Raises:
        ConfigError: the data set no longer has all classes of the prior.
    """
    opened = open_data(moved_data(parse_data_config(prior.data, str(prior.path)), config.root))
    train, validation = opened.image_batches("train", config.seed), opened.image_batches("validation", config.seed)
    sampler = Sampler(prior)
    with progress_bar(config.samples * sampler.codes_per_image, "code", "sampling") as progress:
        images = sampler.sample(config.samples, seed=config.seed, progress=progress.update)
    labels = labels_in_data(train.classes, prior.classes, sampler.labels(np.arange(config.samples)))
    accuracy = measure_agreement(train, validation, images, labels, config.classifier_steps, config.seed)
    held_out, samples = accuracy.held_out, accuracy.samples
    asked_for = f"classifier, {config.samples} samples of the class asked for"
    return [
        SummaryLine("classifier, right on held-out images", f"{held_out:.1%}", "95 %", held_out >= 0.95),
        SummaryLine(asked_for, f"{samples:.1%}", "70 %", samples >= 0.7),
    ]


if __name__ == "__main__":
    run_command(main)
