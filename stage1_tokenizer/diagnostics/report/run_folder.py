"""What a run's folder says of the run, as far as it is there: a training may be under way, or a file damaged."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stage1_tokenizer.config.base import Tree, read_saved_yaml
from stage1_tokenizer.config.messages import shortened
from stage1_tokenizer.engine.checkpoint import brief
from stage1_tokenizer.engine.environment import SESSIONS
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.lock import holder_of
from stage1_tokenizer.engine.log_file import Curve, log_entries, read_curves
from stage1_tokenizer.engine.names import located
from stage1_tokenizer.engine.state import states, step_of
from stage1_tokenizer.tokenizer import TOKENIZER_FILE

CONFIG = "config.yaml"
MOST_SAMPLES = 2000
"""Files of samples/ that are looked at."""


@dataclass(frozen=True)
class RunFolder:
    """A run, of either stage."""

    path: Path
    weights_name: str = TOKENIZER_FILE
    """The file that the run produces."""

    @cached_property
    def name(self) -> str:
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
        """The saved configuration; empty where it is not there or cannot be read."""
        return self._config[0]

    @property
    def config_trouble(self) -> str:
        """Why there is no configuration; empty where there is one."""
        return self._config[1]

    @property
    def weights_file(self) -> Path:
        return self.path / self.weights_name

    @cached_property
    def curves(self) -> dict[str, Curve]:
        return read_curves(self.path / "metrics.jsonl")

    @cached_property
    def alarms(self) -> list[dict[str, Any]]:
        return log_entries(self.path / "alarms.jsonl")

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """One entry for each start of the training; none for runs of earlier versions."""
        return log_entries(self.path / SESSIONS)

    @cached_property
    def planned_steps(self) -> int | None:
        """Steps that were asked for."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @cached_property
    def steps_done(self) -> int:
        """Steps done, by the log and by the states."""
        logged = [curve.steps[-1] for curve in self.curves.values()]
        saved = [step_of(state) for state in states(self.path / "state")[:1]]
        return max([0, *logged, *saved])

    @cached_property
    def is_in_use(self) -> bool:
        """Whether another process has the folder: it is being trained."""
        return holder_of(self.path) not in (None, "this one")

    def last_value(self, name: str) -> float | None:
        """The newest value of a scalar."""
        curve = self.curves.get(name)
        return curve.values[-1] if curve else None

    def logged_images(self, prefix: str) -> list[tuple[int, Path]]:
        """samples/PREFIX-STEP.png as (step, path), the first step first."""
        found = []
        for path in sorted((self.path / "samples").glob(f"{prefix}-*.png"))[:MOST_SAMPLES]:
            number = path.stem.removeprefix(f"{prefix}-")
            if number.isascii() and number.isdecimal() and len(number) <= 16:
                found.append((int(number), path))
        return sorted(found)

    def config_text(self, *keys: str, default: str = "unknown") -> str:
        """A value of the configuration by its keys, for the page."""
        tree: Any = self.config
        for key in keys:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return default if tree is None else brief(tree)


def open_run(path: str | Path, *weights: str) -> RunFolder:
    """A run, by its folder or by its weights.

    weights: names of the files that runs of later stages produce.

    Raises:
        ConfigError: there is nothing there, or nothing of a run.
    """
    folder = Path(path)
    try:
        if folder.is_file() and folder.suffix == ".safetensors":
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"RUN {located(shortened(str(path)))}: there is no such folder")
        there = [name for name in (CONFIG, TOKENIZER_FILE, *weights) if (folder / name).exists()]
        if not there and not states(folder / "state"):
            names = ", ".join([CONFIG, TOKENIZER_FILE, *weights])
            raise ConfigError(
                f"RUN {folder}: is no run's folder: it holds none of {names} and state/. "
                "Runs are in runs/stage1 and runs/stage2"
            )
    except OSError as error:
        raise ConfigError(f"RUN {shortened(str(path))}: {error.strerror}") from None
    return RunFolder(folder)
