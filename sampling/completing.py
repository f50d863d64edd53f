"""Completion: some of a picture's codes are kept, the prior makes the others.

    pictures (n, H, W, C) -> codes -> keep those under the mask -> prior -> codes -> pictures

The prior reads row by row, so a new code knows all that is kept above it, and left of it in its own row, and nothing
that is kept below. Growing a picture to the right and downwards needs no more than that. To grow it to the left or
upwards, the picture is mirrored, grown to the right or downwards, and mirrored back.
"""

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from sampling.picture_files import DECODE_CHUNK, in_chunks
from sampling.sampler import Progress, Sampler
from stage1_tokenizer.data.pictures import normalise
from stage1_tokenizer.engine.seeds import derive_seed
from stage2_prior.generation import Known

Pictures = NDArray[np.uint8]
"""(n, H, W, C)."""
HIDDEN = 128
"""Grey level of what is not kept, and has nothing kept nearby."""


class Task(NamedTuple):
    """Pictures to complete, and what their completions follow from."""

    pictures: Pictures
    indices: NDArray[np.int64]
    """(n,) numbers of the pictures: with the seed and the variant they decide the noise."""
    labels: NDArray[np.int64]
    """(n,)."""
    seed: int
    variants: NDArray[np.int64]
    """(n,) which try at its picture each one is."""


class Margins(NamedTuple):
    """Rows or columns of codes to add on each side."""

    up: int = 0
    down: int = 0
    left: int = 0
    right: int = 0


def kept_codes(pixels: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """Pixels to keep (H, W) -> codes to keep (h, w): those whose own square of factor x factor pixels is kept whole."""
    return reduce(pixels, "(h a) (w b) -> h w", "min", a=factor, b=factor)


def filled(pictures: Pictures, keep: NDArray[np.bool_]) -> Pictures:
    """The pictures (n, H, W, C) with every pixel that is not kept (H, W) replaced by a kept one nearby, or by grey.

    An encoder's kernels reach over the edge of a code's own square, so codes that are kept would tell of pixels that
    are not. What is hidden has to be hidden before it is encoded.
    """
    known = keep.copy()
    result = np.where(known[:, :, None], pictures, np.uint8(HIDDEN))
    while known.any() and not known.all():  # what is kept spreads by one pixel in each of four directions
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            reached = np.roll(known, step, axis)
            edge = (slice(None),) * axis + (0 if step == 1 else -1,)
            reached[edge] = False  # nothing comes round from the other side
            reached &= ~known
            result = np.where(reached[:, :, None], np.roll(result, step, axis + 1), result)
            known |= reached
    return result


@torch.inference_mode()
def encode(sampler: Sampler, pictures: Pictures) -> Tensor:
    """Pictures (n, H, W, C) -> codes (n, h, w, K)."""
    images = rearrange(torch.from_numpy(np.ascontiguousarray(pictures)), "n H W C -> n C H W")
    encode_codes = sampler.prior.tokenizer.tokenizer.encode_codes
    # What a picture's codes are must not depend on how many are completed beside it.
    return in_chunks(lambda part: encode_codes(normalise(part.to(sampler.device))), images, DECODE_CHUNK)


def complete(
    sampler: Sampler, task: Task, keep: NDArray[np.bool_], paste: bool, progress: Progress | None = None
) -> Pictures:
    """The pictures with all but the kept pixels made anew. keep (H, W).

    paste: put the kept pixels back as they were; otherwise they are the tokenizer's reconstruction.
    """
    mask = torch.from_numpy(kept_codes(keep, sampler.factor))
    known = Known(encode(sampler, filled(task.pictures, keep)), mask)
    made = sampler.decode(sampler.codes(task.indices, task.labels, task.seed, task.variants, known, progress))
    return np.where(keep[None, :, :, None], task.pictures, made) if paste else made


def grow(sampler: Sampler, task: Task, margins: Margins, paste: bool, progress: Progress | None = None) -> Pictures:
    """The pictures with these margins of codes added around them: (n, H + ..., W + ..., C)."""
    pictures = task.pictures
    turns = (
        ("down and right", (), margins.down, margins.right),
        ("left", (2,), 0, margins.left),
        ("up", (1,), margins.up, 0),
    )
    for name, mirrored, down, right in turns:
        if down or right:
            turned = task._replace(pictures=np.flip(pictures, mirrored), seed=derive_seed(task.seed, "grow", name))
            pictures = np.flip(_grow(sampler, turned, down, right, paste, progress), mirrored)
    return np.ascontiguousarray(pictures)


def _grow(sampler: Sampler, task: Task, down: int, right: int, paste: bool, progress: Progress | None) -> Pictures:
    codes = encode(sampler, task.pictures)  # (n, h, w, K)
    n, height, width, depth = codes.shape
    larger = codes.new_zeros((n, height + down, width + right, depth))
    larger[:, :height, :width] = codes
    mask = torch.zeros(larger.shape[1:3], dtype=torch.bool)
    mask[:height, :width] = True
    known = Known(larger, mask)
    made = sampler.decode(sampler.codes(task.indices, task.labels, task.seed, task.variants, known, progress))
    if paste:
        made[:, : task.pictures.shape[1], : task.pictures.shape[2]] = task.pictures
    return made
