"""How good a tokenizer's reconstructions or a prior's samples are, by a protocol that the result states.

    python sampling/evaluate.py --tokenizer RUN     originals -> reconstructions, compared one by one and as sets
    python sampling/evaluate.py --prior RUN -n 10000     samples compared with the data set, and bits per token
    python sampling/evaluate.py --samples FILE.npz --prior RUN     pictures made before, or by another program

Writes RUN/evaluation/NAME.json, NAME.md and NAME-nearest.png; for --samples beside our own ones, else runs/evaluation.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sampling.evaluation.extractors import ExtractorConfig, build_extractor
from sampling.evaluation.extractors.inception import InceptionConfig
from sampling.evaluation.memorisation import NEIGHBOURS_SHOWN, Copies, is_grey, look_for_copies
from sampling.evaluation.protocol import DataSet, Measuring, described_lpips
from sampling.evaluation.reconstructions import lpips_per_picture, measure_reconstructions
from sampling.evaluation.reference import Reference, check_reference
from sampling.evaluation.results import (
    Evaluation,
    Figure,
    console_lines,
    described_machine,
    digest_of,
    write_results,
)
from sampling.evaluation.samples import NEAREST, folder_of_results, given, sampled
from sampling.evaluation.sources import Source, SplitSource, some
from sampling.evaluation.tables import likelihood_figures, reconstruction_figures, sample_figures
from sampling.evaluation.warnings_of import comparison_warnings, warnings_of
from sampling.making import PriorSource
from sampling.picture_files import save_png
from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.command import run_command
from stage1_tokenizer.config import CommandConfig, Tree, parse_command_line
from stage1_tokenizer.data import DataConfig, data_config
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.pictures import Pictures, Split
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.errors import BadFileError, ConfigError
from stage1_tokenizer.launch import on_main, start_accelerator
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.report.measured import moved
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.prior import LoadedPrior, labels_for, load_prior, newest_run
from stage2_prior.score import ScoreConfig, score

SAMPLES = 10_000
"""How many a prior is asked for where no number is given. Published FIDs take 50,000; of fewer they are larger."""


MEANS_NOTHING: dict[str, dict[str, str]] = {
    "tokenizer": {
        "sampling": "nothing is sampled",
        "reference": "reconstructions are compared with their originals",
        "nearest": "reconstructions are no samples",
    },
    "samples": {
        "sampling": "nothing is sampled",
        "split": "nothing is reconstructed, and no prior scores images",
        "perceptual": "LPIPS is of reconstructions",
    },
    "prior": {"perceptual": "LPIPS is of reconstructions"},
}
"""Options that do nothing beside another one, and why: whoever gives them has something else in mind."""


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
    root: str | None = None
    """Where the images of the training are now; null: where they were then."""
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
        mode = "samples" if self.samples else "tokenizer" if self.tokenizer else "prior"
        for name, reason in MEANS_NOTHING[mode].items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name} cannot be used with --{mode}: {reason}")
        if self.out is not None and not Path(self.out).name:
            raise ValueError(f"--out {self.out}: is a folder; name the results in it, e.g. {self.out}/results")
        check_reference(self.reference)
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
    data = data_set(config, loaded)
    pictures, size = data.pictures(config.split), loaded.tokenizer.config.image_size
    lpips = Perceptual(config.perceptual, size).to(accelerator.device) if config.perceptual.weight else None
    source = SplitSource(pictures, some(config.n or len(pictures), len(pictures), config.seed))
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
        "pictures": f"{number:,} of {len(pictures):,}" + (", drawn at random" if number < len(pictures) else ""),
        "reference": "the originals of the same pictures",
        "pixels": "a reconstruction is rounded to eight bits before anything is measured",
        **({"LPIPS": described_lpips(config.perceptual)} if lpips else {}),
        **measuring.stated(),
    }
    name = f"reconstructions-{kind}-{config.split}-{number}-{config.extractor.kind}-{digest_of(protocol)}"
    stem = Path(config.out) if config.out else loaded.path.parent / "evaluation" / name
    return stem, Evaluation("tokenizer", figures, protocol, warnings_of(number, None, extractor))


def evaluate_samples(config: EvaluateConfig, measuring: Measuring) -> tuple[Path, Evaluation]:
    """Compare samples with a data set; of a prior also measure how likely it finds images. Returns as the other one."""
    accelerator, extractor = measuring.accelerator, measuring.extractor
    prior = None
    if config.samples is None:
        prior = load_prior(config.prior or newest_run(Path("runs/stage2")), accelerator.device)
        data = data_set(config, prior.tokenizer, prior.data, prior.path)
        labels = labels_for(prior, data.pictures(config.split).classes)
        maker = PriorSource(Sampler(prior, config.sampling), None, config.seed)
        samples = sampled(accelerator, maker, config.n or SAMPLES, config.sampling.batch_size)
        folder, subject = samples.where.parent, f"Samples of {prior.path.parent.name}"
        says: dict[str, Any] = {
            "prior": maker.settings(),
            "sampling": config.sampling.tree(),
            "scored": data.described(config.split),
        }
        if prior.classes:
            says["classes"] = f"{len(prior.classes):,} in turn, so all alike, whatever their shares in the data are"
    else:
        data = trained_on(config)
        samples = given(Path(config.samples), config.n, config.seed)
        folder, subject, says = folder_of_results(samples.where), f"Pictures of {samples.where}", {}
    found = measuring.features(samples.source, "samples", logits=True)
    reference = data.reference(measuring, config.reference)
    figures = sample_figures(found, reference, extractor, config.seed)
    warnings = warnings_of(found.count, reference.moments.count, extractor)
    warnings += comparison_warnings(samples.source, reference)
    if prior is not None:
        figures += bits_of(config, measuring, prior, labels, data.pictures(config.split))
        if prior.classes and found.count % len(prior.classes):
            warnings.append(f"{found.count:,} samples have the {len(prior.classes):,} classes not equally often")
        if samples.per_second is not None:
            where = f"{accelerator.num_processes} x {described_machine(accelerator.device)}"
            figures.append(Figure("throughput", "samples per second", samples.per_second, None, "", "higher", where))
    protocol = {
        "subject": subject,
        "samples": f"{found.count:,} of {samples.of:,} in {samples.where}",
        **says,
        "reference": reference.provenance,
        **measuring.stated(),
    }
    shown = reference.provenance["data"].get("split", "file")
    name = f"{samples.where.stem}-to-{shown}-{found.count}-{config.extractor.kind}-{digest_of(protocol)}"
    stem = Path(config.out) if config.out else folder / name
    picture = stem.with_name(stem.name + NEAREST)
    on_main(accelerator, lambda: picture.unlink(missing_ok=True))  # one of before would not be of these samples
    if config.nearest:
        copies = memorised(config, measuring, samples.source, data, reference)
        if isinstance(copies, str):
            warnings.append(f"training images nearest to samples were not looked for: {copies}")
        else:
            figures += copies.figures
            protocol["memorisation"] = copies.says
            on_main(accelerator, lambda: save_png(picture, copies.picture))
    return stem, Evaluation("prior" if prior else "samples", figures, protocol, warnings)


def bits_of(
    config: EvaluateConfig, measuring: Measuring, prior: LoadedPrior, labels: NDArray[np.int64], pictures: Pictures
) -> list[Figure]:
    """How likely the prior finds a split's images. Raises BadFileError: scores that are not finite."""
    wanted = ScoreConfig(batch_size=config.batch_size)
    scores = score(measuring.accelerator, prior, pictures, len(pictures), labels, wanted)
    if not bool(torch.isfinite(scores.nats).all()):
        raise BadFileError(f"{prior.path}: gives scores that are not finite: its weights are damaged")
    length, unigram = prior.model.shape.length, scores.use.entropy_bits
    return likelihood_figures(scores.nats, length, unigram, config.split, config.seed)


