"""The three tasks of the page: from settings, an image and a mask to images. It knows nothing of Gradio.

    sample      settings                   -> images, as `generate.py` makes them
    complete    an image, a painted mask   -> the kept part, and completions as `complete.py` makes them
    grow        an image, four margins     -> larger images

All values may come from anybody, so they are checked here, even if the page's controls check them too.
"""

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sampling.completion import (
    CompletionTask,
    Margins,
    complete,
    count_generated_codes,
    grow,
    kept_codes,
    margins_in_codes,
    show_kept,
)
from sampling.completion_source import CompleteConfig, read_originals
from sampling.generate import GenerateConfig
from sampling.prior_defaults import option_word, read_defaults
from sampling.sampler import Progress, Sampler, SamplingConfig
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, InterruptionError, UserError
from stage1_tokenizer.engine.model_files import find_name
from stage2_prior.fast_linear import Precision
from stage2_prior.prior import LoadedPrior

CONFIG_NAME = "settings of this page"
"""Name of the page's settings in the errors of a config."""
OFFERED = 12
"""Number of validation images to choose from."""
LONGEST_LINE = 500
"""Characters of a message at most."""
ReportShare = Callable[[float], object]
"""Function that is called with the finished share of a task, in [0, 1]."""


class Limits(NamedTuple):
    """The largest request that is allowed."""

    images: int
    side: int
    """Pixels."""


class Chosen(NamedTuple):
    """An image to complete or to grow."""

    image: ImageArray
    """(H, W, C) uint8 of the prior's size."""
    number: int
    """Number of the image: with the seed it decides the noise."""
    label: int | None
    """The prior's label; None if it is not known."""
    name: str
    """Name that the page shows."""


class Sampled(NamedTuple):
    """The images of one request."""

    images: NDArray[np.uint8]
    """(n, H, W, C)."""
    classes: list[str]
    """n class names; empty if the prior has no classes."""
    command: str
    """Command line that makes the same images."""


