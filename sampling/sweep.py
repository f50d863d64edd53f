"""Measure a prior's samples under several sampling options.   python sampling/sweep.py --temperature 0.8,0.9,1

    all combinations of the listed values -> n samples of each, with the same noise -> distance to validation images

Writes RUN/sweeps/NAME/sweep.json, sweep.md (a table) and sweep.png (the same images under each setting), where NAME
states the protocol. An interrupted sweep continues, and another sweep with the same protocol adds its settings to the
same table. The best setting has the smallest Fréchet distance; --save makes it the prior's own default.
"""

from itertools import product
from pathlib import Path
from types import GenericAlias
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, create_model, model_validator

from sampling.evaluation.extractors import ExtractorConfig, build_extractor
from sampling.evaluation.extractors.inception import InceptionConfig
from sampling.evaluation.features import Evaluator
from sampling.evaluation.options import EvaluateConfig
from sampling.evaluation.sweep_measuring import SettingMeter
from sampling.evaluation.sweep_sheet import draw_sweep
from sampling.evaluation.sweep_table import Sweep
from sampling.output import MOST_IMAGES
from sampling.prior_defaults import DrawConfig, defaults_of_named, write_defaults
from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.config.base import CommandConfig, Tree, parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.launch import run_on_main, start_accelerator
from stage1_tokenizer.engine.lock import lock_folder
from stage1_tokenizer.engine.model_files import find_name
from stage2_prior.fast_linear import Precision
from stage2_prior.prior import LoadedPrior, load_prior

INTERVAL = "guidance_interval"
"""The only option of the draw with one value in a sweep, because each of its values is a list."""
LISTED = {name: field for name, field in DrawConfig.model_fields.items() if name != INTERVAL}


