"""Completion: some of an image's codes are kept, the prior makes the others.

    pictures (n, H, W, C) -> codes -> keep those under the mask -> prior -> codes -> pictures

The prior reads row by row, so a new code knows all that is kept above it, and left of it in its own row, and nothing
that is kept below. Growing a picture to the right and downwards needs no more than that. To grow it to the left or
upwards, the picture is mirrored, grown to the right or downwards, and mirrored back.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from sampling.option_facts import AlwaysShown
from sampling.sampler import Progress, Sampler, SamplingConfig
from sampling.saved_images import DECODE_CHUNK, image_paths, in_chunks, readable, unreadable
from stage1_tokenizer.config.base import CommandConfig, Config
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Texts
from stage1_tokenizer.data.image_batches import normalise, resize
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.seeds import derive_seed
from stage2_prior.class_labels import assign_labels
from stage2_prior.generation import KnownCodes
from stage2_prior.prior import match_labels

ImageArrays = NDArray[np.uint8]
"""(n, H, W, C)."""
HIDDEN = 128
"""Grey level of what is not kept, and has nothing kept nearby."""


class GrowConfig(Config):
    """Pixels to add on each side; multiples of the tokenizer's factor."""

    up: NonNegativeInt = 0
    down: NonNegativeInt = 0
    left: NonNegativeInt = 0
    right: NonNegativeInt = 0


