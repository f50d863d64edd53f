"""The subject of all views: a run, and its tokenizer with validation images encoded and decoded; and what a view is.

Subject -> numbers, computed once (`once`) -> a sheet (PNG, for analyze.py) and a section (for the report's page)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.data import DataConfig, OpenData, data_config
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.record import Found
from stage1_tokenizer.diagnostics.report.markup import Child
from stage1_tokenizer.diagnostics.report.page import EXPECTED_ERRORS, Section, notice, try_section
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.views.projection import ProjectionKind
from stage1_tokenizer.diagnostics.views.sheet import STYLE, Sheet
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.names import located
from stage1_tokenizer.metrics import CodeUse, psnr
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer

BATCH = 64
MOST, LEAST = 512, 16
"""Images that a page looks at."""
PIXELS = {"cpu": 2**20, "cuda": 2**25}
"""Pixels of all of these together: on a CPU a second's work or a few, for the networks of the presets."""
T = TypeVar("T")


class NothingToShowError(Exception):
    """A view means nothing for this subject. The message is a sentence without capital letter and full stop."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A run to look at, and how. What several views need is computed once, when the first of them asks."""

    run: RunFolder
    device: torch.device
    root: str | None = None
    """Folder in which the images of the training are now; None: where they were then."""
    tokenizer: str | Path | None = None
    """The tokenizer's file or folder; None: the run's."""
    option: str = "RUN"
    """The command's option that named it, for messages."""
    images: int | None = None
    """Validation images to look at, evenly spaced; None: as many as the device encodes in seconds."""
    codes: int = 256
    """Codes in the PNG of the atlas."""
    projection: ProjectionKind = "pca"
    """For the codebook on a plane."""
    seed: int = 0
    """Seed of random codes, noise, masks and UMAP."""
    answers: dict[Callable[..., Any], Any] = field(default_factory=dict)
    """Results, or the exceptions raised, of the functions marked with `once`."""


def once(numbers: Callable[[Subject], T]) -> Callable[[Subject], T]:
    """Compute a view's numbers once for each subject. The error that they raise is kept, and raised again too."""

    @wraps(numbers)
    def ask(subject: Subject) -> T:
        if numbers not in subject.answers:
            try:
                subject.answers[numbers] = numbers(subject)
            except (*EXPECTED_ERRORS, NothingToShowError) as error:
                subject.answers[numbers] = error
        answer = subject.answers[numbers]
        if isinstance(answer, Exception):
            raise answer
        result: T = answer
        return result

    return ask


@dataclass(frozen=True)
class View:
    """One view. To add one: a file with its numbers and drawings, and an entry in VIEWS."""

    name: str
    """Name of the PNG."""
    title: str
    """Heading on the page."""
    draw: Callable[[Subject], Sheet] | None = None
    """Draws the PNG; None: the view is on the page alone. Raises NothingToShowError."""
    show: Callable[[Subject], Child] | None = None
    """Makes the section of the page; None: the view is a PNG alone. Raises NothingToShowError."""
    address: str = ""
    """Address of the section on the page; empty: the name."""
    json: Callable[[Subject], str] | None = None
    """Numbers that analyze.py writes beside the PNG."""

    def png(self, subject: Subject) -> bytes:
        """The PNG file. Raises NothingToShowError."""
        from matplotlib import rc_context  # noqa: PLC0415 (why: sheet.py)

        assert self.draw
        with rc_context(STYLE):
            return self.draw(subject).png()

    def section(self, subject: Subject) -> Section:
        """The section, or a sentence that says why there is nothing to see in it."""

        def build() -> Child:
            try:
                return self.show(subject) if self.show else None
            except NothingToShowError as error:
                sentence = str(error)
                return notice(f"{sentence[0].upper()}{sentence[1:]}.")

        return try_section(self.address or self.name, self.title, build)


