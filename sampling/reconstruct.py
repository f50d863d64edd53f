"""Images -> codes -> pictures.   python sampling/reconstruct.py --tokenizer RUN [PICTURE OR FOLDER ...]

Pictures of any size, each encoded and decoded at its own, in tiles where it is larger than one; without any, validation
pictures of the tokenizer's own data. Writes a PNG file of the same name for each (`cat.jpg` becomes OUT/cat.png),
OUT/figures.json and OUT/settings.json, and prints how near the reconstructions are to the originals and how many bits
their codes take. Files that cannot be read are
named and left out, and the command then ends with exit code 3.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt
from pydantic_settings import CliPositionalArg
from torch import Tensor

from sampling.output import close_output, open_output, settings_of
from sampling.saved_images import image_paths, readable, rows_of, save_png, unreadable
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.data.image_files import read_image
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.order import rank_range
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.file_names import normalise_name
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.launch import run_on_main, start_accelerator
from stage1_tokenizer.metrics import psnr, ssim
from stage1_tokenizer.networks.tiles import Tiles, decode_codes, encode_codes, tiles_for
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer

VALIDATION = 64
"""Pictures of the validation split, unless a number is given."""
LONGEST_NAME = 200
"""Bytes of a name; systems take 255, and while a file is written its name is longer."""
COLUMNS = ("psnr", "ssim", "bits", "height", "width")


class ReconstructConfig(CommandConfig):
    """Encode pictures with a tokenizer, and decode them again."""

    tokenizer: str
    """A stage-one run's folder, or its tokenizer.safetensors."""
    pictures: CliPositionalArg[tuple[str, ...]] = ()
    """Images and folders of pictures; none: validation pictures of the tokenizer's own data set."""
    n: PositiveInt | None = None
    """Only the first n; null: all that are given, or 64 validation pictures."""
    tile: PositiveInt | None = None
    """Pixels a side of a tile; null: the size of training, or more where the network has no normalisation. A picture
    that is no larger goes whole."""
    overlap: NonNegativeInt | None = None
    """Pixels by which neighbouring tiles overlap, at least; null: a quarter of a tile, or just enough for the result
    of the whole picture where the network allows it."""
    beside: bool = False
    """Each original on the left of its reconstruction, in one file."""
    out: Annotated[str | None, Mark.FREE] = None
    """Folder for the pictures; default: a new numbered folder under reconstructed/ in the tokenizer's. Where the same
    settings were interrupted in it, or in the newest numbered one, they begin again there."""


class Originals(NamedTuple):
    """The pictures, to be read one at a time."""

    names: list[str]
    """Where each came from."""
    files: list[str]
    """The name of the file, below the folder for the pictures, that its reconstruction goes to."""
    read: Callable[[int], ImageArray]
    """Of a number: (H, W, C) uint8."""
    bad: tuple[str, ...] = ()
    """What is wrong with those that cannot be read and are left out."""


def main() -> None:
    config = parse_command_line(ReconstructConfig)
    accelerator = start_accelerator()
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    tiles = tiles_for(loaded.tokenizer.config, config.tile, config.overlap)
    originals = given_images(accelerator, config, loaded) if config.pictures else validation_images(config, loaded)
    found = {"tokenizer": str(loaded.path), "step": loaded.step, "weights": loaded.fingerprint}
    settings = settings_of(config, {**found, "pictures": originals.names, "files": originals.files})
    # Nothing that is there is kept: the figures are not on disk before the end. But what was begun may be begun again.
    output = open_output(accelerator, config.out, loaded.path.parent / "reconstructed", settings, {})
    out = output.path
    number = len(originals.names)
    named = one_line(str(loaded.path))
    accelerator.print(f"reconstructing {number} pictures with {named} (step {loaded.step}) to {one_line(str(out))}")

    began = time.monotonic()
    figures = torch.zeros(number, len(COLUMNS), dtype=torch.float64)
    mine = rank_range(number, accelerator.process_index, accelerator.num_processes)
    for index in show_progress(mine, len(mine), "picture", "reconstructing"):
        picture = originals.read(index)
        made, *values = reconstruct(accelerator, loaded.tokenizer, picture, tiles)
        save_png(out / originals.files[index], rows_of([[picture, made]]) if config.beside else made)
        figures[index] = torch.tensor([*values, *picture.shape[:2]], dtype=torch.float64)
    figures = accelerator.reduce(figures.to(accelerator.device), "sum").cpu()
    if accelerator.is_main_process:
        finish(config, loaded, tiles, originals, figures, out)
        close_output(output, originals.files)
        seconds = time.monotonic() - began
        print(
            f"{number} pictures in {seconds:.1f} s ({number / max(seconds, 1e-9):.1f} pictures/s): {one_line(str(out))}"
        )
    accelerator.wait_for_everyone()  # a launcher ends the other processes as soon as one has raised
    if originals.bad:
        raise BadFileError(f"{len(originals.bad)} of {number + len(originals.bad)} pictures were left out, see above")


