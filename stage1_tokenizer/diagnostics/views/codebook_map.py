"""The codebook on a plane: the positions of its vectors, their use, and the latents of the encoder."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.bottlenecks.quantizer import CodeSpace
from stage1_tokenizer.diagnostics.views.atlas import mean_patches
from stage1_tokenizer.diagnostics.views.base import (
    EncodedImages,
    Subject,
    View,
    codes_of,
    encoded_images,
    in_batches,
    once,
    tokenizer_device,
)  # fmt: skip
from stage1_tokenizer.diagnostics.views.projection import ProjectionKind, pca, umap
from stage1_tokenizer.diagnostics.views.sheet import GREY, INK, MARGIN, TOP, WIDTH, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LATENTS = 3000
"""Latents that are drawn behind the codebook vectors, at most."""
MOST_CODES = 4096
"""Codebook vectors that are drawn, at most, those of used codes first."""
COLUMNS = 2


class ProjectedCodebook(NamedTuple):
    """One codebook on the plane."""

    codes: Tensor
    """(n, 2), positions of all used codes and then of dead ones, at most MOST_CODES."""
    counts: Tensor
    """(n,) int64, 0 for a dead code."""
    colours: Tensor
    """(n, 3) in 0..1, mean colour of the patches; white for a dead code."""
    latents: Tensor
    """(m, 2), positions of latents; (0, 2) if they are not in the space of the codes."""
    axes_note: str
    """Description of the axes."""


def searched_vectors(encoded: EncodedImages) -> list[Tensor]:
    """Return for each codebook the vectors (N h w, d) whose nearest code the bottleneck searched.

    A bottleneck searches in a space of its own: after a projection, on the sphere, among residuals. This function tries
    each of these and accepts one if its nearest codes are those that the bottleneck chose. If none fits, the result for
    this codebook is (0, d).
    """
    codes, tokenizer = codes_of(encoded), encoded.tokenizer
    codebooks = [codebook.float().cpu() for codebook in tokenizer.bottleneck.codebooks()]
    spaces = [part for part in tokenizer.bottleneck.children() if isinstance(part, CodeSpace)]
    into = spaces[0].to_vectors if spaces else CodeSpace(encoded.z.shape[1], None).to_vectors
    residual = in_batches(into, encoded.z, tokenizer_device(tokenizer))  # (N h w, d)
    searched = []
    for k, codebook in enumerate(codebooks):
        ids = codes[..., k].flatten()  # (N h w,)
        if residual.shape[1] != codebook.shape[1]:
            searched.append(codebook[:0])
            continue
        some = torch.arange(0, len(ids), max(1, len(ids) // 500))
        fitting = [
            candidate
            for candidate in (residual, F.normalize(residual, dim=1))
            if (torch.cdist(candidate[some], codebook).argmin(dim=1) == ids[some]).float().mean() > 0.98
        ]
        searched.append(fitting[0] if fitting else codebook[:0])
        residual = residual - codebook[ids]
    return searched


def project_codebook(
    x: Tensor, codes: Tensor, codebook: Tensor, searched: Tensor, kind: ProjectionKind, seed: int
) -> ProjectedCodebook:
    """Project a codebook (V, d), used by codes (N, h, w) of images x (N, C, H, W), and the searched vectors (M, d)."""
    used, counts, patches = mean_patches(x, codes)
    is_dead = torch.ones(len(codebook), dtype=torch.bool)
    is_dead[used] = False
    ids = torch.cat([used, is_dead.nonzero()[:, 0]])[:MOST_CODES]
    all_counts = torch.zeros(len(codebook), dtype=torch.int64).index_copy_(0, used, counts)
    colours = torch.ones(len(codebook), 3)
    colours[used] = patches.mean(dim=(2, 3)).add(1).div(2).clamp(0, 1).expand(-1, 3)  # (U, 1 or 3) -> (U, 3)
    latents = searched[:: max(1, len(searched) // MOST_LATENTS)][:MOST_LATENTS]
    both = torch.cat([codebook[ids], latents])
    if kind == "umap" and len(both) > 3:
        projected, axes_note = umap(both, seed), "UMAP: only neighbourhoods have a meaning"
    else:
        # Axes of the used codes only, because dead codes may be far away.
        components = pca(codebook[used] if len(used) > 2 else both, 2)
        projected = components(both)
        first, second = (f"{share:.0%}" for share in components.explained.tolist())
        axes_note = f"PCA, {first} across and {second} up of the used codes' variance"
    return ProjectedCodebook(projected[: len(ids)], all_counts[ids], colours[ids], projected[len(ids) :], axes_note)


def _draw_plane(axes: "Axes", projected: ProjectedCodebook) -> None:
    is_used = projected.counts > 0
    share = projected.counts[is_used].double() / projected.counts.sum()
    sizes = 14 + 600 * share / max(1e-12, float(share.max())) * min(1.0, 40 / max(1, int(is_used.sum())))
    order = sizes.argsort(descending=True)  # small marks on top
    dead, codes = projected.codes[~is_used].numpy(), projected.codes[is_used][order].numpy()
    colours, latents = projected.colours[is_used][order].numpy(), projected.latents.numpy()
    axes.scatter(latents[:, 0], latents[:, 1], s=3, color="#8fa3bd", alpha=0.3, lw=0, zorder=1)
    axes.scatter(codes[:, 0], codes[:, 1], s=sizes[order].numpy(), c=colours, edgecolors=INK, lw=0.6, zorder=2)
    axes.scatter(dead[:, 0], dead[:, 1], s=14, facecolors="none", edgecolors=GREY, lw=0.5, zorder=3)
    axes.set(xticklabels=[], yticklabels=[])
    axes.tick_params(length=0)
    axes.set_xlabel(projected.axes_note, color=GREY)
    axes.margins(0.06)


@once
def projected_codebooks(subject: Subject) -> list[ProjectedCodebook]:
    """Project each codebook on a plane."""
    encoded = encoded_images(subject)
    codes = codes_of(encoded)
    codebooks = [codebook.float().cpu() for codebook in encoded.tokenizer.bottleneck.codebooks()]
    return [
        project_codebook(encoded.x, codes[..., k], codebook, searched, subject.projection, subject.seed)
        for k, (codebook, searched) in enumerate(zip(codebooks, searched_vectors(encoded), strict=True))
    ]


def draw_codebook_map(subject: Subject) -> Sheet:
    """Draw each codebook on a plane: used codes filled, dead codes hollow, latents faint."""
    encoded, codebooks = encoded_images(subject), projected_codebooks(subject)
    size = encoded.tokenizer.bottleneck.codebook_size
    K = len(codebooks)
    columns = min(K, COLUMNS)
    width = (WIDTH - 2 * MARGIN - 0.3 * (columns - 1)) / columns
    height = 6.0 if K == 1 else 4.2
    rows = -(-K // columns)
    latents = (
        "faint: the encoder's latents, for which the nearest code was searched"
        if all(len(codebook.latents) for codebook in codebooks)
        else f"the encoder's latents are in another space and not drawn{' where none are visible' if K > 1 else ''}"
    )
    sheet = Sheet(
        TOP + 0.2 + rows * (height + 0.65) - 0.1,
        "The codebook on a plane",
        "Filled: used codes, larger if used more often, in the mean colour of their patches; hollow: dead codes;\n"
        f"{latents}.",
        encoded.footer,
    )
    for k, codebook in enumerate(codebooks):
        row, column = divmod(k, columns)
        axes = sheet.plot(MARGIN + column * (width + 0.3), TOP + 0.2 + row * (height + 0.65), width, height)
        used = int((codebook.counts > 0).sum())
        name = f"code {k + 1} of {K}: " if K > 1 else ""
        axes.set_title(f"{name}{used} of {size} codes in use, {size - used} dead")
        _draw_plane(axes, codebook)
    return sheet


VIEW = View("codebook_2d", "The codebook on a plane", draw_codebook_map)
