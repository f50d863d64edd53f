"""What a training run has around its loop: a folder, a log, a progress bar, and how it resumes."""

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from stage1_tokenizer.checkpoint import storage_error, write_file
from stage1_tokenizer.config import Tree, differences, read_saved_yaml, write_yaml
from stage1_tokenizer.errors import BadFileError, ConfigError, InterruptionError, StorageError, UserError
from stage1_tokenizer.events import Events
from stage1_tokenizer.launch import on_main
from stage1_tokenizer.lock import lock_folder
from stage1_tokenizer.log_file import log_entries
from stage1_tokenizer.run_config import RunConfig, compared
from stage1_tokenizer.state import Part, load_state, named_state, newest_state, save_state, states, sweep

Batch = TypeVar("Batch")


class Run:
    """A run's folder and log. Only the main process writes.

    config.yaml, metrics.jsonl (one object per entry: `step` and scalars under their TensorBoard names), alarms.jsonl
    (one per alarm: `step`, `alarm`, `message`), events.out..., samples/NAME-STEP.png, state/.
    """

    def __init__(self, folder: Path, config: RunConfig, tree: Tree, accelerator: Accelerator, weights: str) -> None:
        """Open a run, new or begun earlier, and keep other processes from it.

        tree: what the run is to be known by, `config.tree()` or more.
        weights: the name of the file that it is to produce.

        Raises:
            ConfigError: the folder holds a run of another config (the keys that differ are listed), or weights without
                a state to continue from, or is no folder, or cannot be written, or is in use by another process.
        """
        self.folder, self._config, self._tree, self._weights = folder, config, tree, weights
        self._accelerator = accelerator
        self._main: bool = accelerator.is_main_process
        self._changed: list[str] = []
        on_main(accelerator, self._open)
        self._events: Events | None = None
        self._bar: tqdm[Any] | None = None
        self._seen = 0
        self._began = time.monotonic()

    def resume(self, parts: Mapping[str, Part]) -> int:
        """Load the newest whole state, or the one that was named, into the parts. Returns the steps done.

        Raises:
            BadFileError: no state is whole, or it does not fit the parts.
        """
        self._accelerator.wait_for_everyone()
        folder = self.folder / "state"
        if self._config.resume == "auto":
            newest = newest_state(folder, warn=self._accelerator.print)
        else:
            newest = named_state(folder, self._config.resume)
        step, scalars = (0, {}) if newest is None else self._load(newest, parts)
        if newest is not None:
            self._accelerator.print(f"continuing {self.folder} from step {step}")
        if self._accelerator.scaler and "scaler" in scalars:
            self._accelerator.scaler.load_state_dict(scalars["scaler"])
        on_main(self._accelerator, lambda: self._begin(step))
        if self._main:
            self._events = Events(self.folder, step + 1 if step else None, self.say)
            self._bar = tqdm(
                total=self._config.steps,
                initial=step,
                desc=self.folder.name,
                unit="step",
                disable=None,
                dynamic_ncols=True,
            )
        self._began, self._seen = time.monotonic(), 0
        return step

    def save(self, step: int, parts: Mapping[str, Part], keep: int) -> None:
        """Save a state that `resume` continues from; every process calls it and waits until it is on disk.

        Raises:
            StorageError: in every process; what was saved before is untouched.
        """
        scaler = self._accelerator.scaler  # of float16's loss; none in other precisions
        scalars = {"scaler": scaler.state_dict()} if scaler else {}

        def save() -> None:
            self._sync_log()
            save_state(self.folder / "state", step, parts, scalars, keep)

        on_main(self._accelerator, save)

    def saving(self, batches: Iterator[Batch], first: int, save: Callable[[int], None]) -> Iterator[Batch]:
        """The batches of the steps from `first` on. Where one cannot be made, because too many pictures are damaged or
        a data worker was killed, the work so far is saved before that ends the run.

        Of several processes only one may have met with it, and those that wait for it cannot save.
        """
        done = first
        try:
            for batch in batches:
                yield batch
                done += 1
        except UserError:
            if done > first and self._accelerator.num_processes == 1:
                save(done)
            raise

    def interrupt(self, step: int) -> NoReturn:
        """End the run early, after a save. Raises InterruptionError."""
        self.finish()
        raise InterruptionError(f"{self.folder}: saved step {step} of {self._config.steps}; the same command continues")

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
        assert self._events is not None
        self._events.scalars(step, dict(scalars))
        self._append("metrics.jsonl", {"step": step, **scalars})
        if self._bar is not None and show:
            self._bar.set_postfix_str(
                " ".join(f"{name.split('/')[-1]} {scalars[name]:.4g}" for name in show), refresh=False
            )

    def logged(self) -> list[dict[str, float]]:
        """The log's entries so far, {"step", scalars}, on the main process; elsewhere none."""
        return log_entries(self.folder / "metrics.jsonl") if self._main else []

    def alarm(self, step: int, name: str, message: str) -> None:
        """Record that something goes wrong though the training goes on, and say so."""
        self.say(f"step {step}: ALARM {name}: {message}")
        if not self._main:
            return
        assert self._events is not None
        self._events.text(step, f"alarms/{name}", message)
        self._append("alarms.jsonl", {"step": step, "alarm": name, "message": message})

    def say(self, message: str) -> None:
        """One line on the console, above the progress bar."""
        if self._main:
            tqdm.write(message)

    def pictures(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Images (N, C, H, W) in [-1, 1] as one grid, to samples/NAME-STEP.png and to TensorBoard."""
        if not self._main:
            return
        assert self._events is not None
        grid = make_grid(images.float().clamp(-1, 1).add(1).div(2).cpu(), nrow=columns, padding=2, pad_value=0.5)
        file = io.BytesIO()
        save_image(grid, file, format="png")
        write_file(self.folder / "samples" / f"{name}-{step:08d}.png", file.getvalue())
        self._events.image(step, name, grid)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()
        self._accelerator.end_training()

    def _open(self) -> None:
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"--out {self.folder}: is a file, not a folder")
            self._check_folder()
            lock_folder(self.folder)
            (self.folder / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: cannot be written to ({error.strerror})") from None
        except StorageError as error:
            raise ConfigError(f"--out {self.folder}: {error}") from None
        sweep(self.folder)
        sweep(self.folder / "state")

    def _check_folder(self) -> None:
        saved_file = self.folder / "config.yaml"
        if not states(self.folder / "state"):
            if (self.folder / self._weights).exists():
                raise ConfigError(
                    f"{self.folder} holds {self._weights}, but no state to continue from; it would be written over. "
                    "Give another --out, or move it away"
                )
            return  # nothing was trained yet
        if not saved_file.exists():
            raise BadFileError(f"{self.folder}: holds states of a run but no config.yaml; choose another --out")
        self._changed = differences(compared(read_saved_yaml(saved_file)), compared(self._tree))
        if self._changed and not self._config.allow_changed:
            raise ConfigError(
                f"{self.folder} holds a run of another configuration; {self._differing()}"
                "Give the saved values to continue that run, or another --out to begin a new one. (--allow_changed "
                "continues it with the given ones, and is no longer the same as one run.)"
            )

    def _differing(self) -> str:
        lines = "".join(f"  {line}\n" for line in self._changed)
        return f"these keys differ (saved -> given):\n{lines}"

    def _load(self, state: Path, parts: Mapping[str, Part]) -> tuple[int, dict[str, Any]]:
        try:
            return load_state(state, parts)
        except BadFileError as error:
            changed = f"\nThe configuration has changed; {self._differing()}" if self._changed else ""
            raise BadFileError(f"{error}{changed}") from None

    def _begin(self, step: int) -> None:
        """Write what says that the run is now of this configuration and at this step; not before its state fits."""
        write_yaml(self.folder / "config.yaml", self._tree)
        self._forget_after(step)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        """One line at the end of a log."""
        path = self.folder / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise storage_error(path, error) from None

    def _sync_log(self) -> None:
        """Entries of steps that a state is about to have behind it must outlive a power cut as it does."""
        log = self.folder / "metrics.jsonl"
        if log.exists():
            with log.open("rb") as file:
                os.fsync(file.fileno())

    def _forget_after(self, step: int) -> None:
        """Drop the log entries of steps that are about to be run again."""
        for log in (self.folder / "metrics.jsonl", self.folder / "alarms.jsonl"):
            kept = [entry for entry in log_entries(log) if entry["step"] <= step]
            if log.exists():
                write_file(log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
