"""The metrics of an evaluation, computed from its measurements, and the warnings that a reader of them needs.

Only with Inception's features are they called FID, KID and inception score, because those of other networks differ.
"""

import math
from typing import Literal

from torch import Tensor

from sampling.evaluation.distances import frechet_distance, inception_score, kernel_distance, manifold
from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Features
from sampling.evaluation.intervals import (
    any_interval,
    bootstrap_mean,
    frechet_interval,
    kernel_interval,
    paired_frechet_interval,
    score_interval,
)
from sampling.evaluation.reconstructions import MeasuredReconstructions
from sampling.evaluation.reference import Reference
from sampling.evaluation.results import Metric
from sampling.evaluation.sources import ImageSource, image_shape
from stage1_tokenizer.tokenizer import Tokenizer

GROUPS = 20
"""Groups of a jackknife."""
FEWEST = 2 * GROUPS
"""Images that a jackknife needs."""
SPLITS = 10
"""Splits of the inception score, as published."""
K, K_DENSITY = 3, 5
"""Neighbour that sets the radius of a ball, as published: for precision and recall, for density and coverage."""
PUBLISHED = 50_000
"""Images behind a published FID."""
COMPARED = 10_000
"""Largest number of images of each side for precision, recall, density and coverage."""


def reconstruction_metrics(
    measured: MeasuredReconstructions, extractor: Extractor | None, net: str, seed: int, is_perturbed: bool
) -> list[Metric]:
    """Return the metrics of reconstructions. net: LPIPS's network. Without an extractor there is no Fréchet distance.

    is_perturbed: names and labels state that the codes were perturbed.
    """
    metrics: list[Metric] = []
    originals, reconstructed = measured.originals, measured.reconstructed
    if extractor is not None and originals is not None and reconstructed is not None:
        name, label = _names(extractor, ("rfid", "rFID"), ("rfd", "Fréchet distance"))
        value = frechet_distance(reconstructed.moments, originals.moments)
        interval = None
        if reconstructed.count >= FEWEST:
            interval = paired_frechet_interval(reconstructed.features, originals.features, seed, GROUPS)
        metrics.append(Metric(name, label, value, interval, "", "lower", "of reconstructions from originals"))
    nmse = measured.squared_error / measured.variance
    columns: list[tuple[str, str, Tensor | None, str, Literal["lower", "higher"], str]] = [
        ("psnr", "PSNR", measured.psnr, "dB", "higher", ""),
        ("ssim", "SSIM", measured.ssim, "", "higher", ""),
        ("nmse", "NMSE", nmse, "", "lower", "error over the originals' variance"),
        ("lpips", f"LPIPS ({net})", measured.lpips, "", "lower", ""),
    ]
    metrics += [
        Metric(name, label, float(values.mean()), bootstrap_mean(values, seed), unit, better, note)
        for name, label, values, unit, better, note in columns
        if values is not None
    ]
    if not is_perturbed:
        return metrics
    return [
        metric._replace(name=f"perturbed_{metric.name}", label=f"{metric.label}, perturbed codes") for metric in metrics
    ]


def code_metrics(measured: MeasuredReconstructions, tokenizer: Tokenizer) -> list[Metric]:
    """Return the metrics of the codebook's use; none for a continuous latent."""
    if not tokenizer.bottleneck.depth:
        return []
    height, width = tokenizer.config.image_size
    size, use = tokenizer.shape.V, measured.use
    bits = tokenizer.shape.length * math.log2(size)  # without entropy coding
    return [
        Metric("code_usage", "codes in use", 100.0 * use.usage, None, "%", "higher", f"of {size:,}"),
        Metric("code_perplexity", "codebook perplexity", use.perplexity, None, "", "higher", f"at most {size:,}"),
        Metric("bits_per_image", "bits per image", bits, None, "", "lower", f"{bits / (height * width):.3g} per pixel"),
    ]


