"""Generation: its logits at each code equal those of one forward pass."""

from dataclasses import dataclass, field
from functools import cache
from itertools import product
from unittest import mock

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import Grid, PreparedPrior, Prior
from stage2_prior.generation import KnownCodes, generate, sample_softmax
from stage2_prior.guidance import Guidance, mix_logits
from stage2_prior.windows import Canvas
from tests.helpers.artefacts import MAKERS, noise_of

V, B = 11, 2
H, W = TRAINED = (3, 4)
LABELS = torch.tensor([0, 1])
KINDS = pytest.mark.parametrize("kind", MAKERS)
DEPTHS = pytest.mark.parametrize("K", [1, 3])
GUIDANCE = Guidance(2.5, "linear")

CASES = {  # grid, window, stride, guidance
    "trained grid": (TRAINED, None, 1, Guidance()),
    "smaller grid": ((2, 3), None, 1, Guidance()),
    "guidance": (TRAINED, None, 1, GUIDANCE),
    "scale 0": (TRAINED, None, 1, Guidance(0.0)),
    "window": ((4, 6), None, 1, Guidance()),
    "small window": ((4, 5), (2, 3), 1, GUIDANCE),
    "stride 2": ((4, 6), None, 2, Guidance()),
    "stride 2 and guidance": ((3, 7), (2, 3), 2, GUIDANCE),
    "wide": ((2, 7), None, 2, Guidance()),
    "tall": ((6, 4), None, 1, Guidance()),
}
EVERY_CASE = pytest.mark.parametrize(("grid", "window", "stride", "guidance"), CASES.values(), ids=CASES)


@cache
def prior_of(kind: str, K: int) -> Prior:
    model = MAKERS[kind](TokenShape(H, W, K, V), 2)
    if kind == "pixelcnn":  # its first contexts are small
        for output in (weight for name, weight in model.head.named_parameters() if "output" in name):
            output.mul_(1.5)
    return model


def codes_of(grid: Grid, K: int, batch: int = B, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, *grid, K), generator=torch.Generator().manual_seed(seed))


def masks_of(grid: Grid) -> dict[str, Tensor]:
    """Known parts of a image: the top with half a row, the left, a hole in the middle, and any."""
    row, column = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None]
    return {
        "top": row * grid[1] + column < grid[1] + grid[1] // 2,
        "left": (column < 2).expand(grid),
        "around": ~((row == 1) & (column > 0) & (column < grid[1] - 1)),
        "any": torch.rand(grid, generator=torch.Generator().manual_seed(5)) < 0.5,
    }


@dataclass
class Recorder:
    """Chooses as `sample_softmax` does, and remembers what it was given."""

    logits: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def __call__(self, logits: Tensor, noise: Tensor, progress: float) -> Tensor:
        self.logits.append(logits.clone())
        self.noise.append(noise)
        self.shares.append(progress)
        return sample_softmax(logits, noise, progress)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert wanted.std() > 0.5, "the logits must be such that an error would show"
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.std()))


def start_of(place: int, size: int, window: int, stride: int) -> int:
    """Find the start of the window by trial: it moves on by strides while the position is past its middle."""
    start = 0
    while start + stride <= place - window // 2:
        start += stride
    return min(start, size - window)


SCHEDULES = {  # whole positions that come in at once, positions that are asked for, and so on; every second time a look
    "from the start": [(0, 12)],
    "after one": [(1, 11)],
    "after a row": [(4, 8)],
    "after a row and a half": [(6, 6)],
    "after a look": [(0, 0), (6, 6)],
    "in pieces": [(1, 0), (2, 0), (5, 0), (1, 3)],
    "in the middle": [(0, 2), (3, 2), (1, 1), (2, 1)],
    "to the end of a row": [(0, 1), (3, 1), (3, 4)],
    "the last": [(11, 1)],
}


def check_logits(prior: Prior, codes: Tensor, labels: Tensor, schedule: list[tuple[int, int]]) -> None:
    """Fed with these codes, a generation has the logits of `forward` wherever it is asked."""
    batch, height, width, K = codes.shape
    wanted, sequence = prior(codes, labels).view(batch, height * width, K, V), codes.flatten(1, 2)
    generation, t = prior.begin(labels, (height, width)), 0
    found, there = [], []
    for number, (ahead, steps) in enumerate(schedule):
        if ahead:
            if number % 2:  # a look at the logits must not change what follows
                assert torch.equal(generation.logits(), generation.logits())
            generation.prefill(sequence[:, t : t + ahead])
            t += ahead
        for position, depth in product(range(t, t + steps), range(K)):
            there.append(wanted[:, position, depth])
            found.append(generation.logits())
            generation.append(sequence[:, position, depth])
        t += steps
    assert_close(torch.stack(found, dim=1), torch.stack(there, dim=1))


