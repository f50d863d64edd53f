"""How good a tokenizer's reconstructions or a prior's samples are, by a protocol that the result states.

    python sampling/evaluate.py --tokenizer RUN     originals -> reconstructions, compared one by one and as sets
    python sampling/evaluate.py --prior RUN -n 10000     samples compared with the data set, and bits per token
    python sampling/evaluate.py --samples FILE.npz --prior RUN     pictures made before, or by another program

Writes RUN/evaluation/NAME.json and NAME.md (for --samples beside these), and NAME-nearest.png.
"""

import re
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from pydantic import NonNegativeInt, PositiveInt, model_validator

from sampling.evaluation.extractors import ExtractorConfig, build_extractor
from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.extractors.inception import InceptionConfig
from sampling.evaluation.memorisation import look_for_copies
from sampling.evaluation.reconstructions import lpips_per_picture, measure_reconstructions
from sampling.evaluation.reference import Reference, load_or_measure, provenance_of, reference_of_file
from sampling.evaluation.results import Evaluation, console_lines, described_machine, now, versions, write_results
from sampling.evaluation.samples import Samples, given, sampled
from sampling.evaluation.sources import SplitSource, evenly, features_of
from sampling.evaluation.tables import likelihood_figures, reconstruction_figures, sample_figures
from sampling.making import PriorSource
from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.command import run_command
from stage1_tokenizer.config import CommandConfig, Config, parse_command_line
from stage1_tokenizer.data import DataConfig, build_images, data_config
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.pictures import Pictures, Split
from stage1_tokenizer.errors import ConfigError
from stage1_tokenizer.launch import on_main, start_accelerator
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.prior import labels_for, load_prior, newest_run
from stage2_prior.score import ScoreConfig, score

SAMPLES = 10_000
"""How many a prior is asked for, unless a number is given. Published FIDs take 50,000; of fewer they come out larger."""


class EvaluateConfig(CommandConfig):
    """Measure a tokenizer, a prior, or given samples."""

    tokenizer: str | None = None
    """A stage-one run's folder, or its tokenizer.safetensors: measure its reconstructions."""
    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors: measure its samples; where nothing is named, the newest run
    under runs/stage2."""
    samples: str | None = None
    """Pictures in place of a prior's: a folder that `generate.py` wrote, any folder of pictures of one size, or an .npz
    file (`arr_0`, as the ADM suite has it). They are compared with the data of --prior, --tokenizer or --data."""
    n: PositiveInt | None = None
    """Pictures to measure; null: 10,000 samples of a prior, else all that there are."""
    data: DataConfig | None = None
    """The data set; null: that of the training."""
    split: Split = "validation"
    """The split whose reconstructions are measured, and that bits per token are measured on."""
    reference: str = "train"
    """What samples are compared with: train, validation, or an .npz file of the ADM suite: pictures, or mu and sigma."""
    extractor: ExtractorConfig = InceptionConfig()
    """The network in whose features sets are compared. Only with Inception's the distances are called FID and KID."""
    perceptual: PerceptualConfig = PerceptualConfig(weight=1.0)
    """The network of LPIPS, as in training; weight 0 leaves it out."""
    sampling: SamplingConfig = SamplingConfig()
    """How a prior is sampled from; the defaults are those of generate.py."""
    nearest: NonNegativeInt = 1000
    """Samples whose nearest training images are looked for; 0: none."""
    references: str = "runs/references"
    """Folder in which the reference's features are kept for the next evaluation."""
    seed: int = 0
    """Of the samples, and of all that is drawn in measuring."""
    batch_size: PositiveInt = 64
    """Pictures measured at once by each process; bounded by memory, without effect on the figures."""
    out: str | None = None
    """Path of the results without .json and .md; default: a name that says the protocol, in evaluation/ of the run."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.tokenizer is not None and self.prior is not None:
            raise ValueError("--tokenizer and --prior exclude each other; a prior's folder holds its tokenizer too")
        if (self.tokenizer or self.samples) and self.sampling != SamplingConfig():
            raise ValueError(f"--sampling is for a prior; with --{'samples' if self.samples else 'tokenizer'} nothing is sampled")
        if self.perceptual.weight not in (0.0, 1.0):
            raise ValueError("--perceptual.weight is 1 to measure LPIPS, or 0 to leave it out")
        return self


def main() -> None:
    config = parse_command_line(EvaluateConfig)
    accelerator = start_accelerator()
    extractor = build_extractor(config.extractor, accelerator.device)
    if config.tokenizer is not None and config.samples is None:
        stem, evaluation = evaluate_tokenizer(accelerator, config, extractor)
    else:
        stem, evaluation = evaluate_samples(accelerator, config, extractor)
    on_main(accelerator, lambda: write_results(stem, evaluation))
    accelerator.print("\n".join(console_lines(evaluation)))
    accelerator.print(f"{one_line(str(stem))}.md, .json")
    accelerator.end_training()


def evaluate_tokenizer(
    accelerator: Accelerator, config: EvaluateConfig, extractor: Extractor
) -> tuple[Path, Evaluation]:
    """Reconstruct a split, and compare."""
    assert config.tokenizer is not None
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    data = config.data or data_config(loaded.data, str(loaded.path))
    size = loaded.tokenizer.config.image_size
    if data.image_size != size:
        raise ConfigError(f"data.image_size is {data.image_size}, but {loaded.path} was trained on {size}; give that")
    lpips = Perceptual(config.perceptual, size).to(accelerator.device) if config.perceptual.weight else None
    source, description = split_source(config, data, config.split, loaded.tokenizer.config.image_channels, config.n)
    accelerator.print(f"reconstructing {len(source)} {config.split} images of {data.kind} with {one_line(str(loaded.path))}")
    found = measure_reconstructions(
        accelerator, loaded, source, extractor, lpips_per_picture(lpips) if lpips else None, config.batch_size
    )
    protocol = {
        "subject": f"reconstructions of {loaded.path.parent.name}",
        "tokenizer": {"file": str(loaded.path), "step": loaded.step, "fingerprint": loaded.fingerprint},
        "data": description,
        "pictures": f"{len(source)}, each once, {picked(source)}",
        "reference": "the originals of the same pictures",
        "pixels": "reconstructions are rounded to eight bits before anything is measured",
        **({"LPIPS": f"version 0.1, {config.perceptual.net}"} if lpips else {}),
        **measured_with(accelerator, config, extractor),
    }
    figures, warnings = reconstruction_figures(found, loaded.tokenizer, extractor, config.perceptual.net, config.seed)
    name = f"reconstructions-{data.kind}-{config.split}-{len(source)}-{config.extractor.kind}"
    return stem_of(config, loaded.path.parent, name), Evaluation("tokenizer", figures, protocol, warnings)


def evaluate_samples(
    accelerator: Accelerator, config: EvaluateConfig, extractor: Extractor
) -> tuple[Path, Evaluation]:
    """Compare samples with a data set; of a prior also measure how likely it finds the images."""
    prior = None
    if config.samples is None:
        prior = load_prior(config.prior or newest_run(Path("runs/stage2")), accelerator.device)
        sampler = Sampler(prior, config.sampling)
    data = config.data or trained_on(config)
    validation, validation_says = split_source(config, data, config.split, None)
    training, training_says = split_source(config, data, "train", None)
    if prior is not None:
        check_fits(prior.tokenizer, data)
        labels = labels_for(prior, validation.pictures.classes)
        samples = sampled(accelerator, PriorSource(sampler, None, config.seed), config.n or SAMPLES, config.sampling.batch_size)
    else:
        assert config.samples is not None
        samples = given(Path(config.samples))
