"""The two subjects of an evaluation: a tokenizer, by its reconstructions, and samples, of a prior or given as files."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sampling.evaluation.features import Evaluator
from sampling.evaluation.memorisation import NEIGHBOURS, Memorisation, is_grey, measure_memorisation
from sampling.evaluation.metrics import (
    code_metrics,
    comparison_warnings,
    distance_warnings,
    likelihood_metric,
    reconstruction_metrics,
    sample_metrics,
)
from sampling.evaluation.options import EvaluateConfig, build_data_set, data_of_samples
from sampling.evaluation.perturbation import CodePerturbation
from sampling.evaluation.reconstructions import lpips_description, lpips_per_image, measure_reconstructions
from sampling.evaluation.reference import DataSet, Reference, load_reference
from sampling.evaluation.results import Evaluation, Metric, machine_name, protocol_digest
from sampling.evaluation.sources import (
    NEAREST,
    ImageSource,
    SampleSet,
    SplitSource,
    check_count,
    image_shape,
    open_images,
    random_indices,
    results_folder,
    sample_prior,
)
from sampling.sampler import Sampler
from sampling.sampling_loop import PriorSource
from sampling.saved_images import save_png
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.perceptual import Perceptual
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.prior import LoadedPrior, load_prior, match_labels
from stage2_prior.scoring import score_images

DEFAULT_SAMPLES = 10_000
"""Samples to draw from a prior if no number is given. Published FIDs use 50,000; an FID of fewer samples is larger."""


def evaluate_tokenizer(config: EvaluateConfig, evaluator: Evaluator) -> tuple[Path, Evaluation]:
    """Compare a split with its reconstructions. Returns the results, and before them their path without ending."""
    accelerator, extractor, chosen = evaluator.accelerator, evaluator.optional_extractor, config.perturbation
    assert config.tokenizer is not None
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    perturb = None
    if chosen.codes:
        perturb = CodePerturbation(chosen, loaded.tokenizer.bottleneck, config.seed, accelerator.device)
    data = build_data_set(config, loaded)
    images, size = data.image_batches(config.measured_split), loaded.tokenizer.config.image_size
    lpips = Perceptual(config.perceptual, size).to(accelerator.device) if config.measures_lpips else None
    source = SplitSource(images, random_indices(config.n or len(images), len(images), config.seed))
    kind, count, split = data.config.kind, len(source), "all" if data.whole else config.measured_split
    what = f"of all {len(images):,} images in {data.whole}" if data.whole else f"{split} images of {kind}"
    accelerator.print(f"reconstructing {count:,} {one_line(what)} with {one_line(loaded.source)}")
    measured = measure_reconstructions(
        accelerator, loaded, source, extractor, lpips_per_image(lpips) if lpips else None, config.batch_size, perturb
    )
    metrics = reconstruction_metrics(measured, extractor, config.perceptual.net, config.seed, bool(perturb))
    metrics += code_metrics(measured, loaded.tokenizer)
    protocol = {
        "subject": f"Reconstructions of {loaded.outputs.name}" + (" from perturbed codes" if perturb else ""),
        "tokenizer": {"file": loaded.source, "step": loaded.step, "fingerprint": loaded.fingerprint},
        "data": data.provenance(config.measured_split),
        "pictures": f"{count:,} of {len(images):,}" + (", drawn at random" if count < len(images) else ""),
        "reference": "the originals of the same images",
        "pixels": "a reconstruction is rounded to eight bits before anything is measured",
        **({"perturbation": {**chosen.tree(), "seed": config.seed}} if perturb else {}),
        **({"LPIPS": lpips_description(config.perceptual)} if lpips else {}),
        **evaluator.protocol(),
    }
    begin = "perturbed" if perturb else "reconstructions"
    name = f"{begin}-{kind}-{split}-{count}-{config.extractor.kind}-{protocol_digest(protocol)}"
    stem = Path(config.out) if config.out else loaded.outputs / "evaluation" / name
    return stem, Evaluation("tokenizer", metrics, protocol, distance_warnings(count, None, extractor))


class _Comparison(NamedTuple):
    """Samples, what they are compared with, and the part of the protocol that is about them."""

    samples: SampleSet
    reference: Reference
    data: DataSet | None
    """The data set of the training; None: not known, and not needed."""
    prior: LoadedPrior | None
    """The prior that the samples were drawn from; None for given samples."""
    folder: Path
    """Folder for the results."""
    protocol: dict[str, Any]


def evaluate_samples(config: EvaluateConfig, evaluator: Evaluator) -> tuple[Path, Evaluation]:
    """Compare samples with a reference; for a prior also measure the bits per token of images.

    Returns the results, and before them their path without ending.
    """
    accelerator, extractor = evaluator.accelerator, evaluator.extractor
    samples, reference, data, prior, folder, facts = (
        _given_samples(config, evaluator) if config.samples else _samples_of_prior(config, evaluator)
    )
    features = evaluator.extract(samples.source, "samples", logits=True)
    metrics = sample_metrics(features, reference, extractor, config.seed)
    warnings = distance_warnings(features.count, reference.moments.count, extractor)
    warnings += comparison_warnings(samples.source, reference)
    if prior is not None and data is not None:
        metrics.append(_bits_per_token(config, evaluator, prior, data))
        if prior.classes and features.count % len(prior.classes):
            warnings.append(
                f"{features.count:,} samples are no multiple of {len(prior.classes):,} classes: some classes have one "
                "sample more than others"
            )
        if samples.images_per_second is not None:
            machine = f"{accelerator.num_processes} x {machine_name(accelerator.device)}"
            speed = samples.images_per_second
            metrics.append(Metric("throughput", "samples per second", speed, None, "", "higher", machine))
    protocol = {
        "subject": facts.pop("subject"),
        "samples": f"{features.count:,} of {samples.total:,} in {samples.path}",
        **facts,
        "reference": reference.provenance,
        **evaluator.protocol(),
    }
    compared_with = reference.provenance["data"].get("split", "file")
    digest = protocol_digest(protocol)
    name = f"{samples.path.stem}-to-{compared_with}-{features.count}-{config.extractor.kind}-{digest}"
    stem = Path(config.out) if config.out else folder / name
    image = stem.with_name(stem.name + NEAREST)
    run_on_main(accelerator, lambda: image.unlink(missing_ok=True))  # it may be of an earlier evaluation's samples
    if config.nearest and data is not None:
        found = _memorisation(config, evaluator, samples.source, data, reference)
        if isinstance(found, str):
            warnings.append(f"no search for the training images nearest to samples: {found}")
        else:
            metrics += found.metrics
            protocol["memorisation"] = found.description
            run_on_main(accelerator, lambda: save_png(image, found.image))
    return stem, Evaluation("prior" if prior else "samples", metrics, protocol, warnings)


def _samples_of_prior(config: EvaluateConfig, evaluator: Evaluator) -> _Comparison:
    """Sample a prior, or use the samples that an earlier evaluation drew."""
    prior = load_prior(config.prior, evaluator.accelerator.device)
    data = build_data_set(config, prior.tokenizer, prior.data, prior.path)
    # An unusable class or reference ends the evaluation here, before hours of sampling.
    match_labels(prior, data.image_batches(config.measured_split).classes)
    reference = load_reference(evaluator, config.reference, data)
    source = PriorSource(Sampler(prior, config.sampling), None, config.seed)
    samples = sample_prior(evaluator.accelerator, source, config.n or DEFAULT_SAMPLES, config.sampling.batch_size)
    protocol: dict[str, Any] = {
        "subject": f"Samples of {prior.outputs.name}",
        "prior": source.settings(),
        "sampling": config.sampling.tree(),
        "scored": data.provenance(config.measured_split),
    }
    if prior.classes:
        protocol["classes"] = f"{len(prior.classes):,} in turn, so equally often, whatever their shares in the data are"
    return _Comparison(samples, reference, data, prior, samples.path.parent, protocol)


def _given_samples(config: EvaluateConfig, evaluator: Evaluator) -> _Comparison:
    """Open the samples that --samples names."""
    data = data_of_samples(config)
    samples = open_images(Path(str(config.samples)), config.n, config.seed)
    check_count(samples.source, "samples")
    reference = load_reference(evaluator, config.reference, data)
    folder, protocol = results_folder(samples.path), {"subject": f"Images of {samples.path}"}
    return _Comparison(samples, reference, data, None, folder, protocol)


def _bits_per_token(config: EvaluateConfig, evaluator: Evaluator, prior: LoadedPrior, data: DataSet) -> Metric:
    """Measure the bits per token that the prior needs for a split. Raises BadFileError: they are not finite."""
    images = data.image_batches(config.measured_split)
    labels: NDArray[np.int64] = match_labels(prior, images.classes)
    scores = score_images(evaluator.accelerator, prior, images, labels, len(images), config.batch_size)
    length, unigram_bits = prior.model.shape.length, scores.use.entropy_bits
    return likelihood_metric(scores.nats, length, unigram_bits, config.measured_split, config.seed)


def _memorisation(
    config: EvaluateConfig, evaluator: Evaluator, samples: ImageSource, data: DataSet, reference: Reference
) -> Memorisation | str:
    """Search for the training images nearest to samples. Returns the reason, if that is impossible."""
    train = data.image_batches("train")
    channels, *size = image_shape(samples)
    train_channels, *train_size = image_shape(data.source("train"))
    if size != train_size:
        return f"samples are {size[0]}x{size[1]}, training images {train_size[0]}x{train_size[1]}"
    if channels != train_channels and config.samples and not is_grey(samples):
        return "samples have colours, training images have none"
    if len(train) < NEIGHBOURS:
        return f"there are only {len(train)} training images, and {NEIGHBOURS} are needed"
    known = reference if config.reference == "train" else data.reference(evaluator, "train")
    assert known.features is not None
    assert known.indices is not None
    return measure_memorisation(
        evaluator,
        samples,
        SplitSource(train, known.indices.numpy()),
        known.features,
        data.source("validation"),
        config.nearest,
        mirrored=data.config.flip,
        training_total=len(train),
    )
