"""What is compared: figures of a trained tokenizer on the validation images of the data that it was trained on."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.data import data_config, open_data
from stage1_tokenizer.data.pictures import Pictures
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.log_file import log_entries
from stage1_tokenizer.metrics import pixel_variance
from stage1_tokenizer.objective import PixelConfig, reconstruction_loss
from stage1_tokenizer.perceptual import Perceptual
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer
from stage1_tokenizer.validation import pairs, validate


@dataclass(frozen=True)
class Row:
    """A preset's figures, over the whole validation split."""

    preset: str
    data: str
    """The data set's kind."""
    parameters: int
    """Learned numbers, a codebook of running means included."""
    nmse: float
    psnr: float
    lpips: float | None
    """None: no weights, or images too small for LPIPS."""
    usage: float | None
    """Share of the codes that occur; this and the next two are None where the latent is continuous."""
    perplexity: float | None
    bits: float | None
    """Per image, at a fixed length of log2 V a code."""
    floats: int | None
    """Numbers per image that the decoder receives; None where there are codes."""
    images_per_second: float
    """In training, validation and saving not included."""
    seconds: float
    """Of training, likewise."""
    trained_on: str
    """Device, precision and threads, as the training printed them."""


@dataclass(frozen=True)
class Failure:
    """A preset that could not be trained or measured."""

    preset: str
    message: str


@dataclass(frozen=True)
class Reconstructions:
    """Some validation images and what a tokenizer makes of them, (n, C, H, W) in [-1, 1] each."""

    row: Row
    originals: Tensor
    images: Tensor


def measure(
    preset: str, folder: Path, batch_size: int, lpips: Perceptual | None, smallest: int, n: int
) -> tuple[Row, Reconstructions | None]:
    """The figures of the tokenizer in a run's folder, and n reconstructions. In float32, whatever it was trained in.

    LPIPS is measured on images of at least `smallest` pixels a side.

    Raises:
        UserError: the tokenizer or its data cannot be read.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    loaded = LoadedTokenizer.load(folder, accelerator.device)
    tokenizer = loaded.tokenizer
    data = data_config(loaded.data, str(loaded.path))
    opened = open_data(data)
    split = opened.pictures("validation", seed=0)
    # Not cached: of the training split, the variance looks at a part alone.
    train_split = Pictures(opened.images("train"), data.model_copy(update={"cache": "none"}), seed=0)
    perceptual = lpips if min(data.image_size) >= smallest else None
    variance = pixel_variance(train_split)
    distance = partial(reconstruction_loss, pixel=PixelConfig(), perceptual=perceptual, perceptual_weight=1.0)
    figures = validate(accelerator, tokenizer, split, batch_size, variance, distance)
    images_per_second, seconds = training_speed(folder, batch_size)
    row = Row(
        preset=preset,
        data=data.kind,
        parameters=learned_numbers(tokenizer),
        nmse=figures["nmse"],
        psnr=figures["psnr"],
        lpips=figures.get("perceptual"),
        usage=figures.get("code_usage"),
        perplexity=figures.get("code_perplexity"),
        bits=figures.get("bits_per_image"),
        floats=None if tokenizer.bottleneck.depth else latent_numbers(tokenizer),
        images_per_second=images_per_second,
        seconds=seconds,
        trained_on=training_place(folder / "train.log"),
    )
    if not n:
        return row, None
    shown = pairs(tokenizer, split, n, accelerator.device).cpu()  # (2n, C, H, W), each original and its reconstruction
    return row, Reconstructions(row, shown[::2], shown[1::2])


def learned_numbers(tokenizer: Tokenizer) -> int:
    """Parameters, and the codebooks that are running means: those are buffers, but learned all the same."""
    return sum(tensor.numel() for tensor in [*tokenizer.parameters(), *tokenizer.bottleneck.learned_buffers()])


def latent_numbers(tokenizer: Tokenizer) -> int:
    """Numbers per image of a continuous latent: those that a VAE draws, else those that the decoder receives."""
    (height, width), network = tokenizer.config.image_size, tokenizer.config.network
    channels = tokenizer.bottleneck.noise_channels or network.latent_channels
    return (height // network.factor) * (width // network.factor) * channels


def training_speed(folder: Path, batch_size: int) -> tuple[float, float]:
    """Images per second and seconds of a run, by the last entry of its log, which precedes validation and saving."""
    entries = [entry for entry in log_entries(folder / "metrics.jsonl") if "train/images_per_second" in entry]
    if not entries:
        raise BadFileError(
            f"{folder / 'metrics.jsonl'}: has no entry of the training; delete the folder to train again"
        )
    last = entries[-1]
    images_per_second = float(last["train/images_per_second"])
    return images_per_second, last["step"] * batch_size / images_per_second


def training_place(log: Path) -> str:
    """The line with which a training begins: processes, device, precision, threads."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith("processes=")]
    return lines[-1] if lines else "unknown: its train.log does not say"
