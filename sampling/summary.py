"""What a run came to: its figures beside the quickstart's bars, and where to look.   python sampling/summary.py

Reads the newest prior's run (or --prior), samples once more for the classifier's judgement, and prints.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from sampling.agreement import agreement
from sampling.sampler import Sampler
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.log_file import read_log
from stage2_prior.prior import LoadedPrior, load_prior


class SummaryConfig(CommandConfig):
    """Print a run's figures; for a labelled data set, also whether samples show the class that was asked for."""

    prior: str | None = None
    """A stage-two run's folder; null: the newest run under runs/stage2."""
    tokenizer: str | None = None
    """The stage-one run's folder, for its figures; null: the newest run under runs/stage1 with this tokenizer."""
    samples: NonNegativeInt = 500
    """Class-conditional samples to judge; 0: leave the classifier out."""
    classifier_steps: PositiveInt = 300
    seed: int = 1
    """Seed of the samples and of the classifier; other than that of `generate.py`, so that these are other pictures."""


class Figure(NamedTuple):
    """A line of the summary."""

    name: str
    value: str
    bar: str
    reached: bool


def main() -> None:
    config = parse_command_line(SummaryConfig)
    prior = load_prior(config.prior, "cuda" if torch.cuda.is_available() else "cpu")
    run = prior.path.parent
    stage1 = tokenizer_run(config, prior)
    lines = tokenizer_figures(stage1) + prior_figures(run, prior.step)
    if config.samples and prior.classes:
        lines += class_figures(config, prior)
    width = max(len(line.name) for line in lines)
    print(f"\n{run}")
    for line in lines:
        print(f"  {line.name:<{width}}  {line.value:>10}   bar {line.bar}{'' if line.reached else '   MISSED'}")
    grids = sorted(run.glob("generated/*/grid.png"))
    print("look at:")
    reconstructions = sorted(stage1.glob("samples/*.png")) if stage1 else []
    for picture in [*grids[-1:], *sorted(run.glob("samples/*.png"))[-1:], *reconstructions[-1:]]:
        print(f"  {picture}")
    print(f"curves:    .venv/bin/tensorboard --logdir {run.parent.parent}")


def last_figures(run: Path, needed: str, step: int | None = None) -> dict[str, float]:
    """The newest entry of a run's metrics.jsonl with a scalar of this name, of this step where there is one.

    Raises ConfigError where there is none."""
    log = run / "metrics.jsonl"
    entries = [entry for entry in read_log(log) if needed in entry]
    if not entries:
        raise ConfigError(f"{log}: has no {needed}; the run has not been validated yet")
    return dict(([entry for entry in entries if entry["step"] == step] or entries)[-1])


def tokenizer_run(config: SummaryConfig, prior: LoadedPrior) -> Path | None:
    """The folder of the stage-one run that trained this prior's tokenizer, where it is still there."""
    if config.tokenizer:
        return Path(config.tokenizer)
    same = prior.tokenizer.path.read_bytes()
    files = [file for file in Path("runs/stage1").glob(f"*/{prior.tokenizer.path.name}") if file.read_bytes() == same]
    return files[0].parent if files else None


def tokenizer_figures(run: Path | None) -> list[Figure]:
    if run is None:
        return []
    figures = last_figures(run, "validation/psnr")
    psnr, usage = figures["validation/psnr"], figures["validation/code_usage"]
    return [
        Figure("reconstruction, PSNR on validation", f"{psnr:.2f} dB", "24 dB", psnr >= 24.0),
        Figure("codes in use on validation", f"{usage:.1%}", "95 %", usage >= 0.95),
    ]


def prior_figures(run: Path, step: int) -> list[Figure]:
    """The figures of the weights of this step, which are the best on validation and need not be the last."""
    figures = last_figures(run, "validation/bits_per_token", step)
    bits, unigram = figures["validation/bits_per_token"], figures["validation/unigram_bits_per_token"]
    bigram = figures["validation/bigram_bits_per_token"]
    saved = 1.0 - bits / unigram if unigram else 0.0  # of images that all have the same code there is nothing to save
    name = f"bits per token {bits:.2f} (bigram {bigram:.2f}), below the unigram's {unigram:.2f} by"
    return [Figure(name, f"{saved:.1%}", "45 %", saved >= 0.45)]


def class_figures(config: SummaryConfig, prior: LoadedPrior) -> list[Figure]:
    data = parse_data_config(prior.data, str(prior.path))
    opened = open_data(data)
    train, validation = opened.image_batches("train", config.seed), opened.image_batches("validation", config.seed)
    sampler = Sampler(prior)
    with progress_bar(config.samples * sampler.codes_per_image, "code", "sampling") as shown:
        pictures = sampler.sample(config.samples, seed=config.seed, progress=shown.update)
    missing = [name for name in prior.classes if name not in train.classes]
    if missing:
        raise ConfigError(f"the data no longer has the classes {', '.join(missing)} that the prior was trained on")
    # The classifier learns the data's labels as they are now; the prior has those of its training.
    labels = np.array([train.classes.index(name) for name in prior.classes])[sampler.labels(np.arange(config.samples))]
    found = agreement(train, validation, pictures, labels, config.classifier_steps, config.seed)
    return [
        Figure("classifier, right on held-out images", f"{found.held_out:.1%}", "95 %", found.held_out >= 0.95),
        Figure(
            f"classifier, {config.samples} samples of the class asked for",
            f"{found.samples:.1%}",
            "70 %",
            found.samples >= 0.7,
        ),
    ]


if __name__ == "__main__":
    run_command(main)