@torch.inference_mode()
def reconstruct(
    accelerator: Accelerator, tokenizer: Tokenizer, picture: ImageArray, tiles: Tiles
) -> tuple[ImageArray, float, float, float]:
    """A picture (H, W, C) uint8 -> its reconstruction, of the same size, PSNR (dB), SSIM, and the bits of its codes
    (nan where the latent is continuous).

    Sides that the factor does not divide are continued by reflection, and cropped again. Codes are always computed in
    float32: in bfloat16 some would be other codes. Decoding follows Accelerate's precision.
    """
    factor = tokenizer.config.network.factor
    height, width = picture.shape[:2]
    whole = np.pad(picture, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="reflect")
    x = normalise(torch.from_numpy(whole)[None].permute(0, 3, 1, 2).to(accelerator.device))  # (1, C, H', W')
    bits = float("nan")
    if tokenizer.bottleneck.depth:
        codes = encode_codes(tokenizer, x, tiles)  # (1, h, w, K)
        bits = codes.numel() * float(np.log2(tokenizer.shape.V))
        with accelerator.autocast():
            x_hat = decode_codes(tokenizer, codes, tiles)
    else:
        z_q = tiles.encode(lambda tile: rearrange(tokenizer.encode(tile).z_q, "B D h w -> B h w D"), x, factor)
        with accelerator.autocast():
            x_hat = tiles.decode(lambda tile: tokenizer.decode(rearrange(tile, "B h w D -> B D h w")), z_q, factor)
    x, x_hat = x[:, :, :height, :width], x_hat[:, :, :height, :width].float()
    made: NDArray[np.uint8] = to_uint8(x_hat)[0].permute(1, 2, 0).cpu().numpy()
    return made, float(psnr(x, x_hat)), float(ssim(x, x_hat)), bits


def given_images(accelerator: Accelerator, config: ReconstructConfig, loaded: LoadedTokenizer) -> Originals:
    """The files named on the command line, and those of the folders named there. All are read once to see whether they
    can be: what cannot is named and left out, and found before hours were spent on the others.

    Raises:
        ConfigError: there is no such file or folder, or no picture in a folder.
        BadFileError: none of them can be read.
    """
    channels = loaded.tokenizer.config.image_channels

    def look() -> tuple[dict[Path, str], list[str]]:
        names = {
            path: path.relative_to(source).as_posix() if path != Path(source) else path.name
            for source in config.pictures
            for path in image_paths(Path(source), "pictures")
        }
        paths, bad = readable([*names][: config.n], channels)
        return dict(zip(paths, png_names([names[path] for path in paths]), strict=True)), bad

    named, bad = run_on_main(accelerator, look)
    paths = [*named]
    if not paths:
        raise unreadable(bad)
    for reason in bad:
        accelerator.print(f"left out: {one_line(reason)}")
    return Originals(
        [str(path) for path in paths], [*named.values()], lambda index: read_image(paths[index], channels), tuple(bad)
    )


def validation_images(config: ReconstructConfig, loaded: LoadedTokenizer) -> Originals:
    """The first pictures of the validation split of the tokenizer's training."""
    data = parse_data_config(loaded.data, str(loaded.path))
    split = open_data(data).image_batches("validation", seed=0)
    number = min(config.n or VALIDATION, len(split))

    def read(index: int) -> ImageArray:
        pixels, _ = split.batch(np.array([index]))
        picture: ImageArray = rearrange(pixels, "1 C H W -> H W C").numpy()
        return picture

    names = [f"validation picture {index} of {data.kind}" for index in range(number)]
    return Originals(names, [f"{index:06d}.png" for index in range(number)], read)


def png_names(names: Sequence[str]) -> list[str]:
    """Names of PNG files for pictures of these names, without two that a system takes for one: `a.jpg` and `a.png` are
    `a.png` and `a-2.png`. Names that leave no room for a number are cut short."""
    taken, found = set[str](), list[str]()
    for name in names:
        path, number = Path(name), 1
        stem = path.with_name(os.fsdecode(os.fsencode(path.stem)[:LONGEST_NAME])).as_posix()
        made = f"{stem}.png"
        while normalise_name(made).casefold() in taken:
            number += 1
            made = f"{stem}-{number}.png"
        taken.add(normalise_name(made).casefold())
        found.append(made)
    return found


def finish(
    config: ReconstructConfig, loaded: LoadedTokenizer, tiles: Tiles, originals: Originals, figures: Tensor, out: Path
) -> None:
    """Write figures.json, and print the means."""
    rows: list[dict[str, Any]] = []
    for index, (name, values) in enumerate(zip(originals.names, figures.tolist(), strict=True)):
        row = dict(zip(COLUMNS, values, strict=True))
        bits = None if np.isnan(row["bits"]) else row["bits"]
        per_pixel = None if bits is None else bits / (row["height"] * row["width"])
        size = {"height": int(row["height"]), "width": int(row["width"])}
        quality = {"psnr": row["psnr"], "ssim": row["ssim"]}
        rows.append(
            {"file": originals.files[index], "of": name, **size, **quality, "bits": bits, "bits_per_pixel": per_pixel}
        )
    mean = {name: float(figures[:, COLUMNS.index(name)].mean()) for name in ("psnr", "ssim")}
    factor = loaded.tokenizer.config.network.factor
    used = {"tile": [side * factor for side in tiles.size], "overlap": tiles.overlap * factor}
    settings: dict[str, Any] = {**config.tree(), "tokenizer": str(loaded.path), "step": loaded.step, **used}
    written = {"settings": settings, "mean": mean, "pictures": rows, "left_out": originals.bad}
    write_file(out / "figures.json", json.dumps(written, indent=1).encode())
    print(f"PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}")
    if rows[0]["bits"] is not None:
        bits = sum(row["bits"] for row in rows) / len(rows)
        per_pixel = sum(row["bits_per_pixel"] for row in rows) / len(rows)
        print(f"{bits:,.0f} bits per picture, {per_pixel:.3f} per pixel (log2 V for each code)")


if __name__ == "__main__":
    run_command(main)
