"""Validation of a prior during training: bits per token of the validation split, and sample images."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.data.order import rank_range, split_evenly
from stage1_tokenizer.engine.console import ConsoleMetric, progress_bar, show_progress
from stage1_tokenizer.engine.precision import device_of_float64
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.metrics import CodeUse
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.base import Prior
from stage2_prior.generation import generate
from stage2_prior.likelihood import image_nats, nats_to_bits
from stage2_prior.tokens import TokenSet

METRICS = (
    ConsoleMetric("bits_per_token", "bits per token", "{:.3f}", -1),
    ConsoleMetric("bigram_bits_per_token", "of a bigram", "{:.3f}", 0),
)
"""The metrics of a prior's training that the console shows."""


@torch.inference_mode()
def validate(
    accelerator: Accelerator, prior: Prior, split: TokenSet, batch_size: int, tokenizer: LoadedTokenizer
) -> dict[str, float]:
    """Measure the cross entropy of the whole split, each image once over all processes, given its class.

    Returns:
        validation/nats_per_token, bits_per_token: mean -ln p and -log2 p of a code.
        validation/unigram_bits_per_token: entropy of the codes' frequencies, the best value without any context.
        validation/code_bits_per_dim: bits of an image's codes, divided by its C*H*W values. It is not the likelihood of
            the pixels.
    """
    device, shape = accelerator.device, prior.shape
    mine = np.asarray(
        rank_range(len(split.labels), accelerator.process_index, accelerator.num_processes), dtype=np.int64
    )
    total = torch.zeros((), dtype=torch.float64, device=device_of_float64(device))
    use = CodeUse(shape.K, shape.V, device)
    batches = split_evenly(mine, batch_size)
    for indices in show_progress(batches, len(batches), "batch", "validating", nested=True):
        codes, labels = (part.to(device) for part in split.batch((indices, np.zeros_like(indices))))
        with accelerator.autocast():
            total += image_nats(prior, codes, labels).sum()
        use.add(codes)
    nats = float(accelerator.reduce(total, "sum")) / len(split.labels) / shape.length
    use.counts = accelerator.reduce(use.counts, "sum")
    height, width = tokenizer.tokenizer.config.image_size
    values = tokenizer.tokenizer.config.image_channels * height * width
    return {
        "validation/nats_per_token": nats,
        "validation/bits_per_token": nats_to_bits(nats),
        "validation/unigram_bits_per_token": use.entropy_bits,
        "validation/code_bits_per_dim": nats_to_bits(nats) * shape.length / values,
    }


def sample_images(prior: Prior, tokenizer: LoadedTokenizer, n: int, seed: int, device: torch.device) -> Tensor:
    """Sample n images (n, C, H, W) in [-1, 1] without filters or guidance; the classes take turns.

    The noise depends on the seed only, so the samples of all validations can be compared.
    """
    indices = np.arange(n, dtype=np.int64)
    noise = draw_uniforms(seed, "sample", np.zeros_like(indices), indices, prior.shape.length)
    labels = torch.from_numpy(indices % max(1, prior.classes)).to(device)
    with torch.inference_mode(), progress_bar(noise.size, "code", "sampling", nested=True) as progress:
        codes = generate(prior, labels, torch.from_numpy(noise).to(device_of_float64(device)), progress=progress.update)
        return tokenizer.tokenizer.decode_codes(codes)
