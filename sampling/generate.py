"""Sample pictures from a prior.   python sampling/generate.py -n 64 [--prior runs/stage2/NAME] [--class NAME]

    --prior       noise -> prior.generate -> codes -> tokenizer.decode_codes -> OUT/000000.png ..., OUT/grid.png,
    --tokenizer   noise -> bottleneck.sample -> z_q -> tokenizer.decode ->      OUT/samples.npz, OUT/settings.json

Image i depends on (seed, i) alone: not on the number of images, the batch size or the number of processes. A command
that was interrupted, given again, makes only the pictures that are missing.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from sampling.noise import NoiseSource
from sampling.option_facts import AlwaysShown, Idle, check_idle
from sampling.output import MOST_IMAGES, image_names, open_output, settings_of
from sampling.sampler import Sampler, SamplingConfig
from sampling.sampling_loop import GRID, PriorSource, assemble, make_missing
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Texts
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.launch import start_accelerator


class GenerateConfig(CommandConfig, SamplingConfig):
    """Sample pictures from a trained prior, or from a tokenizer with bottleneck.kind kl."""

    n: Annotated[PositiveInt, AlwaysShown()] = Field(64, le=MOST_IMAGES)
    """Number of pictures."""
    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    tokenizer: str | None = None
    """A stage-one run's folder, or its tokenizer.safetensors: pictures from its own normal latent, without a prior."""
    out: Annotated[str | None, Mark.FREE] = None
    """Folder for the pictures; default: a new numbered folder under generated/ in the prior's or tokenizer's. Where
    the same settings were interrupted in it, or in the newest numbered one, only what is missing is made."""
    seed: Annotated[int, AlwaysShown()] = 0
    """Picture i follows from (seed, i)."""
    class_: Annotated[Texts | None, Idle(beside="tokenizer", reason="a tokenizer has no classes")] = Field(
        None, alias="class"
    )
    """Name or number of the class of all pictures. Of several, given as `a,b` or as `--class a --class b`, the pictures
    are in turn; null: of all."""
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Divides the prior's logits: below 1 likelier codes gain; 0 always takes the likeliest. With `--tokenizer` it is
    the standard deviation of the noise: below 1 pictures are nearer to the mean one, and 0 gives that alone."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.tokenizer is None:
            return self
        if self.prior is not None:
            raise ValueError("--prior and --tokenizer exclude each other; a prior's folder holds its tokenizer too")
        check_idle(self, "tokenizer")
        return self


def main() -> None:
    config = parse_command_line(GenerateConfig)
    accelerator = start_accelerator()
    source: PriorSource | NoiseSource
    if config.tokenizer is None:
        source = PriorSource(Sampler.load(config.prior, config, accelerator.device), config.class_, config.seed)
        source.labels(np.arange(1))  # an unknown class is an error before anything is written
    else:
        source = NoiseSource.load(config.tokenizer, accelerator.device, config.seed, config.temperature)
    settings = settings_of(config, source.settings())
    wanted = dict.fromkeys(image_names(settings), source.image_shape)
    out = open_output(accelerator, config.out, source.loaded.path.parent / "generated", settings, wanted)
    named, where = one_line(str(source.loaded.path)), one_line(str(out.path))
    accelerator.print(
        f"sampling {config.n} pictures from {named} (step {source.loaded.step}) in {config.precision} to {where}"
    )

    seconds = make_missing(accelerator, source, out, config.batch_size)
    if accelerator.is_main_process:
        assemble(source.labels(np.arange(config.n)), out)
        made = len(out.missing)
        print(f"{made} pictures in {seconds:.1f} s ({made / max(seconds, 1e-9):.1f} pictures/s): {where}/{GRID}")


if __name__ == "__main__":
    run_command(main)
