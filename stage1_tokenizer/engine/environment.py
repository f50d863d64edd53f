"""The machine, packages and command of a training: one line in the run's environment.jsonl per start or resume.

    {"step": 0, "time": "2026-01-31T12:00:00Z", "command": [...], "packages": {...}, "processor": ..., ...}

People and the report of a run read it; no command depends on it.
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
from stage1_tokenizer.engine.system import count_cores

SESSIONS_FILE = "environment.jsonl"
"""Name of the file in a run's folder, with one line per session: from a start or resume to its end."""
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
"""Packages whose version can change a result: they compute, or read and write images and weights."""


def session_entry(accelerator: Accelerator, step: int) -> dict[str, Any]:
    """Return the entry of a session that starts or continues the training at a step."""
    return {
        "step": step,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": [*launcher_command(accelerator), *sys.argv],
        "tessera": _version(PROJECT),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "fast_paths": [path for path in processor.FAST_PATHS if processor.takes_fast_path(path)],
        "threads": torch.get_num_threads(),
    }


def append_session(folder: Path, accelerator: Accelerator, step: int) -> None:
    """Append the entry of a session to environment.jsonl in a run's folder. Raise OSError if it cannot be written."""
    with (folder / SESSIONS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(session_entry(accelerator, step)) + "\n")


def launcher_command(accelerator: Accelerator) -> list[str]:
    """Return the words before the script's name in the command that started this process.

    Only `accelerate launch` sets the variable for the precision. Without it, several processes mean torchrun.
    """
    processes = str(accelerator.num_processes)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        several = ["--multi_gpu"] if accelerator.num_processes > 1 else []
        options = ["--num_processes", processes, "--mixed_precision", accelerator.mixed_precision]
        return ["accelerate", "launch", *several, *options]
    return ["torchrun", "--nproc_per_node", processes] if accelerator.num_processes > 1 else ["python"]


def device_name(device: torch.device) -> str:
    """Return the name of a device, with the model name of a CUDA device."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def processor_name() -> str:
    """Return the model name of the processor and its number of cores: from /proc/cpuinfo, else from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {count_cores()} cores"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