def memorised(
    config: EvaluateConfig, measuring: Measuring, samples: Source, data: DataSet, reference: Reference
) -> Copies | str:
    """The training images nearest to samples; or why they cannot be looked for."""
    total, theirs = len(data.pictures("train")), data.source("train").read(np.arange(1)).shape
    mine = samples.read(np.arange(1)).shape
    if mine[2:] != theirs[2:]:
        return f"samples are {mine[2]}x{mine[3]}, training images {theirs[2]}x{theirs[3]}"
    if mine[1] != theirs[1] and config.samples and not is_grey(samples):
        return "samples have colours, training images have none"
    if total < NEIGHBOURS_SHOWN:
        return f"there are only {total} training images"
    trained = reference if config.reference == "train" else data.reference(measuring, "train")
    assert trained.features is not None
    assert trained.indices is not None
    training = SplitSource(data.pictures("train"), trained.indices.numpy())
    flip, held_out = data.config.flip, data.source("validation")
    return look_for_copies(measuring, samples, training, trained.features, held_out, config.nearest, flip, total)


def data_set(
    config: EvaluateConfig, tokenizer: LoadedTokenizer, tree: Tree | None = None, source: Path | None = None
) -> DataSet:
    """The data of a training, or those given. Raises ConfigError unless they are such as the tokenizer takes.

    tree, source: the data config and the file that it is from; None: the tokenizer's own.
    """
    header = data_config(tree or tokenizer.data, str(source or tokenizer.path))
    if config.root is not None and (config.data is not None or isinstance(header, ShapesConfig)):
        raise ConfigError(f"--root {config.root}: the images are drawn, or --data says where they are; leave it out")
    data = DataSet(config.data or moved(header, config.root))
    wanted, size = tokenizer.tokenizer.config.image_channels, tokenizer.tokenizer.config.image_size
    if data.config.image_size != size:
        given_size = "x".join(map(str, data.config.image_size))
        raise ConfigError(f"data.image_size is {given_size}, but {tokenizer.path} was trained on {size[0]}x{size[1]}")
    channels = data.pictures(config.split).channels
    if channels != wanted:
        raise ConfigError(f"the images have {channels} channels, but {tokenizer.path} was trained on {wanted}")
    return data


def trained_on(config: EvaluateConfig) -> DataSet:
    """The data set that given samples are to be compared with. Raises ConfigError where nothing says which."""
    if config.data is not None:
        return DataSet(config.data)
    if config.prior is not None:
        prior = load_prior(config.prior)
        return data_set(config, prior.tokenizer, prior.data, prior.path)
    if config.tokenizer is not None:
        return data_set(config, LoadedTokenizer.load(config.tokenizer))
    raise ConfigError(
        f"--samples {config.samples}: name what to compare them with: the run that was trained on it, with --prior or "
        "--tokenizer, or the data set itself, with --data.kind"
    )


if __name__ == "__main__":
    run_command(main)
