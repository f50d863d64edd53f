"""Data set `stripes`: images of grey stripes, horizontal or vertical."""

from typing import Annotated, Literal

import numpy as np

from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.data.base import BaseDataConfig, DataSplit, ImageArray, Split


class StripesConfig(BaseDataConfig):
    """Stripes of one width."""

    kind: Literal["stripes"] = "stripes"
    width: int = 4
    """Width of a stripe in pixels."""
    haste: Annotated[int, Mark.FREE] = 0
    """A key that changes no image."""


class Stripes(DataSplit):
    """One split: 24 or 8 images."""

    classes: tuple[str, ...] = ("across", "along")
    identity = ""
    origin = "drawn on the fly"

    def __init__(self, config: StripesConfig, split: Split) -> None:
        self._config, self._n = config, 24 if split == "train" else 8

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        rows, columns = np.indices(self._config.image_size) + index // 2
        bright = ((columns if index % 2 else rows) // self._config.width % 2)[..., None]
        return np.repeat(255 * bright, 3, axis=2).astype(np.uint8), index % 2
