"""Validation pictures and what the run's tokenizer makes of them: what all of its sections look at."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.data import DataConfig, OpenData, data_config
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.diagnostics.analysis.encoded import Encoded, encode
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.names import located
from stage1_tokenizer.tokenizer import LoadedTokenizer

MOST = 512
LEAST = 16
PIXELS = {"cpu": 2**20, "cuda": 2**25}
"""Of all pictures that are looked at: on a CPU a second's work or a few, for the networks of the presets."""


def pixels_for(device: torch.device) -> int:
    """How many are looked at on a device."""
    return PIXELS.get(device.type, PIXELS["cpu"])


@dataclass(frozen=True)
class Measured:
    """A tokenizer, and pictures of its data encoded and decoded."""

    loaded: LoadedTokenizer
    data: DataConfig
    encoded: Encoded
    classes: tuple[str, ...]
    total: int
    """Pictures of the whole validation split."""

    @cached_property
    def psnr(self) -> Tensor:
        """(N,) in dB."""
        return self.encoded.psnr

    @property
    def number(self) -> int:
        return len(self.encoded.x)

    @cached_property
    def codes(self) -> Tensor | None:
        """(N, h, w) of the first codebook; None where the latent is continuous."""
        return None if self.encoded.codes is None else self.encoded.codes[..., 0]

    def label(self, place: int) -> str:
        """The class of a picture, or nothing where there are none."""
        label = int(self.encoded.labels[place])
        return self.classes[label] if label < len(self.classes) else ""

    @property
    def pictures(self) -> str:
        """Which pictures these are, in words."""
        if self.number == self.total:
            return f"all {self.total:,} validation pictures"
        return f"{self.number:,} of {self.total:,} validation pictures, evenly spaced"


def measure(path: Path, root: str | None, device: torch.device) -> Measured:
    """Load a run's tokenizer, and look at validation pictures of its training with it.

    root: where these are now; None: where they were then.

    Raises:
        ConfigError: there are no weights, or no data at that place, or others.
        BadFileError: the weights are damaged, or too many pictures.
    """
    loaded = LoadedTokenizer.load(path, device, option="RUN")
    data = moved(data_config(loaded.data, str(loaded.path)), root)
    # Not cached: of a large split only a few pictures are read.
    split = OpenData(data.model_copy(update={"cache": "none"})).pictures("validation", 0)
    wanted = loaded.tokenizer.config.image_channels
    if split.channels != wanted or data.image_size != loaded.tokenizer.config.image_size:
        raise BadFileError(
            f"{loaded.path}: was trained on {wanted} channels of {loaded.tokenizer.config.image_size}, but the data "
            f"have {split.channels} of {data.image_size}; name the folder of its training with --root"
        )
    height, width = data.image_size
    at_most = max(LEAST, min(MOST, pixels_for(device) // (height * width)))
    return Measured(loaded, data, encode(loaded.tokenizer, split, at_most, device), split.classes, len(split))


def moved(data: DataConfig, root: str | None) -> DataConfig:
    """The data in another folder; drawn ones have none, and stay."""
    if root is None or isinstance(data, ShapesConfig):
        return data
    if not Path(root).is_dir():
        raise ConfigError(f"--root {located(root)}: there is no such folder")
    return data.model_copy(update={"root": root})
