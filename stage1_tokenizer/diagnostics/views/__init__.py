"""The views of a trained tokenizer. To add one: a file here and an entry in VIEWS; analyze.py and the page show it."""

from stage1_tokenizer.diagnostics.views import (
    atlas,
    codebook_map,
    curves,
    failures,
    holes,
    latent_maps,
    masked_latents,
    random_codes,
    reconstructions,
    tokens,
    usage,
)  # fmt: skip

VIEWS = (
    reconstructions.VIEW,
    failures.VIEW,
    holes.VIEW,
    curves.VIEW,
    random_codes.VIEW,
    latent_maps.VIEW,
    masked_latents.VIEW,
    codebook_map.VIEW,
    usage.VIEW,
    atlas.VIEW,
    tokens.VIEW,
)
"""All views in the order of the page and of analyze.py."""
