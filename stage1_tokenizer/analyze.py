"""Pictures that explain a trained tokenizer.   python stage1_tokenizer/analyze.py --tokenizer runs/stage1/NAME

tokenizer + the data of its training -> latents, codes, reconstructions -> RUN/analysis/*.png, and TensorBoard
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data import DataConfig, build_pictures, data_config
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.diagnostics.analysis.atlas import atlas_of
from stage1_tokenizer.diagnostics.analysis.atlas_picture import NEIGHBOURS, draw_atlas
from stage1_tokenizer.diagnostics.analysis.codebook_map import draw_codebook_map
from stage1_tokenizer.diagnostics.analysis.curves import draw_curves
from stage1_tokenizer.diagnostics.analysis.encoded import Encoded, code_use, encode
from stage1_tokenizer.diagnostics.analysis.latent_maps import draw_latent_maps
from stage1_tokenizer.diagnostics.analysis.masked_latents import draw_masked_latents
from stage1_tokenizer.diagnostics.analysis.projection import ProjectionKind, check_projection
from stage1_tokenizer.diagnostics.analysis.random_codes import draw_random_codes
from stage1_tokenizer.diagnostics.analysis.reconstruction import draw_holes, draw_reconstructions, find_holes
from stage1_tokenizer.diagnostics.analysis.sheet import Sheet
from stage1_tokenizer.diagnostics.analysis.usage import draw_usage
from stage1_tokenizer.engine.checkpoint import write_file
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import counted, say
from stage1_tokenizer.engine.errors import ConfigError, StorageError
from stage1_tokenizer.engine.lock import mark_folder
from stage1_tokenizer.engine.log_file import Events, read_curves
from stage1_tokenizer.tokenizer import LoadedTokenizer

EVENTS = ".analysis"
"""Suffix of our TensorBoard files, by which the next analysis finds those of the last."""


class AnalyzeConfig(CommandConfig):
    """Draw pictures that explain a trained tokenizer."""

    tokenizer: str
    """A stage-one run's folder, or its tokenizer.safetensors."""
    root: str | None = None
    """Where the images of its training are now; null: where they were then."""
    images: PositiveInt = 512
    """Validation images to look at, evenly spaced over the split; all figures are over these."""
    codes: PositiveInt = 256
    """Codes in the atlas, the most used ones."""
    projection: ProjectionKind = "pca"
    """How the codebook is brought to two dimensions; umap needs the extra of that name."""
    out: str | None = None
    """Folder for the pictures; default: analysis/ in the run's. Pictures of an earlier analysis are written over."""
    seed: int = 0
    """Of random codes, noise, masks and UMAP."""


def main() -> None:
    config = parse_command_line(AnalyzeConfig)
    check_projection(config.projection)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = LoadedTokenizer.load(config.tokenizer, device)
    run = loaded.path.parent
    out = open_folder(Path(config.out) if config.out else run / "analysis")
    validation = build_pictures(data_of(loaded, config.root), "validation", config.seed)
    check_channels(loaded, validation.channels)
    encoded = encode(loaded.tokenizer, validation, config.images, device)
    describe(loaded, encoded)
    mark_folder(out)
    events = Events(out, None, say, EVENTS)
    drawn = list(pictures(loaded, encoded, config, out))
    for name, draw in counted(drawn, len(drawn), "picture", "drawing"):
        sheet = draw()
        if isinstance(sheet, str):
            (out / f"{name}.png").unlink(missing_ok=True)  # that of an earlier analysis would not be of this one
            say(f"{name}: left out, {sheet}")
            continue
        png = sheet.png()
        write_file(out / f"{name}.png", png)
        with Image.open(io.BytesIO(png)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W)
        events.image(loaded.step, f"analysis/{name}", pixels)
        say(f"{out / name}.png")
    events.close()


