"""A training run around its loop: folder, log, progress bar, saved states and resume."""

import io
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from stage1_tokenizer.config.base import Tree, write_yaml
from stage1_tokenizer.engine import console
from stage1_tokenizer.engine.environment import append_session
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, InterruptionError, StorageError, UserError
from stage1_tokenizer.engine.files import storage_error, write_file
from stage1_tokenizer.engine.launch import run_on_main
from stage1_tokenizer.engine.lock import lock_folder, mark_folder
from stage1_tokenizer.engine.log_file import METRICS_FILE, EventWriter, drop_entries_after, read_log, sync_log
from stage1_tokenizer.engine.precision import TrainingPrecision
from stage1_tokenizer.engine.processor import FastPath
from stage1_tokenizer.engine.resume_check import Changes, RunData, find_changes, format_changes
from stage1_tokenizer.engine.state import (
    Part,
    drop_states_after,
    find_named_state,
    find_newest_state,
    list_states,
    load_state,
    read_scalars,
    remove_unfinished,
    save_state,
    step_of_state,
)
from stage1_tokenizer.engine.trackers import Trackers, check_trackers
from stage1_tokenizer.engine.training_config import TrainingConfig

BatchT = TypeVar("BatchT")
LOGS = (METRICS_FILE, "alarms.jsonl")


class Watch(Protocol):
    """A watcher of the log that reports problems of the training."""

    def look(self, step: int, scalars: Mapping[str, float]) -> Iterable[tuple[str, str]]:
        """Take the next log entry, and return the name and message of each alarm that begins with it."""


