"""Sample pictures from a prior.   python sampling/generate.py -n 64 [--prior runs/stage2/NAME] [--class NAME]

    --prior       noise -> prior.generate -> codes -> tokenizer.decode_codes -> OUT/000000.png ..., OUT/grid.png,
    --tokenizer   noise -> bottleneck.sample -> z_q -> tokenizer.decode ->      OUT/samples.npz, OUT/settings.json

Image i depends on (seed, i) alone: not on the number of images, the batch size or the number of processes.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from tqdm import tqdm

from sampling.choose import ChooseConfig, NotFiniteError, choose
from sampling.noise import NoiseSource
from sampling.picture_files import grid_of, open_folder, save_png, to_pictures
from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.data.order import share
from stage1_tokenizer.errors import BadFileError, ConfigError, run_command
from stage1_tokenizer.run import start_accelerator
from stage1_tokenizer.seeds import uniforms
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.prior import PRIOR_FILE, LoadedPrior, check_guidance, generate, label_of

DEFAULT_TOP_P = 0.9


class GenerateConfig(CommandConfig, ChooseConfig):
    """Sample pictures from a trained prior, or from a tokenizer with bottleneck.kind kl."""

    n: PositiveInt = 64
    """Number of pictures."""
    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    tokenizer: str | None = None
    """A stage-one run's folder, or its tokenizer.safetensors: pictures from its own normal latent, without a prior."""
    out: str | None = None
    """Folder for the pictures; default: a new numbered folder under generated/ in the prior's or tokenizer's."""
    seed: int = 0
    """Picture i follows from (seed, i)."""
    class_: str | None = Field(None, alias="class")
    """Name or number of the class of all pictures; null: the classes in turn."""
    temperature: NonNegativeFloat = 1.0
    """Divides the prior's logits: below 1 likelier tokens gain; 0 always takes the likeliest. With `--tokenizer` it is
    the standard deviation of the noise: below 1 pictures are nearer to the mean one, and 0 gives that alone."""
    top_p: float = Field(DEFAULT_TOP_P, ge=0.0, le=1.0)
    """Only the likeliest tokens that together have this probability. With `--guidance 1 --top_p 1` the pictures are
    drawn from the prior as trained: more varied, and less clean."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance: 1 is the prior as trained, more insists on the class; null: 2 where the prior was
    trained for it, else 1."""
    batch_size: PositiveInt = 64
    """Pictures sampled at once by each process; bounded by memory, without effect on the pictures."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.tokenizer is None:
            return self
        if self.prior is not None:
            raise ValueError("--prior and --tokenizer exclude each other; a prior's folder holds its tokenizer too")
        without_use = {
            "--class": (self.class_, "a tokenizer has no classes"),
            "--guidance": (self.guidance, "guidance is between a prior with and without a class"),
            "--top_k": (self.top_k, "it filters tokens, and there are none"),
            "--top_p": (None if self.top_p == DEFAULT_TOP_P else self.top_p, "it filters tokens, and there are none"),
        }
        for option, (value, reason) in without_use.items():
            if value is not None:
                raise ValueError(f"{option} is for a prior and cannot be used with --tokenizer: {reason}")
        return self


@dataclass(frozen=True)
class PriorSource:
    """A prior, and how it is sampled from. (NoiseSource is the same for a tokenizer alone.)"""

    loaded: LoadedPrior
    device: torch.device
    config: GenerateConfig
    label: int | None
    """That of all pictures; None: the classes in turn."""

    unit = "token"

    @classmethod
    def load(cls, config: GenerateConfig, device: torch.device) -> Self:
        """Raises ConfigError where class or guidance do not fit the prior."""
        prior = LoadedPrior.load(Path(config.prior) if config.prior else newest_run(Path("runs/stage2")), device)
        label = None if config.class_ is None else label_of(config.class_, prior.classes)
        check_guidance(prior.model, guidance_of(config, prior))
        return cls(prior, device, config, label)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer.tokenizer

    @property
    def units_per_picture(self) -> int:
        return self.loaded.model.shape.length

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return labels_of(indices, self.label, len(self.loaded.classes))

    def sample(self, indices: NDArray[np.int64], progress: Callable[[int], object]) -> NDArray[np.uint8]:
        return sample(self.loaded, indices, self.config, self.label, self.device, progress)

    def settings(self) -> dict[str, object]:
        """What settings.json adds to the configuration."""
        prior = self.loaded
        guidance = guidance_of(self.config, prior)
        return {"prior": str(prior.path), "step": prior.step, "guidance": guidance, "classes": prior.classes}


def main() -> None:
    config = parse_command_line(GenerateConfig)
    accelerator = start_accelerator()
    source = (
        NoiseSource.load(config.tokenizer, accelerator.device, config.seed, config.temperature)
        if config.tokenizer is not None
        else PriorSource.load(config, accelerator.device)
    )
    out = open_folder(config.out, source.loaded.path.parent, accelerator)
    accelerator.print(f"sampling {config.n} pictures from {source.loaded.path} (step {source.loaded.step}) to {out}")

    began = time.monotonic()
    mine = np.asarray(share(config.n, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    bar = tqdm(
        total=len(mine) * source.units_per_picture,
        unit=source.unit,
        disable=None if accelerator.is_main_process else True,
    )
    for indices in np.array_split(mine, max(1, -(-len(mine) // config.batch_size))):
        if not len(indices):
            continue
        pictures = source.sample(indices, bar.update)
        for index, picture in zip(indices, pictures, strict=True):
            save_png(out / f"{index:06d}.png", picture)
        bar.set_postfix_str(f"{len(indices)} pictures decoded", refresh=False)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(config, source, out, seconds=time.monotonic() - began)
    accelerator.end_training()


def sample(
    prior: LoadedPrior,
    indices: NDArray[np.int64],
    config: GenerateConfig,
    label: int | None,
    device: torch.device,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.uint8]:
    """The pictures of these numbers: (n, H, W, C) uint8. Raises ConfigError where guidance does not fit the prior."""
    noise = uniforms(config.seed, "sample", np.zeros_like(indices), indices, prior.model.shape.length)  # (n, L)
    labels = labels_of(indices, label, len(prior.classes))
    try:
        codes = generate(
            prior.model,
            torch.from_numpy(labels).to(device),
            torch.from_numpy(noise).to(device),
            partial(choose, config=config),
            guidance_of(config, prior),
            progress,
        )
    except NotFiniteError as error:
        raise BadFileError(f"{prior.path}: {error}") from None
    return to_pictures(prior.tokenizer.tokenizer.decode_codes, codes)


def guidance_of(config: GenerateConfig, prior: LoadedPrior) -> float:
    """The guidance asked for, or what suits the prior."""
    if config.guidance is not None:
        return config.guidance
    return 2.0 if prior.classes and prior.model.config.label_dropout > 0 else 1.0


def labels_of(indices: NDArray[np.int64], label: int | None, classes: int) -> NDArray[np.int64]:
    """The label of each picture: the one asked for, else the classes in turn by the picture's number."""
    return indices % max(1, classes) if label is None else np.full_like(indices, label)


