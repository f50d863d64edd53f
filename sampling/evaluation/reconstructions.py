"""Comparison of a tokenizer's reconstructions with the originals: image by image, and as sets of features.

x uint8 -> normalise -> tokenizer -> x_hat -> uint8         all metrics are of the rounded image, as it is saved

The codes between encoder and decoder can be perturbed (perturbation.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.features import Features, own_batches
from sampling.evaluation.perturbation import CodePerturbation
from sampling.evaluation.sources import ImageSource, Indices
from sampling.saved_images import DECODE_CHUNK, apply_in_chunks
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import file_sha256
from stage1_tokenizer.metrics import CodeUse, psnr, ssim
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer

ImageMetric = Callable[[Tensor, Tensor], Tensor]
"""x, x_hat (B, C, H, W) in [-1, 1] -> (B,)."""


class MeasuredReconstructions(NamedTuple):
    """Measurements of the reconstructions of N images, in the order of the images."""

    psnr: Tensor
    """(N,) float64, dB."""
    ssim: Tensor
    """(N,) float64."""
    squared_error: Tensor
    """(N,) float64: mean over an image's values, on the scale of [-1, 1]."""
    variance: float
    """Variance of all values of the originals, on the same scale."""
    use: CodeUse
    originals: Features | None
    """Features of the originals; None without an extractor."""
    reconstructed: Features | None
    """Features of the reconstructions; None without an extractor."""
    lpips: Tensor | None = None
    """(N,) float64."""


def lpips_description(config: PerceptualConfig) -> str:
    """Return the version, network and backbone of LPIPS, for the protocol."""
    given = f"backbone of sha256 {file_sha256(Path(config.weights))}" if config.weights else "torchvision's backbone"
    return f"version 0.1, {config.net}, {given}"


def lpips_per_image(perceptual: Perceptual) -> ImageMetric:
    """Return LPIPS of each pair of images, as the lpips package computes it."""

    def distance(x: Tensor, x_hat: Tensor) -> Tensor:
        three = (x.expand(-1, 3, -1, -1), x_hat.expand(-1, 3, -1, -1))
        return perceptual.lpips(*three).flatten()

    return distance


@torch.inference_mode()
def measure_reconstructions(
    accelerator: Accelerator,
    loaded: LoadedTokenizer,
    source: ImageSource,
    extractor: Extractor | None,
    lpips: ImageMetric | None,
    batch_size: int,
    perturb: CodePerturbation | None = None,
) -> MeasuredReconstructions:
    """Reconstruct and measure all images of a source. One process measures each; all processes get the result.

    perturb: changes the codes before they are decoded; the codes in use are counted before it.

    Raises:
        ConfigError: there is an extractor and only one image, which has no covariance.
        BadFileError: the tokenizer's output is not finite.
    """
    if extractor is not None and len(source) < 2:
        raise ConfigError(
            "reconstructions: there is 1 image to measure, but an extractor compares sets of at least 2; to measure "
            "PSNR, SSIM and NMSE of one image, give --extractor.kind none"
        )
    device, bottleneck = accelerator.device, loaded.tokenizer.bottleneck
    columns: dict[str, ImageMetric] = {"psnr": psnr, "ssim": ssim, "squared_error": _squared_error}
    if lpips is not None:
        columns["lpips"] = lpips
    table = torch.zeros(len(source), len(columns) + 2, dtype=torch.float64, device=device)
    use = CodeUse(bottleneck.depth, bottleneck.codebook_size, device)
    sides = [Features(extractor.dimension, keep=None) for _ in range(2)] if extractor is not None else []
    batches = own_batches(accelerator, len(source), batch_size)
    with progress_bar(sum(map(len, batches)), "image", "reconstructions") as progress:
        for indices in batches:
            pixels = source.read(indices).to(device)
            x = normalise(pixels)
            x_hat, codes = encode_and_decode(loaded.tokenizer, x, indices, perturb)
            if not torch.isfinite(x_hat).all():
                raise BadFileError(f"{loaded.path}: the output is not finite, so the weights are damaged")
            pixels_hat = to_uint8(x_hat)
            x_hat = normalise(pixels_hat)
            values = [column(x, x_hat).double() for column in columns.values()]
            flat = x.double().flatten(1)
            rows = torch.stack([*values, flat.mean(dim=1), flat.square().mean(dim=1)], dim=1)
            table[torch.from_numpy(indices).to(device)] = rows
            if codes is not None:
                use.add(codes)
            if extractor is not None:
                for side, images in zip(sides, (pixels, pixels_hat), strict=True):
                    side.add(extractor(images)._replace(logits=None), torch.from_numpy(indices))
            progress.update(len(indices))
    table = accelerator.reduce(table, "sum").cpu()
    use.counts = accelerator.reduce(use.counts, "sum").cpu()
    for side in sides:
        side.merge_over(accelerator)
    originals, reconstructed = sides or (None, None)
    measured = dict(zip(columns, table.unbind(dim=1), strict=False))
    variance = max(float(table[:, -1].mean() - table[:, -2].mean().square()), 1e-12)
    return MeasuredReconstructions(
        variance=variance, use=use, originals=originals, reconstructed=reconstructed, **measured
    )


def encode_and_decode(
    tokenizer: Tokenizer, x: Tensor, indices: Indices, perturb: CodePerturbation | None
) -> tuple[Tensor, Tensor | None]:
    """Reconstruct x (B, C, H, W) in [-1, 1] of the images with these indices (B,).

    Returns x_hat and the codes (B, h, w, K) before they are perturbed, None for a continuous latent.
    In chunks of one size, so that neither the batch size nor the number of processes changes a code or a pixel.
    """
    if not tokenizer.bottleneck.depth:
        return apply_in_chunks(lambda part: tokenizer(part)[0].float(), x, DECODE_CHUNK), None
    codes = apply_in_chunks(tokenizer.encode_codes, x, DECODE_CHUNK)
    decoded = codes if perturb is None else perturb(codes, indices)
    return apply_in_chunks(lambda part: tokenizer.decode_codes(part).float(), decoded, DECODE_CHUNK), codes


def _squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).double().square().flatten(1).mean(dim=1)
