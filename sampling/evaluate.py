"""How good a tokenizer's reconstructions or a prior's samples are, by a protocol that the result states.

    python sampling/evaluate.py --tokenizer RUN     originals -> reconstructions, compared one by one and as sets
    python sampling/evaluate.py --prior RUN -n 10000     samples compared with the data set, and bits per token
    python sampling/evaluate.py --samples FILE.npz --prior RUN     pictures made before, or by another program

Writes RUN/evaluation/NAME.json and NAME.md (for --samples beside these), and NAME-nearest.png.
"""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sampling.evaluation.extractors import ExtractorConfig, build_extractor
from sampling.evaluation.extractors.inception import InceptionConfig
from sampling.evaluation.memorisation import Copies, look_for_copies
from sampling.evaluation.protocol import DataSet, Measuring
from sampling.evaluation.reconstructions import lpips_per_picture, measure_reconstructions
from sampling.evaluation.reference import Reference
from sampling.evaluation.results import Evaluation, Figure, console_lines, described_machine, write_results
from sampling.evaluation.samples import given, sampled
from sampling.evaluation.sources import Source, SplitSource, evenly
from sampling.evaluation.tables import likelihood_figures, reconstruction_figures, sample_figures, warnings_of
from sampling.making import PriorSource
from sampling.picture_files import save_png
from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.command import run_command
from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.data import DataConfig, data_config
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.pictures import Pictures, Split
from stage1_tokenizer.errors import ConfigError
from stage1_tokenizer.launch import on_main, start_accelerator
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.prior import LoadedPrior, labels_for, load_prior, newest_run
from stage2_prior.score import ScoreConfig, score
from stage2_prior.tokens import check_fits

SAMPLES = 10_000
"""How many a prior is asked for where no number is given. Published FIDs take 50,000; of fewer they are larger."""


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
    n: int | None = Field(None, ge=2)
    """Pictures to measure; null: 10,000 samples of a prior, else all that there are."""
    data: DataConfig | None = None
    """The data set; null: that of the training."""
    split: Split = "validation"
    """The split whose reconstructions are measured, and that bits per token are measured on."""
    reference: str = "train"
    """What samples are compared with: train, validation, or an .npz file of the ADM suite: pictures, or mu, sigma."""
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
            raise ValueError(
                f"--sampling is for a prior; with --{'samples' if self.samples else 'tokenizer'} nothing is sampled"
            )
        if self.perceptual.weight not in (0.0, 1.0):
            raise ValueError("--perceptual.weight is 1 to measure LPIPS, or 0 to leave it out")
        return self


def main() -> None:
    config = parse_command_line(EvaluateConfig)
    accelerator = start_accelerator()
    extractor = build_extractor(config.extractor, accelerator.device)
    kept = Path(config.references)
    measuring = Measuring(accelerator, extractor, config.extractor.kind, config.batch_size, kept, config.seed)
    evaluate = evaluate_tokenizer if config.tokenizer and not config.samples else evaluate_samples
    stem, evaluation = evaluate(config, measuring)
    on_main(accelerator, lambda: write_results(stem, evaluation))
    accelerator.print("\n".join(console_lines(evaluation)))
    accelerator.print(f"results: {one_line(str(stem))}.md, and .json for programs")
    accelerator.end_training()


def evaluate_tokenizer(config: EvaluateConfig, measuring: Measuring) -> tuple[Path, Evaluation]:
    """Reconstruct a split, and compare. Returns where the results go, and them."""
    accelerator, extractor = measuring.accelerator, measuring.extractor
    assert config.tokenizer is not None
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    data = DataSet(config.data or data_config(loaded.data, str(loaded.path)))
    size, channels = loaded.tokenizer.config.image_size, loaded.tokenizer.config.image_channels
    if data.config.image_size != size:
        raise ConfigError(
            f"data.image_size is {data.config.image_size}, but {loaded.path} was trained on {size}; give that"
        )
    pictures = data.pictures(config.split)
    if pictures.channels != channels:
        raise ConfigError(f"the images have {pictures.channels} channels, but {loaded.path} was trained on {channels}")
    lpips = Perceptual(config.perceptual, size).to(accelerator.device) if config.perceptual.weight else None
    source = SplitSource(pictures, evenly(config.n or len(pictures), len(pictures)))
    kind, number = data.config.kind, len(source)
    accelerator.print(f"reconstructing {number:,} {config.split} images of {kind} with {one_line(str(loaded.path))}")
    found = measure_reconstructions(
        accelerator, loaded, source, extractor, lpips_per_picture(lpips) if lpips else None, config.batch_size
    )
    figures = reconstruction_figures(found, loaded.tokenizer, extractor, config.perceptual.net, config.seed)
    protocol = {
        "subject": f"Reconstructions of {loaded.path.parent.name}",
        "tokenizer": {"file": str(loaded.path), "step": loaded.step, "fingerprint": loaded.fingerprint},
        "data": data.described(config.split),
        "pictures": f"{number:,} of {len(pictures):,}" + (", evenly spaced" if number < len(pictures) else ""),
        "reference": "the originals of the same pictures",
        "pixels": "a reconstruction is rounded to eight bits before anything is measured",
        **measuring.stated(),
    }
    name = f"reconstructions-{kind}-{config.split}-{number}-{config.extractor.kind}"
    stem = Path(config.out) if config.out else loaded.path.parent / "evaluation" / name
    return stem, Evaluation("tokenizer", figures, protocol, warnings_of(number, None, extractor))


