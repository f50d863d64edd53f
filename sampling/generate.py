"""Sample images from a prior.   python sampling/generate.py -n 64 [--prior runs/stage2/NAME] [--class NAME]

    --prior       noise -> prior.generate -> codes -> tokenizer.decode_codes -> OUT/000000.png ..., OUT/grid.png,
    --tokenizer   noise -> bottleneck.sample -> z_q -> tokenizer.decode ->      OUT/samples.npz, OUT/settings.json

Image i depends only on (seed, i), its class and the settings, not on the number of images, the batch size or the number
of processes. If the command is interrupted, the same command makes only the missing images.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from sampling.noise import NoiseSource
from sampling.option_facts import AlwaysShown, Idle, check_idle
from sampling.output import MOST_IMAGES, build_settings, image_names, open_output
from sampling.prior_defaults import defaults_of_named
from sampling.sampler import Sampler, SamplingConfig
from sampling.sampling_loop import GRID, PriorSource, finish_samples, make_missing
from stage1_tokenizer.config.base import CommandConfig, Tree, parse_command_line
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Texts
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.launch import start_accelerator


class GenerateConfig(CommandConfig, SamplingConfig):
    """Sample images from a trained prior, or from a tokenizer with bottleneck.kind kl."""

    n: Annotated[PositiveInt, AlwaysShown()] = Field(64, le=MOST_IMAGES)
    """Number of images."""
    prior: str | None = None
    """Folder of a stage-two run, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME; null: the newest
    run under runs/stage2, or pretrained:shapes if there is none."""
    tokenizer: str | None = None
    """Folder of a stage-one run, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME: sample from
    its normal latent, without a prior."""
    out: Annotated[str | None, Mark.FREE] = None
    """Folder for the images; null: a new numbered folder under generated/ in the run's folder. If this folder, or the
    newest numbered one, holds a part of the same images, only the missing ones are made."""
    seed: Annotated[int, AlwaysShown()] = 0
    """Seed of the noise; image i depends on (seed, i)."""
    class_: Annotated[Texts | None, Idle(beside="tokenizer", reason="a tokenizer has no classes")] = Field(
        None, alias="class"
    )
    """Name or label of the class of all images. With several, given as `a,b` or as `--class a --class b`, the images
    have them in turn; null: all classes in turn."""
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Divides the prior's logits: below 1 makes likely codes more likely; 0 always takes the most likely code. With
    `--tokenizer` it is the standard deviation of the noise: below 1 images are nearer to the average one; 0 gives only
    that one."""

    @classmethod
    def defaults_by_files(cls, given: Tree) -> Tree:
        """Return the sampling defaults that the prior states."""
        return {} if given.get("tokenizer") else defaults_of_named(given.get("prior"), given)

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.tokenizer is None:
            return self
        if self.prior is not None:
            raise ValueError("--prior and --tokenizer exclude each other; a prior's folder holds its tokenizer too")
        check_idle(self, "tokenizer")
        return self


def main() -> None:
    """Sample the images and write them, their grid and an .npz file of them."""
    config = parse_command_line(GenerateConfig)
    accelerator = start_accelerator()
    source: PriorSource | NoiseSource
    if config.tokenizer is None:
        source = PriorSource(Sampler.load(config.prior, config, accelerator.device), config.class_, config.seed)
        source.labels(np.arange(1))  # an unknown class is an error before anything is written
    else:
        source = NoiseSource.load(config.tokenizer, accelerator.device, config.seed, config.temperature)
    settings = build_settings(config, source.settings())
    shapes = dict.fromkeys(image_names(settings), source.image_shape)
    out = open_output(accelerator, config.out, source.loaded.outputs / "generated", settings, shapes)
    weights, folder = one_line(source.loaded.source), one_line(str(out.path))
    accelerator.print(
        f"sampling {config.n} images from {weights} (step {source.loaded.step}) in {config.precision} to {folder}"
    )

    seconds = make_missing(accelerator, source, out, config.batch_size)
    if accelerator.is_main_process:
        finish_samples(source.labels(np.arange(config.n)), out)
        n = len(out.missing)
        print(f"{n} images in {seconds:.1f} s ({n / max(seconds, 1e-9):.1f} images/s): {folder}/{GRID}")


if __name__ == "__main__":
    run_command(main)
