"""Completion: some codes of an image are kept, and the prior generates the others.

    images (n, H, W, C) -> codes -> keep the codes under the mask -> prior -> codes -> images

The prior generates row by row. So a new code depends on the kept codes above it and to its left in the same row, and on
none below. That is enough to grow an image to the right and downwards. To grow it to the left or upwards, the image is
mirrored, grown to the right or downwards, and mirrored back.
"""

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from sampling.sampler import Progress, Sampler
from sampling.saved_images import DECODE_CHUNK, apply_in_chunks
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.seeds import derive_seed
from stage2_prior.generation import KnownCodes

ImageArrays = NDArray[np.uint8]
"""Images (n, H, W, C) uint8."""
HIDDEN_GREY = 128
"""Grey level of pixels that are not kept, where no kept pixel can fill them."""


class Margins(NamedTuple):
    """Rows or columns to add on each side of an image, in pixels or in codes."""

    up: int = 0
    down: int = 0
    left: int = 0
    right: int = 0

    @property
    def passes(self) -> list[tuple[str, tuple[int, ...], int, int]]:
        """The passes in which an image grows: (name, mirrored axes, rows to add below, columns to add on the right)."""
        passes = [
            ("down and right", (), self.down, self.right),
            ("left", (2,), 0, self.left),
            ("up", (1,), self.up, 0),
        ]
        return [one for one in passes if one[2] or one[3]]


class CompletionTask(NamedTuple):
    """Images to complete, and everything else that their completions depend on."""

    images: ImageArrays
    """(n, H, W, C) uint8; H and W are the sampler's."""
    indices: NDArray[np.int64]
    """(n,) numbers of the images: with the seed and the variant they decide the noise."""
    labels: NDArray[np.int64]
    """(n,)."""
    seed: int
    variants: NDArray[np.int64]
    """(n,) number of the variant of each image."""


def complete(
    sampler: Sampler, task: CompletionTask, keep: NDArray[np.bool_], paste: bool, progress: Progress | None = None
) -> ImageArrays:
    """Generate all pixels of the images (n, H, W, C) except the kept ones.

    Args:
        sampler: the prior and its settings.
        task: the images, and what their noise depends on.
        keep: (H, W), True for the pixels to keep.
        paste: True: kept pixels stay exactly as they are. False: they are the tokenizer's reconstruction.
        progress: called with numbers of finished codes.
    """
    mask = torch.from_numpy(kept_codes(keep, sampler.factor))
    known = KnownCodes(encode(sampler, fill_hidden(task.images, keep)), mask)
    completed = _generate_unknown(sampler, task, known, progress)
    return np.where(keep[None, :, :, None], task.images, completed) if paste else completed


def grow(
    sampler: Sampler, task: CompletionTask, margins: Margins, paste: bool, progress: Progress | None = None
) -> ImageArrays:
    """Generate margins (in codes) around the images: (n, H + ..., W + ..., C). `paste` as in `complete`."""
    images = task.images
    for name, mirrored, down, right in margins.passes:
        mirrored_task = task._replace(images=np.flip(images, mirrored), seed=derive_seed(task.seed, "grow", name))
        images = np.flip(_grow_down_and_right(sampler, mirrored_task, (down, right), paste, progress), mirrored)
    return np.ascontiguousarray(images)


def _grow_down_and_right(
    sampler: Sampler, task: CompletionTask, margin: tuple[int, int], paste: bool, progress: Progress | None
) -> ImageArrays:
    codes = encode(sampler, task.images)  # (n, h, w, K)
    n, height, width, depth = codes.shape
    larger = codes.new_zeros((n, height + margin[0], width + margin[1], depth))
    larger[:, :height, :width] = codes
    mask = torch.zeros(larger.shape[1:3], dtype=torch.bool)
    mask[:height, :width] = True
    grown = _generate_unknown(sampler, task, KnownCodes(larger, mask), progress)
    if paste:
        grown[:, : task.images.shape[1], : task.images.shape[2]] = task.images
    return grown


def _generate_unknown(
    sampler: Sampler, task: CompletionTask, known: KnownCodes, progress: Progress | None
) -> ImageArrays:
    return sampler.decode(sampler.codes(task.indices, task.labels, task.seed, task.variants, known, progress))


@torch.inference_mode()
def encode(sampler: Sampler, images: ImageArrays) -> Tensor:
    """Encode images (n, H, W, C) to codes (n, h, w, K)."""
    x = rearrange(torch.from_numpy(np.ascontiguousarray(images)), "n H W C -> n C H W")
    encode_codes = sampler.prior.tokenizer.tokenizer.encode_codes
    # In chunks of one size, so that an image's codes do not depend on the number of images.
    return apply_in_chunks(lambda part: encode_codes(normalise(part.to(sampler.device))), x, DECODE_CHUNK)


def kept_codes(keep: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """Return the codes (h, w) whose square of factor x factor pixels is kept completely; keep: pixels (H, W)."""
    return reduce(keep, "(h a) (w b) -> h w", "min", a=factor, b=factor)


def fill_hidden(images: ImageArrays, keep: NDArray[np.bool_]) -> ImageArrays:
    """Replace every pixel of the images (n, H, W, C) that is not kept (H, W) by a kept pixel nearby, or by grey.

    An encoder's kernels reach beyond the square of a code. Without this, kept codes would contain information about the
    pixels that must stay hidden.
    """
    known = keep.copy()
    filled = np.where(known[:, :, None], images, np.uint8(HIDDEN_GREY))
    while known.any() and not known.all():  # known pixels spread by one pixel in each of four directions
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            reached = np.roll(known, step, axis)
            wrapped_edge = (slice(None),) * axis + (0 if step == 1 else -1,)
            reached[wrapped_edge] = False
            reached &= ~known
            filled = np.where(reached[:, :, None], np.roll(filled, step, axis + 1), filled)
            known |= reached
    return filled


def show_kept(images: ImageArrays, keep: NDArray[np.bool_] | None, margins: Margins, factor: int) -> ImageArrays:
    """Return the images (n, H, W, C) with grey in place of what is generated: the pixels that are not kept or, with
    keep None, the margins (in codes) around the images."""
    if keep is not None:
        return np.where(keep[None, :, :, None], images, np.uint8(HIDDEN_GREY))
    up, down, left, right = (codes * factor for codes in margins)
    return np.pad(images, ((0, 0), (up, down), (left, right), (0, 0)), constant_values=HIDDEN_GREY)


def count_generated_codes(sampler: Sampler, margins: Margins) -> int:
    """Count the codes that one completion goes through: those of its grid, or of the larger grid of each pass."""
    (height, width), depth, total = sampler.grid, sampler.prior.model.shape.K, 0
    for _, _, down, right in margins.passes:
        height, width = height + down, width + right
        total += height * width * depth
    return total or sampler.codes_per_image


def margins_in_codes(margins: Margins, sampler: Sampler) -> Margins:
    """Convert margins from pixels to codes.

    Raises:
        ConfigError: a margin is not a multiple of the tokenizer's factor, or the sampler cannot make the larger size.
    """
    factor = sampler.factor
    for name, pixels in margins._asdict().items():
        if pixels % factor:
            below = pixels // factor * factor
            raise ConfigError(
                f"grow.{name} {pixels}: a code of this tokenizer covers {factor}x{factor} pixels; the nearest that "
                f"fit are {below} and {below + factor}"
            )
    in_codes = Margins(*(pixels // factor for pixels in margins))
    if any(in_codes):
        height, width = sampler.grid
        sampler.check_size((height + in_codes.up + in_codes.down, width + in_codes.left + in_codes.right))
    return in_codes
