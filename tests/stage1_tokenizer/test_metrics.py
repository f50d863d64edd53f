"""PSNR and the use of the codebook, against closed forms."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.metrics import CodeUse, pixel_variance, psnr


def use_of(counts: list[int], pieces: int = 1) -> CodeUse:
    """A histogram that came in so many pieces."""
    use = CodeUse(1, len(counts), torch.device("cpu"))
    codes = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shuffled = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    for piece in shuffled.tensor_split(pieces):
        use.add(piece.reshape(1, -1, 1, 1))
    return use


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize(
    ("counts", "usage", "entropy"),
    [
        ([3, 3, 3, 3], 1.0, 2.0),
        ([12, 0, 0, 0], 0.25, 0.0),
        ([6, 6, 0, 0], 0.5, 1.0),
        ([4, 2, 1, 1], 1.0, 1.75),
        ([7, 0, 7, 0, 7, 0, 7, 0], 0.5, 2.0),
    ],
)
def test_a_known_histogram_has_known_figures(counts: list[int], usage: float, entropy: float, pieces: int) -> None:
    """Trap 13: usage, entropy and perplexity are those of the whole split, however it was cut into batches."""
    use = use_of(counts, pieces)
    assert use.counts.tolist() == [counts]
    assert use.usage == usage
    assert math.isclose(use.entropy_bits, entropy, abs_tol=1e-12)
    assert math.isclose(use.perplexity, 2.0**entropy)


def test_histograms_add_up() -> None:
    """Trap 13: processes sum their counts; the mean of their perplexities would be another number."""
    left, right = use_of([8, 0, 0, 0]), use_of([0, 0, 4, 4])
    left.counts += right.counts
    assert (left.usage, left.entropy_bits, left.perplexity) == (0.75, 1.5, 2.0**1.5)


def test_many_codes_do_not_overflow() -> None:
    """Counts are whole numbers beyond what float32 can count one by one."""
    use = CodeUse(1, 2, torch.device("cpu"))
    use.counts[0, 0] = 2**24
    use.add(torch.zeros(1, 1, dtype=torch.int64))
    assert int(use.counts[0, 0]) == 2**24 + 1


def test_each_code_of_a_position_has_a_histogram_of_its_own() -> None:
    """Trap 13: pooled, a first codebook in full use would hide that the second has one code left."""
    use = CodeUse(2, 4, torch.device("cpu"))
    use.add(torch.stack([torch.arange(8) % 4, torch.zeros(8, dtype=torch.int64)], dim=-1).reshape(2, 2, 2, 2))
    assert use.counts.tolist() == [[2, 2, 2, 2], [8, 0, 0, 0]]
    assert (use.usage, use.entropy_bits, use.perplexity) == (0.625, 1.0, 2.0)


class Levels:
    """A data set of grey images, image i at level i."""

    channels = 1

    def __len__(self) -> int:
        return 256

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(indices).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
        return images, torch.zeros(len(indices), dtype=torch.int64)


@pytest.mark.parametrize("at_most", [256, 10_000])
def test_the_variance_of_the_data(at_most: int) -> None:
    """NMSE is the squared error over this; 256 equally frequent levels of [-1, 1] have a variance of 1/3 and a bit."""
    levels = np.arange(256) / 127.5 - 1
    assert math.isclose(pixel_variance(cast("ImageBatches", Levels()), at_most), float(levels.var()), rel_tol=1e-6)


def test_the_variance_from_a_part_of_the_data() -> None:
    """The images are taken from all over the split: a folder is sorted by class, and its first ones are alike."""
    part = pixel_variance(cast("ImageBatches", Levels()), 16)
    assert math.isclose(part, float((np.arange(256) / 127.5 - 1).var()), rel_tol=0.15)


def constant(value: float, B: int = 2) -> Tensor:
    return torch.full((B, 3, 4, 5), value)


@pytest.mark.parametrize(
    ("x", "x_hat", "decibels"),
    [(-1.0, 1.0, 0.0), (0.0, 0.2, 20.0), (0.0, 0.02, 40.0), (0.5, 0.25, 10 * math.log10(4 / 0.0625))],
)
def test_psnr_in_closed_form(x: float, x_hat: float, decibels: float) -> None:
    """Trap 40: the range of [-1, 1] is 2, so black for white is 0 dB; a range of 1 would give 6 dB less."""
    assert torch.allclose(psnr(constant(x), constant(x_hat)), torch.tensor(decibels), atol=1e-4)


def test_psnr_equals_that_of_the_pictures() -> None:
    """Trap 40: the same number comes from the 8-bit images, 10 log10(255^2 / mse)."""
    x = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    y = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    expected = 10 * torch.log10(255**2 / (x - y).square().mean(dim=(1, 2, 3)))
    assert torch.allclose(psnr(x / 127.5 - 1, y / 127.5 - 1).double(), expected, atol=1e-4)


def test_psnr_is_per_image_clamped_and_finite() -> None:
    """A reconstruction is clamped when it becomes an image file, and equal images must not make a mean infinite."""
    x, x_hat = torch.stack([constant(1.0)[0], constant(0.0)[0]]), torch.stack([constant(3.0)[0], constant(0.2)[0]])
    figures = psnr(x, x_hat)
    assert figures.shape == (2,)
    assert torch.allclose(figures, torch.tensor([100.0, 20.0]), atol=1e-4)
