"""Sample pictures from a prior.   python sampling/generate.py -n 64 [--prior runs/stage2/NAME] [--class NAME]

    --prior       noise -> prior.generate -> codes -> tokenizer.decode_codes -> OUT/000000.png ..., OUT/grid.png,
    --tokenizer   noise -> bottleneck.sample -> z_q -> tokenizer.decode ->      OUT/samples.npz, OUT/settings.json

Image i depends on (seed, i) alone: not on the number of images, the batch size or the number of processes. A command
that was interrupted, given again, makes only the pictures that are missing.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from sampling.noise import NoiseSource
from sampling.output import Output, close_output, open_output, settings_of
from sampling.picture_files import Shape, grid_of, read_png, save_png
from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.checkpoint import write_file
from stage1_tokenizer.command import run_command
from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.console import bar
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.order import share
from stage1_tokenizer.launch import start_accelerator
from stage2_prior.prior import LoadedPrior

MEANS_NOTHING = {
    "class_": "a tokenizer has no classes",
    "guidance": "guidance is between a prior with and without a class",
    "guidance_schedule": "guidance is between a prior with and without a class",
    "top_k": "it filters codes, and there are none",
    "top_p": "it filters codes, and there are none",
    "min_p": "it filters codes, and there are none",
    "temperature_end": "there are no positions one after the other",
    "size": "its noise has the size of training",
    "window": "its noise has the size of training",
    "stride": "its noise has the size of training",
    "precision": "it is that of a prior's weights",
    "candidates": "only a prior can say which one is best",
}
"""Options that are for a prior, and why a tokenizer alone cannot follow them. (Those that only go with one of these are
refused without it.)"""

GRID = "grid.png"


class GenerateConfig(CommandConfig, SamplingConfig):
    """Sample pictures from a trained prior, or from a tokenizer with bottleneck.kind kl."""

    n: PositiveInt = Field(64, le=10_000_000)
    """Number of pictures."""
    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    tokenizer: str | None = None
    """A stage-one run's folder, or its tokenizer.safetensors: pictures from its own normal latent, without a prior."""
    out: str | None = None
    """Folder for the pictures; default: a new numbered folder under generated/ in the prior's or tokenizer's. Where
    the same settings were interrupted in it, or in the newest numbered one, only what is missing is made."""
    seed: int = 0
    """Picture i follows from (seed, i)."""
    class_: str | None = Field(None, alias="class")
    """Name or number of the class of all pictures; null: the classes in turn."""
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Divides the prior's logits: below 1 likelier codes gain; 0 always takes the likeliest. With `--tokenizer` it is
    the standard deviation of the noise: below 1 pictures are nearer to the mean one, and 0 gives that alone."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.tokenizer is None:
            return self
        if self.prior is not None:
            raise ValueError("--prior and --tokenizer exclude each other; a prior's folder holds its tokenizer too")
        fields = type(self).model_fields
        for name, reason in MEANS_NOTHING.items():
            if getattr(self, name) != fields[name].default:
                option = fields[name].alias or name
                raise ValueError(f"--{option} is for a prior and cannot be used with --tokenizer: {reason}")
        return self


@dataclass(frozen=True)
class PriorSource:
    """A prior, and how it is sampled from. (NoiseSource is the same for a tokenizer alone.)"""

    sampler: Sampler
    config: GenerateConfig

    unit = "code"

    @property
    def loaded(self) -> LoadedPrior:
        return self.sampler.prior

    @property
    def picture_shape(self) -> Shape:
        return self.sampler.picture_shape

    @property
    def units_per_picture(self) -> int:
        return self.sampler.codes_per_picture * self.config.candidates

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.sampler.labels(indices, self.config.class_)

    def sample(self, indices: NDArray[np.int64], progress: Callable[[int], object]) -> NDArray[np.uint8]:
        return self.sampler.pictures(indices, self.labels(indices), self.config.seed, progress)

    def settings(self) -> dict[str, object]:
        """What settings.json adds to the configuration."""
        return self.sampler.settings()


def main() -> None:
    config = parse_command_line(GenerateConfig)
    accelerator = start_accelerator()
    source: PriorSource | NoiseSource
    if config.tokenizer is None:
        source = PriorSource(Sampler.load(config.prior, config, accelerator.device), config)
        source.labels(np.arange(1))  # an unknown class is an error before anything is written
    else:
        source = NoiseSource.load(config.tokenizer, accelerator.device, config.seed, config.temperature)
    names = {f"{index:06d}.png": source.picture_shape for index in range(config.n)}
    settings = settings_of(config.tree(), source.settings())
    out = open_output(accelerator, config.out, source.loaded.path.parent / "generated", settings, names)
    named, where = one_line(str(source.loaded.path)), one_line(str(out.path))
    accelerator.print(
        f"sampling {config.n} pictures from {named} (step {source.loaded.step}) in {config.precision} to {where}"
    )

    began = time.monotonic()
    mine = out.missing[share(len(out.missing), accelerator.process_index, accelerator.num_processes)]
    shown = bar(len(mine) * source.units_per_picture, source.unit, "sampling")
    for indices in np.array_split(mine, max(1, -(-len(mine) // config.batch_size))):
        if not len(indices):
            continue
        pictures = source.sample(indices, shown.update)
        for index, picture in zip(indices, pictures, strict=True):
            save_png(out.path / f"{index:06d}.png", picture)
    shown.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        assemble(source.labels(np.arange(config.n)), names, out)
        seconds = time.monotonic() - began
        made = len(out.missing)
        print(f"{made} pictures in {seconds:.1f} s ({made / max(seconds, 1e-9):.1f} pictures/s): {where}/{GRID}")
    accelerator.end_training()


def assemble(labels: NDArray[np.int64], names: Mapping[str, Shape], out: Output) -> None:
    """Write the grid and the .npz of all the pictures, and say that they are finished."""
    pictures = np.stack([read_png(out.path / name) for name in names])  # (n, H, W, C)
    save_png(out.path / GRID, grid_of(pictures))
    arrays = BytesIO()
    np.savez_compressed(arrays, arr_0=pictures, labels=labels)
    write_file(out.path / "samples.npz", arrays.getbuffer())
    close_output(out, [*names, GRID])


if __name__ == "__main__":
    run_command(main)