def newest_run(folder: Path) -> Path:
    """The run under a folder whose prior was written last. Raises ConfigError where there is none."""
    files = sorted(folder.glob(f"*/{PRIOR_FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"there is no run to sample from: no {folder}/*/{PRIOR_FILE}; train one with "
            "`python stage2_prior/train.py --tokenizer runs/stage1/NAME`, or name one with --prior"
        )
    return files[-1].parent


def finish(config: GenerateConfig, source: PriorSource | NoiseSource, out: Path, seconds: float) -> None:
    """Write the grid, the .npz and what they were made with."""
    shape = source.tokenizer.config
    files = [out / f"{index:06d}.png" for index in range(config.n)]
    pictures = np.stack(
        [np.asarray(Image.open(file)).reshape(*shape.image_size, shape.image_channels) for file in files]
    )
    save_png(out / "grid.png", grid_of(pictures))
    np.savez_compressed(out / "samples.npz", arr_0=pictures, labels=source.labels(np.arange(config.n)))
    settings: dict[str, Any] = {**config.tree(), **source.settings()}
    (out / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    print(
        f"{config.n} pictures in {seconds:.1f} s ({config.n / max(seconds, 1e-9):.1f} pictures/s): {out / 'grid.png'}"
    )


if __name__ == "__main__":
    run_command(main)
