"""Encode and decode images.   python sampling/reconstruct.py --tokenizer RUN [IMAGE OR FOLDER ...]

Images of any size, each at its own size, in tiles where it is larger than one; without any, validation images of the
tokenizer's own data set. Writes a PNG file of the same name for each (`cat.jpg` becomes OUT/cat.png), OUT/figures.json
and OUT/settings.json, and prints how close the reconstructions are to the originals (PSNR, SSIM) and how many bits the
codes take. Files that cannot be read are named and left out, and the command then ends with exit code 3.
"""

import time
from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt
from pydantic_settings import CliPositionalArg

from sampling.input_images import given_images, validation_images
from sampling.output import build_settings, close_output, open_output
from sampling.reconstruction import reconstruct_all, write_metrics
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.launch import start_accelerator
from stage1_tokenizer.networks.tiles import tiles_for
from stage1_tokenizer.tokenizer import LoadedTokenizer


class ReconstructConfig(CommandConfig):
    """Encode images with a tokenizer, and decode them again."""

    tokenizer: str
    """Folder of a stage-one run, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME."""
    pictures: CliPositionalArg[tuple[str, ...]] = ()
    """Image files and folders of images; none: validation images of the tokenizer's own data set."""
    n: PositiveInt | None = None
    """Number of images, counted from the first; null: all that are given, or 64 validation images."""
    tile: PositiveInt | None = None
    """Side of a tile in pixels; null: the size of training, or more if the network has no normalisation. An image that
    is not larger than a tile is processed whole. Reduce it if memory runs out."""
    overlap: NonNegativeInt | None = None
    """Smallest overlap of neighbouring tiles in pixels; null: a quarter of a tile, or just enough for the same result
    as without tiles if the network allows it."""
    beside: bool = False
    """Write each original on the left of its reconstruction, in one file."""
    out: Annotated[str | None, Mark.FREE] = None
    """Folder for the images; null: a new numbered folder under reconstructed/ in the tokenizer's folder. If this
    folder, or the newest numbered one, was interrupted with the same settings, the command starts again in it."""


def main() -> None:
    """Reconstruct the images, write them and figures.json, and print the means."""
    config = parse_command_line(ReconstructConfig)
    accelerator = start_accelerator()
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    model = loaded.tokenizer.config
    tiles = tiles_for(model, config.tile, config.overlap)
    if config.pictures:
        images = given_images(accelerator, config.pictures, config.n, model.image_channels)
    else:
        images = validation_images(loaded, config.n)
    facts = {"tokenizer": loaded.source, "step": loaded.step, "weights": loaded.fingerprint}
    settings = build_settings(config, {**facts, "pictures": images.names, "files": images.files})
    # No image is kept from an interrupted command, because figures.json needs the numbers of all; so none is listed.
    out = open_output(accelerator, config.out, loaded.outputs / "reconstructed", settings, {})
    n, weights, folder = len(images.names), one_line(loaded.source), one_line(str(out.path))
    accelerator.print(f"reconstructing {n} images with {weights} (step {loaded.step}) to {folder}")

    start = time.monotonic()
    table = reconstruct_all(accelerator, loaded.tokenizer, images, tiles, out.path, config.beside)
    if accelerator.is_main_process:
        factor = model.network.factor
        used = {"tile": [side * factor for side in tiles.size], "overlap": tiles.overlap * factor}
        settings = {**config.tree(), "tokenizer": loaded.source, "step": loaded.step, **used}
        print(write_metrics(out.path / "figures.json", table, images, settings))
        close_output(out, images.files)
        seconds = time.monotonic() - start
        print(f"{n} images in {seconds:.1f} s ({n / max(seconds, 1e-9):.1f} images/s): {folder}")
    accelerator.wait_for_everyone()  # a launcher ends the other processes as soon as one has raised
    if images.errors:
        total = n + len(images.errors)
        raise BadFileError(f"{len(images.errors)} of {total} images were left out, see the lines above")


if __name__ == "__main__":
    run_command(main)
