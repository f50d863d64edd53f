"""The pictures that are to be completed: files, or the data set that the prior was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sampling.picture_files import picture_paths, readable, unreadable
from sampling.sampler import Sampler
from stage1_tokenizer.data import build_pictures, data_config
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.pictures import resize
from stage2_prior.class_names import labels_in_turn
from stage2_prior.prior import labels_for


class ToComplete(NamedTuple):
    """Pictures and what is known of them."""

    pictures: NDArray[np.uint8]
    """(n, H, W, C) of the sampler's size."""
    labels: NDArray[np.int64]
    """(n,), those of the prior."""
    names: list[str]
    """Where each came from."""


def read_pictures(
    sampler: Sampler, source: str | None, n: int, class_: str | Sequence[str] | None, seed: int
) -> ToComplete:
    """The first n pictures of a file or folder, scaled and cropped to the sampler's size; or validation pictures.

    Raises:
        ConfigError: there are none, an unknown class, or no class where the prior needs one.
        BadFileError: files cannot be read; all are named, so that they can be taken out at once.
    """
    known = sampler.prior.classes
    given = None if class_ is None else labels_in_turn(class_, known, np.arange(n, dtype=np.int64))
    if source is not None:
        paths = picture_paths(Path(source), "images")[:n]
        channels = sampler.prior.tokenizer.tokenizer.config.image_channels
        _, bad = readable(paths, channels)
        if bad:
            raise unreadable(bad)
        pictures = [_fitted(resize(read_image(path, channels), sampler.size), sampler.size) for path in paths]
        own = np.resize(labels_for(sampler.prior, ()), len(paths)) if given is None else given[: len(paths)]
        return ToComplete(np.stack(pictures), own, [str(path) for path in paths])
    data = data_config(sampler.prior.data, str(sampler.prior.path)).model_copy(update={"image_size": sampler.size})
    split = build_pictures(data, "validation", seed)
    indices = np.arange(min(n, len(split)), dtype=np.int64)
    pixels, labels = split.batch(indices)
    names = [f"validation picture {index} of {data.kind}" for index in indices]
    own = labels_for(sampler.prior, split.classes)[labels.numpy()] if given is None else given[: len(indices)]
    return ToComplete(pixels.permute(0, 2, 3, 1).numpy(), own, names)


def _fitted(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle (H, W, C) of a picture that covers it."""
    top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]]
