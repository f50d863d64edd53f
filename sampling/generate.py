"""Sample pictures from a prior.   python sampling/generate.py -n 64 [--prior runs/stage2/NAME] [--class NAME]

    noise -> prior.generate -> codes -> tokenizer.decode_codes -> OUT/000000.png ..., OUT/grid.png, OUT/samples.npz

Image i depends on (seed, i) alone: not on the number of images, the batch size or the number of processes.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from sampling.choose import ChooseConfig, NotFiniteError, choose
from stage1_tokenizer.config import CommandConfig, parse_command_line
from stage1_tokenizer.data.order import share
from stage1_tokenizer.data.pictures import to_uint8
from stage1_tokenizer.errors import BadFileError, ConfigError, StorageError, run_command
from stage1_tokenizer.run import start_accelerator
from stage1_tokenizer.seeds import uniforms
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.prior import PRIOR_FILE, LoadedPrior, check_guidance, generate, label_of

DECODE_CHUNK = 16
"""Codes are decoded in chunks of just this many images, the last one filled up: with another batch size, convolutions
round differently, and now and then a pixel of the same picture would differ by one level."""


class GenerateConfig(CommandConfig, ChooseConfig):
    """Sample pictures from a trained prior."""

    n: PositiveInt = 64
    """Number of pictures."""
    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    out: str | None = None
    """Folder for the pictures; default: a new numbered folder under generated/ in the prior's."""
    seed: int = 0
    """Picture i follows from (seed, i)."""
    class_: str | None = Field(None, alias="class")
    """Name or number of the class of all pictures; null: the classes in turn."""
    top_p: float = Field(0.9, ge=0.0, le=1.0)
    """Only the likeliest tokens that together have this probability. With `--guidance 1 --top_p 1` the pictures are
    drawn from the prior as trained: more varied, and less clean."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance: 1 is the prior as trained, more insists on the class; null: 2 where the prior was
    trained for it, else 1."""
    batch_size: PositiveInt = 64
    """Pictures sampled at once by each process; bounded by memory, without effect on the pictures."""


def main() -> None:
    config = parse_command_line(GenerateConfig)
    accelerator = start_accelerator()
    path = Path(config.prior) if config.prior else newest_run(Path("runs/stage2"))
    prior = LoadedPrior.load(path, accelerator.device)
    label = None if config.class_ is None else label_of(config.class_, prior.classes)
    check_guidance(prior.model, guidance_of(config, prior))
    out = open_folder(config, prior.path.parent, accelerator)
    accelerator.print(f"sampling {config.n} pictures from {prior.path} (step {prior.step}) to {out}")

    began = time.monotonic()
    mine = np.asarray(share(config.n, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    bar = tqdm(
        total=len(mine) * prior.model.shape.length, unit="token", disable=None if accelerator.is_main_process else True
    )
    for indices in np.array_split(mine, max(1, -(-len(mine) // config.batch_size))):
        if not len(indices):
            continue
        pictures = sample(prior, indices, config, label, accelerator.device, progress=bar.update)
        for index, picture in zip(indices, pictures, strict=True):
            save_png(out / f"{index:06d}.png", picture)
        bar.set_postfix_str(f"{len(indices)} pictures decoded", refresh=False)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(config, prior, label, out, seconds=time.monotonic() - began)
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
    return to_pictures(prior.tokenizer.tokenizer, codes)


def guidance_of(config: GenerateConfig, prior: LoadedPrior) -> float:
    """The guidance asked for, or what suits the prior."""
    if config.guidance is not None:
        return config.guidance
    return 2.0 if prior.classes and prior.model.config.label_dropout > 0 else 1.0


def labels_of(indices: NDArray[np.int64], label: int | None, classes: int) -> NDArray[np.int64]:
    """The label of each picture: the one asked for, else the classes in turn by the picture's number."""
    return indices % max(1, classes) if label is None else np.full_like(indices, label)


@torch.inference_mode()
def to_pictures(tokenizer: Tokenizer, codes: Tensor) -> NDArray[np.uint8]:
    """codes (n, h, w, K) -> pictures (n, H, W, C) uint8."""
    chunks = []
    for start in range(0, len(codes), DECODE_CHUNK):
        chunk = codes[start : start + DECODE_CHUNK]
        filled = torch.cat([chunk, chunk.new_zeros(DECODE_CHUNK - len(chunk), *chunk.shape[1:])])
        chunks.append(to_uint8(tokenizer.decode_codes(filled))[: len(chunk)].cpu())
    return torch.cat(chunks).permute(0, 2, 3, 1).numpy()


def newest_run(folder: Path) -> Path:
    """The run under a folder whose prior was written last. Raises ConfigError where there is none."""
    files = sorted(folder.glob(f"*/{PRIOR_FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"there is no run to sample from: no {folder}/*/{PRIOR_FILE}; train one with "
            "`python stage2_prior/train.py --tokenizer runs/stage1/NAME`, or name one with --prior"
        )
    return files[-1].parent


def open_folder(config: GenerateConfig, run: Path, accelerator: Accelerator) -> Path:
    """The folder to write to, made by the main process. Raises ConfigError where it holds pictures already."""
    if config.out is not None:
        out = Path(config.out)
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out}: is a file, not a folder")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out}: is not empty, and nothing is written over; choose another folder")
    else:
        number = 1
        while (run / "generated" / f"{number:03d}").exists():
            number += 1
        out = run / "generated" / f"{number:03d}"
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"--out {out}: cannot be made ({error.strerror})") from None
    accelerator.wait_for_everyone()
    return out


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """picture (H, W, C) uint8; the file appears whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(temporary, format="PNG")
    temporary.replace(path)


def grid_of(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, H, W, C) -> one picture, as square as n allows, row by row, two grey pixels between them."""
    n, height, width, channels = pictures.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    grid = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 128, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + 2) + 2, index % columns * (width + 2) + 2
        grid[top : top + height, left : left + width] = picture
    return grid


def finish(config: GenerateConfig, prior: LoadedPrior, label: int | None, out: Path, seconds: float) -> None:
    """Write the grid, the .npz and what they were made with."""
    channels = prior.tokenizer.tokenizer.config.image_channels
    files = [out / f"{index:06d}.png" for index in range(config.n)]
    pictures = np.stack(
        [np.asarray(Image.open(file)).reshape(*prior.tokenizer.tokenizer.config.image_size, channels) for file in files]
    )
    save_png(out / "grid.png", grid_of(pictures))
    labels = labels_of(np.arange(config.n), label, len(prior.classes))
    np.savez_compressed(out / "samples.npz", arr_0=pictures, labels=labels)
    settings: dict[str, Any] = {
        **config.tree(),
        "prior": str(prior.path),
        "step": prior.step,
        "guidance": guidance_of(config, prior),
        "classes": prior.classes,
    }
    (out / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    print(
        f"{config.n} pictures in {seconds:.1f} s ({config.n / max(seconds, 1e-9):.1f} pictures/s): {out / 'grid.png'}"
    )


if __name__ == "__main__":
    run_command(main)
