"""Generation: compute the codes of images from a prior, labels and noise.

    for each position in row-major order, and each depth k < K:
        logits (B, V) -> guidance (B, V) -> choose(logits, noise) -> codes (B,)

Known codes (of the kept part of an image) are not chosen but given to the prior. A grid larger than the trained one is
generated through a sliding window (`windows.py`). The result depends on the arguments only: same noise, same codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine.errors import DivergedError
from stage1_tokenizer.engine.precision import to_float64
from stage2_prior.base import Generation, PreparedPrior, Prior
from stage2_prior.guidance import Guidance, check_guidance, mix_logits
from stage2_prior.windows import Canvas, placements

Choose = Callable[[Tensor, Tensor, float], Tensor]
"""A sampling rule: (logits (B, V) float32, noise (B,) uniform in [0, 1), progress) -> codes (B,) int64.

Progress is the share of the image's positions before this one: 0 at the first position, 1 at the last."""
NO_GUIDANCE, TRAINED_CANVAS = Guidance(), Canvas()


class NotFiniteError(DivergedError, ValueError):
    """The prior's logits contain NaN or infinity, so no code can be chosen."""


@dataclass(frozen=True)
class KnownCodes:
    """Codes that are given, and need not be generated."""

    codes: Tensor
    """(B, h, w, K) int64; codes at positions outside `mask` are ignored."""
    mask: Tensor
    """(h, w) bool; True: the codes of this position are known."""


def draw_codes(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draw codes (B,) from probabilities (B, V), by inverting the cumulative distribution at noise (B,) in [0, 1).

    Each code uses one random number of its own, so an image does not depend on the other images of its batch. A code of
    probability 0 is never drawn. The probabilities need not sum to 1.
    """
    cumulative = to_float64(probabilities).cumsum(dim=-1)  # (B, V)
    target = noise.to(cumulative.device).double()[:, None] * cumulative[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(probabilities.shape[-1] - 1)


def sample_softmax(logits: Tensor, noise: Tensor, progress: float = 0.0) -> Tensor:
    """Draw codes (B,) from the prior's own distribution, without filters: logits (B, V), noise (B,)."""
    del progress
    return draw_codes(logits.softmax(dim=-1), noise)


class _FiniteLogits:
    """A check of all logits that waits for the device once per row of codes only, so that a GPU need not stop at each
    code."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []  # (B,) each

    def note(self, logits: Tensor) -> None:
        """Add logits (B, V) to the check. Some may be -inf (a filtered code), but none NaN or inf, and no row all
        -inf."""
        self._largest.append(logits.amax(dim=-1))

    def check(self) -> None:
        """Raise NotFiniteError if logits since the last check are unusable; `draw_codes` would return the first or last
        code."""
        is_usable = torch.cat(self._largest).isfinite().all()
        self._largest = []
        if not is_usable:
            raise NotFiniteError(
                "the prior gave logits that are not finite: its weights are damaged or its training diverged"
            )


@torch.inference_mode()
def generate(
    prior: Prior,
    labels: Tensor,
    noise: Tensor,
    choose: Choose = sample_softmax,
    guidance: Guidance = NO_GUIDANCE,
    canvas: Canvas = TRAINED_CANVAS,
    *,
    known: KnownCodes | None = None,
    progress: Callable[[int], object] | None = None,
    prepared: PreparedPrior | None = None,
) -> Tensor:
    """Generate codes (B, h, w, K) on the canvas from labels (B,) and uniform noise (B, h*w*K) in [0, 1).

    known: codes that are given. progress: called with numbers of finished codes, which add up to B*h*w*K.
    prepared: what `prior.prepare` returned, for use in several calls; None: prepare in float32.

    Raises:
        ConfigError: the prior does not support guidance, or the window is larger than the trained grid.
        NotFiniteError: the prior's logits are not finite.
    """
    check_guidance(prior.config, prior.classes, guidance)
    prepared = prepared or prior.prepare()
    assert prepared.prior is prior
    shape, batch = prior.shape, len(labels)
    grid, window = canvas.resolve((shape.h, shape.w))
    height, width = grid
    # With guidance the batch is doubled: B sequences with their class, then the same B without.
    all_labels = torch.cat([labels, torch.full_like(labels, prior.null_label)]) if guidance.is_needed else labels
    codes = torch.zeros((batch, height, width, shape.K), dtype=torch.int64, device=labels.device)
    is_known = torch.zeros(grid, dtype=torch.bool) if known is None else known.mask.cpu()
    if known is not None:
        codes = torch.where(known.mask[..., None].to(codes.device), known.codes, codes)
    noise = rearrange(noise, "B (h w K) -> B h w K", h=height, w=width)

    finite = _FiniteLogits()
    corner = None  # top and left of the present window
    done = 0  # positions of the present window that `generation` has
    for top, left, row, columns in placements(grid, window, canvas.stride):
        unknown = [column for column in columns if not is_known[row, column]]
        if progress is not None:
            progress(batch * shape.K * (len(columns) - len(unknown)))
        if not unknown:
            continue
        # Codes inside the window: (B, positions of the window, K)
        inside = rearrange(codes[:, top : top + window[0], left : left + window[1]], "B h w K -> B (h w) K")
        if corner != (top, left):
            generation, corner, done = prepared.begin(all_labels, window), (top, left), 0
        for column in unknown:
            position = (row - top) * window[1] + column - left  # in the window
            if done < position:
                before = inside[:, done:position]  # (B, n, K)
                generation.prefill(before.repeat(2, 1, 1) if guidance.is_needed else before)
            share = (row * width + column) / max(height * width - 1, 1)
            _fill(codes[:, row, column], generation, noise[:, row, column], share, choose, guidance, finite=finite)
            done = position + 1
            if progress is not None:
                progress(batch * shape.K)
        finite.check()
    return codes


def _fill(
    codes: Tensor,
    generation: Generation,
    noise: Tensor,
    progress: float,
    choose: Choose,
    guidance: Guidance,
    *,
    finite: _FiniteLogits,
) -> None:
    """Choose the K codes of the next position with noise (B, K), and write them into codes (B, K)."""
    for depth in range(codes.shape[1]):
        logits = generation.logits()  # (B, V); with guidance (2 B, V): with the class, then without
        if guidance.is_needed:
            conditional, unconditional = logits.chunk(2)
            logits = mix_logits(conditional, unconditional, guidance.scale_at(progress))
        finite.note(logits)
        chosen = choose(logits, noise[:, depth], progress).to(codes.device)  # (B,)
        codes[:, depth] = chosen
        generation.append(chosen.repeat(2) if guidance.is_needed else chosen)
