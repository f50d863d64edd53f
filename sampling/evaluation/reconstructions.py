"""How near a tokenizer's reconstructions are to the originals: picture by picture, and as a set.

x uint8 -> normalise -> tokenizer -> x_hat -> uint8         all figures are of the rounded picture, as it is saved
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Features, my_batches, without_logits
from sampling.evaluation.sources import Source
from sampling.saved_images import DECODE_CHUNK, in_chunks
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import file_sha256
from stage1_tokenizer.metrics import CodeUse, psnr, ssim
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer

PerImage = Callable[[Tensor, Tensor], Tensor]
"""x, x_hat (B, C, H, W) in [-1, 1] -> (B,)."""


class Reconstructions(NamedTuple):
    """Of N pictures, in their order."""

    psnr: Tensor
    """(N,) float64, dB."""
    ssim: Tensor
    """(N,) float64."""
    squared_error: Tensor
    """(N,) float64, mean over a picture's values on the scale of [-1, 1]."""
    lpips: Tensor | None
    """(N,) float64."""
    variance: float
    """Of all values of the originals, on the same scale."""
    use: CodeUse
    originals: Features | None
    made: Features | None
    """Features of both sides; None without an extractor."""


def described_lpips(config: PerceptualConfig) -> str:
    """The kind of LPIPS, for the protocol."""
    given = f"backbone of sha256 {file_sha256(Path(config.weights))}" if config.weights else "torchvision's backbone"
    return f"version 0.1, {config.net}, {given}"


def lpips_per_image(perceptual: Perceptual) -> PerImage:
    """The distance of each pair, as the lpips package computes it."""

    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        three = (x.expand(-1, 3, -1, -1), x_hat.expand(-1, 3, -1, -1))
        return perceptual.lpips(*three).flatten()

    return distance


@torch.inference_mode()
def measure_reconstructions(
    accelerator: Accelerator,
    loaded: LoadedTokenizer,
    source: Source,
    extractor: Extractor | None,
    lpips: PerImage | None,
    batch_size: int,
) -> Reconstructions:
    """Reconstruct all pictures of a source, each once over all processes; all processes know the result.

    Raises:
        ConfigError: there is one picture, and an extractor: a set of one has no spread.
        BadFileError: the tokenizer gives numbers that are not finite.
    """
    if extractor is not None and len(source) < 2:
        raise ConfigError(
            "reconstructions: there is 1 picture to measure, and an extractor compares sets of at least 2; without one "
            "(--extractor.kind none) PSNR, SSIM and NMSE are measured"
        )
    device, bottleneck = accelerator.device, loaded.tokenizer.bottleneck
    columns: dict[str, PerImage] = {"psnr": psnr, "ssim": ssim, "error": _squared_error}
    if lpips is not None:
        columns["lpips"] = lpips
    table = torch.zeros(len(source), len(columns) + 2, dtype=torch.float64, device=device)
    use = CodeUse(bottleneck.depth, bottleneck.codebook_size, device)
    sides = [Features(extractor.dimension, keep=None) for _ in range(2)] if extractor is not None else []
    batches = my_batches(accelerator, len(source), batch_size)
    with progress_bar(sum(map(len, batches)), "picture", "reconstructions") as shown:
        for indices in batches:
            pixels = source.read(indices).to(device)
            x = normalise(pixels)
            x_hat, codes = reconstruct(loaded.tokenizer, x)
            if not torch.isfinite(x_hat).all():
                raise BadFileError(f"{loaded.path}: gives numbers that are not finite: its weights are damaged")
            pixels_hat = to_uint8(x_hat)
            x_hat = normalise(pixels_hat)
            values = [column(x, x_hat).double() for column in columns.values()]
            flat = x.double().flatten(1)
            rows = torch.stack([*values, flat.mean(dim=1), flat.square().mean(dim=1)], dim=1)
            table[torch.from_numpy(indices).to(device)] = rows
            if codes is not None:
                use.add(codes)
            if extractor is not None:
                for side, shown_to_it in zip(sides, (pixels, pixels_hat), strict=True):
                    side.add(without_logits(extractor(shown_to_it)), torch.from_numpy(indices))
            shown.update(len(indices))
    table = accelerator.reduce(table, "sum").cpu()
    use.counts = accelerator.reduce(use.counts, "sum").cpu()
    for side in sides:
        side.merge_over(accelerator)
    originals, made = sides or (None, None)
    found = dict(zip(columns, table.unbind(dim=1), strict=False))
    mean, square = table[:, -2].mean(), table[:, -1].mean()
    variance = max(float(square - mean.square()), 1e-12)
    return Reconstructions(
        found["psnr"], found["ssim"], found["error"], found.get("lpips"), variance, use, originals, made
    )


def reconstruct(tokenizer: Tokenizer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x (B, C, H, W) in [-1, 1] -> x_hat of the same shape, and codes (B, h, w, K), None of a continuous latent.

    In chunks of one size, so that neither the batch size nor the number of processes changes a code or a pixel.
    """
    if not tokenizer.bottleneck.depth:
        return in_chunks(lambda part: tokenizer(part)[0].float(), x, DECODE_CHUNK), None
    codes = in_chunks(tokenizer.encode_codes, x, DECODE_CHUNK)
    return in_chunks(lambda part: tokenizer.decode_codes(part).float(), codes, DECODE_CHUNK), codes


def bits_per_image(tokenizer: Tokenizer) -> float:
    """What the codes of an image take as plain numbers: log2 V for each."""
    shape = tokenizer.shape
    return shape.length * math.log2(shape.V)


def _squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).double().square().flatten(1).mean(dim=1)