class CompleteConfig(CommandConfig, SamplingConfig):
    """Complete pictures: keep a part of each, let the prior make the rest; or grow them beyond their edges."""

    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    images: str | None = None
    """A picture, or a folder of pictures; null: the validation pictures of the prior's own data set."""
    n: Annotated[PositiveInt, AlwaysShown()] = 8
    """Images to complete: the first ones."""
    keep: Literal["top", "bottom", "left", "right"] | None = None
    """Which half to keep; the default where nothing else is said is the top one."""
    box: tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt] | None = None
    """A box of pixels to keep: top, left, height, width."""
    mask: str | None = None
    """A picture of the size of the pictures: what is white in it is kept, what is black is made anew."""
    invert: bool = False
    """Make anew just what would have been kept, and keep the rest."""
    grow: GrowConfig = GrowConfig()
    variants: Annotated[PositiveInt, AlwaysShown()] = 4
    """Completions of each picture."""
    paste: bool = True
    """Put the kept pixels back as they were; --no-paste shows them as the tokenizer has them, without a seam."""
    class_: Texts | None = Field(None, alias="class")
    """Name or number of the class of all pictures, or several that they have in turn; null: each one's own where the
    data set says it, else none."""
    seed: Annotated[int, AlwaysShown()] = 0
    """Variant v of picture i follows from (seed, i, v)."""
    out: Annotated[str | None, Mark.FREE] = None
    """Folder for the pictures; default: a new numbered folder under completed/ in the prior's. Where the same settings
    were interrupted in it, or in the newest numbered one, only what is missing is made."""

    @property
    def margins(self) -> "Margins":
        """The pixels to add on each side."""
        return Margins(self.grow.up, self.grow.down, self.grow.left, self.grow.right)

    @model_validator(mode="after")
    def _check(self) -> "CompleteConfig":
        given = [name for name in ("keep", "box", "mask") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: each says what is kept")
        if any(self.margins) and (given or self.invert):
            raise ValueError(f"grow keeps the whole picture, so {(given or ['invert'])[0]} means nothing beside it")
        return self


class Margins(NamedTuple):
    """Rows or columns, of pixels or of codes, to add on each side."""

    up: int = 0
    down: int = 0
    left: int = 0
    right: int = 0

    @property
    def turns(self) -> list[tuple[str, tuple[int, ...], int, int]]:
        """The steps in which a picture grows: name, mirrored axes, rows to add below, columns to add on the right."""
        steps = [
            ("down and right", (), self.down, self.right),
            ("left", (2,), 0, self.left),
            ("up", (1,), self.up, 0),
        ]
        return [step for step in steps if step[2] or step[3]]


class Task(NamedTuple):
    """Images to complete, and what their completions follow from."""

    pictures: ImageArrays
    indices: NDArray[np.int64]
    """(n,) numbers of the pictures: with the seed and the variant they decide the noise."""
    labels: NDArray[np.int64]
    """(n,)."""
    seed: int
    variants: NDArray[np.int64]
    """(n,) which try at its picture each one is."""


class Originals(NamedTuple):
    """Images that are to be completed."""

    pictures: ImageArrays
    """(n, H, W, C) uint8; H and W are the sampler's."""
    labels: NDArray[np.int64]
    """(n,), those of the prior."""
    names: list[str]
    """Where each came from."""


def read_originals(
    sampler: Sampler, source: str | None, n: int, class_: str | Sequence[str] | None = None, seed: int = 0
) -> Originals:
    """The first n pictures of a file or folder, scaled and cropped to the sampler's size; or validation pictures of the
    data set that the prior was trained on.

    Raises:
        ConfigError: there are none, an unknown class, or no class where the prior needs one.
        BadFileError: files cannot be read; all are named, so that they can be taken out at once.
    """
    known, size = sampler.prior.classes, sampler.size
    given = None if class_ is None else assign_labels(class_, known, np.arange(n, dtype=np.int64))
    if source is not None:
        paths = image_paths(Path(source), "images")[:n]
        channels = sampler.prior.tokenizer.tokenizer.config.image_channels
        _, bad = readable(paths, channels)
        if bad:
            raise unreadable(bad)
        pictures = np.stack([_middle(resize(read_image(path, channels), size), size) for path in paths])
        names, own = [str(path) for path in paths], match_labels(sampler.prior, ())
        labels = np.resize(own, len(paths)) if given is None else given[: len(paths)]
        return Originals(pictures, labels, names)
    data = parse_data_config(sampler.prior.data, str(sampler.prior.path)).model_copy(update={"image_size": size})
    split = open_data(data).image_batches("validation", seed)
    indices = np.arange(min(n, len(split)), dtype=np.int64)
    pixels, data_labels = split.batch(indices)
    names = [f"validation picture {index} of {data.kind}" for index in indices]
    labels = match_labels(sampler.prior, split.classes)[data_labels.numpy()] if given is None else given[: len(indices)]
    return Originals(pixels.permute(0, 2, 3, 1).numpy(), labels, names)


def _middle(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of a picture (H, W, C) that is at least of this size."""
    top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]]


def margins_in_codes(margins: Margins, sampler: Sampler) -> Margins:
    """Pixels to codes. Raises ConfigError where a side is no multiple of the tokenizer's factor."""
    factor = sampler.factor
    for name, pixels in margins._asdict().items():
        if pixels % factor:
            below = pixels // factor * factor
            raise ConfigError(
                f"grow.{name} {pixels}: a code of this tokenizer covers {factor}x{factor} pixels; the nearest that "
                f"fit are {below} and {below + factor}"
            )
    added = Margins(*(pixels // factor for pixels in margins))
    if any(added):
        height, width = sampler.grid
        sampler.check_size((height + added.up + added.down, width + added.left + added.right))
    return added


def kept_pixels(config: CompleteConfig, sampler: Sampler) -> NDArray[np.bool_]:
    """The pixels to keep, (H, W).

    Raises:
        ConfigError: a box that leaves the picture, a mask that is not there or of another size, or nothing to do.
    """
    height, width = sampler.size
    kept = np.zeros((height, width), dtype=np.bool_)
    if config.mask is not None:
        path = Path(config.mask)
        if not path.is_file():
            raise ConfigError(f"mask {describe_path(path)}: there is no such file")
        mask = read_image(path, 1)[:, :, 0]
        if mask.shape != kept.shape:
            raise ConfigError(
                f"mask {path}: is {mask.shape[0]}x{mask.shape[1]} (height, width), but the pictures are "
                f"{height}x{width}"
            )
        kept = mask >= 128
    elif config.box is not None:
        top, left, high, wide = config.box
        if top + high > height or left + wide > width:
            raise ConfigError(
                f"box {top},{left},{high},{wide} (top, left, height, width) reaches to {top + high},{left + wide}, "
                f"beyond the pictures of {height}x{width}"
            )
        kept[top : top + high, left : left + wide] = True
    else:
        halves = {
            "top": kept[: height // 2],
            "bottom": kept[height // 2 :],
            "left": kept[:, : width // 2],
            "right": kept[:, width // 2 :],
        }
        halves[config.keep or "top"][:] = True
    kept = ~kept if config.invert else kept
    if kept.all():
        raise ConfigError("everything is kept, so there is nothing to complete; --invert makes the kept part anew")
    if not kept_codes(kept, sampler.factor).any():
        raise ConfigError(
            f"what is kept covers no code whole, so the prior would not see it: a code of this tokenizer covers "
            f"{sampler.factor}x{sampler.factor} pixels"
        )
    return kept


def kept_codes(pixels: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """Pixels to keep (H, W) -> codes to keep (h, w): those whose own square of factor x factor pixels is kept whole."""
    return reduce(pixels, "(h a) (w b) -> h w", "min", a=factor, b=factor)


def framed(pictures: ImageArrays, keep: NDArray[np.bool_] | None, margins: Margins, factor: int) -> ImageArrays:
    """The pictures (n, H, W, C) with all grey that is not kept, or with a grey margin where they are to grow."""
    if keep is not None:
        return np.where(keep[None, :, :, None], pictures, np.uint8(HIDDEN))
    up, down, left, right = (codes * factor for codes in margins)
    return np.pad(pictures, ((0, 0), (up, down), (left, right), (0, 0)), constant_values=HIDDEN)


def codes_made(sampler: Sampler, margins: Margins) -> int:
    """Codes that a completion goes through: those of the grid, and of each of the grids that it grows to."""
    (height, width), depth, total = sampler.grid, sampler.prior.model.shape.K, 0
    for _, _, down, right in margins.turns:
        height, width = height + down, width + right
        total += height * width * depth
    return total or sampler.codes_per_image


def filled(pictures: ImageArrays, keep: NDArray[np.bool_]) -> ImageArrays:
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
def encode(sampler: Sampler, pictures: ImageArrays) -> Tensor:
    """Images (n, H, W, C) -> codes (n, h, w, K)."""
    images = rearrange(torch.from_numpy(np.ascontiguousarray(pictures)), "n H W C -> n C H W")
    encode_codes = sampler.prior.tokenizer.tokenizer.encode_codes
    # What a picture's codes are must not depend on how many are completed beside it.
    return in_chunks(lambda part: encode_codes(normalise(part.to(sampler.device))), images, DECODE_CHUNK)


def complete(
    sampler: Sampler, task: Task, keep: NDArray[np.bool_], paste: bool, progress: Progress | None = None
) -> ImageArrays:
    """The pictures with all but the kept pixels made anew. keep (H, W).

    paste: put the kept pixels back as they were; otherwise they are the tokenizer's reconstruction.
    """
    mask = torch.from_numpy(kept_codes(keep, sampler.factor))
    made = _with_new_codes(sampler, task, KnownCodes(encode(sampler, filled(task.pictures, keep)), mask), progress)
    return np.where(keep[None, :, :, None], task.pictures, made) if paste else made


def grow(sampler: Sampler, task: Task, margins: Margins, paste: bool, progress: Progress | None = None) -> ImageArrays:
    """The pictures with these margins of codes added around them: (n, H + ..., W + ..., C)."""
    pictures = task.pictures
    for name, mirrored, down, right in margins.turns:
        turned = task._replace(pictures=np.flip(pictures, mirrored), seed=derive_seed(task.seed, "grow", name))
        pictures = np.flip(_grow(sampler, turned, down, right, paste, progress), mirrored)
    return np.ascontiguousarray(pictures)


def _grow(sampler: Sampler, task: Task, down: int, right: int, paste: bool, progress: Progress | None) -> ImageArrays:
    codes = encode(sampler, task.pictures)  # (n, h, w, K)
    n, height, width, depth = codes.shape
    larger = codes.new_zeros((n, height + down, width + right, depth))
    larger[:, :height, :width] = codes
    mask = torch.zeros(larger.shape[1:3], dtype=torch.bool)
    mask[:height, :width] = True
    made = _with_new_codes(sampler, task, KnownCodes(larger, mask), progress)
    if paste:
        made[:, : task.pictures.shape[1], : task.pictures.shape[2]] = task.pictures
    return made


def _with_new_codes(sampler: Sampler, task: Task, known: KnownCodes, progress: Progress | None) -> ImageArrays:
    return sampler.decode(sampler.codes(task.indices, task.labels, task.seed, task.variants, known, progress))