@KINDS
@DEPTHS
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_generation_has_the_logits_of_forward(kind: str, K: int, schedule: list[tuple[int, int]]) -> None:
    """Trap 30: from the start and after known codes, however many of them come in at once."""
    check_logits(prior_of(kind, K), codes_of(TRAINED, K), LABELS, schedule)


@KINDS
@DEPTHS
@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (3, 1), (1, 1)], ids=str)
def test_generation_on_a_smaller_grid(kind: str, K: int, grid: Grid) -> None:
    """Trap 30: rows are shorter there, so a position's neighbour above is another one in the sequence."""
    prior, codes, last = prior_of(kind, K), codes_of(grid, K, 8), grid[0] * grid[1] - 1
    for schedule in ([(0, last + 1)], [(last, 1)], [(last // 2, last + 1 - last // 2)]):
        check_logits(prior, codes, torch.arange(8) % 3, schedule)


@KINDS
@DEPTHS
def test_generation_of_a_guidance_pair(kind: str, K: int) -> None:
    """Trap 30: with and without class in one batch, each has the logits that it has alone."""
    prior, codes = prior_of(kind, K), codes_of(TRAINED, K)
    pair = torch.cat([LABELS, torch.full_like(LABELS, prior.null_label)])
    check_logits(prior, torch.cat([codes, codes]), pair, [(0, 3), (2, 7)])


@KINDS
def test_a_grid_larger_than_the_trained_one_is_our_bug(kind: str) -> None:
    """Places beyond it were never trained; only the sliding window goes there."""
    prior = prior_of(kind, 1)
    for grid in ((4, 4), (3, 5), (0, 4)):
        with pytest.raises(AssertionError):
            prior.begin(LABELS, grid)


@KINDS
def test_whole_positions_do_not_come_in_amid_one(kind: str) -> None:
    """The codes would land at the wrong depth."""
    generation = prior_of(kind, 3).begin(LABELS)
    generation.append(LABELS)
    with pytest.raises(AssertionError, match="codes already"):
        generation.prefill(codes_of((1, 1), 3)[:, 0])


def check_generation(
    kind: str,
    K: int,
    case: tuple[Grid, Grid | None, int, Guidance],
    mask: Tensor | None = None,
) -> None:
    """`choose` sees at every unknown code the logits of a forward pass on the window that is cut out for it."""
    grid, window, stride, guidance = case
    prior, noise, seen = prior_of(kind, K), noise_of(B, grid[0] * grid[1] * K), Recorder()
    known = None if mask is None else KnownCodes(codes_of(grid, K), mask)
    codes = generate(prior, LABELS, noise, seen, guidance, Canvas(grid, window, stride), known=known)
    if known is not None:
        assert torch.equal(codes[:, known.mask], known.codes[:, known.mask])
    height, width = (min(pair) for pair in zip(window or TRAINED, grid, strict=True))
    cuts, inside, places = [], [], []
    for t, (row, column) in enumerate(product(range(grid[0]), range(grid[1]))):
        if mask is None or not mask[row, column]:
            top, left = start_of(row, grid[0], height, 1), start_of(column, grid[1], width, stride)
            cuts.append(codes[:, top : top + height, left : left + width])
            inside.append((row - top) * width + column - left)
            places.append(t)
    cut, labels = torch.cat(cuts), LABELS.repeat(len(cuts))  # every position has a window of its own
    conditional, unconditional = prior(cut, labels), prior(cut, torch.full_like(labels, prior.null_label))
    shares = [t / (grid[0] * grid[1] - 1) for t in places]
    wanted = []
    for i, (share, here) in enumerate(zip(shares, inside, strict=True)):
        ours = slice(i * B, (i + 1) * B), slice(here * K, (here + 1) * K)
        wanted.append(mix_logits(conditional[ours], unconditional[ours], guidance.scale_at(share)))
    assert_close(torch.stack(seen.logits, dim=1), torch.cat(wanted, dim=1))
    assert seen.shares == pytest.approx([share for share in shares for _ in range(K)])
    assert torch.equal(torch.stack(seen.noise, dim=1), noise.view(B, -1, K)[:, places].flatten(1))


@KINDS
@DEPTHS
@EVERY_CASE
def test_generation_has_the_logits_of_forward(
    kind: str, K: int, grid: Grid, window: Grid | None, stride: int, guidance: Guidance
) -> None:
    """Traps 30 and 32: with the cache, guidance and a sliding window it is the slow loop that everybody can read."""
    check_generation(kind, K, (grid, window, stride, guidance))


@KINDS
@DEPTHS
@pytest.mark.parametrize("mask", masks_of(TRAINED))
@pytest.mark.parametrize("case", ["guidance", "stride 2 and guidance"])
def test_known_codes_are_read_and_kept(kind: str, K: int, mask: str, case: str) -> None:
    """Trap 30: a image's known part is fed in, in any pieces, and each code keeps the noise of its own place."""
    check_generation(kind, K, CASES[case], masks_of(CASES[case][0])[mask])


@KINDS
@pytest.mark.parametrize("case", ["guidance", "stride 2"])
def test_what_stands_at_unknown_places_is_not_read(kind: str, case: str) -> None:
    """A caller encodes the whole image, and what was to be painted over must not shine through."""
    grid, window, stride, guidance = CASES[case]
    mask, noise = masks_of(grid)["any"], noise_of(B, grid[0] * grid[1])
    codes, garbage = codes_of(grid, 1), codes_of(grid, 1, seed=2)
    garbage[:, mask] = codes[:, mask]
    assert not torch.equal(codes, garbage)
    one, other = (
        generate(prior_of(kind, 1), LABELS, noise, guidance=guidance, canvas=Canvas(grid, window, stride), known=k)
        for k in (KnownCodes(codes, mask), KnownCodes(garbage, mask))
    )
    assert torch.equal(one, other)


@KINDS
def test_unknown_codes_follow_from_those_before_them(kind: str) -> None:
    """A known code changes what comes later and nothing earlier, and not the caller's own tensors."""
    prior, mask, noise = prior_of(kind, 1), masks_of(TRAINED)["any"], noise_of(64, H * W)
    labels, codes = torch.arange(64) % 2, codes_of(TRAINED, 1, 64)
    before, kept = generate(prior, labels, noise, known=KnownCodes(codes, mask)).flatten(1), codes.clone()
    assert torch.equal(codes, kept)
    for t in mask.flatten().nonzero().flatten().tolist():
        changed = codes.clone()
        changed.view(64, -1)[:, t] = (changed.view(64, -1)[:, t] + 1) % V
        after = generate(prior, labels, noise, known=KnownCodes(changed, mask)).flatten(1)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t + 1 :] != before[:, t + 1 :]).any() == (~mask.flatten()[t + 1 :]).any()


@DEPTHS
@EVERY_CASE
def test_progress_counts_every_code(K: int, grid: Grid, window: Grid | None, stride: int, guidance: Guidance) -> None:
    """A bar that ends at another number than it announced makes the user doubt the rest."""
    prior, whole = prior_of("gpt", K), torch.ones(grid, dtype=torch.bool)
    generation = mock.Mock(**{"logits.return_value": torch.zeros(2 * B if guidance.is_needed else B, V)})
    with mock.patch.object(PreparedPrior, "begin", return_value=generation):
        for mask in (None, *masks_of(grid).values(), whole, ~whole):
            counted: list[int] = []
            known = None if mask is None else KnownCodes(codes_of(grid, K), mask)
            noise = noise_of(B, grid[0] * grid[1] * K)
            canvas, progress = Canvas(grid, window, stride), counted.append
            generate(prior, LABELS, noise, sample_softmax, guidance, canvas, known=known, progress=progress)
            assert sum(counted) == B * grid[0] * grid[1] * K


@KINDS
def test_a_whole_picture_that_is_known_costs_nothing(kind: str) -> None:
    """Nothing is left to choose, so no network runs."""
    prior, codes, choose = prior_of(kind, 3), codes_of((5, 7), 3), mock.Mock(side_effect=AssertionError)
    known = KnownCodes(codes, torch.ones(5, 7, dtype=torch.bool))
    with mock.patch.object(PreparedPrior, "begin", choose):
        assert torch.equal(
            generate(prior, LABELS, noise_of(B, 105), choose, GUIDANCE, Canvas((5, 7)), known=known), codes
        )


@KINDS
def test_generated_codes_are_in_row_major_order(kind: str) -> None:
    """Trap 37: the t-th code that is chosen lands at row-major place t of the grid, as `forward` reads it."""
    shape = TokenShape(2, 3, 2, 12)
    noise = ((torch.arange(12) + 0.5) / 12)[None].expand(B, 12).double()  # token t has the noise of code t
    codes = generate(MAKERS[kind](shape), LABELS, noise, choose=lambda _, noise, __: (noise * 12).long())
    assert torch.equal(codes, torch.arange(12).view(1, 2, 3, 2).expand_as(codes))


@KINDS
def test_one_position_is_a_picture_too(kind: str) -> None:
    """Shares of the image are counted from the first position to the last, which here are the same one."""
    seen = Recorder()
    assert generate(prior_of(kind, 1), LABELS, noise_of(B, 1), seen, GUIDANCE, Canvas((1, 1))).shape == (B, 1, 1, 1)
    assert seen.shares == [0.0]
