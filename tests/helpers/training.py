"""A tiny run of stage one's train.py, for tests: its arguments, the call, and its files."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from stage1_tokenizer import objective
from stage1_tokenizer.engine.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "stage1_tokenizer" / "train.py"

TINY = {
    "data.image_size": 16,
    "data.train_images": 20,
    "data.validation_images": 6,
    "data.cache": "memory",
    "data.flip": True,
    "network.channels": 8,
    "network.residual_channels": 4,
    "network.latent_channels": 4,
    "network.blocks": 1,
    "bottleneck.codebook_size": 8,
    "bottleneck.kmeans_iterations": 2,
    "adversarial.weight": 0.5,
    "adversarial.start": 3,
    "adversarial.discriminator.channels": 4,
    "adversarial.discriminator.layers": 1,
    "optim.warmup_steps": 2,
    "batch_size": 8,
    "steps": 4,
    "log_every": 1,
    "save_every": 1,
    "validate_every": 100,
    "keep": 100,
    "pictures": 2,
    "no-report": True,
}
"""Drawn images of 16x16, a network of 8 channels, a discriminator from step 3 on, a state after each step."""


class StoppedError(Exception):
    """Abort of a run, like a power cut."""


def train(
    accelerator: Accelerator,
    out: Path,
    options: dict[str, Any],
    stop: tuple[Literal["log", "save"], int] | None = None,
    change: Callable[[dict[str, Any], int], object] = lambda names, rank: None,
) -> dict[str, Any]:
    """Run train.py's main with the options of TINY and these. For run_processes, because a run changes its process.

    stop: abort the run after it has logged or saved this step.
    change: function that gets the script's names, which it may replace, and the rank.

    Returns the images of each step on this rank (`batches`), and the number of calls of `adaptive_weight`.
    """
    seen: dict[str, Any] = {"batches": [], "adaptive_calls": 0}
    script = runpy.run_path(str(SCRIPT), run_name="train")
    names = script["main"].__globals__
    batches, weight = names["training_batches"], objective.adaptive_weight

    def recorded_batches(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches(*args):
            seen["batches"].append(images.numpy().copy())
            yield images, labels

    def counted_weight(*args: Any, **kwargs: Any) -> Tensor:
        seen["adaptive_calls"] += 1
        value: Tensor = weight(*args, **kwargs)
        return value

    def stopping(kind: str, call: Callable[..., None]) -> Callable[..., None]:
        def stopped(run: Run, step: int, *args: Any, **kwargs: Any) -> None:
            call(run, step, *args, **kwargs)
            if stop == (kind, step):
                raise StoppedError

        return stopped

    names["training_batches"] = recorded_batches
    setattr(objective, "adaptive_weight", counted_weight)  # noqa: B010
    setattr(Run, "log", stopping("log", Run.log))  # noqa: B010
    setattr(Run, "_save_state", stopping("save", Run._save_state))  # noqa: B010
    change(names, accelerator.process_index)
    sys.argv = [str(SCRIPT), "--out", str(out)]
    ours = {key: value for key, value in TINY.items() if f"{key.split('.')[0]}.kind" not in options}
    for key, value in {**ours, **options}.items():
        flag = f"--{'no-' if value is False else ''}{key}"
        sys.argv += [flag] if isinstance(value, bool) else [flag, str(value)]
    try:
        script["main"]()
    except StoppedError:
        assert stop is not None
    return seen


def part(out: Path, step: int, name: str) -> dict[str, Tensor]:
    """Read a part (`tokenizer`, `ema`, `optimizer`, `discriminator`, ...) of the state after `step` steps."""
    tensors: dict[str, Tensor] = load_file(out / "state" / f"step-{step:08d}" / f"{name}.safetensors")
    return tensors


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert that tensors are equal up to float32's rounding over a few steps, relative to each tensor's scale."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        scale = float(tensor.double().abs().max())
        apart = (ours[key].double() - tensor.double()).abs()
        assert (apart <= 1e-3 * tensor.double().abs() + 1e-4 * scale).all(), f"{key}: up to {float(apart.max())} apart"


def checksums(out: Path, step: int) -> dict[str, str]:
    """Return the checksum of every part of the state after `step` steps."""
    manifest = json.loads((out / "state" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def log(out: Path) -> list[dict[str, float]]:
    """Return the entries of metrics.jsonl, without those that depend on time."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "train/images_per_second"} for entry in entries]
