"""Growth of the cost with the codes of an image, the codebook, the batch and the processes: measured and planned.

Each point is the median of a few calls, compared with the prediction of `python -m stage2_prior.plan --device here`
from this machine's rates, which are measured before each curve. The prior is the quickstart's GPT (4 layers of 128),
except for the size that the curve varies. There is no peer here: the curves show which sizes are affordable, and how
well the plan predicts.

    python -m benchmarks.growth --draw       draw docs/growth.png from the newest results
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.growth_plot import draw
from benchmarks.measure import compare
from benchmarks.memory import peak_of
from benchmarks.record import RESULTS, Results
from stage1_tokenizer.bottlenecks.nearest import find_nearest
from stage1_tokenizer.engine.log_file import read_log
from stage1_tokenizer.engine.optim import Ema, OptimConfig, build_optimizer
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.generation import generate
from stage2_prior.gpt.model import GptConfig
from stage2_prior.likelihood import token_loss
from stage2_prior.plan import image_seconds, step_seconds
from stage2_prior.planning.costs import BYTES, count_generation, count_training, zero_batch
from stage2_prior.planning.devices import DeviceRates, measure_device
from stage2_prior.planning.operations import Trace
from stage2_prior.prior import build_prior

ROOT = Path(__file__).parent.parent
CONFIG = GptConfig()
SHAPE = TokenShape(8, 8, 1, 512)
TOKENS = 4096
"""Tokens of a training step on the curve `codes`: 64 images of 8x8 codes, or one of 64x64."""
SIDES, CODEBOOKS, BATCHES, PROCESSES = (8, 16, 32, 64), (9, 12, 15, 18), (1, 4, 16, 64, 256), (1, 2, 4)
"""Values of x on the curves; codebook sizes as powers of two."""
DRAWN, CODEBOOK_BATCH = 4, 8
"""Images sampled at once on the curve `codes`; images of a training step on the curve `codebook`."""
VECTORS, CHANNELS = 4096, 8
REPEATS = 3
STACKS = {
    "quickstart, 64 images of 8x8": (CONFIG, SHAPE, 64),
    "12 layers of 512, 16 of 16x16": (GptConfig(layers=12, width=512, heads=8), TokenShape(16, 16, 1, 1024), 16),
    "LlamaGen-B, 16 of 16x16": (
        GptConfig(layers=12, width=768, heads=12, feed_forward=2048),
        TokenShape(16, 16, 1, 16384),
        16,
    ),
}
Row = dict[str, Any]


def measure(device: torch.device, small: bool) -> Results:
    """Measure all curves, and return the results."""
    check_equal()
    sides, books, batches = (each[: 1 if small else None] for each in (SIDES, CODEBOOKS, BATCHES))
    rows: list[Row] = []
    rates = measure_device(CONFIG, device)
    for side in sides:
        shape = SHAPE._replace(h=side, w=side)
        batch = 1 if small else TOKENS // shape.length
        rows += measure_training("codes", side, shape, batch, device, rates, memory=not small)
        rows.append(measure_sampling("codes", side, shape, DRAWN, device, rates))
    rates = rates if small else measure_device(CONFIG, device)  # the machine's speed may have changed
    for power in books:
        rows += measure_search(2**power, device, rates)
        rows += measure_training(
            "codebook", 2**power, SHAPE._replace(V=2**power), CODEBOOK_BATCH, device, rates, memory=not small
        )
    rates = rates if small else measure_device(CONFIG, device)
    for batch in batches:
        rows += measure_training("batch", batch, SHAPE, batch, device, rates, memory=False)
        rows.append(measure_sampling("batch", batch, SHAPE, batch, device, rates))
    if small or device.type != "cpu":
        print("several processes: not measured; they take minutes on a CPU, and mean nothing on one GPU")
    else:
        rows += measure_processes()
    return {"rows": rows, "memory": [stack(name) for name in list(STACKS)[: 1 if small else None]]}


def check_equal() -> None:
    """Check that the plan counts the step that is timed: equal operations for real tensors and for fake ones."""
    prior = build_prior(CONFIG, SHAPE, 0)
    with Trace() as real:
        codes, labels = zero_batch(SHAPE, 2)
        token_loss(prior(codes, labels), codes).backward()  # type: ignore[no-untyped-call]
    assert real.flops == count_training(CONFIG, SHAPE, 0, 2).training_flops


def row(curve: str, x: int, what: str, unit: str, measured: float | None, predicted: float, spread: float = 0.0) -> Row:
    """Print a point of a curve, and return it as a row of results."""
    value = "not measured" if measured is None else f"{measured:.4g} {unit}"
    print(f"{curve} {x}: {what} {value}, by the plan {predicted:.4g} {unit}", flush=True)
    return {"curve": curve, "x": x, "what": what, "unit": unit, "spread": round(spread, 3)} | {
        "measured": measured,
        "predicted": predicted,
    }


def step_of(shape: TokenShape, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a whole training step of the prior."""
    torch.manual_seed(0)
    prior = build_prior(CONFIG, shape, 0).to(device)
    optim = OptimConfig()
    optimizer, ema = build_optimizer(prior, optim), Ema(prior, optim.ema_decay)
    codes, labels = (part.to(device) for part in zero_batch(shape, batch))

    def step() -> None:
        token_loss(prior(codes, labels), codes).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(prior.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(prior, 0)

    return step


def prepared_step(shape: TokenShape, batch: int, device: torch.device) -> Callable[[], None]:
    """Prepare a step for `peak_of`, after a small step that loads code and starts thread pools."""
    step_of(SHAPE, 1, device)()
    return step_of(shape, batch, device)


def measure_training(
    curve: str, x: int, shape: TokenShape, batch: int, device: torch.device, rates: DeviceRates, memory: bool
) -> list[Row]:
    """Measure a training step, and its memory if wanted."""
    counted = count_training(CONFIG, shape, 0, batch)
    taken = compare({"step": step_of(shape, batch, device)}, REPEATS)["step"]
    predicted = step_seconds(counted, 1, rates)
    tokens = batch * shape.length
    if curve == "batch":
        return [row(curve, x, "training", "tokens/s", tokens / taken.median, tokens / predicted, taken.spread)]
    rows = [row(curve, x, "training step", "s", taken.median, predicted, taken.spread)]
    if memory:
        # The first step also allocates Adam's two moments.
        expected = (counted.peak_bytes + 2 * BYTES * counted.parameters) / 2**20
        grown = peak_of(device, prepared_step, shape, batch, device)
        rows.append(row(curve, x, "training memory", "MiB", grown, expected))
    return rows


def measure_sampling(
    curve: str, x: int, shape: TokenShape, batch: int, device: torch.device, rates: DeviceRates
) -> Row:
    """Measure the sampling of images."""
    prior = build_prior(CONFIG, shape, 0).to(device).eval()
    prepared = prior.prepare()
    noise, labels = torch.rand(batch, shape.length, device=device), zero_batch(shape, batch)[1].to(device)
    repeats = 1 if shape.length > 1024 else REPEATS
    taken = compare({"draw": lambda: generate(prior, labels, noise, prepared=prepared)}, repeats, warmups=repeats > 1)
    seconds, spread = taken["draw"].median / batch, taken["draw"].spread
    predicted = image_seconds(count_generation(CONFIG, shape, 0, batch), shape, batch, rates)
    if curve == "batch":
        return row(curve, x, "sampling", "images/s", 1 / seconds, 1 / predicted, spread)
    return row(curve, x, "drawing an image", "s", seconds, predicted, spread)


def prepared_lookup(codes: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """Prepare a search for the nearest codes, after a tiny one."""
    torch.manual_seed(0)
    vectors, book = torch.randn(VECTORS, CHANNELS, device=device), torch.randn(codes, CHANNELS, device=device)
    find_nearest(vectors[:64], book[:64])
    return lambda: find_nearest(vectors, book)


def measure_search(codes: int, device: torch.device, rates: DeviceRates) -> list[Row]:
    """Measure the search for the nearest of so many codebook vectors, for VECTORS vectors of CHANNELS."""
    taken = compare({"nearest": prepared_lookup(codes, device)}, REPEATS)["nearest"]
    with FakeTensorMode(), torch.no_grad(), Trace() as trace:
        find_nearest(torch.zeros(VECTORS, CHANNELS), torch.zeros(codes, CHANNELS))
    grown = peak_of(device, prepared_lookup, codes, device)
    return [
        row("codebook", codes, "nearest", "s", taken.median, rates.training_seconds(trace.operations), taken.spread),
        row("codebook", codes, "nearest, memory", "MiB", grown, trace.peak_bytes / 2**20),
    ]


def measure_processes() -> list[Row]:
    """Measure the quickstart's tokenizer training by torchrun (gloo): a batch of 64 shared by the processes.

    The processes share the cores. The plan does not model processes: the prediction is the rate of one process.
    """
    rows: list[Row] = []
    steps = 30
    for number in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
            often = {"steps": steps, "log_every": steps // 3, "validate_every": steps, "save_every": steps}
            little = {"data.validation_images": 16, "pictures": 0, "batch_size": 64}
            settings = [f"--{key}={value}" for key, value in {**often, **little}.items()]
            script = ["stage1_tokenizer/train.py", *settings, f"--out={folder}/run"]
            subprocess.run([*command, *script], cwd=ROOT, check=True, capture_output=True)
            log = read_log(Path(folder) / "run" / "metrics.jsonl")
        rates = {entry["step"]: entry["train/images_per_second"] for entry in log if "train/images_per_second" in entry}
        first, last = min(rates), max(rates)  # the steps before the first entry are warm-up
        rate = (last - first) / (last / rates[last] - first / rates[first])
        rows.append(
            row("processes", number, "tokenizer training", "images/s", rate, rows[0]["measured"] if rows else rate)
        )
    return rows


def stack(name: str) -> Row:
    """Return the parts of training's memory by the plan, in MiB; the last part is the cache for sampling 16 images."""
    config, shape, batch = STACKS[name]
    counted, cache = count_training(config, shape, 0, batch), count_generation(config, shape, 0, 1).cache_bytes
    weights = BYTES * counted.parameters
    parts = {
        "weights": weights,
        "their mean": weights,
        "AdamW": 2 * weights,
        "gradients": weights,
        "activations": counted.activation_bytes,
        "passing": max(0, counted.peak_bytes - weights - counted.activation_bytes),
        "16 caches": 16 * cache,
    }
    return {"name": name} | {part: size / 2**20 for part, size in parts.items()}


def table(results: Results) -> str:
    """Return the results as Markdown."""
    lines = ["| | | measured | by the plan | plan / measured |", "|---|---|---|---|---|"]
    for each in results["rows"]:
        measured, predicted, unit = each["measured"], each["predicted"], each["unit"]
        share = "" if measured is None else f"{predicted / measured:.2f}"
        shown = "" if measured is None else f"{measured:,.4g} {unit}"
        lines.append(
            f"| {each['curve']} {each['x']:,} | {each['what']} | {shown} | {predicted:,.4g} {unit} | {share} |"
        )
    parts = [part for part in results["memory"][0] if part != "name"]
    lines += ["", f"| memory by the plan, MiB | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for each in results["memory"]:
        lines.append(f"| {each['name']} | " + " | ".join(f"{each[part]:,.0f}" for part in parts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", required=True, help="draw docs/growth.png")
    parser.add_argument(
        "--results", type=Path, help="path of a growth.json; default: the newest under benchmarks/results"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "growth.png", help="path of the PNG")
    options = parser.parse_args()
    written = sorted(RESULTS.glob("*/growth.json"), key=lambda path: path.stat().st_mtime)
    if options.results is None and not written:
        parser.error("there are no results; run first `python -m benchmarks.run growth`")
    draw(json.loads((options.results or written[-1]).read_text(encoding="utf-8")), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
