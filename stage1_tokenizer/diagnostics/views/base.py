"""The classes View and Subject (a run to look at), and the validation images that all views share.

Subject -> numbers, computed once (`once`) -> a sheet (PNG, for analyze.py) and a section (for the report page)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.data.record import DataSummary
from stage1_tokenizer.data.saved_config import parse_data_config, with_root
from stage1_tokenizer.diagnostics.report.markup import Child
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, NothingToShowError, Section, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.views.projection import ProjectionKind
from stage1_tokenizer.diagnostics.views.sheet import STYLE, Sheet
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.metrics import CodeUse, psnr
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer

BATCH = 64
MOST, LEAST = 512, 16
"""Bounds of the number of validation images that a page looks at."""
PIXELS = {"cpu": 2**20, "cuda": 2**25}
"""Pixels of these images together; on a CPU the preset networks take one second or a few."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Subject:
    """A run to look at, with the options of its views and the results that they have computed so far."""

    run: RunFolder
    device: torch.device
    root: str | None = None
    """Folder that now has the images of the training; None: the folder that the training used."""
    replaces_drawn: bool = False
    """Look at all images of `root` where the images of the training are drawn."""
    tokenizer: str | Path | None = None
    """The tokenizer's weights file or folder; None: the run's."""
    option: str = "RUN"
    """The command-line option that named the tokenizer, for messages."""
    images: int | None = None
    """Number of validation images, evenly spaced; None: as many as the device encodes in seconds."""
    codes: int = 256
    """Number of codes in the atlas's PNG."""
    projection: ProjectionKind = "pca"
    """Projection of the codebook on a plane."""
    seed: int = 0
    """Seed of random codes, noise, masks and UMAP."""
    answers: dict[Callable[..., Any], Any] = field(default_factory=dict)
    """Results, or the errors raised, of the functions marked with `once`."""


def once(compute: Callable[[Subject], T]) -> Callable[[Subject], T]:
    """Decorate a function so that it runs once for each subject. An expected error is kept too, and raised again."""

    @wraps(compute)
    def ask(subject: Subject) -> T:
        if compute not in subject.answers:
            try:
                subject.answers[compute] = compute(subject)
            except EXPECTED_ERRORS as error:
                subject.answers[compute] = error
        answer = subject.answers[compute]
        if isinstance(answer, Exception):
            raise answer
        result: T = answer
        return result

    return ask


@dataclass(frozen=True)
class View:
    """One view of a tokenizer. To add one: a file with its numbers and drawings, and an entry in VIEWS."""

    name: str
    """Name of the PNG file."""
    title: str
    """Heading on the page."""
    draw: Callable[[Subject], Sheet] | None = None
    """Draws the PNG; None: the view is only on the page. Raises NothingToShowError."""
    show: Callable[[Subject], Child] | None = None
    """Returns the content of the page's section; None: the view is only a PNG. Raises NothingToShowError."""
    address: str = ""
    """Address of the section on the page; empty: the name."""
    json: Callable[[Subject], str] | None = None
    """Returns numbers that analyze.py writes beside the PNG."""

    def png(self, subject: Subject) -> bytes:
        """Return the PNG file. Raises NothingToShowError."""
        from matplotlib import rc_context  # noqa: PLC0415 (why: sheet.py)

        assert self.draw
        with rc_context(STYLE):
            return self.draw(subject).png()

    def section(self, subject: Subject) -> Section:
        """Return the section of the page, or a notice that says why there is nothing to show."""
        assert self.show
        return try_section(self.address or self.name, self.title, partial(self.show, subject))


@dataclass(frozen=True)
class EncodedImages:
    """Validation images with their latents, codes, reconstructions and errors; tensors on the CPU."""

    loaded: LoadedTokenizer
    data: DataConfig
    found: DataSummary
    classes: tuple[str, ...]
    split_size: int
    """Number of images of the whole validation split."""
    x: Tensor
    """(N, C, H, W) in [-1, 1]."""
    labels: Tensor
    """(N,) int64."""
    z: Tensor
    """(N, D, h, w), output of the encoder."""
    z_q: Tensor
    """(N, D, h, w), output of the bottleneck."""
    codes: Tensor | None
    """(N, h, w, K) int64; None: the bottleneck is continuous."""
    x_hat: Tensor
    """(N, C, H, W), clamped to [-1, 1]."""
    errors: Tensor
    """(N, H, W), absolute error, mean over channels, as a share of the range of values."""
    psnr: Tensor
    """(N,) in dB."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.loaded.tokenizer

    @property
    def count(self) -> int:
        """Number of images, N."""
        return len(self.x)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, H and W."""
        return self.x.shape[2], self.x.shape[3]

    def spaced_indices(self, n: int) -> list[int]:
        """Return up to n different indices of images, evenly spaced."""
        return sorted(set(np.linspace(0, len(self.x) - 1, min(n, len(self.x)), dtype=np.int64).tolist()))

    def class_name(self, index: int) -> str:
        """Return the class of an image; empty if the data set has no classes."""
        label = int(self.labels[index])
        return self.classes[label] if label < len(self.classes) else ""

    @property
    def description(self) -> str:
        """The number of images and their selection, in words."""
        if self.count == self.split_size:
            return f"all {self.split_size:,} validation images"
        return f"{self.count:,} of {self.split_size:,} validation images, evenly spaced"

    @property
    def footer(self) -> str:
        """The last line of each PNG."""
        return f"{self.loaded.outputs.name}   step {self.loaded.step}   {self.tokenizer.config.bottleneck.kind}"


