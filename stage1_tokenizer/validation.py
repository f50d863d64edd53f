"""How good a tokenizer is, measured over a whole split, and pictures to look at."""

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

FIGURES = (
    ConsoleMetric("psnr", "PSNR", "{:.2f} dB", 1),
    ConsoleMetric("code_usage", "codes in use", "{:.0%}", 1),
    ConsoleMetric("perceptual", "LPIPS", "{:.4f}", -1),
    ConsoleMetric("total", "loss", "{:.4g}", -1),
)
"""The figures of a tokenizer's training that the console shows, where the bottleneck and the losses give them."""
Distance = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Images and reconstructions (B, C, H, W) -> the loss () between them, and its terms: `Objective.distance`."""


@torch.inference_mode()
def validate(
    accelerator: Accelerator,
    tokenizer: Tokenizer,
    split: ImageBatches,
    batch_size: int,
    variance: float,
    distance: Distance,
) -> dict[str, float]:
    """Figures over the whole split, each image once over all processes; `batch_size` is that of all of them.

    Losses under their own names, psnr (dB), nmse (mean squared error over `variance`, that of the data), and for a
    tokenizer with codes code_usage, code_perplexity, code_entropy_bits and bits_per_image (log2 V bits a token).
    """
    device, bottleneck = accelerator.device, tokenizer.bottleneck
    sums: dict[str, Tensor] = {}
    use = CodeUse(bottleneck.depth, bottleneck.codebook_size, device)
    size = max(1, batch_size // accelerator.num_processes)
    batches = validation_batches(split, size, accelerator.process_index, accelerator.num_processes)
    number = -(-len(split) // (size * accelerator.num_processes))
    for pixels, _ in show_progress(batches, number, "batch", "validating", nested=True):
        x = normalise(pixels.to(device))
        with accelerator.autocast():
            x_hat, bottlenecked = tokenizer(x)
        reconstruction, terms = distance(x, x_hat.float())
        means = generator_loss(reconstruction, terms, bottlenecked).parts | {"psnr": psnr(x, x_hat).mean()}
        for name, mean in means.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + mean * len(x)
        if bottlenecked.codes is not None:
            use.add(bottlenecked.codes)
    figures = {name: float(accelerator.reduce(total, "sum")) / len(split) for name, total in sums.items()}
    figures["nmse"] = figures["l2"] / variance
    if bottleneck.depth:
        figures |= use.taken(accelerator)
        figures["bits_per_image"] = tokenizer.shape.length * float(np.log2(tokenizer.shape.V))
    return figures


@torch.inference_mode()
def pairs(tokenizer: Tokenizer, split: ImageBatches, n: int, device: torch.device) -> Tensor:
    """n images from all over a split, each followed by its reconstruction: (2n, C, H, W) in [-1, 1]."""
    pixels, _ = split.batch(np.linspace(0, len(split) - 1, min(n, len(split)), dtype=np.int64))
    x = normalise(pixels.to(device))
    return torch.stack([x, tokenizer(x)[0].float()], dim=1).flatten(0, 1)
