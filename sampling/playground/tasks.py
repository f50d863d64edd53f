"""What the page can be asked for: from settings, a picture and a mask, all of them from anybody, to pictures.

    sample      settings                      -> pictures, as `generate.py` makes them
    complete    a picture, what is painted    -> what is kept, completions, as `complete.py` makes them
    grow        a picture, four margins       -> larger pictures

Nothing here knows of the page. What arrives is checked here, whatever a page let through.
"""

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sampling.completion import (
    CompleteConfig,
    Margins,
    Task,
    codes_made,
    complete,
    framed,
    grow,
    kept_codes,
    margins_in_codes,
    read_originals,
)
from sampling.generate import GenerateConfig
from sampling.sampler import Progress, Sampler, SamplingConfig
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, InterruptionError, UserError
from stage2_prior.fast_linear import Precision
from stage2_prior.prior import LoadedPrior

SOURCE = "settings of this page"
OFFERED = 12
"""Validation pictures to choose from."""
LONGEST_LINE = 500
"""Characters of a message."""
Share = Callable[[float], object]
"""Called with the share in [0, 1] of a task that is done."""


class Limits(NamedTuple):
    """The most that one request may ask for."""

    pictures: int
    side: int
    """Pixels."""


class Chosen(NamedTuple):
    """A picture to complete or to grow."""

    picture: ImageArray
    """(H, W, C) of the prior's size."""
    number: int
    """Its number: with the seed it decides the noise."""
    label: int | None
    """Its class, where its data set says it."""
    name: str


class Sampled(NamedTuple):
    pictures: NDArray[np.uint8]
    """(n, H, W, C)."""
    classes: list[str]
    """(n,), or none where the prior has none."""
    command: str
    """The command line that makes the same pictures."""


