"""Results of a benchmark on disk, with a description of the machine."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stage1_tokenizer.diagnostics.comparison import processor_model
from stage1_tokenizer.engine.system import count_cores

RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]


def machine() -> dict[str, Any]:
    """Return the facts about this machine and its libraries that times depend on."""
    described: dict[str, Any] = {
        "processor": processor_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "x-transformers": version("x-transformers"),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def machine_name() -> str:
    """Return a name for this machine, usable as a folder's name."""
    known = machine()
    parts = [known["gpu"]] if "gpu" in known else [f"{known['cores']} cores", known["processor"], known["instructions"]]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def write(folder: Path, name: str, results: Results) -> Path:
    """Write results and a description of this machine to folder/NAME.json. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    return path
