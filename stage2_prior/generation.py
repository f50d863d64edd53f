"""Generation: a prior, labels and noise in, codes out. A function of its arguments alone.

    for each position, row by row, and each of its K codes:   logits -> guidance -> choose(logits, noise) -> code

Codes that are known (a picture's kept part) are not chosen but fed in. A grid larger than the trained one is generated
through a sliding window (`windows.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine.errors import DivergedError
from stage1_tokenizer.engine.precision import float64
from stage2_prior.base import Generation, PreparedPrior, Prior
from stage2_prior.guidance import Guidance, check_guidance, mix
from stage2_prior.windows import Canvas, placements

Choose = Callable[[Tensor, Tensor, float], Tensor]
"""(logits (B, V) float32, noise (B,) uniform in [0, 1), progress in [0, 1]) -> codes (B,) int64. Progress is the share
of the picture's positions that lie before this one: 0 at the first, 1 at the last."""
NO_GUIDANCE, TRAINED = Guidance(), Canvas()


class NotFiniteError(DivergedError, ValueError):
    """Logits from which nothing can be chosen."""


@dataclass(frozen=True)
class KnownCodes:
    """Codes that are given."""

    codes: Tensor
    """(B, h, w, K) int64; what stands where `mask` is false is not read."""
    mask: Tensor
    """(h, w) bool."""


def draw_codes(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Codes (B,) from probabilities (B, V), by inverting the distribution function at noise (B,) in [0, 1).

    One number per code decides, so what an image becomes depends on its own noise and not on its batch. A code of
    probability 0 is never drawn.
    """
    cumulative = float64(probabilities).cumsum(dim=-1)  # (B, V)
    target = noise.to(cumulative.device).double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(probabilities.shape[-1] - 1)


def sample_softmax(logits: Tensor, noise: Tensor, progress: float = 0.0) -> Tensor:
    """The prior's own distribution, unfiltered: logits (B, V), noise (B,) -> codes (B,)."""
    del progress
    return draw_codes(logits.softmax(dim=-1), noise)


class _FiniteLogits:
    """A check that asks the device once per row of codes: asked at each code, a GPU would stand still in between."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)  # stays 0 while all logits are finite, else becomes NaN

    def note(self, logits: Tensor) -> None:
        """Remember whether from these logits (B, V) something can be chosen: -inf may stand in them, but no NaN, no inf
        and no row of -inf alone."""
        self._sum += (logits.amax(dim=-1) * 0.0).sum()

    def check(self) -> None:
        """Raises NotFiniteError: from logits noted so far nothing can be chosen. (What was drawn would silently be the
        first or the last code.)"""
        if not self._sum.isfinite():
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
    canvas: Canvas = TRAINED,
    *,
    known: KnownCodes | None = None,
    progress: Callable[[int], object] | None = None,
    prepared: PreparedPrior | None = None,
) -> Tensor:
    """Codes (B, h, w, K) for labels (B,), from uniform noise (B, h*w*K), where h and w are those of the canvas.

    known: codes that are given. `progress` is called with a number of codes, which add up to B*h*w*K. prepared: this
    prior, prepared before and used again; None: it is prepared here, in float32.

    Raises:
        ConfigError: guidance, but the prior has no classes or was trained without label dropout; a window that is
            larger than the trained grid.
        NotFiniteError: the prior's logits are not finite.
    """
    check_guidance(prior.config, prior.classes, guidance)
    prepared = prepared or prior.prepare()
    assert prepared.prior is prior
    shape, batch = prior.shape, len(labels)
    grid, window = canvas.fitted((shape.h, shape.w))
    height, width = grid
    both = torch.cat([labels, torch.full_like(labels, prior.null_label)]) if guidance.is_needed else labels
    codes = torch.zeros((batch, height, width, shape.K), dtype=torch.int64, device=labels.device)
    given = torch.zeros(grid, dtype=torch.bool) if known is None else known.mask.cpu()
    if known is not None:
        codes = torch.where(known.mask[..., None].to(codes.device), known.codes, codes)
    last = max(height * width - 1, 1)
    noise = rearrange(noise, "B (h w K) -> B h w K", h=height, w=width)

    finite = _FiniteLogits(labels.device)
    place = None  # of the window of the generation under way
    done = 0  # positions of that window that it has been fed
    for top, left, row, columns in placements(grid, window, canvas.stride):
        unknown = [column for column in columns if not given[row, column]]
        if progress is not None:
            progress(batch * shape.K * (len(columns) - len(unknown)))
        if not unknown:
            continue
        view = rearrange(codes[:, top : top + window[0], left : left + window[1]], "B h w K -> B (h w) K")
        if place != (top, left):
            generation, place, done = prepared.begin(both, window), (top, left), 0
        for column in unknown:
            here = (row - top) * window[1] + column - left
            if done < here:
                before = view[:, done:here]  # (B, n, K)
                generation.prefill(before.repeat(2, 1, 1) if guidance.is_needed else before)
            share = (row * width + column) / last
            _fill(codes[:, row, column], generation, noise[:, row, column], share, choose, guidance, finite=finite)
            done = here + 1
            if progress is not None:
                progress(batch * shape.K)
        finite.check()
    return codes


def _fill(
    codes: Tensor,
    generation: Generation,
    noise: Tensor,
    share: float,
    choose: Choose,
    guidance: Guidance,
    *,
    finite: "_FiniteLogits",
) -> None:
    """Choose the K codes of the position that comes next, and write them into codes (B, K); noise (B, K)."""
    for depth in range(codes.shape[1]):
        logits = generation.logits()  # (B, V), or (2 B, V): with the class, then without
        if guidance.is_needed:
            with_class, without = logits.chunk(2)
            logits = mix(with_class, without, guidance.at(share))
        finite.note(logits)
        chosen = choose(logits, noise[:, depth], share).to(codes.device)  # (B,)
        codes[:, depth] = chosen
        generation.append(chosen.repeat(2) if guidance.is_needed else chosen)