class Run:
    """A training run. The constructor opens its folder, `resume` loads its state, then the loop logs and saves.

    Only the main process writes. The folder has: config.yaml, metrics.jsonl (one object per entry: `step` and scalars
    under their TensorBoard names), alarms.jsonl (one per alarm: `step`, `alarm`, `message`), data.json,
    environment.jsonl, events.out..., samples/, state/, and the weights file.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        weights_name: str,
        data: RunData,
        replaced: Tree | None = None,
        fast_paths: Sequence[FastPath] = (),
    ) -> None:
        """Open and lock the folder of a new run, or of a run to be resumed.

        weights_name: name of the weights file that the run writes.
        data: the data to train on.
        replaced: keys of the config with the values to save and to compare in place of the given ones.
        fast_paths: the fast paths that this training uses on a CPU (processor.py).

        Raises:
            ConfigError: the folder has a run of another config or of other data (the message lists the differences),
                weights without a state to continue from, or images; is a file; cannot be written to; or is in use.
                Or a tracker of `log_with` is not installed.
        """
        check_trackers(config.log_with)
        self.folder, self.first_step, self.done = config.folder, 0, 0
        self._config, self._accelerator, self._weights_name, self._data = config, accelerator, weights_name, data
        self._is_main: bool = accelerator.is_main_process
        self._precision = TrainingPrecision(accelerator, fast_paths)
        self._tree = config.tree() | (replaced or {})
        self._changes = Changes([])
        self._write_error: StorageError | None = None
        self._events: EventWriter | None = None
        self._trackers: Trackers | None = None
        self._bar: tqdm[Any] | None = None
        run_on_main(accelerator, self._open)
        scalars = run_on_main(accelerator, lambda: read_scalars(self.folder / "state"))
        self.was_compiled: bool | None = scalars.get("compiled", False) if scalars else None
        """True or False if this run is resumed and was compiled or not; None: a new run."""

    def _open(self) -> None:
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"--out {self.folder}: is a file, not a folder")
        except OSError as error:  # a name that no file can have
            raise ConfigError(f"--out {self.folder!s:.200}: {error.strerror}") from None
        self._data.check_run_folder(self.folder)
        lock_folder(self.folder)
        if list_states(self.folder / "state"):
            self._changes = find_changes(self.folder, self._config, self._tree, self._data)
        elif (self.folder / self._weights_name).exists():
            raise ConfigError(
                f"{self.folder} has {self._weights_name}, but no state to continue from. It would be overwritten. "
                "Give another --out, or move it away"
            )
        for folder in (self.folder, *(self.folder / name for name in ("state", "samples", "tokens"))):
            remove_unfinished(folder)

    def resume(
        self,
        parts: Mapping[str, Part],
        watch: Watch,
        write_weights: Callable[[int], None],
        before_saving: Callable[[], object] = lambda: None,
        optional: Collection[str] = (),
    ) -> None:
        """Load the newest intact state, or the one that the config names, into the parts; or start at step 0.

        parts: models and optimizers that the states consist of, by name.
        watch: gets each log entry, also those of the steps that are done already.
        write_weights: writes the weights file after a number of steps; called after each saved state and at a resume.
        before_saving: called by every process before it saves.
        optional: names of parts that states of earlier versions lack; without them these parts stay as they are.

        Raises:
            BadFileError: no state is intact, or it does not fit the parts.
        """
        self._accelerator.wait_for_everyone()
        self._parts, self._watch = parts, watch
        self._write_weights, self._before_saving = write_weights, before_saving
        state = run_on_main(self._accelerator, self._choose_state)
        step, scalars = (0, {}) if state is None else self._load(state, optional)
        begun = f"training {self.folder}" if state is None else f"continuing {self.folder} from step {step}"
        if step == self._config.steps:
            begun = f"{self.folder} is finished already"
        self._accelerator.print(f"{begun}: {self._config.steps:,} steps of {self._config.batch_size} images")
        self._precision.load(scalars)
        run_on_main(self._accelerator, lambda: self._begin(step))
        self.first_step = self.done = step
        self._image_count, self._began = 0, time.monotonic()
        self._last_step_at = self._began
        if self._is_main:
            self._events = EventWriter(self.folder, step, self.say)
            self._bar = console.progress_bar(self._config.steps, "step", self.folder.name, step)
            for entry in read_log(self.folder / METRICS_FILE):
                watch.look(int(entry["step"]), entry)
        if step:  # the run may have been killed after it saved the state and before it wrote the weights
            write_weights(step)

    def _choose_state(self) -> Path | None:
        """Return the state to continue from. The main process chooses for all."""
        folder, most = self.folder / "state", self._changes.shared_steps
        if self._config.resume == "auto":
            state = find_newest_state(folder, self._accelerator.print, most)
        else:
            state = find_named_state(folder, self._config.resume)
        if state is None or most is None:
            return state
        given = format_changes(self._changes.lines)
        if step_of_state(state) > most:
            raise ConfigError(
                f"--resume {self._config.resume}: with the given values the learning rates differ from step "
                f"{most + 1:,} on; {given}Name a state of at most {most:,} steps, or leave --resume out"
            )
        later = "" if state == list_states(folder)[0] else f", and removing the states after {state.name}"
        console.say(
            f"{self.folder}: {given}The learning rates of the first {most:,} steps are the same. Continuing{later}"
        )
        return state

    def _load(self, state: Path, optional: Collection[str]) -> tuple[int, dict[str, Any]]:
        try:
            step, scalars = load_state(state, self._parts, optional)
        except BadFileError as error:
            lines = self._changes.lines
            changed = f"\nThe configuration has changed; {format_changes(lines)}" if lines else ""
            raise BadFileError(f"{error}{changed}") from None
        if not self._config.allow_changed:
            self._precision.check(self.folder, scalars)
        return step, scalars

    def _begin(self, step: int) -> None:
        """Write config and records, remove later states and entries, and start the trackers; only after a state was
        loaded."""
        drop_states_after(self.folder / "state", step)
        write_yaml(self.folder / "config.yaml", self._tree)
        self._data.write_record(self.folder)
        for name in LOGS:
            drop_entries_after(self.folder / name, step)
        append_session(self.folder, self._accelerator, step)
        if names := self._config.log_with:
            project = self._config.log_project
            self._trackers = Trackers(self._accelerator, names, project, self.folder, self._tree, self.say)

    def fetch_batches(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """Yield the batches of the remaining steps. If fetching one fails, the run is saved first."""
        batches, done = iter(batches), self.first_step
        while True:
            with self.save_on_error(done):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch
            done += 1

    @contextmanager
    def save_on_error(self, done: int) -> Iterator[None]:
        """Save the run after `done` steps if a UserError ends the block, e.g. too many damaged images.

        It saves in one process only: of several, one may have the error while the others wait for it.
        """
        try:
            yield
        except UserError:
            saved = list_states(self.folder / "state")
            if self._accelerator.num_processes == 1 and done > (step_of_state(saved[0]) if saved else 0):
                self.save(done)
            raise

    def save(self, step: int) -> None:
        """Save a state and the weights. Every process calls it and waits until they are on disk.

        Raises:
            StorageError: in every process. What was saved before stays as it was.
        """
        self._before_saving()
        self._save_state(step)
        self._write_weights(step)

    def _save_state(self, step: int) -> None:
        def write() -> None:
            if self._write_error is not None:
                raise self._write_error
            for name in LOGS:
                sync_log(self.folder / name)
            scalars, keep, kept_step = self._precision.record(), self._config.keep, self._config.kept_step
            save_state(self.folder / "state", step, self._parts, scalars, keep, kept_step)

        run_on_main(self._accelerator, write)

    def interrupt(self, step: int) -> NoReturn:
        """End the run early, after a save, by an InterruptionError."""
        self.close()
        raise InterruptionError(f"{self.folder}: saved step {step} of {self._config.steps}; the same command continues")

    def count_step(self, images: int) -> None:
        """Count one optimizer step over `images` images of all processes."""
        self._image_count, self.done, self._last_step_at = self._image_count + images, self.done + 1, time.monotonic()
        if self._bar is not None:
            self._bar.update()

    @property
    def images_per_second(self) -> float:
        """Mean rate since the start of this process, with the time for validation and saving."""
        return self._image_count / max(1e-9, time.monotonic() - self._began)

    def log(self, step: int, scalars: Mapping[str, float], show: tuple[str, ...] = ()) -> None:
        """Log the scalars of a step, and raise the alarms that begin with them.

        show: names of scalars to show beside the progress bar.
        """
        if self._events is None:
            return
        self._events.add_scalars(step, scalars)
        if self._trackers is not None:
            self._trackers.log(step, scalars)
        self._append(METRICS_FILE, {"step": step, **scalars})
        if self._bar is not None and show:
            metrics = self._config.console_metrics
            text = ", ".join(f"{console.metric_label(name, metrics)} {scalars[name]:.4g}" for name in show)
            self._bar.set_postfix_str(text, refresh=False)
        for name, message in self._watch.look(step, scalars):
            self.alarm(step, name, message)

    def alarm(self, step: int, name: str, message: str) -> None:
        """Print and log a problem of the training, which continues."""
        self.say(f"step {step}: ALARM {name}: {message}")
        if self._events is None:
            return
        self._events.add_text(step, f"alarms/{name}", message)
        self._append("alarms.jsonl", {"step": step, "alarm": name, "message": message})

    def log_images(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Write images (N, C, H, W) in [-1, 1] as one grid to samples/NAME-STEP.png, to TensorBoard and trackers."""
        if self._events is None:
            return
        grid = make_grid(images.float().clamp(-1, 1).add(1).div(2).cpu(), nrow=columns, padding=2, pad_value=0.5)
        file = io.BytesIO()
        save_image(grid, file, format="png")
        path = self.folder / "samples" / f"{name}-{step:08d}.png"
        mark_folder(path.parent)
        self._write(lambda: write_file(path, file.getvalue()))
        self._events.add_image(step, name, grid)
        if self._trackers is not None:
            pixels = grid.mul(255).round().byte().permute(1, 2, 0).numpy()  # (H, W, C)
            self._trackers.log_image(step, name, pixels, path)

    def say(self, message: str) -> None:
        """Print a line on the console, above the progress bar, in the main process only."""
        if self._is_main:
            console.say(message)

    def print_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Print the metrics of a validation after a number of steps."""
        seconds = time.monotonic() - self._last_step_at
        self.say(console.format_validation(step, self._config.steps, values, self._config.console_metrics, seconds))

    def print_summary(self, *commands: tuple[str, str]) -> None:
        """Print the summary of the finished run, and commands that can follow, each as (description, command)."""
        seconds = time.monotonic() - self._began
        metrics, weights = self._config.console_metrics, self._weights_name
        if self._is_main:
            print(console.format_summary(self.folder, metrics, self.first_step, self.done, seconds, weights, commands))

    def close(self) -> None:
        """Close the progress bar and TensorBoard's file, and end the trackers' runs."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()
        if self._trackers is not None:
            self._trackers.finish()

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append one line to a log."""
        path = self.folder / name

        def append() -> None:
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise storage_error(path, error) from None

        self._write(append)

    def _write(self, action: Callable[[], None]) -> None:
        """Write something in the main process. Of several processes, all raise its StorageError at the next save."""
        try:
            action()
        except StorageError as error:
            if self._accelerator.num_processes == 1:
                raise
            self._write_error = error
