"""The figures of an evaluation, from what was measured, and the warnings that a reader needs before believing them.

Only of Inception's features is anything called FID, KID or inception score: of another network these are other numbers.
"""

import math
from typing import Literal

import numpy as np
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
from sampling.evaluation.reconstructions import Reconstructions, bits_per_image
from sampling.evaluation.reference import Reference
from sampling.evaluation.results import Figure
from sampling.evaluation.sources import Source
from stage1_tokenizer.tokenizer import Tokenizer

GROUPS = 20
"""Of the jackknife."""
SPLITS = 10
"""Of the inception score, as published."""
NEIGHBOURS, NEIGHBOURS_OF_DENSITY = 3, 5
"""Which neighbour a ball reaches to, as published."""
PUBLISHED = 50_000
"""Pictures behind a published FID."""
COMPARED = 10_000
"""Pictures of each side at most that every one is compared with every other one of."""


def reconstruction_figures(
    found: Reconstructions, tokenizer: Tokenizer, extractor: Extractor | None, net: str, seed: int
) -> list[Figure]:
    """Return the figures of a tokenizer; without an extractor no distance is among them."""
    figures = _reconstruction_distance(found, extractor, seed)
    of_each: list[tuple[str, str, Tensor, str, Literal["lower", "higher"], str]] = [
        ("psnr", "PSNR", found.psnr, "dB", "higher", ""),
        ("ssim", "SSIM", found.ssim, "", "higher", ""),
        (
            "nmse",
            "NMSE",
            found.squared_error / found.variance,
            "",
            "lower",
            "error over the originals' variance",
        ),
    ]
    if found.lpips is not None:
        of_each.append(("lpips", f"LPIPS ({net})", found.lpips, "", "lower", ""))
    for key, says, values, unit, better, note in of_each:
        interval = bootstrap_mean(values, seed)
        figures.append(Figure(key, says, float(values.mean()), interval, unit, better, note))
    return [*figures, *_code_figures(found, tokenizer)]


def _reconstruction_distance(found: Reconstructions, extractor: Extractor | None, seed: int) -> list[Figure]:
    if extractor is None or found.made is None or found.originals is None:
        return []
    name, label = ("rfid", "rFID") if extractor.is_inception else ("rfd", _called("Fréchet distance", extractor))
    value = frechet_distance(found.made.moments, found.originals.moments)
    interval = None
    if found.made.count >= 2 * GROUPS:
        interval = paired_frechet_interval(found.made.features, found.originals.features, seed, GROUPS)
    return [Figure(name, label, value, interval, "", "lower", "of reconstructions from originals")]


