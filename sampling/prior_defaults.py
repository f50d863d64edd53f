"""The options of the draw, and a prior's own defaults for them, which an entry in the header of its file states.

    prior.safetensors, header    "sampling": {"temperature": 0.9, "top_p": 0.95, "guidance": 2.5, ...}

`sweep.py --save` writes the entry. All commands that sample from a prior read it: it replaces the defaults of this
project, and the user's options replace it. The entry belongs to the weights: publishing keeps it, and a training drops
it as soon as it writes other weights.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from sampling.choose import ChooseConfig
from sampling.option_facts import AlwaysShown, Idle, PartOf, facts_of_kind
from stage1_tokenizer.config.base import Tree, config_from_json
from stage1_tokenizer.engine.checkpoint import read_header, read_weights, write_tensors
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import find_existing_path
from stage2_prior.base import BasePriorConfig
from stage2_prior.guidance import Guidance, GuidanceSchedule, check_guidance
from stage2_prior.prior import IMPORTER, PriorHeader, find_prior_file

ENTRY = "sampling"
"""Key of the entry in the header."""
DEFAULT_GUIDANCE = 2.0
"""Guidance scale for a prior that was trained for guidance (classes and label dropout)."""
NEEDS_CLASSES = Idle(beside="tokenizer", reason="guidance is between a prior with and without a class")


class DrawConfig(ChooseConfig):
    """Settings of the distribution that codes are drawn from; a prior's file may state its own defaults for them."""

    top_p: Annotated[float, AlwaysShown()] = Field(0.9, ge=0.0, le=1.0)
    """Draw only from the most likely codes that together have this probability. `guidance 1` with `top_p 1` samples
    from the prior as trained: images vary more and look less clean."""
    guidance: Annotated[float | None, NEEDS_CLASSES, AlwaysShown()] = Field(None, ge=0.0, le=100.0)
    """Strength of classifier-free guidance: 1 is the prior as trained, 0 ignores the class, above 1 follows the class
    more closely and varies less. null: 2 if the prior was trained for guidance, else 1."""
    guidance_schedule: Annotated[GuidanceSchedule, NEEDS_CLASSES, PartOf(whole="guidance")] = "constant"
    """Positions at which guidance applies: constant: all; linear, cosine: rising from 1 at the first position to
    `guidance` at the last; interval: those in `guidance_interval`."""
    guidance_interval: Annotated[tuple[float, float] | None, PartOf(whole="guidance")] = None
    """Only with `guidance_schedule interval`: first and last position with guidance, as shares of all positions, such
    as 0.2,0.8."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if (self.guidance_interval is not None) != (self.guidance_schedule == "interval"):
            raise ValueError("guidance_schedule interval and guidance_interval belong together; give both, or neither")
        low, high = self.guidance_interval or (0.0, 1.0)
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval ({low}, {high}) must rise within 0 to 1")
        return self

    def resolve_guidance(self, prior: BasePriorConfig, classes: int) -> Guidance:
        """Return the guidance for a prior of this many classes, with the scale that null stands for.

        Raises:
            ConfigError: the prior was not trained for guidance, or the schedule has no effect.
        """
        default = DEFAULT_GUIDANCE if classes and prior.label_dropout > 0 else 1.0
        scale = default if self.guidance is None else self.guidance
        guidance = Guidance(scale, self.guidance_schedule, self.guidance_interval or (0.0, 1.0))
        check_guidance(prior, classes, guidance)
        if guidance.schedule != "constant" and not guidance.is_needed:
            raise ConfigError(f"guidance_schedule {guidance.schedule}: has no effect with guidance 1")
        return guidance

    def defaults_beside(self, given: Mapping[str, Any]) -> Tree:
        """Return these values for all options but the given ones and those that belong to a given one (`PartOf`), so
        that `--guidance 1` does not meet the schedule of another scale."""
        parts = {name: facts[0].whole for name, facts in facts_of_kind(DrawConfig, PartOf).items()}
        replaced = {parts.get(name, name) for name in given}
        values = {name: getattr(self, name) for name in DrawConfig.model_fields}
        return {name: value for name, value in values.items() if parts.get(name, name) not in replaced}


ALWAYS_SHOWN = tuple(facts_of_kind(DrawConfig, AlwaysShown))
"""Options of the draw that a description of samples has even at their defaults."""


def read_defaults(file: Path) -> DrawConfig:
    """Read the defaults that a prior's file states; without an entry they are those of this project.

    Raises:
        BadFileError: the file is not a prior, an option or a value is unknown, or a value does not fit the prior.
    """
    header = read_header(file, "prior", IMPORTER)
    if ENTRY not in header:
        return DrawConfig()
    defaults = config_from_json(DrawConfig, header[ENTRY], str(file))
    prior = config_from_json(PriorHeader, header.get("config"), str(file))
    try:
        defaults.resolve_guidance(prior.prior, len(prior.classes))
    except ConfigError as error:
        raise BadFileError(f"{file}: its header states sampling defaults that do not fit this prior: {error}") from None
    return defaults


def write_defaults(file: Path, defaults: DrawConfig) -> None:
    """Write a prior's defaults into its file, which otherwise stays as it is.

    Raises:
        BadFileError: the file is damaged or is not a prior.
        StorageError: no space, or no permission.
    """
    tensors, header = read_weights(file, "prior", IMPORTER)
    write_tensors(file, tensors, {**header, ENTRY: defaults.model_dump_json()})


def defaults_of_named(prior: object, given: Mapping[str, Any]) -> Tree:
    """Return the defaults of the prior that an option of a command names (None: the newest run) for the options that
    are not given, and say so.

    Without such a prior it returns no values; the command reports that, after the mistakes in its options.

    Raises:
        BadFileError: the file states defaults that cannot be used.
    """
    if not (prior is None or isinstance(prior, str)):
        return {}
    try:
        file = find_prior_file(find_existing_path(prior) if prior else None)
    except ConfigError:
        return {}
    defaults = read_defaults(file).defaults_beside(given)
    if changed := describe_draw(defaults):
        print_note(f"{file.parent.name} states sampling defaults of its own, which options replace: {changed}")
    return defaults


def describe_draw(options: Mapping[str, Any], always: Collection[str] = ()) -> str:
    """Return the options that differ from the defaults of this project, and those in `always`: "temperature 0.9"."""
    ours = DrawConfig()
    shown = [name for name, value in options.items() if name in always or value != getattr(ours, name)]
    return ", ".join(f"{name} {option_word(options[name])}" for name in shown)


def option_word(value: object) -> str:
    """Return a value of an option as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(option_word, value))
    return "null" if value is None else str(value).removesuffix(".0")
