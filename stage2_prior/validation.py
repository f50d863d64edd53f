"""Validation of a prior: bits per token over a whole split, and samples to look at."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.data.order import parts_of, share
from stage1_tokenizer.engine.console import ConsoleMetric, progress_bar, show_progress
from stage1_tokenizer.engine.precision import device_of_float64
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.metrics import CodeUse
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.base import Prior
from stage2_prior.generation import generate
from stage2_prior.likelihood import bits, image_nats
from stage2_prior.tokens import TokenSet

FIGURES = (
    ConsoleMetric("bits_per_token", "bits per token", "{:.3f}", -1),
    ConsoleMetric("bigram_bits_per_token", "of a bigram", "{:.3f}", 0),
)
"""The figures of a prior's training that the console shows."""


@torch.inference_mode()
def validate(
    accelerator: Accelerator, prior: Prior, split: TokenSet, batch_size: int, tokenizer: LoadedTokenizer
) -> dict[str, float]:
    """Cross entropy over the whole split, each image once over all processes, with its class given."""
    device, shape = accelerator.device, prior.shape
    mine = np.asarray(share(len(split.labels), accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    total = torch.zeros((), dtype=torch.float64, device=device_of_float64(device))
    use = CodeUse(shape.K, shape.V, device)
    batches = parts_of(mine, batch_size)
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
        "validation/bits_per_token": bits(nats),
        # The entropy of the tokens' frequencies is what a prior that ignores all context would need.
        "validation/unigram_bits_per_token": use.entropy_bits,
        # The length of the codes, per colour value of the image: not the likelihood of its pixels.
        "validation/code_bits_per_dim": bits(nats) * shape.length / values,
    }


def sample(prior: Prior, tokenizer: LoadedTokenizer, n: int, seed: int, device: torch.device) -> Tensor:
    """n images (n, C, H, W) in [-1, 1] from the unfiltered prior, the classes in turn; the same noise at every step."""
    indices = np.arange(n, dtype=np.int64)
    noise = draw_uniforms(seed, "sample", np.zeros_like(indices), indices, prior.shape.length)
    labels = torch.from_numpy(indices % max(1, prior.classes)).to(device)
    with torch.inference_mode(), progress_bar(noise.size, "code", "sampling", nested=True) as shown:
        codes = generate(prior, labels, torch.from_numpy(noise).to(device_of_float64(device)), progress=shown.update)
        return tokenizer.tokenizer.decode_codes(codes)