def sample_figures(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> list[Figure]:
    """Of samples beside a reference."""
    return [
        _frechet(samples, reference, extractor, seed),
        *_kernel(samples, reference, extractor, seed),
        *_score(samples, extractor, seed),
        *_manifold(samples, reference, extractor, seed),
    ]


def likelihood_figures(nats: Tensor, length: int, unigram_bits: float, split: str, seed: int) -> list[Figure]:
    """nats (N,) of images of `length` tokens."""
    bits = nats / (length * math.log(2))
    note = f"on {len(bits):,} {split} images; by the codes' frequencies alone {unigram_bits:.3f}"
    return [
        Figure("bits_per_token", "bits per token", float(bits.mean()), bootstrap_mean(bits, seed), "", "lower", note)
    ]


def _frechet(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> Figure:
    name, label = ("fid", "FID") if extractor.is_inception else ("fd", _called("Fréchet distance", extractor))
    value = frechet_distance(samples.moments, reference.moments)
    interval = None
    if samples.count >= 2 * GROUPS:
        interval = frechet_interval(samples.features, reference.moments, seed, GROUPS)
    return Figure(name, label, value, interval, "", "lower", "the reference is taken as it is")


def _kernel(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> list[Figure]:
    if reference.features is None:
        return []
    name, label = ("kid", "KID") if extractor.is_inception else ("kd", _called("kernel distance", extractor))
    found = kernel_distance(samples.features, reference.features, seed=seed)
    interval = None
    if samples.count >= 2 * GROUPS:
        interval = kernel_interval(samples.features, reference.features, found.mean, seed, GROUPS)
    note = f"mean of 100 subsets of {found.subset_size:,}, whose deviation is {found.std:.3g}"
    return [Figure(name, label, found.mean, interval, "", "lower", note)]


def _score(samples: Features, extractor: Extractor, seed: int) -> list[Figure]:
    if samples.logits is None or samples.count < 2 * GROUPS:
        return []
    name, label = ("is", "inception score") if extractor.is_inception else ("cs", _called("class score", extractor))
    found = inception_score(samples.logits, SPLITS, seed)
    interval = score_interval(samples.logits, seed, SPLITS, GROUPS)
    note = f"over {SPLITS} splits, whose deviation is {found.std:.3g}"
    return [Figure(name, label, found.mean, interval, "", "higher", note)]


def _manifold(samples: Features, reference: Reference, extractor: Extractor, seed: int) -> list[Figure]:
    if reference.features is None or min(samples.count, len(reference.features)) <= NEIGHBOURS_OF_DENSITY:
        return []
    sizes = (NEIGHBOURS, NEIGHBOURS_OF_DENSITY, COMPARED, seed)
    groups = GROUPS if samples.count >= 2 * GROUPS else 1
    each = manifold(samples.features, reference.features, *sizes, groups)
    of_samples = [bootstrap_mean(part, seed) if groups > 1 else None for part in (each.precision, each.density)]
    of_reference = [
        any_interval(part) if groups > 1 else None for part in (each.recall_by_group, each.coverage_by_group)
    ]
    precision, recall = (float(part.float().mean()) for part in (each.precision, each.recall))
    used = f"{min(COMPARED, samples.count):,} samples, {min(COMPARED, len(reference.features)):,} reference pictures"
    near, balls = (f"{used}; neighbour {k}" for k in sizes[:2])
    return [
        Figure("precision", "precision", precision, of_samples[0], "", "higher", near),
        Figure("recall", "recall", recall, of_reference[0], "", "higher", near),
        Figure("density", "density", float(each.density.mean()), of_samples[1], "", "higher", balls),
        Figure(
            "coverage",
            "coverage",
            float(each.coverage.double().mean()),
            of_reference[1],
            "",
            "higher",
            balls,
        ),
    ]


def _code_figures(found: Reconstructions, tokenizer: Tokenizer) -> list[Figure]:
    """How the codebook is used; none of a continuous latent."""
    if not tokenizer.bottleneck.depth:
        return []
    height, width = tokenizer.config.image_size
    bits, size = bits_per_image(tokenizer), tokenizer.shape.V
    return [
        Figure("code_usage", "codes in use", 100.0 * found.use.usage, None, "%", "higher", f"of {size:,}"),
        Figure("code_perplexity", "codebook perplexity", found.use.perplexity, None, "", "higher", f"at most {size:,}"),
        Figure("bits_per_image", "bits per image", bits, None, "", "lower", f"{bits / (height * width):.3g} per pixel"),
    ]


def _called(what: str, extractor: Extractor) -> str:
    return f"{what}, {extractor.name}"


def warnings_of(count: int, reference_count: int | None, extractor: Extractor | None) -> list[str]:
    """Return what must be known before distances are believed; nothing without an extractor, for there are none then.

    reference_count: None where it is not known, or the same.
    """
    found: list[str] = []
    if extractor is None:
        return found
    if not extractor.is_inception:
        found.append(
            f"features are those of {extractor.name}: no distance here is an FID or KID, and none can be compared with "
            "one; compare only figures of the same extractor, reference and counts"
        )
    else:
        found.append(
            "pictures are resized antialiased, as the protocol says; tools that resize as TensorFlow did (the ADM "
            "suite, torch-fidelity) give other figures of the same pictures"
        )
    fewest = min(count, reference_count or count)
    if fewest <= extractor.dimension:
        found.append(
            f"{fewest:,} pictures span fewer than the features' {extractor.dimension:,} dimensions, and that dominates "
            "the Fréchet distance; take more pictures"
        )
    elif count < PUBLISHED:
        found.append(
            f"a Fréchet distance falls with the number of pictures: of {count:,} it is larger than of the "
            f"{PUBLISHED:,} that are usual"
        )
    if count < 2 * GROUPS:
        found.append(f"of {count} pictures there are no intervals but those of means; these need {2 * GROUPS}")
    return found


def comparison_warnings(samples: Source, reference: Reference) -> list[str]:
    """Of samples beside this reference."""
    found = []
    if reference.features is None:
        found.append(
            "the reference is moments alone: how its pictures were resized is not known, and KID, precision, recall, "
            "density and coverage cannot be had"
        )
    elif reference.moments.count is not None and len(reference.features) < reference.moments.count:
        found.append(
            f"all but the Fréchet distance compare with {len(reference.features):,} of the reference's "
            f"{reference.moments.count:,} pictures, drawn at random"
        )
    height, width = samples.read(np.arange(1)).shape[2:]
    if reference.size is not None and reference.size != (height, width):
        theirs = f"{reference.size[0]}x{reference.size[1]}"
        found.append(f"samples are {height}x{width} and the reference's pictures {theirs}, which distances feel too")
    return found
