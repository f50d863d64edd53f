"""The options of a completion command, and the source of the completions that they describe."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sampling.completion import (
    CompletionTask,
    ImageArrays,
    Margins,
    complete,
    count_generated_codes,
    grow,
    kept_codes,
    margins_in_codes,
    show_kept,
)
from sampling.input_images import bad_files_error, image_paths, split_readable, validation_names
from sampling.option_facts import AlwaysShown
from sampling.prior_defaults import defaults_of_named
from sampling.sampler import Progress, Sampler, SamplingConfig
from sampling.saved_images import ImageShape
from stage1_tokenizer.config.base import CommandConfig, Config, Tree
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Texts
from stage1_tokenizer.data.image_batches import resize
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import moved_data, parse_data_config
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage2_prior.class_labels import assign_labels
from stage2_prior.prior import match_labels


class GrowConfig(Config):
    """Pixels to add on each side of the images: multiples of the tokenizer's factor, the side of a code in pixels."""

    up: NonNegativeInt = 0
    """Pixels to add above."""
    down: NonNegativeInt = 0
    """Pixels to add below."""
    left: NonNegativeInt = 0
    """Pixels to add on the left."""
    right: NonNegativeInt = 0
    """Pixels to add on the right."""


class CompleteConfig(CommandConfig, SamplingConfig):
    """Complete images: keep a part of each and let the prior generate the rest, or grow them beyond their edges."""

    prior: str | None = None
    """Folder of a stage-two run, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME; null: the newest
    run under runs/stage2, or pretrained:shapes if there is none."""
    images: str | None = None
    """Image file, or folder of images, to complete; null: the validation images of the prior's own data set."""
    root: Annotated[str | None, Mark.FREE] = None
    """Folder of the prior's data set, if it was moved; null: the folder that the training used."""
    n: Annotated[PositiveInt, AlwaysShown()] = 8
    """Number of images to complete, counted from the first."""
    keep: Literal["top", "bottom", "left", "right"] | None = None
    """Half of each image to keep. Without keep, box, mask and grow, the top half is kept."""
    box: tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt] | None = None
    """Box of pixels to keep: top, left, height, width."""
    mask: str | None = None
    """Image file of the images' size: white pixels are kept, black ones are generated."""
    invert: bool = False
    """Generate what keep, box or mask would keep, and keep the rest."""
    grow: GrowConfig = GrowConfig()
    variants: Annotated[PositiveInt, AlwaysShown()] = 4
    """Number of completions of each image."""
    paste: bool = True
    """Leave the kept pixels exactly as they are. --no-paste shows the tokenizer's reconstruction of them instead, which
    has no seam."""
    class_: Texts | None = Field(None, alias="class")
    """Name or label of the class of all images, or several that they have in turn; null: each image's own class, if the
    data set knows it, else no class."""
    seed: Annotated[int, AlwaysShown()] = 0
    """Seed of the noise; variant v of image i depends on (seed, i, v)."""
    out: Annotated[str | None, Mark.FREE] = None
    """Folder for the images; null: a new numbered folder under completed/ in the prior's folder. If this folder, or the
    newest numbered one, holds a part of the same images, only the missing ones are made."""

    @classmethod
    def defaults_by_files(cls, given: Tree) -> Tree:
        """Return the sampling defaults that the prior states."""
        return defaults_of_named(given.get("prior"), given)

    @property
    def margins(self) -> Margins:
        """The pixels to add on each side."""
        return Margins(self.grow.up, self.grow.down, self.grow.left, self.grow.right)

    @model_validator(mode="after")
    def _check(self) -> "CompleteConfig":
        given = [name for name in ("keep", "box", "mask") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other, because each says what is kept; give one")
        if self.images is not None and self.root is not None:
            raise ValueError("images names the images, so root has no effect; leave it out")
        if any(self.margins) and (given or self.invert):
            raise ValueError(f"grow keeps the whole image, so {(given or ['invert'])[0]} has no effect; leave it out")
        return self


class Originals(NamedTuple):
    """Images that are to be completed."""

    images: ImageArrays
    """(n, H, W, C) uint8; H and W are the sampler's."""
    labels: NDArray[np.int64]
    """(n,) labels of the prior."""
    names: list[str]
    """Path, or position in the data set, of each image."""


@dataclass(frozen=True)
class CompletionSource:
    """Completions of images: variant v of image i has number i * variants + v."""

    sampler: Sampler
    config: CompleteConfig
    originals: Originals
    keep: NDArray[np.bool_] | None
    """(H, W) pixels to keep; None: all, and the images grow."""
    margins: Margins
    """Margins to add, in codes."""

    task, unit = "completing", "code"

    @classmethod
    def load(cls, config: CompleteConfig, device: torch.device | str) -> Self:
        """Load the prior and the originals that the options name.

        Raises:
            ConfigError: the options do not fit the prior or the images.
            BadFileError: the prior is damaged, or images cannot be read.
        """
        sampler = Sampler.load(config.prior, config, device)
        margins = margins_in_codes(config.margins, sampler)
        originals = read_originals(sampler, config.images, config.n, config.class_, config.seed, config.root)
        return cls(sampler, config, originals, None if any(margins) else pixels_to_keep(config, sampler), margins)

    @cached_property
    def kept(self) -> ImageArrays:
        """The originals (n, H', W', C), of the size of the completions, with grey in place of what is generated."""
        return show_kept(self.originals.images, self.keep, self.margins, self.sampler.factor)

    @property
    def image_shape(self) -> ImageShape:
        """Height, width and channels of one completion."""
        return self.kept.shape[1:]

    @property
    def units_per_image(self) -> int:
        """Number of codes that are generated or fed in for one completion, those of all its candidates."""
        return self.config.candidates * count_generated_codes(self.sampler, self.margins)

    def settings(self) -> dict[str, object]:
        """Return what the completions depend on beside the config, for settings.json."""
        digest = hashlib.sha256(self.originals.images.tobytes() + self.kept.tobytes()).hexdigest()[:32]
        facts = {"labels": self.originals.labels.tolist(), "sources": self.originals.names, "pictures": digest}
        return {**self.sampler.settings(), **facts}

    def sample(self, numbers: NDArray[np.int64], progress: Progress) -> ImageArrays:
        """Make the completions with these numbers: (n, H', W', C)."""
        sampler, config = self.sampler, self.config
        indices, variants = np.divmod(numbers, config.variants)
        images, labels = self.originals.images[indices], self.originals.labels[indices]
        task = CompletionTask(images, indices, labels, config.seed, variants)
        if self.keep is None:
            return grow(sampler, task, self.margins, config.paste, progress)
        return complete(sampler, task, self.keep, config.paste, progress)


def read_originals(
    sampler: Sampler,
    source: str | None,
    n: int,
    class_: str | Sequence[str] | None = None,
    seed: int = 0,
    root: str | None = None,
) -> Originals:
    """Read the first n images of a file or folder, resized and cropped to the sampler's size; source None: the first n
    validation images of the prior's data set, in the folder `root` if it is given.

    Raises:
        ConfigError: there is no image, no such class, or no class although the prior needs one.
        BadFileError: files cannot be read; the message lists them, so that all can be removed at once.
    """
    names_of_classes, size = sampler.prior.classes, sampler.size
    given = None if class_ is None else assign_labels(class_, names_of_classes, np.arange(n, dtype=np.int64))
    if source is not None:
        paths = image_paths(Path(source), "images")[:n]
        channels = sampler.prior.tokenizer.tokenizer.config.image_channels
        _, errors = split_readable(paths, channels)
        if errors:
            raise bad_files_error(errors)
        images = np.stack([_crop_centre(resize(read_image(path, channels), size), size) for path in paths])
        labels = np.resize(match_labels(sampler.prior, ()), len(paths)) if given is None else given[: len(paths)]
        return Originals(images, labels, [str(path) for path in paths])
    data = moved_data(parse_data_config(sampler.prior.data, str(sampler.prior.path)), root)
    split = open_data(data.model_copy(update={"image_size": size})).image_batches("validation", seed)
    indices = np.arange(min(n, len(split)), dtype=np.int64)
    pixels, data_labels = split.batch(indices)
    labels = match_labels(sampler.prior, split.classes)[data_labels.numpy()] if given is None else given[: len(indices)]
    return Originals(pixels.permute(0, 2, 3, 1).numpy(), labels, validation_names(data.kind, len(indices)))


def _crop_centre(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop the centre of an image (H, W, C) that is at least of this size."""
    top, left = (image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]


def pixels_to_keep(config: CompleteConfig, sampler: Sampler) -> NDArray[np.bool_]:
    """Return the pixels (H, W) that mask, box or keep say, inverted with `invert`.

    Raises:
        ConfigError: the box reaches beyond the images, the mask is missing or of another size, all pixels are kept, or
            no code is kept completely.
    """
    if config.mask is not None:
        keep = _read_mask(Path(config.mask), sampler.size)
    elif config.box is not None:
        keep = _box_pixels(config.box, sampler.size)
    else:
        keep = _half_pixels(config.keep or "top", sampler.size)
    keep = ~keep if config.invert else keep
    if keep.all():
        raise ConfigError("everything is kept, so there is nothing to complete; --invert generates the kept part")
    if not kept_codes(keep, sampler.factor).any():
        raise ConfigError(
            f"the kept part covers no code whole, so the prior would see nothing: a code of this tokenizer covers "
            f"{sampler.factor}x{sampler.factor} pixels; keep a larger part"
        )
    return keep


def _read_mask(path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    if not path.is_file():
        raise ConfigError(f"mask {describe_path(path)}: there is no such file")
    mask = read_image(path, 1)[:, :, 0]
    if mask.shape != size:
        raise ConfigError(
            f"mask {path}: is {mask.shape[0]}x{mask.shape[1]} (height, width), but the images are {size[0]}x{size[1]}"
        )
    return mask >= 128


def _box_pixels(box: tuple[int, int, int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    top, left, height, width = box
    if top + height > size[0] or left + width > size[1]:
        raise ConfigError(
            f"box {top},{left},{height},{width} (top, left, height, width) reaches to {top + height},{left + width}, "
            f"beyond the images of {size[0]}x{size[1]}"
        )
    keep = np.zeros(size, dtype=np.bool_)
    keep[top : top + height, left : left + width] = True
    return keep


def _half_pixels(half: Literal["top", "bottom", "left", "right"], size: tuple[int, int]) -> NDArray[np.bool_]:
    rows, columns = np.indices(size)
    is_before = rows < size[0] // 2 if half in ("top", "bottom") else columns < size[1] // 2
    return is_before if half in ("top", "left") else ~is_before
