"""PixelCNN sampling: our incremental sampler against a forward pass per position.

Three ways to sample the same codes from the same gated PixelCNN (16x16 codes of 512, 15 layers of 128, a first kernel
of 7, then kernels of 3, 10 classes) with the same noise: ours; a full forward pass per position, as in tutorials; a
forward pass per position over the rows so far (rosinality). All three must choose identical codes, and the incremental
logits must equal those of a forward pass over the result. The floor is one full forward pass, which any exact sampler
has to compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Seconds, compare, seconds
from benchmarks.record import Results
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate, sample_softmax
from stage2_prior.pixelcnn.model import PixelCnn, PixelCnnConfig

SHAPE = TokenShape(16, 16, 1, 512)
CONFIG = PixelCnnConfig(layers=15, width=128, first_kernel=7, kernel=3)
SMALL_SHAPE = TokenShape(4, 4, 1, 16)
SMALL_CONFIG = PixelCnnConfig(layers=3, width=16, first_kernel=7, kernel=3)
BATCHES = (1, 16)
REPEATS = 2
"""Timings of ours per timing of another way; those run once, because at batch 16 they take minutes."""


def build(config: PixelCnnConfig, shape: TokenShape, device: torch.device) -> PixelCnn:
    """Build a prior with random weights, scaled to distributions that are far from uniform and show a wrong context."""
    torch.manual_seed(0)
    model = PixelCnn(config, shape, classes=10)
    with torch.no_grad():
        model.head.get_submodule("output").weight.mul_(40.0)  # type: ignore[operator]
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def by_forward_passes(model: PixelCnn, labels: Tensor, noise: Tensor, cropped: bool) -> Tensor:
    """Sample codes (B, h, w, 1) with a forward pass per position, over the whole grid or (cropped) the rows so far."""
    codes = torch.zeros(len(labels), *model.shape[:3], dtype=torch.int64, device=labels.device)
    for position in range(model.shape.length):
        row, column = divmod(position, model.shape.w)
        logits = model(codes[:, : row + 1] if cropped else codes, labels)[:, position]
        codes[:, row, column, 0] = sample_softmax(logits, noise[:, position])
    return codes


@torch.inference_mode()
def logits_apart(model: PixelCnn, codes: Tensor, labels: Tensor) -> tuple[float, float]:
    """Largest difference between incremental logits and those of one forward pass, and the latter's deviation."""
    generation, steps = model.begin(labels), []
    for position in range(model.shape.length):
        steps.append(generation.logits())
        generation.append(codes[:, position // model.shape.w, position % model.shape.w, 0])
    wanted = model(codes, labels)
    return float((torch.stack(steps, dim=1) - wanted).abs().max()), float(wanted.std())


def measure_batch(model: PixelCnn, batch: int, device: torch.device) -> dict[str, Any]:
    """Time the three ways at one batch size, and compare their codes and logits."""
    labels = torch.arange(batch, device=device) % 10
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(batch, model.shape.length, generator=generator, dtype=torch.float64).to(device)
    prepared = model.prepare()  # once for all images, as in the sampler
    chosen: dict[str, Tensor] = {}

    def keep(name: str, codes: Tensor) -> None:
        chosen[name] = codes

    ways: dict[str, Callable[[], object]] = {
        "naive": lambda: keep("naive", by_forward_passes(model, labels, noise, cropped=False)),
        "cropped": lambda: keep("cropped", by_forward_passes(model, labels, noise, cropped=True)),
        "ours": lambda: keep("ours", generate(model, labels, noise, prepared=prepared)),
    }
    ways["ours"]()  # warm-up; the other ways take so long that they need none
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name in ("naive", "cropped"):
        times[name].append(seconds(ways[name]))
        times["ours"] += [seconds(ways["ours"]) for _ in range(REPEATS)]
    equal = torch.equal(chosen["ours"], chosen["naive"]) and torch.equal(chosen["ours"], chosen["cropped"])
    apart, deviation = logits_apart(model, chosen["ours"], labels)
    with torch.inference_mode():
        forward = compare({"forward": lambda: model(chosen["ours"], labels)}, 5)["forward"]
    took = {name: Seconds(values) for name, values in times.items()}
    return {
        "batch": batch,
        "equal": equal,
        "logits_apart": apart,
        "logits_deviation": deviation,
        **{name: each.row() for name, each in took.items()},
        "forward": forward.row(),
        "times_naive": took["naive"].median / took["ours"].median,
        "times_cropped": took["cropped"].median / took["ours"].median,
        "over_floor": took["ours"].median / forward.median,
    }


def measure(device: torch.device, small: bool) -> Results:
    """Check that the three ways choose equal codes, time them, and return the results."""
    model = build(SMALL_CONFIG, SMALL_SHAPE, device) if small else build(CONFIG, SHAPE, device)
    rows = []
    for batch in (1, 2) if small else BATCHES:
        rows.append(measure_batch(model, batch, device))
        assert rows[-1]["equal"], f"batch {batch}: the ways chose different codes, so times would say nothing"
        print(f"batch {batch}: {rows[-1]['times_naive']:.1f} times as fast as a forward pass per position", flush=True)
    return {"equal": all(row["equal"] for row in rows), "rows": rows}


def table(results: Results) -> str:
    """Return the results as Markdown."""
    lines = [
        "| batch | a forward pass per position, s | on the rows so far, s | ours, s | times as fast "
        "| one forward pass, s | ours over it | logits apart (deviation) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [
            f"{row['batch']}",
            f"{row['naive']['median_s']:,.2f}",
            f"{row['cropped']['median_s']:,.2f}",
            f"{row['ours']['median_s']:,.3f} ± {row['ours']['spread']:.0%}",
            f"{row['times_naive']:,.1f} and {row['times_cropped']:,.1f}",
            f"{row['forward']['median_s']:,.3f}",
            f"{row['over_floor']:,.1f}",
            f"{row['logits_apart']:.0e} ({row['logits_deviation']:,.0f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "All three ways give identical codes."])
