"""Validation of a tokenizer: metrics over a whole split, and images with their reconstructions."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.order import validation_batches
from stage1_tokenizer.engine.console import ConsoleMetric, show_progress
from stage1_tokenizer.metrics import CodeUse, psnr
from stage1_tokenizer.objective import generator_loss
from stage1_tokenizer.tokenizer import Tokenizer

METRICS = (
    ConsoleMetric("psnr", "PSNR", "{:.2f} dB", 1),
    ConsoleMetric("code_usage", "codes in use", "{:.0%}", 1),
    ConsoleMetric("perceptual", "LPIPS", "{:.4f}", -1),
    ConsoleMetric("total", "loss", "{:.4g}", -1),
)
"""Metrics of a tokenizer's training that the console shows, if the run logs them."""
ReconstructionLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Function of x and x_hat (B, C, H, W) that returns a loss () and its terms: `Objective.reconstruction_loss`."""


@torch.inference_mode()
def validate(
    accelerator: Accelerator,
    tokenizer: Tokenizer,
    split: ImageBatches,
    batch_size: int,
    variance: float,
    reconstruction_loss: ReconstructionLoss,
) -> dict[str, float]:
    """Measure a tokenizer on a whole split: each image once, shared by all processes.

    batch_size: images per batch, over all processes. variance: that of the data (`pixel_variance`).

    Return each loss under its own name, `psnr` in dB, `nmse`, and for a tokenizer with codes `code_usage`,
    `code_perplexity`, `code_entropy_bits` and `bits_per_image` (log2 V bits per token).
    """
    device, bottleneck = accelerator.device, tokenizer.bottleneck
    sums: dict[str, Tensor] = {}
    use = CodeUse(bottleneck.depth, bottleneck.codebook_size, device)
    size = max(1, batch_size // accelerator.num_processes)
    batches = validation_batches(split, size, accelerator.process_index, accelerator.num_processes)
    count = -(-len(split) // (size * accelerator.num_processes))
    for pixels, _ in show_progress(batches, count, "batch", "validating", nested=True):
        x = normalise(pixels.to(device))  # (B, C, H, W)
        with accelerator.autocast():
            x_hat, bottlenecked = tokenizer(x)
        loss, terms = reconstruction_loss(x, x_hat.float())
        means = generator_loss(loss, terms, bottlenecked).parts | {"psnr": psnr(x, x_hat).mean()}
        for name, mean in means.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + mean * len(x)
        if bottlenecked.codes is not None:
            use.add(bottlenecked.codes)
    metrics = {name: float(accelerator.reduce(total, "sum")) / len(split) for name, total in sums.items()}
    metrics["nmse"] = metrics["l2"] / variance
    if bottleneck.depth:
        metrics |= use.take_metrics(accelerator)
        metrics["bits_per_image"] = tokenizer.shape.length * float(np.log2(tokenizer.shape.V))
    return metrics


@torch.inference_mode()
def reconstruct_pairs(tokenizer: Tokenizer, split: ImageBatches, n: int, device: torch.device) -> Tensor:
    """Return n images of a split (or all if fewer), each followed by its reconstruction: (2n, C, H, W) in [-1, 1]."""
    pixels, _ = split.batch(np.linspace(0, len(split) - 1, min(n, len(split)), dtype=np.int64))
    x = normalise(pixels.to(device))  # (n, C, H, W)
    return torch.stack([x, tokenizer(x)[0].float()], dim=1).flatten(0, 1)
