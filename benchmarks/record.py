"""What a benchmark leaves behind: its rows and the machine they were measured on."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def write(folder: Path, name: str, **results: Any) -> None:
    """Write results and a description of this machine to folder/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, **results}, indent=1), encoding="utf-8")
