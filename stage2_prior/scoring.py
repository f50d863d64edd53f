"""Scores of images: -ln p(codes | class) of each image under a prior, and their summary over a set of images.

images (b, C, H, W) -> tokenizer -> codes (b, h, w, K) -> prior -> nats (b,), nats by class (b, classes)
"""

import csv
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.order import rank_range, split_evenly
from stage1_tokenizer.engine.console import progress_bar
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.metrics import CodeUse, psnr
from stage2_prior.likelihood import class_log_probabilities, image_nats, nats_by_class, nats_to_bits
from stage2_prior.prior import LoadedPrior


class Scores(NamedTuple):
    """The scores of N images, in their order."""

    labels: Tensor
    """(N,) int64: labels under which the images were scored; "no class" for a class that the prior does not know."""
    nats: Tensor
    """(N,) float64: -ln p(codes | label) of each image."""
    by_class: Tensor
    """(N, classes) float64: nats under each class; (N, 0) if they were not asked for."""
    psnr: Tensor
    """(N,) float64: PSNR of the tokenizer's reconstructions in dB."""
    use: CodeUse
    """Counts of the codes of all images."""


@torch.inference_mode()
def score_images(
    accelerator: Accelerator,
    prior: LoadedPrior,
    images: ImageBatches,
    labels: NDArray[np.int64],
    n: int,
    batch_size: int,
    by_class: bool = False,
) -> Scores:
    """Score the first `n` images, each once over all processes.

    labels: the prior's label for each label of the data set (see `match_labels`).
    by_class: score each image under every class, too.

    Raises:
        BadFileError: scores are not finite, since the prior's weights are damaged.
    """
    device, model, tokenizer = accelerator.device, prior.model, prior.tokenizer.tokenizer
    classes = len(prior.classes) if by_class else 0
    table = torch.zeros(n, 3 + classes, dtype=torch.float64, device=device)  # label, nats, psnr, nats by class
    use = CodeUse(model.shape.K, model.shape.V, device)
    mine = np.asarray(rank_range(n, accelerator.process_index, accelerator.num_processes), dtype=np.int64)
    progress = progress_bar(len(mine), "image", "scoring")
    for indices in split_evenly(mine, batch_size):
        pixels, data_labels = images.batch(indices)  # (b, C, H, W) uint8, (b,)
        x = normalise(pixels.to(device))
        codes = tokenizer.encode_codes(x)  # (b, h, w, K)
        own = torch.from_numpy(labels)[data_labels].to(device)  # (b,)
        columns = [own.double(), image_nats(model, codes, own), psnr(x, tokenizer.decode_codes(codes)).double()]
        rows = torch.stack(columns, dim=1)  # (b, 3)
        if classes:
            rows = torch.cat([rows, nats_by_class(model, codes)], dim=1)  # (b, 3 + classes)
        table[torch.from_numpy(indices).to(device)] = rows
        use.add(codes)
        progress.update(len(indices))
    progress.close()
    table = accelerator.reduce(table, "sum").cpu()
    use.counts = accelerator.reduce(use.counts, "sum").cpu()
    if not bool(torch.isfinite(table[:, 1]).all()):
        raise BadFileError(f"{prior.path}: gives scores that are not finite: its weights are damaged")
    return Scores(table[:, 0].long(), table[:, 1], table[:, 3:], table[:, 2], use)


def summarise(scores: Scores, prior: LoadedPrior, values: int) -> dict[str, Any]:
    """Return the metrics of the whole set, as scores.json has them. values: numbers in an image, C*H*W."""
    length, nats = prior.model.shape.length, scores.nats
    mean = float(nats.mean())
    summary: dict[str, Any] = {
        "images": len(nats),
        "nats_per_token": mean / length,
        "bits_per_token": nats_to_bits(mean) / length,
        "unigram_bits_per_token": scores.use.entropy_bits,
        "nats_per_image": mean,
        "bits_per_image": nats_to_bits(mean),
        "bits_per_image_deviation": nats_to_bits(float(nats.std())) if len(nats) > 1 else 0.0,
        "code_length_bytes": nats_to_bits(float(nats.sum())) / 8,
        "code_bits_per_dim": nats_to_bits(mean) / values,
        "psnr": float(scores.psnr.mean()),
        "classes": {
            name: {"images": int(own.sum()), "bits_per_token": nats_to_bits(float(nats[own].mean())) / length}
            for label, name in enumerate([*prior.classes, "(no class)"])
            if bool((own := scores.labels == label).any())
        },
    }
    if scores.by_class.shape[1]:
        is_right = scores.by_class.argmin(dim=1) == scores.labels  # (N,)
        is_known = scores.labels < len(prior.classes)
        summary["class_found"] = float(is_right[is_known].double().mean()) if bool(is_known.any()) else None
        for label, name in enumerate(prior.classes):
            if name in summary["classes"]:
                summary["classes"][name]["found"] = float(is_right[scores.labels == label].double().mean())
    return summary


def csv_table(scores: Scores, prior: LoadedPrior) -> str:
    """Return a CSV table with one line per image: index, class, nats, bits, PSNR and, where known, ln p of each
    class."""
    names = [*prior.classes, ""]
    posterior = class_log_probabilities(scores.by_class) if scores.by_class.shape[1] else scores.by_class
    text = StringIO(newline="")
    rows = csv.writer(text)
    class_columns = [f"ln p({name})" for name in prior.classes[: posterior.shape[1]]]
    rows.writerow(["image", "class", "nats", "bits", "psnr", *class_columns])
    for index, (label, nats) in enumerate(zip(scores.labels.tolist(), scores.nats.tolist(), strict=True)):
        numbers = (nats, nats_to_bits(nats), float(scores.psnr[index]), *posterior[index].tolist())
        rows.writerow([index, names[label], *(f"{number:.4f}" for number in numbers)])
    return text.getvalue()