class Playground:
    """A loaded prior, and the limits of what may be asked of it."""

    def __init__(self, prior: LoadedPrior, precision: Precision, limits: Limits) -> None:
        """Raises ConfigError if the precision does not fit the prior."""
        self.prior, self.precision, self.limits = prior, precision, limits
        self.stopping = threading.Event()
        """Set it to end the running task with an InterruptionError."""
        self._stated = read_defaults(prior.path)
        default = Sampler(prior, SamplingConfig.of_prior(prior.path, precision=precision))
        self.size, self.factor = default.size, default.factor
        self.defaults = self._stated.defaults_beside({}) | {"guidance": default.guidance.scale}
        """The prior's defaults of the options of the draw, with the guidance scale that null stands for."""

    @property
    def name(self) -> str:
        """Value of --prior that names this prior: its run's folder, hf:OWNER/NAME@COMMIT or pretrained:NAME."""
        return str(find_name(self.prior.path) or self.prior.path.parent)

    @property
    def can_guide(self) -> bool:
        """True if the prior was trained for guidance."""
        return bool(self.prior.classes) and self.prior.model.config.label_dropout > 0.0

    @property
    def can_be_larger(self) -> bool:
        """True if images larger than trained can be made and the limits allow them."""
        network = self.prior.tokenizer.tokenizer.config.network
        return not network.name_of_one_size and self.limits.side >= min(self.size) + self.factor

    def offered(self) -> list[Chosen]:
        """Return the first validation images of the prior's own data set.

        Raises:
            UserError: the data set cannot be read.
        """
        originals = read_originals(Sampler(self.prior), None, OFFERED)
        known = self.prior.classes
        labels = [int(label) if label < len(known) else None for label in originals.labels]
        return [
            Chosen(image, index, label, f"validation image {index}")
            for index, (image, label) in enumerate(zip(originals.images, labels, strict=True))
        ]

    def uploaded(self, path: Path, name: str) -> Chosen:
        """Read an uploaded file, resized and cropped to the prior's size. `name`: its name on the user's machine.

        Raises:
            BadFileError: the file is no image, is damaged, or is too large.
        """
        some_class = "0" if self.prior.classes else None  # the task decides on the real one
        try:
            image = read_originals(Sampler(self.prior), str(path), 1, some_class).images[0]
        except BadFileError as error:
            raise BadFileError(str(error).replace(str(path), name)) from None
        return Chosen(image, 0, None, name)

    def sample(self, values: Mapping[str, Any], report: ReportShare) -> Sampled:
        """Sample images. `values`: options of `generate.py` by name.

        Raises:
            ConfigError: a value does not fit, or is beyond the limits.
        """
        config = GenerateConfig.from_tree(self._tree(values, "n"), CONFIG_NAME)
        self._check_number("n", config.n)
        self._check_side("size", config.size or self.size)
        sampler = Sampler(self.prior, config)
        indices = np.arange(config.n, dtype=np.int64)
        labels = sampler.labels(indices, config.class_)
        progress = self._progress(config.n * sampler.codes_per_image, report)
        images = sampler.images(indices, labels, config.seed, progress)
        names = [self.prior.classes[label] for label in labels] if self.prior.classes else []
        return Sampled(images, names, self._command(config))

    def complete(
        self, chosen: Chosen | None, painted: NDArray[np.bool_], values: Mapping[str, Any], report: ReportShare
    ) -> tuple[ImageArray, NDArray[np.uint8]]:
        """Generate the painted pixels (H, W) of the chosen image. `values`: options of `complete.py` by name.

        Returns:
            The image (H, W, C) with grey in place of the painted pixels, and the completions (variants, H, W, C).

        Raises:
            ConfigError: as `sample`; or no image is chosen, or nothing or too much is painted.
        """
        config, sampler, task = self._prepare(chosen, values)
        keep = ~painted
        if keep.all():
            raise ConfigError("nothing is painted: paint over the part that the prior should generate")
        if not kept_codes(keep, self.factor).any():
            raise ConfigError(
                f"too much is painted: a code covers {self.factor}x{self.factor} pixels, and no code is left whole, so "
                "the prior would see nothing; erase a part"
            )
        progress = self._progress(config.variants * sampler.codes_per_image, report)
        completions = complete(sampler, task, keep, config.paste, progress)
        return show_kept(task.images[:1], keep, Margins(), self.factor)[0], completions

    def grow(
        self, chosen: Chosen | None, values: Mapping[str, Any], report: ReportShare
    ) -> tuple[ImageArray, NDArray[np.uint8]]:
        """Generate margins around the chosen image. `values`: as for `complete`, and `grow` with up, down, left, right.

        Returns:
            The image with grey margins (H', W', C), and the results (variants, H', W', C).

        Raises:
            ConfigError: as `sample`; or no image is chosen, or the margins are not multiples of the factor, or all 0.
        """
        config, sampler, task = self._prepare(chosen, values)
        pixels = config.margins
        height, width = self.size[0] + pixels.up + pixels.down, self.size[1] + pixels.left + pixels.right
        self._check_side("grow", (height, width), "a result of ")
        margins = margins_in_codes(pixels, sampler)
        if not any(margins):
            raise ConfigError("all four margins are 0: give at least one side some pixels")
        progress = self._progress(config.variants * count_generated_codes(sampler, margins), report)
        grown = grow(sampler, task, margins, config.paste, progress)
        return show_kept(task.images[:1], None, margins, self.factor)[0], grown

    def _prepare(
        self, chosen: Chosen | None, values: Mapping[str, Any]
    ) -> tuple[CompleteConfig, Sampler, CompletionTask]:
        """Return config, sampler and task for the variants of the chosen image."""
        config = CompleteConfig.from_tree(self._tree(values, "variants"), CONFIG_NAME)
        self._check_number("variants", config.variants)
        if chosen is None:
            raise ConfigError("no image is chosen: choose one, or upload one")
        sampler = Sampler(self.prior, config)
        n = config.variants
        images, indices = np.repeat(chosen.image[None], n, axis=0), np.full(n, chosen.number, dtype=np.int64)
        labels = np.full(n, self._label(chosen, config.class_, sampler), dtype=np.int64)
        return config, sampler, CompletionTask(images, indices, labels, config.seed, np.arange(n, dtype=np.int64))

    def _label(self, chosen: Chosen, given: str | Sequence[str] | None, sampler: Sampler) -> int:
        """Return the label of the given class, else that of the image, else the one for no class."""
        if given is not None:
            return int(sampler.labels(np.zeros(1, dtype=np.int64), given)[0])
        if chosen.label is not None or not self.prior.classes:
            return chosen.label or 0
        if self.prior.model.config.label_dropout == 0.0:
            raise ConfigError("class: this prior was not trained without classes; say which class this image has")
        return self.prior.model.null_label

    def _tree(self, values: Mapping[str, Any], key: str) -> Tree:
        """Return the values as the tree of a config, after a check of the number of images under `key`.

        The page sends a value for each control; one that is the prior's default is as if it was not given.
        """
        number = values.get(key, 1)
        if isinstance(number, int | float):  # the config has a limit too, with a message that fits the page less
            self._check_number(key, number)
        given = {name: value for name, value in values.items() if self.defaults.get(name) != value}
        return {**self._stated.defaults_beside(given), key: 1, **given, "precision": self.precision}

    def _check_number(self, key: str, number: float) -> None:
        most = self.limits.images
        if number > most:
            raise ConfigError(f"{key}: {number:,} images are more than the {most} that this page makes at once")

    def _check_side(self, key: str, size: tuple[int, int], prefix: str = "") -> None:
        if max(size) > max(self.limits.side, *self.size):
            raise ConfigError(
                f"{key}: {prefix}{size[0]:,}x{size[1]:,} pixels is larger than this page makes, which is up to "
                f"{self.limits.side} a side"
            )

    def _progress(self, total: int, report: ReportShare) -> Progress:
        """Return a function that counts the codes of a task, and ends the task when the page is closed."""
        done = 0

        def advance(codes: int) -> None:
            nonlocal done
            if self.stopping.is_set():
                raise InterruptionError("the page is being closed")
            before, done = done, done + codes
            if 100 * done // total > 100 * before // total:
                report(done / total)

        return advance

    def _command(self, config: GenerateConfig) -> str:
        """Return the command line of `generate.py` with the options that differ from the prior's defaults."""
        words = ["python", "sampling/generate.py", "-n", str(config.n), "--prior", self.name]
        defaults = GenerateConfig.from_tree(self._stated.tree()).tree()
        for key, value in config.tree().items():
            if value != defaults[key] and key != "n":
                words += [f"--{key}", option_word(value)]
        return shlex.join(words)


def one_line_message(error: UserError) -> str:
    """Return the error's message as one line of at most `LONGEST_LINE` characters or so, its middle left out."""
    line = " ".join(str(error).removeprefix(f"in the {CONFIG_NAME}:").split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