@dataclass(frozen=True)
class EncodedImages:
    """Validation images and what a tokenizer made of them; tensors on the CPU."""

    loaded: LoadedTokenizer
    data: DataConfig
    found: Found
    classes: tuple[str, ...]
    split_size: int
    """Images of the whole validation split."""
    x: Tensor
    """(N, C, H, W) in [-1, 1]."""
    labels: Tensor
    """(N,) int64."""
    z: Tensor
    """(N, D, h, w), as the bottleneck receives it."""
    z_q: Tensor
    """(N, D, h, w), as the decoder receives it."""
    codes: Tensor | None
    """(N, h, w, K) int64, or None where the bottleneck is continuous."""
    x_hat: Tensor
    """(N, C, H, W), clamped to [-1, 1]."""
    errors: Tensor
    """(N, H, W), absolute error, mean over channels, as a share of the range of values."""
    psnr: Tensor
    """(N,) in dB."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    @property
    def count(self) -> int:
        return len(self.x)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.x.shape[2], self.x.shape[3]

    def spaced_indices(self, n: int) -> list[int]:
        """Up to n different places 0..N-1, evenly spaced."""
        return sorted(set(np.linspace(0, len(self.x) - 1, min(n, len(self.x)), dtype=np.int64).tolist()))

    def class_name(self, place: int) -> str:
        """The class of an image, or nothing where there are none."""
        label = int(self.labels[place])
        return self.classes[label] if label < len(self.classes) else ""

    @property
    def description(self) -> str:
        """Which images these are, in words."""
        if self.count == self.split_size:
            return f"all {self.split_size:,} validation pictures"
        return f"{self.count:,} of {self.split_size:,} validation pictures, evenly spaced"

    @property
    def footer(self) -> str:
        """The line below each PNG."""
        return f"{self.loaded.path.parent.name}   step {self.loaded.step}   {self.tokenizer.config.bottleneck.kind}"


@once
def encoded_images(subject: Subject) -> EncodedImages:
    """Load the subject's tokenizer, and encode and decode validation images of its training.

    Raises:
        ConfigError: there are no weights, or no data at that place, or others.
        BadFileError: the weights are damaged, or too many images.
    """
    loaded = LoadedTokenizer.load(subject.tokenizer or subject.run.path, subject.device, option=subject.option)
    return encode_images(loaded, with_root(data_config(loaded.data, str(loaded.path)), subject.root), subject.images)


@torch.inference_mode()
def encode_images(loaded: LoadedTokenizer, data: DataConfig, images: int | None = None) -> EncodedImages:
    """Encode and decode up to so many validation images of a data set, evenly spaced over the split.

    Raises:
        ConfigError: the data have other sizes than the tokenizer.
    """
    tokenizer, device = loaded.tokenizer, tokenizer_device(loaded.tokenizer)
    opened = OpenData(data.model_copy(update={"cache": "none"}))  # of a large split only a few images are read
    split = opened.image_batches("validation", 0)
    wanted = tokenizer.config.image_channels
    if split.channels != wanted or data.image_size != tokenizer.config.image_size:
        raise ConfigError(
            f"{loaded.path}: was trained on {wanted} channels of {tokenizer.config.image_size}, but the data have "
            f"{split.channels} of {data.image_size}; name the folder of its training with --root"
        )
    height, width = data.image_size
    at_most = images or max(LEAST, min(MOST, pixels_for(device) // (height * width)))
    chosen = np.linspace(0, len(split) - 1, min(at_most, len(split)), dtype=np.int64)
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
        loaded, data, opened.found, split.classes, len(split),
        x, labels, z, z_q, codes if tokenizer.bottleneck.depth else None, x_hat, error_map(x, x_hat), psnr(x, x_hat),
    )  # fmt: skip


def with_root(data: DataConfig, root: str | None) -> DataConfig:
    """The data in another folder; drawn ones have none, and stay."""
    if root is None or data.is_drawn:
        return data
    if not Path(root).is_dir():
        raise ConfigError(f"--root {located(root)}: there is no such folder")
    return data.model_copy(update={"root": root})


def pixels_for(device: torch.device) -> int:
    """Number of pixels that are looked at on a device."""
    return PIXELS.get(device.type, PIXELS["cpu"])


def tokenizer_device(tokenizer: Tokenizer) -> torch.device:
    return next(tokenizer.parameters()).device


def codes_of(encoded: EncodedImages) -> Tensor:
    """The codes (N, h, w, K); raises NothingToShowError where the latent is continuous."""
    if encoded.codes is None:
        raise NothingToShowError(
            f"the latent of this bottleneck ({encoded.tokenizer.config.bottleneck.kind}) is continuous: there are no "
            "codes, and nothing to show here"
        )
    return encoded.codes


def in_batches(network: Callable[[Tensor], Tensor], tensor: Tensor, device: torch.device) -> Tensor:
    """Apply the network to a tensor (N, ...) part by part on the device; the result is on the CPU."""
    return torch.cat([network(part.to(device)).cpu() for part in tensor.chunk(-(-len(tensor) // BATCH))])


@torch.inference_mode()
def decode_latents(tokenizer: Tokenizer, z_q: Tensor) -> Tensor:
    """(N, D, h, w) -> images (N, C, H, W), clamped to [-1, 1], on the CPU."""
    return in_batches(lambda part: tokenizer.decode(part).float().clamp(-1, 1), z_q, tokenizer_device(tokenizer))


@torch.inference_mode()
def look_up_vectors(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """codes (N, h, w, K) -> z_q (N, D, h, w) on the CPU."""
    return in_batches(lambda part: tokenizer.bottleneck.vectors(part).float(), codes, tokenizer_device(tokenizer))


def code_use(codes: Tensor, codebook_size: int) -> CodeUse:
    """Histogram of the codes (N, h, w, K) over their codebooks."""
    use = CodeUse(codes.shape[-1], codebook_size, codes.device)
    use.add(codes)
    return use


def error_map(x: Tensor, x_hat: Tensor) -> Tensor:
    """Absolute difference (N, H, W) of images (N, C, H, W) in [-1, 1], mean over channels, as a share of the range."""
    return (x_hat - x).abs().mean(dim=1) / 2.0
