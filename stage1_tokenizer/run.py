"""What a training run has around its loop: processes, a folder, a log, a progress bar, and how it resumes."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from stage1_tokenizer.config import Tree, differences, read_yaml, write_yaml
from stage1_tokenizer.errors import BadFileError, ConfigError, StorageError
from stage1_tokenizer.state import Part, load_state, newest_state, save_state

# Keys that say where and how often, not what: a resumed run may change them.
FREE_KEYS = ("config", "out", "log_every", "validate_every", "save_every", "keep", "cache", "workers")


class Run:
    """A run's folder and log. Only the main process writes.

    config.yaml, metrics.jsonl (one object per entry: `step` and scalars under their TensorBoard names), alarms.jsonl
    (one per alarm: `step`, `alarm`, `message`), events.out..., samples/NAME-STEP.png, state/.
    """

    def __init__(self, folder: Path, config: Tree, steps: int, accelerator: Accelerator, weights: str) -> None:
        """Open a run, new or begun earlier. `weights` is the name of the file that it is to produce.

        Raises:
            ConfigError: the folder holds a run of another config (the keys that differ are listed), or weights without
                a state to continue from, or is no folder.
        """
        self.folder, self._steps, self._accelerator, self._weights = folder, steps, accelerator, weights
        self._main: bool = accelerator.is_main_process
        self._check_folder(config)
        accelerator.wait_for_everyone()
        if self._main:
            try:
                (folder / "samples").mkdir(parents=True, exist_ok=True)
                write_yaml(folder / "config.yaml", config)
            except OSError as error:
                raise StorageError(f"cannot write to {folder}: {error.strerror}") from None
        self._writer: SummaryWriter | None = None
        self._bar: tqdm[Any] | None = None
        self._seen = 0
        self._began = time.monotonic()

    def resume(self, parts: Mapping[str, Part]) -> int:
        """Load the newest whole state into the parts. Returns the steps done, 0 for a new run."""
        self._accelerator.wait_for_everyone()
        newest = newest_state(self.folder / "state", warn=self._accelerator.print)
        step, scalars = (0, {}) if newest is None else load_state(newest, parts)
        if newest is not None:
            self._accelerator.print(f"continuing {self.folder} from step {step}")
        if self._accelerator.scaler and "scaler" in scalars:
            self._accelerator.scaler.load_state_dict(scalars["scaler"])
        if self._main:
            self._forget_after(step)
            self._writer = SummaryWriter(self.folder, purge_step=step + 1 if step else None)
            self._bar = tqdm(
                total=self._steps, initial=step, desc=self.folder.name, unit="step", disable=None, dynamic_ncols=True
            )
        self._began, self._seen = time.monotonic(), 0
        return step

    def save(self, step: int, parts: Mapping[str, Part], keep: int) -> None:
        """Save a state that `resume` continues from; every process calls it and waits until it is on disk."""
        if self._main:
            scaler = self._accelerator.scaler  # of float16's loss; none in other precisions
            scalars = {"scaler": scaler.state_dict()} if scaler else {}
            save_state(self.folder / "state", step, parts, scalars, keep)
        self._accelerator.wait_for_everyone()

    def advance(self, images: int) -> None:
        """One optimizer step over `images` images (of all processes) is done."""
        self._seen += images
        if self._bar is not None:
            self._bar.update()

    @property
    def images_per_second(self) -> float:
        """Since the start of this process, validation and saving included."""
        return self._seen / max(1e-9, time.monotonic() - self._began)

    def log(self, step: int, scalars: Mapping[str, float], show: tuple[str, ...] = ()) -> None:
        """Record scalars at a step, and show some of them beside the progress bar."""
        if not self._main:
            return
        assert self._writer is not None
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        if self._bar is not None and show:
            self._bar.set_postfix_str(
                " ".join(f"{name.split('/')[-1]} {scalars[name]:.4g}" for name in show), refresh=False
            )

    def logged(self) -> list[dict[str, float]]:
        """The log's entries so far, {"step", scalars}, on the main process; elsewhere none."""
        log = self.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if self._main and log.exists() else []
        return [json.loads(line) for line in lines]

    def alarm(self, step: int, name: str, message: str) -> None:
        """Record that something goes wrong though the training goes on, and say so."""
        self.say(f"step {step}: ALARM {name}: {message}")
        if not self._main:
            return
        assert self._writer is not None
        self._writer.add_text(f"alarms/{name}", message, step)
        with (self.folder / "alarms.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "alarm": name, "message": message}) + "\n")

    def say(self, message: str) -> None:
        """One line on the console, above the progress bar."""
        if self._main:
            tqdm.write(message)

    def pictures(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Images (N, C, H, W) in [-1, 1] as one grid, to samples/NAME-STEP.png and to TensorBoard."""
        if not self._main:
            return
        assert self._writer is not None
        grid = make_grid(images.float().clamp(-1, 1).add(1).div(2).cpu(), nrow=columns, padding=2, pad_value=0.5)
        save_image(grid, self.folder / "samples" / f"{name}-{step:08d}.png")
        self._writer.add_image(name, grid, step)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._accelerator.end_training()

    def _check_folder(self, config: Tree) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--out {self.folder}: is a file, not a folder")
        saved_file = self.folder / "config.yaml"
        if not any((self.folder / "state").glob("step-*")):
            if (self.folder / self._weights).exists():
                raise ConfigError(
                    f"{self.folder} holds {self._weights}, but no state to continue from; it would be written over. "
                    "Give another --out, or move it away"
                )
            return  # nothing was trained yet
        if not saved_file.exists():
            raise BadFileError(f"{self.folder}: holds states of a run but no config.yaml; choose another --out")
        changed = differences(_compared(read_yaml(saved_file)), _compared(config))
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run of another configuration; these keys differ (saved -> given):\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nGive the saved values to continue that run, or another --out to begin a new one."
            )

    def _forget_after(self, step: int) -> None:
        """Drop the log entries of steps that are about to be run again."""
        for log in (self.folder / "metrics.jsonl", self.folder / "alarms.jsonl"):
            if not log.exists():
                continue
            kept = []
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # a line cut off by the stop
            log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _compared(tree: Tree) -> Tree:
    return {
        key: _compared(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in FREE_KEYS
    }
