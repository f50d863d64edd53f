"""PixelCNN sampling, incremental against a forward pass per position.   python -m benchmarks.pixelcnn [--out FOLDER]

Three ways to sample the same codes from the same gated PixelCNN (16x16 codes of 512, 15 layers of 128, 10 classes) with
the same noise: ours; a full forward pass for each position, as every tutorial does; and that on the rows so far alone
(rosinality). Before anything counts, all three must choose identical codes, and the incremental logits must be those of
a forward pass over the result. One full forward pass is the floor: the arithmetic that any exact sampler must do.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate, sample_softmax
from stage2_prior.pixelcnn import PixelCnn, PixelCnnConfig

SHAPE = TokenShape(16, 16, 1, 512)
CASES = [(1, 3), (16, 3)]
"""Batch, side of the kernels after the first (7)."""
LARGER_KERNEL = (16, 5)


def build(kernel: int) -> PixelCnn:
    """Random weights, scaled so that the distributions are far from uniform and a wrong context shows."""
    torch.manual_seed(0)
    model = PixelCnn(PixelCnnConfig(layers=15, width=128, first_kernel=7, kernel=kernel), SHAPE, classes=10)
    with torch.no_grad():
        model.head.get_submodule("output").weight.mul_(40.0)  # type: ignore[operator]
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def by_forward_passes(model: PixelCnn, labels: Tensor, noise: Tensor, cropped: bool) -> Tensor:
    """Codes (B, h, w, 1): a forward pass for each position, over the whole grid or the rows so far."""
    codes = torch.zeros(len(labels), *SHAPE[:3], dtype=torch.int64)
    for position in range(SHAPE.length):
        row, column = divmod(position, SHAPE.w)
        logits = model(codes[:, : row + 1] if cropped else codes, labels)[:, position]
        codes[:, row, column, 0] = sample_softmax(logits, noise[:, position])
    return codes


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


@torch.inference_mode()
def logits_apart(model: PixelCnn, codes: Tensor, labels: Tensor) -> tuple[float, float]:
    """Largest difference between incremental logits and those of one forward pass, and the latter's deviation."""
    decoding, steps = model.begin(labels), []
    for position in range(SHAPE.length):
        steps.append(decoding.logits())
        decoding.append(codes[:, position // SHAPE.w, position % SHAPE.w, 0])
    wanted = model(codes, labels)
    return float((torch.stack(steps, dim=1) - wanted).abs().max()), float(wanted.std())


def case(batch: int, kernel: int, repeats: int) -> dict[str, Any]:
    model, labels = build(kernel), torch.arange(batch) % 10
    noise = torch.rand(batch, SHAPE.length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ways = {
        "naive": lambda: by_forward_passes(model, labels, noise, cropped=False),
        "cropped": lambda: by_forward_passes(model, labels, noise, cropped=True),
        "ours": lambda: generate(model, labels, noise),
    }
    ways["ours"]()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for name, way in ways.items():  # the slow ones once, ours beside each of them
        for _ in range(repeats if name == "ours" else 1):
            took, results[name] = seconds(way)
            times[name].append(took)
        if name != "ours":
            times["ours"].append(seconds(ways["ours"])[0])
    with torch.inference_mode():
        model(results["ours"], labels)
        floor = median(seconds(lambda: model(results["ours"], labels))[0] for _ in range(5))
    apart, deviation = logits_apart(model, results["ours"], labels)
    ours = median(times["ours"])
    return {
        "batch": batch,
        "kernel": kernel,
        "ids_equal": torch.equal(results["ours"], results["naive"])
        and torch.equal(results["ours"], results["cropped"]),
        "logits_apart": apart,
        "logits_deviation": deviation,
        "seconds": times,
        "forward_s": floor,
        "times_naive": times["naive"][0] / ours,
        "times_cropped": times["cropped"][0] / ours,
        "over_floor": ours / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--larger", action="store_true", help="5x5 kernels too: minutes more")
    parser.add_argument("--out", type=Path, help="folder for pixelcnn.json")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, 15 layers of 128, 16x16 codes of 512")
    print("batch kernel   naive s  cropped s   ours s  times naive  cropped  over one forward  logits apart  ids equal")
    rows = []
    for batch, kernel in [*CASES, *([LARGER_KERNEL] if options.larger else [])]:
        row = case(batch, kernel, options.repeats)
        rows.append(row)
        print(
            f"{batch:5} {kernel:6} {row['seconds']['naive'][0]:9.2f} {row['seconds']['cropped'][0]:10.2f} "
            f"{median(row['seconds']['ours']):8.3f} {row['times_naive']:12.1f} {row['times_cropped']:8.1f} "
            f"{row['over_floor']:17.2f} {row['logits_apart']:13.1e}  {row['ids_equal']}",
            flush=True,
        )
    if options.out:
        write(options.out, "pixelcnn", rows=rows)


if __name__ == "__main__":
    main()
