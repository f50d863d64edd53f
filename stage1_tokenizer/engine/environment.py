"""What a training ran on: a line in the run's environment.jsonl for each time that it was started or continued.

    {"step": 0, "time": "2026-01-31T12:00:00Z", "command": [...], "packages": {...}, "processor": ..., ...}

It is for people, and for the run report; nothing is decided by it.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.system import cores

SESSIONS = "environment.jsonl"
PROJECT = "tessera-images"
PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "numpy",
    "pillow",
    "einops",
    "lpips",
    "vector-quantize-pytorch",
    "x-transformers",
    "safetensors",
)
"""Those that compute, or read and write pictures and weights."""


def session(accelerator: Accelerator, step: int) -> dict[str, Any]:
    """The line of a training that begins, or continues, at a step."""
    return {
        "step": step,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": [*launcher(accelerator), *sys.argv],
        "tessera": _version(PROJECT),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "fast_paths": [path for path in processor.FAST_PATHS if processor.takes(path)],
        "threads": torch.get_num_threads(),
    }


def note_session(folder: Path, accelerator: Accelerator, step: int) -> None:
    """Add the line. Raises OSError."""
    with (folder / SESSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(session(accelerator, step)) + "\n")


def launcher(accelerator: Accelerator) -> list[str]:
    """How the script was started: `accelerate launch` says the precision in the environment, and torchrun nothing."""
    processes = str(accelerator.num_processes)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        several = ["--multi_gpu"] if accelerator.num_processes > 1 else []
        how = ["--num_processes", processes, "--mixed_precision", accelerator.mixed_precision]
        return ["accelerate", "launch", *several, *how]
    return ["torchrun", "--nproc_per_node", processes] if accelerator.num_processes > 1 else ["python"]


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def processor_name() -> str:
    """From Linux's description of the processor; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {cores()} cores"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
