"""The two subjects of an evaluation: a tokenizer, by its reconstructions, and samples, of a prior or given ones."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sampling.evaluation.features import Measuring
from sampling.evaluation.memorisation import NEIGHBOURS_SHOWN, Copies, is_grey, look_for_copies
from sampling.evaluation.options import EvaluateConfig, data_set, trained_on
from sampling.evaluation.reconstructions import described_lpips, lpips_per_image, measure_reconstructions
from sampling.evaluation.reference import DataSet, Reference, reference_named
from sampling.evaluation.results import (
    Evaluation,
    Figure,
    described_machine,
    digest_of,
)
from sampling.evaluation.sources import (
    NEAREST,
    Source,
    SplitSource,
    check_set,
    folder_of_results,
    given,
    sampled,
    some,
)
from sampling.evaluation.tables import (
    comparison_warnings,
    likelihood_figures,
    reconstruction_figures,
    sample_figures,
    warnings_of,
)
from sampling.sampler import Sampler
from sampling.sampling_loop import PriorSource
from sampling.saved_images import save_png
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.perceptual import Perceptual
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.prior import LoadedPrior, load_prior, match_labels
from stage2_prior.scoring import score_images

DEFAULT_SAMPLES = 10_000
"""Samples to draw from a prior where no number is given. Published FIDs take 50,000; of fewer they are larger."""


def evaluate_tokenizer(config: EvaluateConfig, measuring: Measuring) -> tuple[Path, Evaluation]:
    """Reconstruct a split, and compare. Returns where the results go, and them."""
    accelerator, extractor = measuring.accelerator, measuring.network
    assert config.tokenizer is not None
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    data = data_set(config, loaded)
    pictures, size = data.image_batches(config.measured_split), loaded.tokenizer.config.image_size
    lpips = Perceptual(config.perceptual, size).to(accelerator.device) if config.measures_lpips else None
    source = SplitSource(pictures, some(config.n or len(pictures), len(pictures), config.seed))
    kind, number, split = data.config.kind, len(source), "all" if data.whole else config.measured_split
    what = f"of all {len(pictures):,} images in {data.whole}" if data.whole else f"{split} images of {kind}"
    accelerator.print(f"reconstructing {number:,} {one_line(what)} with {one_line(str(loaded.path))}")
    found = measure_reconstructions(
        accelerator, loaded, source, extractor, lpips_per_image(lpips) if lpips else None, config.batch_size
    )
    figures = reconstruction_figures(found, loaded.tokenizer, extractor, config.perceptual.net, config.seed)
    protocol = {
        "subject": f"Reconstructions of {loaded.path.parent.name}",
        "tokenizer": {"file": str(loaded.path), "step": loaded.step, "fingerprint": loaded.fingerprint},
        "data": data.described(config.measured_split),
        "pictures": f"{number:,} of {len(pictures):,}" + (", drawn at random" if number < len(pictures) else ""),
        "reference": "the originals of the same pictures",
        "pixels": "a reconstruction is rounded to eight bits before anything is measured",
        **({"LPIPS": described_lpips(config.perceptual)} if lpips else {}),
        **measuring.stated(),
    }
    name = f"reconstructions-{kind}-{split}-{number}-{config.extractor.kind}-{digest_of(protocol)}"
    stem = Path(config.out) if config.out else loaded.path.parent / "evaluation" / name
    return stem, Evaluation("tokenizer", figures, protocol, warnings_of(number, None, extractor))


def evaluate_samples(config: EvaluateConfig, measuring: Measuring) -> tuple[Path, Evaluation]:
    """Compare samples with a data set; of a prior also measure how likely it finds images. Returns as the other one."""
    accelerator, extractor = measuring.accelerator, measuring.extractor
    prior: LoadedPrior | None = None
    data: DataSet | None = None
    if config.samples is None:
        prior = load_prior(config.prior, accelerator.device)
        data = data_set(config, prior.tokenizer, prior.data, prior.path)
        labels = match_labels(prior, data.image_batches(config.measured_split).classes)
        maker = PriorSource(Sampler(prior, config.sampling), None, config.seed)
        reference = reference_named(measuring, config.reference, data)  # what is wrong with it shows before sampling
        samples = sampled(accelerator, maker, config.n or DEFAULT_SAMPLES, config.sampling.batch_size)
        folder, subject = samples.where.parent, f"Samples of {prior.path.parent.name}"
        says: dict[str, Any] = {
            "prior": maker.settings(),
            "sampling": config.sampling.tree(),
            "scored": data.described(config.measured_split),
        }
        if prior.classes:
            says["classes"] = f"{len(prior.classes):,} in turn, so all alike, whatever their shares in the data are"
    else:
        data = trained_on(config)
        samples = given(Path(config.samples), config.n, config.seed)
        check_set(samples.source, "samples")
        reference = reference_named(measuring, config.reference, data)
        folder, subject, says = folder_of_results(samples.where), f"Pictures of {samples.where}", {}
    found = measuring.features(samples.source, "samples", logits=True)
    figures = sample_figures(found, reference, extractor, config.seed)
    warnings = warnings_of(found.count, reference.moments.count, extractor)
    warnings += comparison_warnings(samples.source, reference)
    if prior is not None and data is not None:
        figures += bits_of(config, measuring, prior, labels, data.image_batches(config.measured_split))
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
    run_on_main(accelerator, lambda: picture.unlink(missing_ok=True))  # one of before would not be of these samples
    if config.nearest and data is not None:
        copies = memorised(config, measuring, samples.source, data, reference)
        if isinstance(copies, str):
            warnings.append(f"training images nearest to samples were not looked for: {copies}")
        else:
            figures += copies.figures
            protocol["memorisation"] = copies.says
            run_on_main(accelerator, lambda: save_png(picture, copies.picture))
    return stem, Evaluation("prior" if prior else "samples", figures, protocol, warnings)


def bits_of(
    config: EvaluateConfig, measuring: Measuring, prior: LoadedPrior, labels: NDArray[np.int64], pictures: ImageBatches
) -> list[Figure]:
    """Measure the bits per token that the prior needs for a split's images. Raises BadFileError: scores that are not
    finite."""
    scores = score_images(measuring.accelerator, prior, pictures, labels, len(pictures), config.batch_size)
    length, unigram = prior.model.shape.length, scores.use.entropy_bits
    return likelihood_figures(scores.nats, length, unigram, config.measured_split, config.seed)


def memorised(
    config: EvaluateConfig, measuring: Measuring, samples: Source, data: DataSet, reference: Reference
) -> Copies | str:
    """The training images nearest to samples; or why they cannot be looked for."""
    total, theirs = len(data.image_batches("train")), data.source("train").read(np.arange(1)).shape
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
    training = SplitSource(data.image_batches("train"), trained.indices.numpy())
    flip, held_out = data.config.flip, data.source("validation")
    return look_for_copies(
        measuring, samples, training, trained.features, held_out, config.nearest, mirrored=flip, trained_on=total
    )
