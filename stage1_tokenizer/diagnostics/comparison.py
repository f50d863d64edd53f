"""The comparison of trained tokenizers: a table of their metrics on validation images, and their reconstructions."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.image_batches import ImageBatches, to_uint8
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.log_file import METRICS_FILE, read_log
from stage1_tokenizer.metrics import pixel_variance
from stage1_tokenizer.objective import PixelConfig, reconstruction_loss
from stage1_tokenizer.perceptual import Perceptual
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer
from stage1_tokenizer.validation import reconstruct_pairs, validate

COLUMNS = (
    "preset",
    "parameters",
    "NMSE",
    "PSNR, dB",
    "LPIPS",
    "usage",
    "perplexity",
    "per image",
    "images/s",
    "training, s",
)
INCHES = 0.9
"""Side of a reconstruction in the image file; labels are as wide as three of them."""


@dataclass(frozen=True)
class Row:
    """The metrics of one preset over the whole validation split."""

    preset: str
    data: str
    """The data set's kind."""
    parameters: int
    """Number of learned numbers, those of codebooks that are running means included."""
    nmse: float
    psnr: float
    lpips: float | None
    """None: no LPIPS weights, or images too small for LPIPS."""
    usage: float | None
    """Share of the codes that occur. None: the latent is continuous, as for perplexity and bits."""
    perplexity: float | None
    bits: float | None
    """Bits per image, with log2 V bits for each code."""
    floats: int | None
    """Numbers per image of a continuous latent; None: there are codes."""
    images_per_second: float
    """Speed of training, without validation and saving."""
    seconds: float
    """Duration of training, without validation and saving."""
    trained_on: str
    """Device, precision and threads, as the training printed them."""


@dataclass(frozen=True)
class Failure:
    """The error of a preset that could not be trained or measured."""

    preset: str
    message: str


@dataclass(frozen=True)
class PresetImages:
    """Some validation images and their reconstructions by one preset, (n, C, H, W) in [-1, 1] each."""

    row: Row
    originals: Tensor
    images: Tensor


def measure_run(
    preset: str, folder: Path, batch_size: int, lpips: Perceptual | None, smallest: int, n: int
) -> tuple[Row, PresetImages | None]:
    """Measure the tokenizer in a run's folder, in float32, and make n reconstructions; None for n = 0.

    LPIPS is measured if images have at least `smallest` pixels a side.

    Raises:
        UserError: the tokenizer or its data cannot be read.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    loaded = LoadedTokenizer.load(folder, accelerator.device)
    tokenizer = loaded.tokenizer
    data = parse_data_config(loaded.data, str(loaded.path))
    opened = open_data(data)
    split = opened.image_batches("validation", seed=0)
    # Not cached, because the variance reads only a part of the train split.
    train_split = ImageBatches(opened.splits["train"], data.model_copy(update={"cache": "none"}), seed=0)
    perceptual = lpips if min(data.image_size) >= smallest else None
    variance = pixel_variance(train_split)
    distance = partial(reconstruction_loss, pixel=PixelConfig(), perceptual=perceptual, perceptual_weight=1.0)
    metrics = validate(accelerator, tokenizer, split, batch_size, variance, distance)
    images_per_second, seconds = read_training_speed(folder, batch_size)
    row = Row(
        preset=preset,
        data=data.kind,
        parameters=count_learned_numbers(tokenizer),
        nmse=metrics["nmse"],
        psnr=metrics["psnr"],
        lpips=metrics.get("perceptual"),
        usage=metrics.get("code_usage"),
        perplexity=metrics.get("code_perplexity"),
        bits=metrics.get("bits_per_image"),
        floats=None if tokenizer.bottleneck.depth else count_latent_numbers(tokenizer),
        images_per_second=images_per_second,
        seconds=seconds,
        trained_on=read_training_place(folder / "train.log"),
    )
    if not n:
        return row, None
    images = reconstruct_pairs(
        tokenizer, split, n, accelerator.device
    ).cpu()  # (2n, C, H, W), originals and reconstructions in turn
    return row, PresetImages(row, images[::2], images[1::2])


def count_learned_numbers(tokenizer: Tokenizer) -> int:
    """Count the parameters and the codebooks that are running means, which are learned buffers."""
    return sum(tensor.numel() for tensor in [*tokenizer.parameters(), *tokenizer.bottleneck.learned_buffers()])


def count_latent_numbers(tokenizer: Tokenizer) -> int:
    """Count the numbers per image of a continuous latent: those of a VAE, or those that the decoder gets."""
    (height, width), network = tokenizer.config.image_size, tokenizer.config.network
    channels = tokenizer.bottleneck.noise_channels or network.latent_channels
    return (height // network.factor) * (width // network.factor) * channels


def read_training_speed(folder: Path, batch_size: int) -> tuple[float, float]:
    """Return images per second and seconds of a run, from its last training entry, without validation and saving."""
    entries = [entry for entry in read_log(folder / METRICS_FILE) if "train/images_per_second" in entry]
    if not entries:
        raise BadFileError(
            f"{folder / METRICS_FILE}: has no entry about the training; delete the folder to train again"
        )
    last = entries[-1]
    images_per_second = float(last["train/images_per_second"])
    return images_per_second, last["step"] * batch_size / images_per_second


def read_training_place(log: Path) -> str:
    """Return the first line that a training prints: processes, device, precision, threads."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith("processes=")]
    return lines[-1] if lines else "unknown: not in its train.log"