def sample_metrics(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> list[Metric]:
    """Return the metrics of samples compared with a reference."""
    return [
        _frechet(samples, reference, extractor, seed),
        *_kernel(samples, reference, extractor, seed),
        *_score(samples, extractor, seed),
        *_manifold(samples, reference, seed),
    ]


def likelihood_metric(nats: Tensor, length: int, unigram_bits: float, split: str, seed: int) -> Metric:
    """Return the bits per token, given the nats (N,) of images of `length` tokens."""
    bits = nats / (length * math.log(2))
    note = f"on {len(bits):,} {split} images; by the codes' frequencies alone {unigram_bits:.3f}"
    return Metric("bits_per_token", "bits per token", float(bits.mean()), bootstrap_mean(bits, seed), "", "lower", note)


def _frechet(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> Metric:
    name, label = _names(extractor, ("fid", "FID"), ("fd", "Fréchet distance"))
    value = frechet_distance(samples.moments, reference.moments)
    interval = None
    if samples.count >= FEWEST:
        interval = frechet_interval(samples.features, reference.moments, seed, GROUPS)
    return Metric(name, label, value, interval, "", "lower", "the reference is taken as it is")


def _kernel(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> list[Metric]:
    if reference.features is None:
        return []
    name, label = _names(extractor, ("kid", "KID"), ("kd", "kernel distance"))
    distance = kernel_distance(samples.features, reference.features, seed=seed)
    interval = None
    if samples.count >= FEWEST:
        interval = kernel_interval(samples.features, reference.features, distance.mean, seed, GROUPS)
    note = f"mean of 100 subsets of {distance.subset_size:,}, whose deviation is {distance.std:.3g}"
    return [Metric(name, label, distance.mean, interval, "", "lower", note)]


def _score(samples: Features, extractor: Extractor, seed: int) -> list[Metric]:
    if samples.logits is None or samples.count < FEWEST:
        return []
    name, label = _names(extractor, ("is", "inception score"), ("cs", "class score"))
    score = inception_score(samples.logits, SPLITS, seed)
    interval = score_interval(samples.logits, seed, SPLITS, GROUPS)
    note = f"over {SPLITS} splits, whose deviation is {score.std:.3g}"
    return [Metric(name, label, score.mean, interval, "", "higher", note)]


def _manifold(samples: Features, reference: Reference, seed: int) -> list[Metric]:
    if reference.features is None or min(samples.count, len(reference.features)) <= K_DENSITY:
        return []
    has_intervals = samples.count >= FEWEST
    groups = GROUPS if has_intervals else 1
    values = manifold(samples.features, reference.features, K, K_DENSITY, COMPARED, seed, groups)
    used = f"{min(COMPARED, samples.count):,} samples, {min(COMPARED, len(reference.features)):,} reference images"
    metrics = []
    for name, value, by_group, k in (
        ("precision", values.precision.float(), None, K),
        ("recall", values.recall.float(), values.recall_by_group, K),
        ("density", values.density, None, K_DENSITY),
        ("coverage", values.coverage.double(), values.coverage_by_group, K_DENSITY),
    ):
        interval = None
        if has_intervals:
            interval = bootstrap_mean(value, seed) if by_group is None else any_interval(by_group)
        metrics.append(Metric(name, name, float(value.mean()), interval, "", "higher", f"{used}; neighbour {k}"))
    return metrics


def _names(extractor: Extractor, published: tuple[str, str], other: tuple[str, str]) -> tuple[str, str]:
    """Return name and label of a metric: the published ones, or for other features than Inception's the other ones."""
    return published if extractor.is_inception else (other[0], f"{other[1]}, {extractor.name}")


def distance_warnings(count: int, reference_count: int | None, extractor: Extractor | None) -> list[str]:
    """Return the facts that limit the meaning of distances; none without an extractor.

    reference_count: number of the reference's images; None: unknown, or equal to `count`.
    """
    if extractor is None:
        return []
    warnings = []
    if not extractor.is_inception:
        warnings.append(
            f"the features are those of {extractor.name}: no distance here is an FID or KID, and none can be compared "
            "with one; compare only metrics of the same extractor, reference and counts"
        )
    else:
        warnings.append(
            "images are resized antialiased, as the protocol says; tools that resize as TensorFlow did (the ADM suite, "
            "torch-fidelity) give other values for the same images"
        )
    fewest = min(count, reference_count or count)
    if fewest <= extractor.dimension:
        warnings.append(
            f"{fewest:,} images are too few for {extractor.dimension:,} features: their covariance is singular, which "
            "dominates the Fréchet distance; measure more images"
        )
    elif count < PUBLISHED:
        warnings.append(
            f"a Fréchet distance falls as the number of images rises: for {count:,} it is larger than for the usual "
            f"{PUBLISHED:,}"
        )
    if count < FEWEST:
        warnings.append(f"{count} images have no intervals except those of means; the others need {FEWEST} images")
    return warnings


def comparison_warnings(samples: ImageSource, reference: Reference) -> list[str]:
    """Return the facts that limit the comparison of samples with this reference."""
    warnings = []
    if reference.features is None:
        warnings.append(
            "the reference has moments only: how its images were resized is not known, and KID, precision, recall, "
            "density and coverage cannot be computed"
        )
    elif reference.moments.count is not None and len(reference.features) < reference.moments.count:
        warnings.append(
            f"all metrics except the Fréchet distance use {len(reference.features):,} random images of the reference's "
            f"{reference.moments.count:,}"
        )
    _, height, width = image_shape(samples)
    if reference.size is not None and reference.size != (height, width):
        size = f"{reference.size[0]}x{reference.size[1]}"
        warnings.append(f"samples are {height}x{width}, but the reference's images {size}, which changes distances too")
    return warnings