class SweepOptions(CommandConfig):
    """Sample from a prior under all combinations of the listed options, and compare them by their samples."""

    prior: str | None = None
    """Folder of a stage-two run, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME; null: the newest
    run under runs/stage2, or pretrained:shapes if there is none."""
    n: int = Field(1000, ge=2, le=MOST_IMAGES)
    """Number of samples of each setting. A Fréchet distance of more samples is smaller and more certain."""
    save: bool = False
    """Write the best setting of the table into the prior's file, as the default of all commands that sample from it."""
    guidance_interval: tuple[float, float] | None = None
    """First and last position with guidance, as shares of all positions, of settings with guidance_schedule
    interval."""
    root: str | None = None
    """Folder of the training's images, if they were moved; null: the folder that the training used."""
    reference: str = "validation"
    """Images to compare samples with, as for evaluate.py; not the images of the training, because those do not show
    whether samples are copies of them."""
    extractor: ExtractorConfig = InceptionConfig()
    """The network whose features are compared, as for evaluate.py."""
    references: str = "runs/references"
    """Folder for the features of references, which later evaluations read again."""
    classifier_steps: NonNegativeInt = 300
    """Steps of training a small classifier that judges whether samples show the class that was asked for; 0: no
    classifier. Without classes in the data there is none either."""
    seed: int = 0
    """Seed of the samples, and of all random choices in measuring."""
    precision: Precision = "float32"
    """Number format of a GPT's weights, as for generate.py."""
    batch_size: PositiveInt = 64
    """Images that each process samples or measures at once; it changes no result."""

    @classmethod
    def defaults_by_files(cls, given: Tree) -> Tree:
        """Return the sampling defaults that the prior states, as lists of one value."""
        stated = defaults_of_named(given.get("prior"), given)
        return {name: value if name == INTERVAL else [value] for name, value in stated.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        combinations = self.combinations()
        if not combinations:
            raise ValueError("a list of values is empty; give at least one value, or leave the option out")
        if self.guidance_interval and all(draw.guidance_interval is None for draw in combinations):
            raise ValueError("guidance_interval: no setting has guidance_schedule interval; add it to the schedules")
        self.evaluation()
        return self

    def combinations(self) -> list[DrawConfig]:
        """Return all combinations of the listed values. With guidance 1 the schedule has no effect and is constant.

        Raises:
            ConfigError: two values exclude each other.
        """
        draws = []
        for values in product(*(getattr(self, name) for name in LISTED)):
            options: dict[str, Any] = dict(zip(LISTED, values, strict=True))
            if options["guidance"] == 1.0:
                options["guidance_schedule"] = "constant"
            options[INTERVAL] = self.guidance_interval if options["guidance_schedule"] == "interval" else None
            draws.append(DrawConfig.from_tree(options, "combinations of the lists"))
        return list(dict.fromkeys(draws))

    def settings(self, prior: LoadedPrior) -> list[DrawConfig]:
        """Return the combinations, each with the guidance scale that null stands for.

        Raises:
            ConfigError: a combination does not fit the prior.
        """
        model, draws = prior.model, self.combinations()
        scales = [draw.resolve_guidance(model.config, model.classes).scale for draw in draws]
        pairs = zip(draws, scales, strict=True)
        return list(dict.fromkeys(draw.model_copy(update={"guidance": scale}) for draw, scale in pairs))

    def evaluation(self) -> EvaluateConfig:
        """Return the options of `evaluate.py` that all settings have in common. Raises ConfigError: one is wrong."""
        options = {
            "prior": self.prior,
            "n": self.n,
            "root": self.root,
            "reference": self.reference,
            "extractor": self.extractor,
            "sampling": SamplingConfig(precision=self.precision, batch_size=self.batch_size),
            "references": self.references,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        return EvaluateConfig.from_tree(options, "options of the evaluation")


LISTS: dict[str, Any] = {
    name: (
        GenericAlias(tuple, (field.rebuild_annotation(), ...)),
        Field((field.default,), description=f"One value, or several with commas. {field.description}"),
    )
    for name, field in LISTED.items()
}
SweepConfig = create_model("SweepConfig", __base__=SweepOptions, __doc__=SweepOptions.__doc__, **LISTS)
"""The options, with a list of values for each option of the draw. A new filter can be swept without a change here."""


def main() -> None:
    """Measure the settings that are not in the table yet, and write table, picture and, with --save, the defaults."""
    config = parse_command_line(SweepConfig)
    accelerator = start_accelerator(exact=True)
    prior = load_prior(config.prior, accelerator.device)
    settings = config.settings(prior)
    if config.save:
        run_on_main(accelerator, lambda: lock_for_saving(prior))
    extractor = build_extractor(config.extractor, accelerator.device)
    references = Path(config.references)
    evaluator = Evaluator(accelerator, extractor, config.extractor.kind, config.batch_size, references, config.seed)
    meter = SettingMeter.prepare(prior, evaluator, config.evaluation(), config.classifier_steps)
    sweep = run_on_main(accelerator, lambda: Sweep.open(meter.folder, meter.protocol, meter.warnings))
    folder = one_line(str(meter.folder))
    accelerator.print(f"{len(settings)} settings of {config.n:,} samples: {folder}")
    for draw in settings:
        if draw not in sweep.measured:
            sweep.measured[draw] = meter.measure(draw)
            run_on_main(accelerator, sweep.write)
        accelerator.print(f"  {sweep.line(draw)}")
    run_on_main(accelerator, lambda: write_file(meter.folder / "sweep.png", draw_sweep(sweep, meter.samples)))
    accelerator.print(f"best: {sweep.conclusion()}\nresults: {folder}/sweep.md, sweep.png, and sweep.json for programs")
    if config.save:
        run_on_main(accelerator, lambda: save_best(prior, meter, sweep.ranked[0]))
        accelerator.print(f"saved in {one_line(str(prior.path))}: the defaults of all commands that sample from it")


def lock_for_saving(prior: LoadedPrior) -> None:
    """Lock the folder of a prior whose file is to be changed.

    Raises:
        ConfigError: a training is changing it, or it is a published file, which must stay as it is.
    """
    if name := find_name(prior.path):
        raise ConfigError(f"--save: {name} is published and stays as it is; copy its folder, and name the copy")
    lock_folder(prior.path.parent)


def save_best(prior: LoadedPrior, meter: SettingMeter, best: DrawConfig) -> None:
    """Write the defaults into the prior's file.

    Raises:
        BadFileError: the file has other weights than those that were measured.
    """
    if Sampler(load_prior(prior.path)).settings()["weights"] != meter.protocol["prior"]["weights"]:
        raise BadFileError(f"{prior.path}: has other weights than at the start of the sweep; start the sweep again")
    write_defaults(prior.path, best)


if __name__ == "__main__":
    run_command(main)