def row_cells(row: Row) -> list[str]:
    """Format a row as text, with "-" for missing values."""
    return [
        row.preset,
        f"{row.parameters:,}",
        f"{row.nmse:.4f}",
        f"{row.psnr:.2f}",
        "-" if row.lpips is None else f"{row.lpips:.4f}",
        "-" if row.usage is None else f"{row.usage:.1%}",
        "-" if row.perplexity is None else f"{row.perplexity:,.1f}",
        f"{row.floats:,} f32" if row.bits is None else f"{row.bits:,.0f} bits",
        f"{row.images_per_second:,.3g}" if row.images_per_second < 100 else f"{row.images_per_second:,.0f}",
        f"{row.seconds:,.1f}" if row.seconds < 100 else f"{row.seconds:,.0f}",
    ]


def console_table(rows: Sequence[Row | Failure]) -> str:
    """Format the table for the console, with aligned columns; a failed preset shows its message."""
    lines = [list(COLUMNS), *(row_cells(row) for row in rows if isinstance(row, Row))]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    widths[0] = max(widths[0], *(len(row.preset) for row in rows))

    def line(words: Sequence[str]) -> str:
        padded = [word.rjust(width) for word, width in zip(words, widths, strict=True)]
        return "  ".join([words[0].ljust(widths[0]), *padded[1:]])

    texts = [
        line(row_cells(row)) if isinstance(row, Row) else f"{row.preset.ljust(widths[0])}  {row.message}"
        for row in rows
    ]
    return "\n".join([line(COLUMNS), *texts])


def markdown_table(rows: Sequence[Row | Failure], caption: str) -> str:
    """Format the table as Markdown, with a caption below it."""
    head = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:]))]
    body = [
        row_cells(row)
        if isinstance(row, Row)
        else [row.preset, row.message.replace("|", "\\|"), *("" for _ in COLUMNS[2:])]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(words) + " |" for words in [*head, *body]) + f"\n\n{caption}\n"


def json_table(rows: Sequence[Row | Failure], settings: Tree) -> str:
    """Return JSON with all digits of the metrics, the settings and the machine."""
    tree = {"settings": settings, "machine": machine_facts(), "rows": [dataclasses.asdict(row) for row in rows]}
    return json.dumps(tree, indent=2) + "\n"


def machine_facts() -> dict[str, str]:
    """Return the processor, the GPU and the versions of Python and torch."""
    facts = {"processor": processor_model(), "python": platform.python_version(), "torch": torch.__version__}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def processor_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture if the system does not give a name."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_image(presets: Sequence[PresetImages], path: Path) -> None:
    """Write the reconstructions as an image file. Presets of one data set are below a row of its originals."""
    rows = image_rows(presets)
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(INCHES * (columns + 3), INCHES * len(rows)), dpi=120, layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        strip = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=255)  # (3, height, width)
        axes.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.savefig(path, bbox_inches="tight")


def image_rows(presets: Sequence[PresetImages]) -> list[tuple[str, Tensor]]:
    """Return (label, images (n, C, H, W)) from top to bottom: each data set's originals, then its presets."""
    groups: list[list[PresetImages]] = []
    for preset in presets:
        same = [group for group in groups if torch.equal(group[0].originals, preset.originals)]
        if same:
            same[0].append(preset)
        else:
            groups.append([preset])
    rows = []
    for group in groups:
        rows.append((f"{group[0].row.data}, validation", group[0].originals))
        rows += [(f"{preset.row.preset}\n{preset.row.psnr:.2f} dB", preset.images) for preset in group]
    return rows
