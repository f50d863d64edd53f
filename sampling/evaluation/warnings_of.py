"""What a reader must know before believing the figures of an evaluation."""

import numpy as np

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.reference import Reference
from sampling.evaluation.sources import Source
from sampling.evaluation.tables import GROUPS

PUBLISHED = 50_000
"""Pictures behind a published FID."""


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
