"""The codebook on a plane: where its vectors lie, which are used, and where the encoder puts its latents."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.bottlenecks.space import CodeSpace
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

CLOUD = 3000
"""Latents drawn behind the codes."""
MOST = 4096
"""Codes drawn, the used ones first."""
COLUMNS = 2


class Placed(NamedTuple):
    """One codebook on the plane."""

    codes: Tensor
    """(n, 2), all used codes and then dead ones, at most MOST."""
    counts: Tensor
    """(n,) int64."""
    colours: Tensor
    """(n, 3) in 0..1, of the mean patch; white for a dead code."""
    cloud: Tensor
    """(m, 2), latents; none where they do not lie in the space of the codes."""
    note: str
    """What the axes are."""


def searched_vectors(encoded: EncodedImages) -> list[Tensor]:
    """For each codebook the vectors (N h w, d) for which the nearest code was sought, or (0, d) where these are not
    known.

    Bottlenecks search in spaces of their own: after a projection, on the sphere, among residuals. So each of these is
    tried, and is taken for right where the nearest code is the one that was chosen.
    """
    codes, tokenizer = codes_of(encoded), encoded.tokenizer
    codebooks = [codebook.float().cpu() for codebook in tokenizer.bottleneck.codebooks()]
    spaces = [part for part in tokenizer.bottleneck.children() if isinstance(part, CodeSpace)]
    into = spaces[0].into if spaces else CodeSpace(encoded.z.shape[1], None).into
    residual = in_batches(into, encoded.z, tokenizer_device(tokenizer))  # (N h w, d)
    found = []
    for k, codebook in enumerate(codebooks):
        ids = codes[..., k].flatten()  # (N h w,)
        empty = codebook[:0]
        if residual.shape[1] != codebook.shape[1]:
            found.append(empty)
            continue
        some = torch.arange(0, len(ids), max(1, len(ids) // 500))
        fitting = [
            candidate
            for candidate in (residual, F.normalize(residual, dim=1))
            if (torch.cdist(candidate[some], codebook).argmin(dim=1) == ids[some]).float().mean() > 0.98
        ]
        found.append(fitting[0] if fitting else empty)
        residual = residual - codebook[ids]
    return found


def place_codebook(
    x: Tensor, codes: Tensor, codebook: Tensor, searched: Tensor, kind: ProjectionKind, seed: int
) -> Placed:
    """x (N, C, H, W), codes (N, h, w) of a codebook (V, d), and the vectors (M, d) that were looked up in it."""
    used, counts, patches = mean_patches(x, codes)
    dead = torch.ones(len(codebook), dtype=torch.bool)
    dead[used] = False
    ids = torch.cat([used, dead.nonzero()[:, 0]])[:MOST]
    all_counts = torch.zeros(len(codebook), dtype=torch.int64).index_copy_(0, used, counts)
    colours = torch.ones(len(codebook), 3)
    colours[used] = patches.mean(dim=(2, 3)).add(1).div(2).clamp(0, 1).expand(-1, 3)  # (U, 1 or 3) -> (U, 3)
    cloud = searched[:: max(1, len(searched) // CLOUD)][:CLOUD]
    both = torch.cat([codebook[ids], cloud])
    if kind == "umap" and len(both) > 3:
        placed, note = umap(both, seed), "UMAP: only neighbourhoods mean something"
    else:
        # The axes of the used codes: dead ones may lie anywhere, far away too.
        components = pca(codebook[used] if len(used) > 2 else both, 2)
        placed = components(both)
        first, second = (f"{share:.0%}" for share in components.explained.tolist())
        note = f"PCA, {first} across and {second} up of the used codes' variance"
    return Placed(placed[: len(ids)], all_counts[ids], colours[ids], placed[len(ids) :], note)


def _draw_plane(axes: "Axes", placed: Placed) -> None:
    used = placed.counts > 0
    share = placed.counts[used].double() / placed.counts.sum()
    sizes = 14 + 600 * share / max(1e-12, float(share.max())) * min(1.0, 40 / max(1, int(used.sum())))
    order = sizes.argsort(descending=True)  # the small ones on top
    dead, codes = placed.codes[~used].numpy(), placed.codes[used][order].numpy()
    colours = placed.colours[used][order].numpy()
    axes.scatter(
        placed.cloud[:, 0].numpy(), placed.cloud[:, 1].numpy(), s=3, color="#8fa3bd", alpha=0.3, lw=0, zorder=1
    )
    axes.scatter(codes[:, 0], codes[:, 1], s=sizes[order].numpy(), c=colours, edgecolors=INK, lw=0.6, zorder=2)
    axes.scatter(dead[:, 0], dead[:, 1], s=14, facecolors="none", edgecolors=GREY, lw=0.5, zorder=3)
    axes.set(xticklabels=[], yticklabels=[])
    axes.tick_params(length=0)
    axes.set_xlabel(placed.note, color=GREY)
    axes.margins(0.06)


@once
def placed_of(subject: Subject) -> list[Placed]:
    """Each codebook on a plane."""
    encoded = encoded_images(subject)
    codes = codes_of(encoded)
    codebooks = [codebook.float().cpu() for codebook in encoded.tokenizer.bottleneck.codebooks()]
    return [
        place_codebook(encoded.x, codes[..., k], codebook, searched, subject.projection, subject.seed)
        for k, (codebook, searched) in enumerate(zip(codebooks, searched_vectors(encoded), strict=True))
    ]


def draw_codebook_map(subject: Subject) -> Sheet:
    encoded, placed = encoded_images(subject), placed_of(subject)
    size = encoded.tokenizer.bottleneck.codebook_size
    K = len(placed)
    columns = min(K, COLUMNS)
    width = (WIDTH - 2 * MARGIN - 0.3 * (columns - 1)) / columns
    height = 6.0 if K == 1 else 4.2
    rows = -(-K // columns)
    cloud = (
        "faint: what the encoder gives, for which the nearest code was sought"
        if all(len(one.cloud) for one in placed)
        else "the encoder's latents lie in another space and are left out" + (", where none are seen" if K > 1 else "")
    )
    sheet = Sheet(
        TOP + 0.2 + rows * (height + 0.65) - 0.1,
        "The codebook on a plane",
        f"Filled: used codes, the larger the more often, in the mean colour of the patches on which they fall; hollow: "
        f"dead codes;\n{cloud}.",
        encoded.footer,
    )
    for k, one in enumerate(placed):
        row, column = divmod(k, columns)
        axes = sheet.plot(MARGIN + column * (width + 0.3), TOP + 0.2 + row * (height + 0.65), width, height)
        used = int((one.counts > 0).sum())
        name = f"code {k + 1} of {K}: " if K > 1 else ""
        axes.set_title(f"{name}{used} of {size} codes in use, {size - used} dead")
        _draw_plane(axes, one)
    return sheet


VIEW = View("codebook_2d", "The codebook on a plane", draw_codebook_map)
