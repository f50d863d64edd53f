"""Weights stored as bfloat16, in half the bytes: those of a prior and of a tokenizer's decoder.

    float32 -> round_weights -> files -> loaded as float32 again (checkpoint.read_weights) -> describe_change

Encoder and bottleneck stay float32, so the codes of all images are the same, bit for bit, and prior, tokens and
tokenizer fit each other as before.
"""

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sampling.publishing.source import Source
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.order import split_evenly
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.checkpoint import Header
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import UserError
from stage1_tokenizer.metrics import psnr
from stage1_tokenizer.tokenizer import DECODER, SAME_CODES
from stage2_prior.likelihood import image_nats, nats_to_bits
from stage2_prior.prior import match_labels

MOST_IMAGES = 512
"""Validation images that the change is measured on, at most."""
BATCH = 32


def round_weights(tensors: Mapping[str, Tensor], header: Header, source: Source) -> tuple[dict[str, Tensor], Header]:
    """Round the weights of a file of the source that no code depends on to bfloat16, and return its new header.

    The header of a tokenizer lists its fingerprint from before among those with the same codes, as after a training of
    the decoder alone, because the header of a prior of a former version has it.
    """
    beginning = ""
    if header["kind"] == "tokenizer":
        beginning = DECODER
        same_codes = [*source.tokenizer.tokenizer.same_codes, source.tokenizer.fingerprint]
        header = {**header, SAME_CODES: json.dumps(same_codes)}
    rounded = {
        name: tensor.bfloat16() if tensor.dtype == torch.float32 and name.startswith(beginning) else tensor
        for name, tensor in tensors.items()
    }
    return rounded, header


def describe_change(before: Source, after: Source) -> str:
    """Measure weights before and after rounding on validation images of their training, and return a sentence.

    A note says why, if these images cannot be read.
    """
    try:
        measured = _measure(before, after)
    except UserError as error:
        print_note(f"the change by rounding is not measured: {error}")
        return "The change was not measured, because there was no validation image at hand."
    means = measured.mean(dim=0).tolist()
    parts = [f"PSNR {means[0]:.3f} dB before and {means[1]:.3f} dB after"]
    if before.prior is not None:
        bits = [nats_to_bits(nats) / before.prior.model.shape.length for nats in means[2:]]
        parts.append(f"bits per token {bits[0]:.4f} before and {bits[1]:.4f} after")
    return f"On {len(measured)} validation images: {', '.join(parts)}."


@torch.inference_mode()
def _measure(before: Source, after: Source) -> Tensor:
    """Return a table (N, 2 or 4) float64 of N images: PSNR before and after; of a prior also nats before and after."""
    images = open_data(parse_data_config(before.loaded.data, "RUN")).image_batches("validation", seed=0)
    rows = []
    for indices in split_evenly(np.arange(min(MOST_IMAGES, len(images))), BATCH):
        pixels, data_labels = images.batch(indices)
        x = normalise(pixels)  # (b, C, H, W)
        latents = before.tokenizer.tokenizer.encode(x)  # the same after rounding
        columns = [psnr(x, source.tokenizer.tokenizer.decode(latents.z_q)).double() for source in (before, after)]
        for prior in filter(None, (before.prior, after.prior)):
            assert latents.codes is not None
            labels = torch.from_numpy(match_labels(prior, images.classes))[data_labels]  # (b,)
            columns.append(image_nats(prior.model, latents.codes, labels))
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows)
