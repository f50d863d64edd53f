"""Draw diagnostic images of a trained tokenizer.   python stage1_tokenizer/analyze.py --tokenizer runs/stage1/NAME

tokenizer + validation images -> latents, codes, reconstructions -> RUN/analysis/*.png, and TensorBoard
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt

from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.record import print_data_summary
from stage1_tokenizer.diagnostics.report.page import NothingToShowError
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder
from stage1_tokenizer.diagnostics.views import VIEWS
from stage1_tokenizer.diagnostics.views.base import (
    EncodedImages,
    Subject,
    View,
    code_use,
    encoded_images,
)
from stage1_tokenizer.diagnostics.views.projection import ProjectionKind, check_projection
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import say, show_progress
from stage1_tokenizer.engine.errors import ConfigError, StorageError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.lock import mark_folder
from stage1_tokenizer.engine.log_file import EventWriter
from stage1_tokenizer.engine.model_files import output_folder
from stage1_tokenizer.tokenizer import resolve_tokenizer

EVENTS = ".analysis"
"""Suffix of this command's TensorBoard files, by which the next analysis finds and removes them."""


class AnalyzeConfig(CommandConfig):
    """Draw diagnostic images of a trained tokenizer."""

    tokenizer: str
    """A stage-one run's folder, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME."""
    root: str | None = None
    """Folder that holds the data set of the training now, if it was moved; null: the folder of the training. If the
    training's images are drawn, it may be any folder, and all its images are looked at."""
    images: PositiveInt = 512
    """Number of validation images to use, evenly spaced over the split; all metrics are over these images."""
    codes: PositiveInt = 256
    """Number of codes in the atlas; the most used ones are shown."""
    projection: ProjectionKind = "pca"
    """Method that maps codebook vectors to two dimensions; `umap` needs the extra `umap` to be installed."""
    out: str | None = None
    """Folder to write to; default: analysis/ in the run's folder. Images of an earlier analysis are replaced."""
    seed: int = 0
    """Seed of random codes, noise, masks and UMAP."""


def main() -> None:
    """Measure the tokenizer once, then write the image of each view."""
    config = parse_command_line(AnalyzeConfig)
    check_projection(config.projection)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = resolve_tokenizer(config.tokenizer)
    subject = Subject(
        RunFolder(weights.parent), device, config.root, True, config.tokenizer, "--tokenizer", config.images,
        config.codes, config.projection, config.seed,
    )  # fmt: skip
    out = open_folder(Path(config.out) if config.out else output_folder(weights) / "analysis")
    encoded = encoded_images(subject)
    print_metrics(encoded)
    mark_folder(out)
    events = EventWriter(out, None, say, EVENTS)
    drawn = [view for view in VIEWS if view.draw]
    for view in show_progress(drawn, len(drawn), "image", "drawing"):
        say(write_view(view, subject, out, events))
    events.close()


def write_view(view: View, subject: Subject, out: Path, events: EventWriter) -> str:
    """Write a view's PNG and JSON. Return a message for the console: its path, or why the view was left out."""
    path = out / f"{view.name}.png"
    try:
        png = view.png(subject)
    except NothingToShowError as reason:
        path.unlink(missing_ok=True)  # a file of an earlier analysis would be misleading
        return f"{view.name}: left out, {reason}"
    if view.json:
        write_file(path.with_suffix(".json"), view.json(subject).encode())
    write_file(path, png)
    with Image.open(io.BytesIO(png)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (3, H, W)
    events.add_image(encoded_images(subject).loaded.step, f"analysis/{view.name}", pixels)
    return str(path)


def print_metrics(encoded: EncodedImages) -> None:
    """Print the data set, the main metrics, and the use of codes."""
    print_data_summary(encoded.found)
    loaded, psnr, (H, W), (h, w) = encoded.loaded, encoded.psnr, encoded.image_size, encoded.z_q.shape[2:]
    print(f"{loaded.source} (step {loaded.step}): {encoded.count} validation images {H}x{W}, latent {h}x{w}")
    print(f"PSNR {psnr.mean():.2f} dB, from {psnr.min():.2f} to {psnr.max():.2f}")
    if encoded.codes is not None:
        use = code_use(encoded.codes, encoded.tokenizer.bottleneck.codebook_size)
        print(f"codes in use {use.usage:.1%}, perplexity {use.perplexity:.1f}, entropy {use.entropy_bits:.2f} bits")


def open_folder(out: Path) -> Path:
    """Create the folder `out`, and remove the TensorBoard files of an earlier analysis from it.

    Raises:
        ConfigError: `out` is a file.
        StorageError: the folder cannot be created or written to.
    """
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
