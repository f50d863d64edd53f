"""A trained prior as a thing to call: from a seed to pictures.

    from sampling.sampler import Sampler

    sampler = Sampler.load("runs/stage2/shapes_vq_gpt")
    pictures = sampler.sample(16, classes="disk", seed=0)     # uint8 (16, H, W, C)

Picture i follows from (seed, i), its class and the settings: not from the number of pictures, how many are computed at
once, or by how many processes. `generate.py`, `complete.py` and `summary.py` are command lines around this class.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from sampling.choose import ChooseConfig, choose
from sampling.option_facts import AlwaysShown, Idle
from sampling.saved_images import Shape, to_images
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Size
from stage1_tokenizer.data.order import split_evenly
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.precision import device_of_float64
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.networks.tiles import decode_codes, tiles_for
from stage1_tokenizer.tokenizer import check_image_size
from stage2_prior.base import Grid
from stage2_prior.class_labels import assign_labels, parse_class
from stage2_prior.fast_linear import Precision
from stage2_prior.generation import KnownCodes, NotFiniteError, generate
from stage2_prior.guidance import Guidance, GuidanceSchedule, check_guidance
from stage2_prior.likelihood import class_log_probabilities, image_nats, nats_by_class
from stage2_prior.prior import LoadedPrior, load_prior
from stage2_prior.windows import Canvas

DEFAULT_TOP_P = 0.9
OF_CLASSES = Idle(beside="tokenizer", reason="guidance is between a prior with and without a class")
OF_SIZES = Idle(beside="tokenizer", reason="its noise has the size of training")
Progress = Callable[[int], object]
"""Called with a number of codes that are done."""


class SamplingConfig(ChooseConfig):
    """How pictures are drawn from a prior."""

    top_p: Annotated[float, AlwaysShown()] = Field(DEFAULT_TOP_P, ge=0.0, le=1.0)
    """Only the likeliest codes that together have this probability. With `guidance 1` and `top_p 1` the pictures are
    drawn from the prior as trained: more varied, and less clean."""
    guidance: Annotated[float | None, OF_CLASSES, AlwaysShown()] = Field(None, ge=0.0, le=100.0)
    """Classifier-free guidance: 1 is the prior as trained, 0 ignores the class, more insists on it; null: 2 where the
    prior was trained for it, else 1."""
    guidance_schedule: Annotated[GuidanceSchedule, OF_CLASSES] = "constant"
    """Where in the picture it applies: everywhere; rising from 1 along a line or a cosine from first to last position;
    or in an interval."""
    guidance_interval: tuple[float, float] | None = None
    """For the schedule interval: from which share of the positions to which, as in 0.2,0.8."""
    size: Annotated[Size | None, OF_SIZES] = None
    """Height and width of the pictures in pixels; larger ones than trained are made through a sliding window."""
    window: Annotated[Size | None, OF_SIZES] = None
    """Rows and columns of codes that the sliding window shows; null: the grid of training."""
    stride: Annotated[PositiveInt, OF_SIZES] = 1
    """Columns by which the window moves at once: 1 centres it on every position, more is faster. Without effect where
    the window covers the picture's width."""
    candidates: Annotated[PositiveInt, Idle(beside="tokenizer", reason="only a prior can say which one is best")] = 1
    """Draw this many for each picture and keep the best one, so `n` pictures are the best of n times as many."""
    best_by: Literal["score", "class"] | None = None
    """Which candidate is best: the likeliest, which is also the plainest (null does that); or the one whose class is
    surest, by the prior's own judgement."""
    precision: Annotated[Precision, Idle(beside="tokenizer", reason="it is that of a prior's weights")] = "float32"
    """Of a GPT's weights while it samples. bfloat16 is faster on GPUs and on processors that compute in it (AVX-512
    BF16, AMX), int8 on other processors; both change the logits a little, and so some pictures, as docs/performance.md
    shows."""
    batch_size: Annotated[PositiveInt, Mark.FREE] = 64
    """Pictures sampled at once by each process; bounded by memory, without effect on the pictures."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if (self.guidance_interval is not None) != (self.guidance_schedule == "interval"):
            raise ValueError("guidance_schedule interval and guidance_interval belong together; give both, or neither")
        low, high = self.guidance_interval or (0.0, 1.0)
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval ({low}, {high}) must rise within 0 to 1")
        if self.best_by is not None and self.candidates == 1:
            raise ValueError(f"best_by {self.best_by}: with one candidate there is nothing to choose; give candidates")
        return self


class Sampler:
    """A prior, its tokenizer, and how to draw from them."""

    def __init__(self, prior: LoadedPrior, config: SamplingConfig | None = None) -> None:
        """Raises ConfigError where the settings do not fit the prior: guidance, size, window, best_by, or precision."""
        self.prior, self.config = prior, config or SamplingConfig()
        self.device = next(prior.model.parameters()).device
        shape, tokenizer = prior.model.shape, prior.tokenizer.tokenizer.config
        self.factor = tokenizer.network.factor
        self.size = self.config.size or tokenizer.image_size
        check_image_size(self.size, self.factor, "size")
        self.grid: Grid = (self.size[0] // self.factor, self.size[1] // self.factor)
        self.check_size(self.grid)
        _, self.window = Canvas(self.grid, self.config.window, self.config.stride).resolve((shape.h, shape.w))
        self.guidance = Guidance(
            self._scale(), self.config.guidance_schedule, self.config.guidance_interval or (0.0, 1.0)
        )
        check_guidance(prior.model.config, prior.model.classes, self.guidance)
        if self.guidance.schedule != "constant" and not self.guidance.is_needed:
            raise ConfigError(f"guidance_schedule {self.guidance.schedule}: the guidance is 1, so nothing would change")
        if self.config.best_by == "class" and not prior.classes:
            raise ConfigError("best_by class: this prior has no classes; use best_by score")
        self.prepared = prior.model.prepare(self.config.precision)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        config: SamplingConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """From a stage-two run's folder or its prior.safetensors; None: the newest run under runs/stage2.

        Raises:
            ConfigError: there is no prior, or the settings do not fit it.
            BadFileError: its files are damaged or do not belong together.
        """
        return cls(load_prior(path, device), config)

    @property
    def codes_per_image(self) -> int:
        return self.grid[0] * self.grid[1] * self.prior.model.shape.K

    @property
    def image_shape(self) -> Shape:
        """Of each picture."""
        return (*self.size, self.prior.tokenizer.tokenizer.config.image_channels)

    def settings(self) -> dict[str, object]:
        """What the pictures follow from beside the configuration, for settings.json."""
        prior = self.prior
        digest = hashlib.sha256(f"{prior.tokenizer.fingerprint} {prior.model.config.model_dump_json()}".encode())
        for name, tensor in sorted(prior.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        weights = digest.hexdigest()[:32]
        found = {"step": prior.step, "guidance": self.guidance.scale, "classes": prior.classes, "weights": weights}
        return {"prior": str(prior.path), **found}

    def check_size(self, grid: Grid) -> None:
        """Raises ConfigError where pictures of this grid cannot be made, or cannot be compared as candidates."""
        shape, tokenizer = self.prior.model.shape, self.prior.tokenizer.tokenizer.config
        if grid != (shape.h, shape.w) and (network := tokenizer.network.name_of_one_size):
            raise ConfigError(
                f"pictures of {grid[0] * self.factor}x{grid[1] * self.factor}: this tokenizer's network is a "
                f"{network}, which decodes {tokenizer.image_size[0]}x{tokenizer.image_size[1]} alone"
            )
        if self.config.candidates > 1 and (grid[0] > shape.h or grid[1] > shape.w):
            raise ConfigError(
                f"candidates {self.config.candidates}: pictures larger than trained have no score to compare, since no "
                "window sees all of one; use candidates 1"
            )

    def sample(
        self,
        n: int,
        classes: str | int | Sequence[str | int] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> NDArray[np.uint8]:
        """Pictures 0..n-1 of a seed: (n, H, W, C) uint8.

        classes: a name or number for all pictures, one for each, or None for the classes in turn. In a text, several
        that pictures have in turn may stand with commas between them.

        Raises:
            ConfigError: n is not positive, an unknown class (lists those there are), or as many classes as pictures
                are not given.
            BadFileError: the prior gives logits that are not finite.
        """
        if n < 1:
            raise ConfigError(f"n is {n}, but at least one picture must be asked for")
        indices = np.arange(n, dtype=np.int64)
        labels = self.labels(indices, classes)
        parts = split_evenly(indices, self.config.batch_size)
        return np.concatenate([self.images(part, labels[part], seed, progress) for part in parts])

    def labels(
        self, indices: NDArray[np.int64], classes: str | int | Sequence[str | int] | None = None
    ) -> NDArray[np.int64]:
        """The label of each picture (n,): those asked for, else the classes in turn by the picture's number."""
        known = self.prior.classes
        if classes is None:
            return indices % max(1, len(known))
        if isinstance(classes, str | int | np.integer):
            return assign_labels(str(classes), known, indices)
        if len(classes) != len(indices):
            raise ConfigError(f"{len(classes)} classes for {len(indices)} pictures: give one for each, or one for all")
        return np.array([parse_class(str(name), known) for name in classes], dtype=np.int64)

    def images(
        self, indices: NDArray[np.int64], labels: NDArray[np.int64], seed: int, progress: Progress | None = None
    ) -> NDArray[np.uint8]:
        """The pictures of these numbers and labels, all at once: (n, H, W, C) uint8."""
        return self.decode(self.codes(indices, labels, seed, progress=progress))

    def codes(
        self,
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        seed: int,
        variants: NDArray[np.int64] | None = None,
        known: KnownCodes | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The codes (n, h, w, K) of these pictures: of several candidates each, the best.

        variants (n,): which try at its picture each one is; None: the first.
        """
        where = torch.from_numpy(labels).to(self.device)
        first = (np.zeros_like(indices) if variants is None else variants) * self.config.candidates
        tries = [
            self._generate(indices, where, seed, first + number, known, progress)
            for number in range(self.config.candidates)
        ]
        if len(tries) == 1:
            return tries[0]
        scores = torch.stack([self._score(codes, where) for codes in tries])  # (candidates, n)
        return torch.stack(tries)[scores.argmax(dim=0), torch.arange(len(indices))]

    def decode(self, codes: Tensor) -> NDArray[np.uint8]:
        """Codes (n, h, w, K) of any grid -> pictures (n, H, W, C) uint8; in tiles where they are larger than one."""
        shape = self.prior.model.shape
        larger = -(-codes.shape[1] * codes.shape[2] // (shape.h * shape.w))
        tokenizer = self.prior.tokenizer.tokenizer
        return to_images(partial(decode_codes, tokenizer, tiles=tiles_for(tokenizer.config)), codes, larger)

    def _generate(
        self,
        indices: NDArray[np.int64],
        labels: Tensor,
        seed: int,
        attempts: NDArray[np.int64],
        known: KnownCodes | None,
        progress: Progress | None,
    ) -> Tensor:
        grid = self.grid if known is None else (known.mask.shape[0], known.mask.shape[1])
        draws = grid[0] * grid[1] * self.prior.model.shape.K
        noise = draw_uniforms(seed, "sample", attempts, indices, draws)  # (n, draws)
        try:
            return generate(
                self.prior.model,
                labels,
                torch.from_numpy(noise).to(device_of_float64(self.device)),
                partial(choose, config=self.config),
                self.guidance,
                Canvas(grid, self.window, self.config.stride),
                known=known,
                progress=progress,
                prepared=self.prepared,
            )
        except NotFiniteError as error:
            raise BadFileError(f"{self.prior.path}: {error}") from None

    def _score(self, codes: Tensor, labels: Tensor) -> Tensor:
        """How good candidates are (n,)."""
        if self.config.best_by == "class":
            return class_log_probabilities(nats_by_class(self.prior.model, codes)).gather(1, labels[:, None])[:, 0]
        return -image_nats(self.prior.model, codes, labels)

    def _scale(self) -> float:
        """The guidance asked for, or what suits the prior."""
        if self.config.guidance is not None:
            return self.config.guidance
        return 2.0 if self.prior.classes and self.prior.model.config.label_dropout > 0 else 1.0