class Playground:
    """A loaded prior, and what may be asked of it."""

    def __init__(self, prior: LoadedPrior, precision: Precision, limits: Limits) -> None:
        """Raises ConfigError where the precision does not fit the prior."""
        self.prior, self.precision, self.limits = prior, precision, limits
        self.stopping = threading.Event()
        """Once it is set, a task that is under way ends with an InterruptionError."""
        plain = Sampler(prior, SamplingConfig(precision=precision))
        self.size, self.factor, self.guidance = plain.size, plain.factor, plain.guidance.scale

    @property
    def can_guide(self) -> bool:
        return bool(self.prior.classes) and self.prior.model.config.label_dropout > 0.0

    @property
    def can_be_larger(self) -> bool:
        """Whether pictures larger than trained can be made, and the limit admits them."""
        network = self.prior.tokenizer.tokenizer.config.network
        return not network.name_of_one_size and self.limits.side >= min(self.size) + self.factor

    def offered(self) -> list[Chosen]:
        """The first validation pictures of the prior's own data.

        Raises:
            UserError: the data are not here any more.
        """
        found = read_originals(Sampler(self.prior), None, OFFERED)
        known = self.prior.classes
        labels = [int(label) if label < len(known) else None for label in found.labels]
        places = enumerate(zip(found.pictures, labels, strict=True))
        return [Chosen(picture, index, label, f"validation picture {index}") for index, (picture, label) in places]

    def uploaded(self, path: Path, name: str) -> Chosen:
        """A file that somebody sent, scaled and cropped to the prior's size. `name` is what they call it.

        Raises:
            BadFileError: it is no picture, or a damaged or too large one.
        """
        plain = Sampler(self.prior)
        known = "0" if self.prior.classes else None  # which class it is, its task will say
        try:
            picture = read_originals(plain, str(path), 1, known).pictures[0]
        except BadFileError as error:
            raise BadFileError(str(error).replace(str(path), name)) from None
        return Chosen(picture, 0, None, name)

    def sample(self, values: Mapping[str, Any], report: Share) -> Sampled:
        """values: n, seed, class, and how codes are chosen, under the names of `generate.py`'s options.

        Raises:
            ConfigError: a value that does not fit, or more than the limits admit.
        """
        config = GenerateConfig.from_tree(self._tree(values, "n"), SOURCE)
        self._check_number("n", config.n)
        self._check_side("size", config.size or self.size)
        sampler = Sampler(self.prior, config)
        indices = np.arange(config.n, dtype=np.int64)
        labels = sampler.labels(indices, config.class_)
        progress = self._counted(config.n * sampler.codes_per_image, report)
        made = sampler.images(indices, labels, config.seed, progress)
        names = [self.prior.classes[label] for label in labels] if self.prior.classes else []
        return Sampled(made, names, self._command(config))

    def complete(
        self, chosen: Chosen | None, painted: NDArray[np.bool_], values: Mapping[str, Any], report: Share
    ) -> tuple[ImageArray, NDArray[np.uint8]]:
        """The picture with all that is painted (H, W) hidden, and with it made anew: (variants, H, W, C).

        values: variants, paste, seed, class, and how codes are chosen, as `complete.py` has them.

        Raises:
            ConfigError: as `sample`; or nothing is painted, or too much.
        """
        config, sampler, task = self._started(chosen, values)
        keep = ~painted
        if keep.all():
            raise ConfigError("nothing is painted: paint over what is to be made anew")
        if not kept_codes(keep, self.factor).any():
            raise ConfigError(
                f"too much is painted: a code covers {self.factor}x{self.factor} pixels, and none is left whole, so "
                "the prior would see nothing"
            )
        progress = self._counted(config.variants * sampler.codes_per_image, report)
        made = complete(sampler, task, keep, config.paste, progress)
        return framed(task.pictures[:1], keep, Margins(), self.factor)[0], made

    def grow(
        self, chosen: Chosen | None, values: Mapping[str, Any], report: Share
    ) -> tuple[ImageArray, NDArray[np.uint8]]:
        """The picture with empty margins around it, and with these made: (variants, H + ..., W + ..., C).

        values: as for `complete`, and `grow`, with the pixels `up`, `down`, `left` and `right`.

        Raises:
            ConfigError: as `sample`; or the margins are no multiples of the tokenizer's factor, or all zero.
        """
        config, sampler, task = self._started(chosen, values)
        wanted = config.margins
        self._check_side(
            "grow", (self.size[0] + wanted.up + wanted.down, self.size[1] + wanted.left + wanted.right), "a result of "
        )
        margins = margins_in_codes(wanted, sampler)
        if not any(margins):
            raise ConfigError("all four margins are 0: give at least one side some pixels")
        progress = self._counted(config.variants * codes_made(sampler, margins), report)
        made = grow(sampler, task, margins, config.paste, progress)
        return framed(task.pictures[:1], None, margins, self.factor)[0], made

    def _started(self, chosen: Chosen | None, values: Mapping[str, Any]) -> tuple[CompleteConfig, Sampler, Task]:
        config = CompleteConfig.from_tree(self._tree(values, "variants"), SOURCE)
        self._check_number("variants", config.variants)
        if chosen is None:
            raise ConfigError("no picture is chosen: choose one, or upload one")
        sampler = Sampler(self.prior, config)
        n = config.variants
        label = self._label(chosen, config.class_, sampler)
        pictures, indices = np.repeat(chosen.picture[None], n, axis=0), np.full(n, chosen.number, dtype=np.int64)
        task = Task(pictures, indices, np.full(n, label, dtype=np.int64), config.seed, np.arange(n, dtype=np.int64))
        return config, sampler, task

    def _label(self, chosen: Chosen, given: str | Sequence[str] | None, sampler: Sampler) -> int:
        """The class that was given, else the picture's own, else none."""
        if given is not None:
            return int(sampler.labels(np.zeros(1, dtype=np.int64), given)[0])
        if chosen.label is not None or not self.prior.classes:
            return chosen.label or 0
        if self.prior.model.config.label_dropout == 0.0:
            raise ConfigError("class: this prior does not know pictures of no class; say which class this one is")
        return self.prior.model.null_label

    def _tree(self, values: Mapping[str, Any], key: str) -> Tree:
        """The values as a config's; `key` is the one that says how many pictures are wanted."""
        number = values.get(key, 1)
        if isinstance(number, int | float):  # with a better message than a config's own limit has
            self._check_number(key, number)
        return {key: 1, **values, "precision": self.precision}

    def _check_number(self, key: str, number: float) -> None:
        most = self.limits.pictures
        if number > most:
            raise ConfigError(f"{key}: {number:,} pictures are more than the {most} that this page makes at once")

    def _check_side(self, key: str, size: tuple[int, int], what: str = "") -> None:
        if max(size) > max(self.limits.side, *self.size):
            raise ConfigError(
                f"{key}: {what}{size[0]:,}x{size[1]:,} pixels is larger than this page makes, which is up to "
                f"{self.limits.side} a side"
            )

    def _counted(self, total: int, report: Share) -> Progress:
        """What counts the codes of a task, and ends it where the page is being closed."""
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
        words = ["python", "sampling/generate.py", "-n", str(config.n), "--prior", str(self.prior.path.parent)]
        defaults = GenerateConfig().tree()
        for key, value in config.tree().items():
            if value != defaults[key] and key != "n":
                words += [f"--{key}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        return shlex.join(words)


def said(error: UserError) -> str:
    """An error for one line on a page, which a long value in it does not fill."""
    line = " ".join(str(error).removeprefix(f"in the {SOURCE}:").split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