def evaluate_samples(config: EvaluateConfig, measuring: Measuring) -> tuple[Path, Evaluation]:
    """Compare samples with a data set; of a prior also measure how likely it finds images. Returns as the other one."""
    accelerator, extractor = measuring.accelerator, measuring.extractor
    prior = None
    if config.samples is None:
        prior = load_prior(config.prior or newest_run(Path("runs/stage2")), accelerator.device)
        data = DataSet(config.data or data_config(prior.data, str(prior.path)))
        check_fits(prior.tokenizer, data.config)
        maker = PriorSource(Sampler(prior, config.sampling), None, config.seed)
        samples = sampled(accelerator, maker, config.n or SAMPLES, config.sampling.batch_size)
        folder, subject = samples.where.parent, f"Samples of {prior.path.parent.name}"
        says: dict[str, Any] = {"prior": maker.settings(), "sampling": config.sampling.tree()}
    else:
        data = DataSet(config.data or trained_on(config))
        samples = given(Path(config.samples), config.n)
        folder, subject, says = samples.where.parent, f"Pictures of {samples.where}", {}
    found = measuring.features(samples.source, "samples", logits=True)
    reference = data.reference(measuring, config.reference)
    figures = sample_figures(found, reference, extractor, config.seed)
    warnings = warnings_of(found.count, reference.moments.count, extractor)
    if prior is not None:
        figures += bits_of(config, measuring, prior, data.pictures(config.split))
        if samples.per_second is not None:
            where = f"{accelerator.num_processes} x {described_machine(accelerator.device)}"
            figures.append(Figure("throughput", "samples per second", samples.per_second, None, "", "higher", where))
    protocol = {
        "subject": subject,
        "samples": f"{found.count:,} in {samples.where}",
        **says,
        "reference": reference.provenance,
        **measuring.stated(),
    }
    shown = reference.provenance["data"].get("split") or Path(config.reference).stem
    name = f"{samples.where.stem}-to-{shown}-{found.count}-{config.extractor.kind}"
    stem = Path(config.out) if config.out else folder / name
    if config.nearest:
        copies = memorised(config, measuring, samples.source, data, reference)
        if isinstance(copies, str):
            warnings.append(f"training images nearest to samples were not looked for: {copies}")
        else:
            figures += copies.figures
            protocol["memorisation"] = copies.says
            path = stem.with_name(f"{stem.name}-nearest.png")
            on_main(accelerator, lambda: save_png(path, copies.picture))
    return stem, Evaluation("prior" if prior else "samples", figures, protocol, warnings)


def bits_of(config: EvaluateConfig, measuring: Measuring, prior: LoadedPrior, pictures: Pictures) -> list[Figure]:
    """How likely the prior finds a split's images."""
    labels, wanted = labels_for(prior, pictures.classes), ScoreConfig(batch_size=config.batch_size)
    scores = score(measuring.accelerator, prior, pictures, len(pictures), labels, wanted)
    length, unigram = prior.model.shape.length, scores.use.entropy_bits
    return likelihood_figures(scores.nats, length, unigram, config.split, config.seed)


def memorised(
    config: EvaluateConfig, measuring: Measuring, samples: Source, data: DataSet, reference: Reference
) -> Copies | str:
    """The training images nearest to samples; or why they cannot be looked for."""
    mine, theirs = (source.read(np.arange(1)).shape[2:] for source in (samples, data.source("train")))
    if mine != theirs:
        return f"samples are {mine[0]}x{mine[1]}, training images {theirs[0]}x{theirs[1]}"
    trained = reference if config.reference == "train" else data.reference(measuring, "train")
    assert trained.features is not None
    assert trained.indices is not None
    training = SplitSource(data.pictures("train"), trained.indices.numpy())
    return look_for_copies(
        measuring, samples, training, trained.features, data.source("validation"), config.nearest, data.config.flip
    )


def trained_on(config: EvaluateConfig) -> DataConfig:
    """The data set that given samples are to be compared with. Raises ConfigError where nothing says which."""
    if config.prior is not None:
        prior = load_prior(config.prior)
        return data_config(prior.data, str(prior.path))
    if config.tokenizer is not None:
        loaded = LoadedTokenizer.load(config.tokenizer)
        return data_config(loaded.data, str(loaded.path))
    raise ConfigError(
        f"--samples {config.samples}: name what to compare them with: the run that was trained on it, with --prior or "
        "--tokenizer, or the data set itself, with --data.kind"
    )


if __name__ == "__main__":
    run_command(main)