def pictures(
    loaded: LoadedTokenizer, encoded: Encoded, config: AnalyzeConfig, out: Path
) -> Iterator[tuple[str, Callable[[], Sheet | str]]]:
    """Each picture's name, and the function that draws it or says why not."""
    tokenizer, codes, size = loaded.tokenizer, encoded.codes, loaded.tokenizer.bottleneck.codebook_size
    footer = f"{loaded.path.parent.name}   step {loaded.step}   {tokenizer.config.bottleneck.kind}"

    def holes() -> Sheet | str:
        found = find_holes(encoded.x, encoded.labels) if has_holes(loaded.data) else None
        return (
            draw_holes(encoded, found, footer) if found else "the images are not drawn shapes with holes (data.holes)"
        )

    def curves() -> Sheet | str:
        log = loaded.path.parent / "metrics.jsonl"
        found = read_curves(log)
        return draw_curves(found, 0 if codes is None else size, footer) if found else f"there is no log {log}"

    def codebook_map() -> Sheet | str:
        if codes is None:
            return continuous
        return draw_codebook_map(tokenizer, encoded, config.projection, config.seed, footer)

    def atlas() -> Sheet | str:
        if codes is None:
            return continuous
        found = atlas_of(encoded.x, codes[..., 0], tokenizer.bottleneck.codebooks()[0].float().cpu(), NEIGHBOURS)
        write_file(out / "atlas.json", found.json().encode())
        return draw_atlas(found, codes.shape[-1], config.codes, len(encoded.x), footer)

    continuous = "the latent is continuous and has no codes"
    yield "reconstructions", lambda: draw_reconstructions(encoded, footer)
    yield "holes", holes
    yield "curves", curves
    yield "random_codes", lambda: draw_random_codes(tokenizer, encoded, config.seed, footer)
    yield "latent_maps", lambda: draw_latent_maps(encoded, footer)
    yield "masked_latents", lambda: draw_masked_latents(tokenizer, encoded, config.seed, footer)
    yield "codebook_2d", codebook_map
    yield "atlas", atlas
    yield "usage", lambda: continuous if codes is None else draw_usage(codes, size, footer)


def describe(loaded: LoadedTokenizer, encoded: Encoded) -> None:
    """The key figures."""
    (H, W), (h, w) = encoded.image_size, encoded.z_q.shape[2:]
    print(f"{loaded.path} (step {loaded.step}): {len(encoded.x)} validation images {H}x{W}, latent {h}x{w}")
    print(f"PSNR {encoded.psnr.mean():.2f} dB, from {encoded.psnr.min():.2f} to {encoded.psnr.max():.2f}")
    if encoded.codes is not None:
        use = code_use(encoded.codes, loaded.tokenizer.bottleneck.codebook_size)
        print(f"codes in use {use.usage:.1%}, perplexity {use.perplexity:.1f}, entropy {use.entropy_bits:.2f} bits")


def data_of(loaded: LoadedTokenizer, root: str | None) -> DataConfig:
    """The data of the training, from another folder where `root` names one.

    Raises:
        ConfigError: they do not come from a folder.
    """
    config = data_config(loaded.data, str(loaded.path))
    if root is None:
        return config
    if isinstance(config, ShapesConfig):
        raise ConfigError(
            f"--root {root}: this tokenizer's images (data.kind shapes) are drawn, not read; leave it out"
        )
    return config.model_copy(update={"root": root})


def has_holes(data: dict[str, object]) -> bool:
    return data.get("kind") == "shapes" and bool(data.get("holes"))


def check_channels(loaded: LoadedTokenizer, channels: int) -> None:
    """Raises ConfigError where the images are grey and the tokenizer's were not, or the other way round."""
    wanted = loaded.tokenizer.config.image_channels
    if channels != wanted:
        raise ConfigError(
            f"the images have {channels} channels, but {loaded.path} was trained on {wanted}; "
            "name the folder of its training with --root"
        )


def open_folder(out: Path) -> Path:
    """The folder to write to, without the TensorBoard files of an earlier analysis."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file, not a folder; name another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob(f"events.out.tfevents.*{EVENTS}"):
            old.unlink()
    except OSError as error:
        raise StorageError(f"--out {out}: cannot be written to ({error.strerror})") from None
    return out


if __name__ == "__main__":
    run_command(main)
