"""A trained prior as a Python object that samples images.

    from sampling.sampler import Sampler

    sampler = Sampler.load("runs/stage2/shapes_vq_gpt")
    images = sampler.sample(16, classes="disk", seed=0)     # uint8 (16, H, W, C)

The way of n images, numbered i = 0..n-1 (B = n at once, h w K as in the prior, V codes):

    noise    (n, h*w*K)    uniform in [0, 1), a function of (seed, i, attempt) alone
    codes    (n, h, w, K)  position by position: prior -> logits (n, V) -> guidance -> choose(logits, noise) -> code
    images   (n, H, W, C)  the tokenizer decodes the codes; uint8

One noise number decides each code (`choose.py`), so image i depends only on (seed, i), its class and the settings, and
not on n, the batch size or the number of processes. `generate.py`, `complete.py` and `summary.py` are command lines
around this class.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt, model_validator
from torch import Tensor

from sampling.choose import choose
from sampling.option_facts import Idle
from sampling.prior_defaults import DrawConfig, read_defaults
from sampling.saved_images import ImageShape, decode_in_chunks
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
from stage2_prior.likelihood import class_log_probabilities, image_nats, nats_by_class
from stage2_prior.prior import LoadedPrior, load_prior
from stage2_prior.windows import Canvas

NEEDS_GRID = Idle(beside="tokenizer", reason="its noise has the size of training")
Progress = Callable[[int], object]
"""Function that is called with the number of codes generated since its last call."""


class SamplingConfig(DrawConfig):
    """Settings with which images are sampled from a prior."""

    size: Annotated[Size | None, NEEDS_GRID] = None
    """Height and width of the images in pixels; null: the size of training. Larger images are generated through a
    sliding window."""
    window: Annotated[Size | None, NEEDS_GRID] = None
    """Rows and columns of codes in the sliding window; null: the grid of training. Smaller is faster."""
    stride: Annotated[PositiveInt, NEEDS_GRID] = 1
    """Columns of codes by which the window moves: 1 centres it on every position, more is faster. No effect if the
    window is as wide as the image."""
    candidates: Annotated[PositiveInt, Idle(beside="tokenizer", reason="only a prior can say which one is best")] = 1
    """Number of images to sample for each image that is kept, the best one; the time grows with it."""
    best_by: Literal["score", "class"] | None = None
    """Criterion for the best candidate. score (the default): highest likelihood under the prior, which prefers plain
    images. class: highest probability of the class, computed by the prior itself."""
    precision: Annotated[Precision, Idle(beside="tokenizer", reason="it is that of a prior's weights")] = "float32"
    """Number format of a GPT's weights while it samples. bfloat16 is faster on GPUs and on processors with AVX-512 BF16
    or AMX, int8 on other processors. Both change the logits slightly and so change some images; docs/performance.md has
    measurements."""
    batch_size: Annotated[PositiveInt, Mark.FREE] = 64
    """Images that each process samples at once. Reduce it if memory runs out; it does not change the images."""

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.best_by is not None and self.candidates == 1:
            raise ValueError(f"best_by {self.best_by}: with one candidate there is nothing to choose; give candidates")
        return self

    @classmethod
    def of_prior(cls, file: Path, **options: object) -> Self:
        """Return these options, and for the others the defaults that a prior's file states.

        Raises:
            ConfigError: an option is unknown or has a wrong value.
            BadFileError: the file is not a prior, or its defaults cannot be used.
        """
        return cls.from_tree({**read_defaults(file).defaults_beside(options), **options}, "options")


class Sampler:
    """A loaded prior with its tokenizer and the sampling settings.

    Attributes: `size` (height, width) of the images in pixels; `grid` (h, w) of their codes; `window` (h, w) of the
    sliding window; `factor` pixels per code and axis; `guidance`, with the
    scale that null stands for; `prepared`, the weights in the precision of the config.
    """

    def __init__(self, prior: LoadedPrior, config: SamplingConfig | None = None) -> None:
        """Prepare the prior's weights in the precision of the config; None: the defaults that the prior states.

        Raises:
            BadFileError: the prior states defaults that cannot be used.
            ConfigError: guidance, size, window, best_by or precision do not fit the prior.
        """
        self.prior, self.config = prior, config or SamplingConfig.of_prior(prior.path)
        self.device = next(prior.model.parameters()).device
        shape, tokenizer = prior.model.shape, prior.tokenizer.tokenizer.config
        self.factor = tokenizer.network.factor
        self.size = self.config.size or tokenizer.image_size
        check_image_size(self.size, self.factor, "size")
        self.grid: Grid = (self.size[0] // self.factor, self.size[1] // self.factor)
        self.check_size(self.grid)
        _, self.window = Canvas(self.grid, self.config.window, self.config.stride).resolve((shape.h, shape.w))
        self.guidance = self.config.resolve_guidance(prior.model.config, prior.model.classes)
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
        """Load a stage-two run's folder, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME.

        None loads the newest run under runs/stage2, or pretrained:shapes if there is none.

        Raises:
            ConfigError: there is no prior, or the settings do not fit it.
            BadFileError: its files are damaged or do not belong together.
        """
        return cls(load_prior(path, device), config)

    @property
    def codes_per_image(self) -> int:
        """Number of codes of one image: h * w * K."""
        return self.grid[0] * self.grid[1] * self.prior.model.shape.K

    @property
    def image_shape(self) -> ImageShape:
        """Height, width and channels of one image."""
        return (*self.size, self.prior.tokenizer.tokenizer.config.image_channels)

    def settings(self) -> dict[str, object]:
        """Return what the images depend on beside the config, for settings.json: step, guidance, classes, weights."""
        prior = self.prior
        digest = hashlib.sha256(f"{prior.tokenizer.fingerprint} {prior.model.config.model_dump_json()}".encode())
        for name, tensor in sorted(prior.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        weights = digest.hexdigest()[:32]
        facts = {"step": prior.step, "guidance": self.guidance.scale, "classes": prior.classes, "weights": weights}
        return {"prior": prior.source, **facts}

    def check_size(self, grid: Grid) -> None:
        """Check that images with a grid of (h, w) codes can be generated, and compared if there are candidates.

        Raises:
            ConfigError: the tokenizer's network decodes only one size, or several candidates of a larger size.
        """
        shape, tokenizer = self.prior.model.shape, self.prior.tokenizer.tokenizer.config
        if grid != (shape.h, shape.w) and (network := tokenizer.network.name_of_one_size):
            raise ConfigError(
                f"images of {grid[0] * self.factor}x{grid[1] * self.factor}: this tokenizer's network is a {network}, "
                f"which decodes only {tokenizer.image_size[0]}x{tokenizer.image_size[1]}"
            )
        if self.config.candidates > 1 and (grid[0] > shape.h or grid[1] > shape.w):
            raise ConfigError(
                f"candidates {self.config.candidates}: images larger than trained have no score to compare, because "
                "the prior sees only a window of each; use candidates 1"
            )

    def sample(
        self,
        n: int,
        classes: str | int | Sequence[str | int] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> NDArray[np.uint8]:
        """Sample images 0..n-1 of a seed: (n, H, W, C) uint8.

        Args:
            n: number of images.
            classes: a class name or label for all images, or a sequence with one for each image; None: all classes in
                turn. A text may list several classes with commas, which the images then have in turn.
            seed: seed of the noise.
            progress: called with the number of codes generated since its last call.

        Raises:
            ConfigError: n is below 1, there is no such class (the message lists the classes), or the sequence does not
                have n classes.
            BadFileError: the prior's logits are not finite.
        """
        if n < 1:
            raise ConfigError(f"n is {n}, but at least one image must be asked for")
        indices = np.arange(n, dtype=np.int64)
        labels = self.labels(indices, classes)
        parts = split_evenly(indices, self.config.batch_size)
        return np.concatenate([self.images(part, labels[part], seed, progress) for part in parts])

    def labels(
        self, indices: NDArray[np.int64], classes: str | int | Sequence[str | int] | None = None
    ) -> NDArray[np.int64]:
        """Return the label (n,) of each image; `classes` as in `sample`."""
        names = self.prior.classes
        if classes is None:
            return indices % max(1, len(names))
        if isinstance(classes, str | int | np.integer):
            return assign_labels(str(classes), names, indices)
        if len(classes) != len(indices):
            raise ConfigError(f"{len(classes)} classes for {len(indices)} images: give one for each, or one for all")
        return np.array([parse_class(str(name), names) for name in classes], dtype=np.int64)

    def images(
        self, indices: NDArray[np.int64], labels: NDArray[np.int64], seed: int, progress: Progress | None = None
    ) -> NDArray[np.uint8]:
        """Sample the images with these numbers (n,) and labels (n,), all at once: (n, H, W, C) uint8."""
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
        """Generate the codes (n, h, w, K) of images; of several candidates for each image, return the best.

        Args:
            indices: (n,) numbers of the images.
            labels: (n,).
            seed: with the number and the variant it decides the noise.
            variants: (n,) number of the variant of each image; None: 0 for all. Each variant has its own candidates.
            known: codes that are given, not generated; its grid replaces the sampler's.
            progress: called with the number of codes generated since its last call.
        """
        device_labels = torch.from_numpy(labels).to(self.device)
        count = self.config.candidates
        first_attempt = (np.zeros_like(indices) if variants is None else variants) * count
        candidates = [
            self._generate(indices, device_labels, seed, first_attempt + number, known, progress)
            for number in range(count)
        ]
        if count == 1:
            return candidates[0]
        scores = torch.stack([self._score(codes, device_labels) for codes in candidates])  # (candidates, n)
        return torch.stack(candidates)[scores.argmax(dim=0), torch.arange(len(indices))]

    def decode(self, codes: Tensor) -> NDArray[np.uint8]:
        """Decode codes (n, h, w, K) of any grid to images (n, H, W, C) uint8; larger images than trained in tiles."""
        shape = self.prior.model.shape
        times_larger = -(-codes.shape[1] * codes.shape[2] // (shape.h * shape.w))
        tokenizer = self.prior.tokenizer.tokenizer
        decode = partial(decode_codes, tokenizer, tiles=tiles_for(tokenizer.config))
        return decode_in_chunks(decode, codes, times_larger)

    def _generate(
        self,
        indices: NDArray[np.int64],
        labels: Tensor,
        seed: int,
        attempts: NDArray[np.int64],
        known: KnownCodes | None,
        progress: Progress | None,
    ) -> Tensor:
        """Generate one candidate of each image: codes (n, h, w, K). The noise depends on (seed, attempt, index)."""
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
        """Return the score (n,) of candidates: log-probability of the codes given the label, or of the label."""
        if self.config.best_by == "class":
            return class_log_probabilities(nats_by_class(self.prior.model, codes)).gather(1, labels[:, None])[:, 0]
        return -image_nats(self.prior.model, codes, labels)
