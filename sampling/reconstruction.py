"""Reconstructions of images of any size: one image through the tokenizer, all images, and their numbers in a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from sampling.input_images import InputImages
from sampling.saved_images import arrange_rows, save_png
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.data.image_batches import normalise, to_uint8
from stage1_tokenizer.data.order import rank_range
from stage1_tokenizer.engine.console import show_progress
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.metrics import psnr, ssim
from stage1_tokenizer.networks.tiles import Tiles, decode_codes, encode_codes
from stage1_tokenizer.tokenizer import Tokenizer

COLUMNS = ("psnr", "ssim", "bits", "height", "width")
"""Columns of the table of `reconstruct_all`: PSNR (dB), SSIM, bits of the codes (nan without codes), size (pixels)."""


@torch.inference_mode()
def reconstruct_image(
    accelerator: Accelerator, tokenizer: Tokenizer, image: ImageArray, tiles: Tiles
) -> tuple[ImageArray, float, float, float]:
    """Encode and decode an image (H, W, C) uint8, in tiles where it is larger than one.

    Sides that the factor does not divide are continued by reflection, and cropped again. Codes are always computed in
    float32, because bfloat16 would change some of them. Decoding follows Accelerate's precision.

    Returns:
        The reconstruction (H, W, C) uint8, PSNR (dB), SSIM, and the bits of the codes (nan with a continuous latent).
    """
    factor = tokenizer.config.network.factor
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="reflect")
    x = normalise(torch.from_numpy(padded)[None].permute(0, 3, 1, 2).to(accelerator.device))  # (1, C, H', W')
    bits = float("nan")
    if tokenizer.bottleneck.depth:
        codes = encode_codes(tokenizer, x, tiles)  # (1, h, w, K)
        bits = codes.numel() * float(np.log2(tokenizer.shape.V))
        with accelerator.autocast():
            x_hat = decode_codes(tokenizer, codes, tiles)
    else:
        z_q = tiles.encode(lambda tile: rearrange(tokenizer.encode(tile).z_q, "B D h w -> B h w D"), x, factor)
        with accelerator.autocast():
            x_hat = tiles.decode(lambda tile: tokenizer.decode(rearrange(tile, "B h w D -> B D h w")), z_q, factor)
    x, x_hat = x[:, :, :height, :width], x_hat[:, :, :height, :width].float()
    reconstruction: ImageArray = to_uint8(x_hat)[0].permute(1, 2, 0).cpu().numpy()
    return reconstruction, float(psnr(x, x_hat)), float(ssim(x, x_hat)), bits


def reconstruct_all(
    accelerator: Accelerator, tokenizer: Tokenizer, images: InputImages, tiles: Tiles, folder: Path, beside: bool
) -> Tensor:
    """Write the reconstructions into a folder, each process its share; `beside` puts each original on the left.

    Returns:
        A table (n, 5) float64 on CPU with the `COLUMNS` of all images, on every process.
    """
    n = len(images.names)
    table = torch.zeros(n, len(COLUMNS), dtype=torch.float64)
    own_share = rank_range(n, accelerator.process_index, accelerator.num_processes)
    for index in show_progress(own_share, len(own_share), "image", "reconstructing"):
        image = images.read(index)
        reconstruction, *values = reconstruct_image(accelerator, tokenizer, image, tiles)
        shown = arrange_rows([[image, reconstruction]]) if beside else reconstruction
        save_png(folder / images.files[index], shown)
        table[index] = torch.tensor([*values, *image.shape[:2]], dtype=torch.float64)
    return accelerator.reduce(table.to(accelerator.device), "sum").cpu()


def write_metrics(path: Path, table: Tensor, images: InputImages, settings: Mapping[str, Any]) -> str:
    """Write figures.json: settings, mean PSNR and SSIM, the numbers of each image, and the files that were left out.

    Returns:
        The means, as lines for the console.
    """
    rows: list[dict[str, Any]] = []
    for file, name, values in zip(images.files, images.names, table.tolist(), strict=True):
        row = dict(zip(COLUMNS, values, strict=True))
        height, width = int(row["height"]), int(row["width"])
        bits = None if np.isnan(row["bits"]) else row["bits"]
        per_pixel = None if bits is None else bits / (height * width)
        size = {"file": file, "of": name, "height": height, "width": width}
        rows.append({**size, "psnr": row["psnr"], "ssim": row["ssim"], "bits": bits, "bits_per_pixel": per_pixel})
    mean = {name: float(table[:, COLUMNS.index(name)].mean()) for name in ("psnr", "ssim")}
    figures = {"settings": settings, "mean": mean, "pictures": rows, "left_out": images.errors}
    write_file(path, json.dumps(figures, indent=1).encode())
    lines = [f"PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}"]
    if rows[0]["bits"] is not None:
        bits = sum(row["bits"] for row in rows) / len(rows)
        per_pixel = sum(row["bits_per_pixel"] for row in rows) / len(rows)
        lines.append(f"{bits:,.0f} bits per image, {per_pixel:.3f} per pixel (log2 V for each code)")
    return "\n".join(lines)