@once
def encoded_images(subject: Subject) -> EncodedImages:
    """Load the subject's tokenizer, and encode and decode validation images of its training.

    Raises:
        ConfigError: there are no weights, no data in that folder, or data of another size.
        BadFileError: the weights are damaged, or too many images are.
    """
    loaded = LoadedTokenizer.load(subject.tokenizer or subject.run.path, subject.device, option=subject.option)
    data = parse_data_config(loaded.data, str(loaded.path))
    if data.is_drawn and subject.root and subject.replaces_drawn:
        channels = loaded.tokenizer.config.image_channels
        data = FolderConfig(
            root=subject.root, image_size=data.image_size, channels=channels, layout="flat", validation_share=1.0
        )
    return encode_images(loaded, with_root(data, subject.root), subject.images)


@torch.inference_mode()
def encode_images(loaded: LoadedTokenizer, data: DataConfig, images: int | None = None) -> EncodedImages:
    """Encode and decode up to `images` validation images, evenly spaced over the split; None: by the device's speed.

    Raises:
        ConfigError: the images have another size than the tokenizer's.
    """
    tokenizer, device = loaded.tokenizer, tokenizer_device(loaded.tokenizer)
    opened = OpenData(data.model_copy(update={"cache": "none"}))  # only a few images of the split are read
    split = opened.image_batches("validation", 0)
    channels = tokenizer.config.image_channels
    if split.channels != channels or data.image_size != tokenizer.config.image_size:
        raise ConfigError(
            f"{loaded.path}: was trained on {channels} channels of {tokenizer.config.image_size}, but the data have "
            f"{split.channels} of {data.image_size}; name the folder of its training with --root"
        )
    height, width = data.image_size
    most = images or max(LEAST, min(MOST, pixels_for(device) // (height * width)))
    chosen = np.linspace(0, len(split) - 1, min(most, len(split)), dtype=np.int64)
    parts: list[tuple[Tensor, ...]] = []
    for indices in np.array_split(chosen, -(-len(chosen) // BATCH)):
        batch, labels = split.batch(indices)
        x = normalise(batch.to(device))
        z = tokenizer.encoder(x)  # (B, D, h, w)
        bottlenecked = tokenizer.bottleneck(z)
        codes = torch.zeros(len(x)) if bottlenecked.codes is None else bottlenecked.codes  # (B, h, w, K)
        x_hat = tokenizer.decode(bottlenecked.z_q).float().clamp(-1, 1)
        parts.append(tuple(part.cpu() for part in (x, labels, z.float(), bottlenecked.z_q.float(), codes, x_hat)))
    x, labels, z, z_q, codes, x_hat = (torch.cat(part) for part in zip(*parts, strict=True))
    return EncodedImages(
        loaded, data, opened.summary, split.classes, len(split),
        x, labels, z, z_q, codes if tokenizer.bottleneck.depth else None, x_hat, error_map(x, x_hat), psnr(x, x_hat),
    )  # fmt: skip


def pixels_for(device: torch.device) -> int:
    """Return the number of pixels that a device encodes or decodes in a few seconds."""
    return PIXELS.get(device.type, PIXELS["cpu"])


def tokenizer_device(tokenizer: Tokenizer) -> torch.device:
    """Return the device of the tokenizer's parameters."""
    return next(tokenizer.parameters()).device


def codes_of(encoded: EncodedImages) -> Tensor:
    """Return the codes (N, h, w, K). Raises NothingToShowError if the latent is continuous."""
    if encoded.codes is None:
        raise NothingToShowError(
            f"the latent of this bottleneck ({encoded.tokenizer.config.bottleneck.kind}) is continuous: there are no "
            "codes"
        )
    return encoded.codes


def in_batches(network: Callable[[Tensor], Tensor], tensor: Tensor, device: torch.device) -> Tensor:
    """Apply a network to a tensor (N, ...) in batches on the device; return the result on the CPU."""
    return torch.cat([network(part.to(device)).cpu() for part in tensor.chunk(-(-len(tensor) // BATCH))])


@torch.inference_mode()
def decode_latents(tokenizer: Tokenizer, z_q: Tensor) -> Tensor:
    """Decode z_q (N, D, h, w) to images (N, C, H, W), clamped to [-1, 1], on the CPU."""
    return in_batches(lambda part: tokenizer.decode(part).float().clamp(-1, 1), z_q, tokenizer_device(tokenizer))


@torch.inference_mode()
def look_up_vectors(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Return z_q (N, D, h, w) of codes (N, h, w, K), on the CPU."""
    return in_batches(
        lambda part: tokenizer.bottleneck.codes_to_latents(part).float(), codes, tokenizer_device(tokenizer)
    )


def code_use(codes: Tensor, codebook_size: int) -> CodeUse:
    """Count how often each code occurs in codes (N, h, w, K), for each of the K codebooks."""
    use = CodeUse(codes.shape[-1], codebook_size, codes.device)
    use.add(codes)
    return use


def error_map(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return the absolute difference (N, H, W) of images (N, C, H, W) in [-1, 1], mean over channels, in 0..1."""
    return (x_hat - x).abs().mean(dim=1) / 2.0
