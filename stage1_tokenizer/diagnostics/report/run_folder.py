"""Read access to a run's folder. A missing or damaged file gives an empty value: the run may still be in training."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stage1_tokenizer.config.base import Tree, read_saved_yaml
from stage1_tokenizer.engine.environment import SESSIONS_FILE
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.lock import find_lock_holder
from stage1_tokenizer.engine.log_file import METRICS_FILE, Curve, read_curves, read_log
from stage1_tokenizer.engine.model_files import output_folder
from stage1_tokenizer.engine.pretrained import resolve_path
from stage1_tokenizer.engine.state import list_states, step_of_state
from stage1_tokenizer.tokenizer import TOKENIZER_FILE

CONFIG = "config.yaml"
MOST_SAMPLES = 2000
"""Files of samples/ that are listed, at most."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run of either stage."""

    path: Path
    weights_name: str = TOKENIZER_FILE
    """Name of the weights file that the run writes."""

    @cached_property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @cached_property
    def _config(self) -> tuple[Tree, str]:
        file = self.path / CONFIG
        if not file.exists():
            return {}, f"the folder holds no {CONFIG}"
        try:
            return read_saved_yaml(file), ""
        except BadFileError as error:
            return {}, str(error)

    @property
    def config(self) -> Tree:
        """The saved configuration; empty if it is missing or cannot be read."""
        return self._config[0]

    @property
    def config_trouble(self) -> str:
        """The reason why the configuration is missing; empty if there is one."""
        return self._config[1]

    @property
    def weights_file(self) -> Path:
        """Path of the weights file, which may not exist yet."""
        return self.path / self.weights_name

    @property
    def outputs(self) -> Path:
        """The folder for what is made with the run's weights."""
        return output_folder(self.weights_file)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """All scalars of the log by name."""
        return read_curves(self.path / METRICS_FILE)

    @cached_property
    def alarms(self) -> list[dict[str, Any]]:
        """The entries of alarms.jsonl: step, alarm, message."""
        return read_log(self.path / "alarms.jsonl")

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """One entry for each start of the training; none in runs of former versions."""
        return read_log(self.path / SESSIONS_FILE)

    @cached_property
    def planned_steps(self) -> int | None:
        """Steps that the configuration asks for."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @cached_property
    def steps_done(self) -> int:
        """Steps that were trained, by the log and the saved states."""
        logged = [curve.steps[-1] for curve in self.curves.values()]
        saved = [step_of_state(state) for state in list_states(self.path / "state")[:1]]
        return max([0, *logged, *saved])

    @cached_property
    def seconds_of_steps(self) -> float:
        """Seconds that the logged steps took, without validation and saving; 0 if the log does not say."""
        curve, batch_size = self.curves.get("train/images_per_second"), self.config.get("batch_size")
        if curve is None or not isinstance(batch_size, int):
            return 0.0
        steps = np.diff(curve.steps, prepend=0)
        return float((steps * batch_size / np.maximum(curve.values, 1e-9)).sum())

    @cached_property
    def is_in_use(self) -> bool:
        """True if another process is training this run."""
        return find_lock_holder(self.path) not in (None, "this one")

    def last_value(self, name: str) -> float | None:
        """Return the newest value of a scalar; None if there is none."""
        curve = self.curves.get(name)
        return curve.values[-1] if curve else None

    def logged_images(self, prefix: str) -> list[tuple[int, Path]]:
        """Return (step, path) of each samples/PREFIX-STEP.png, the first step first."""
        images = []
        for path in sorted((self.path / "samples").glob(f"{prefix}-*.png"))[:MOST_SAMPLES]:
            step = path.stem.removeprefix(f"{prefix}-")
            if step.isascii() and step.isdecimal() and len(step) <= 16:
                images.append((int(step), path))
        return sorted(images)

    def config_text(self, *keys: str) -> str:
        """Return the value under nested keys of the configuration as short text; `unknown` if there is none."""
        tree: Any = self.config
        for key in keys:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return "unknown" if tree is None else shorten(tree)


def find_training(tokenizer: Path) -> RunFolder | None:
    """Return the run under runs/stage1 whose weights file has the same bytes as a tokenizer's file; None: there is
    none."""
    data = tokenizer.read_bytes()
    files = sorted(Path("runs/stage1").glob(f"*/{TOKENIZER_FILE}"))
    return next((RunFolder(file.parent) for file in files if file.read_bytes() == data), None)


def open_run(path: str | Path, *weights: str) -> RunFolder:
    """Open a run by its folder or its weights file, or a model of the packages by pretrained:NAME.

    weights: names of the weights files of later stages, which also identify a run's folder.

    Raises:
        ConfigError: the folder does not exist, or is not a run's folder.
    """
    folder = resolve_path(path, "RUN")
    try:
        if folder.is_file() and folder.suffix == ".safetensors":
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"RUN {describe_path(shorten(str(path)))}: there is no such folder")
        names = [CONFIG, TOKENIZER_FILE, *weights]
        if not any((folder / name).exists() for name in names) and not list_states(folder / "state"):
            raise ConfigError(
                f"RUN {folder}: is no run's folder: it holds none of {', '.join(names)} and state/. "
                "Runs are in runs/stage1 and runs/stage2"
            )
    except OSError as error:
        raise ConfigError(f"RUN {shorten(str(path))}: {error.strerror}") from None
    return RunFolder(folder)
