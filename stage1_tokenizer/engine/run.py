"""The frame of a training's loop: its folder, log, progress bar and saved states, and how it resumes."""

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
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.data.folder.scan import check_is_no_data
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.data.record import DataRecord
from stage1_tokenizer.engine import console
from stage1_tokenizer.engine.checkpoint import storage_error, write_file
from stage1_tokenizer.engine.environment import note_session
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, InterruptionError, StorageError, UserError
from stage1_tokenizer.engine.launch import on_main
from stage1_tokenizer.engine.lock import lock_folder, mark_folder
from stage1_tokenizer.engine.log_file import Events, forget_after, log_entries, sync_log
from stage1_tokenizer.engine.precision import Arithmetic
from stage1_tokenizer.engine.processor import FastPath
from stage1_tokenizer.engine.same_run import changes, listed
from stage1_tokenizer.engine.state import (
    Part,
    drop_later,
    load_state,
    named_state,
    newest_state,
    save_state,
    states,
    step_of,
    sweep,
)

Batch = TypeVar("Batch")


class Watch(Protocol):
    """Looks at every log entry of a run, in order, and says what goes wrong."""

    def look(self, step: int, scalars: Mapping[str, float]) -> Iterable[tuple[str, str]]:
        """The name and message of each alarm that begins with the entry."""


class OpenedRun:
    """A run's folder, opened, and kept from other processes.

    config.yaml, metrics.jsonl (one object per entry: `step` and scalars under their TensorBoard names), alarms.jsonl
    (one per alarm: `step`, `alarm`, `message`), data.json, environment.jsonl, events.out..., samples/, state/.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        weights: str,
        data: OpenData | None = None,
        known_by: Tree | None = None,
        fast_paths: Sequence[FastPath] = (),
    ) -> None:
        """Open the folder of a run, new or begun earlier.

        weights: the name of the file that the run is to produce.
        data: what it is trained on.
        known_by: keys of the config that a resume compares in another form.
        fast_paths: those that this training meets (processor.py).

        Raises:
            ConfigError: the folder holds a run of another config or of other data (what differs is listed), weights
                without a state to continue from, or images; is no folder; cannot be written; or is in use by another.
        """
        self.path, self.config, self.accelerator, self.weights = config.folder, config, accelerator, weights
        self.arithmetic = Arithmetic(accelerator, fast_paths)
        self._tree = config.tree() | (known_by or {})
        self._changed: list[str] = []
        self._data: DataRecord | None = None
        on_main(accelerator, lambda: self._open(data))

    def say(self, message: str) -> None:
        """One line on the console, above the progress bar."""
        if self.accelerator.is_main_process:
            console.say(message)

    def resume(
        self,
        parts: Mapping[str, Part],
        watch: Watch,
        write_weights: Callable[[int], None],
        before_saving: Callable[[], object] = lambda: None,
        newer: Collection[str] = (),
    ) -> "Run":
        """Load the newest whole state, or the one that was named, into the parts, and begin or go on.

        watch: is given each log entry, and those of the steps that are done already.
        write_weights: writes the weights of so many steps, whenever a state was saved.
        before_saving: is called by every process before it saves.
        newer: names of parts that a state of an earlier version may lack; these stay as they are then.

        Raises:
            BadFileError: no state is whole, or it does not fit the parts.
        """
        self.accelerator.wait_for_everyone()
        newest = on_main(self.accelerator, lambda: self._choose(self.path / "state"))
        step, scalars = (0, {}) if newest is None else self._load(newest, parts, newer)
        begun = f"training {self.path}" if newest is None else f"continuing {self.path} from step {step}"
        if step == self.config.steps:
            begun = f"{self.path} is finished already"
        self.accelerator.print(f"{begun}: {self.config.steps:,} steps of {self.config.batch_size} images")
        self.arithmetic.load(scalars)
        on_main(self.accelerator, lambda: self._begin(step))
        return Run(self, step, parts, watch, write_weights, before_saving)

    def _open(self, data: OpenData | None) -> None:
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"--out {self.path}: is a file, not a folder")
        except OSError as error:  # a name that no file can have
            raise ConfigError(f"--out {self.path!s:.200}: {error.strerror}") from None
        self._data = None if data is None else DataRecord.of(data)
        check_is_no_data(self.path)
        lock_folder(self.path)
        if states(self.path / "state"):
            self._changed = changes(self.path, self.config, self._tree, self._data)
        elif (self.path / self.weights).exists():
            raise ConfigError(
                f"{self.path} holds {self.weights}, but no state to continue from; it would be written over. "
                "Give another --out, or move it away"
            )
        for folder in (self.path, *(self.path / name for name in ("state", "samples", "tokens"))):
            sweep(folder)

    def _choose(self, folder: Path) -> Path | None:
        """The state to continue from; one process chooses for all."""
        if self.config.resume == "auto":
            return newest_state(folder, warn=self.accelerator.print)
        return named_state(folder, self.config.resume)

    def _load(self, state: Path, parts: Mapping[str, Part], newer: Collection[str]) -> tuple[int, dict[str, Any]]:
        try:
            step, scalars = load_state(state, parts, newer)
        except BadFileError as error:
            changed = f"\nThe configuration has changed; {listed(self._changed)}" if self._changed else ""
            raise BadFileError(f"{error}{changed}") from None
        if not self.config.allow_changed:
            self.arithmetic.check(self.path, scalars)
        return step, scalars

    def _begin(self, step: int) -> None:
        """Write what says that the run is now of this configuration and at this step; not before its state fits."""
        drop_later(self.path / "state", step)
        write_yaml(self.path / "config.yaml", self._tree)
        if self._data:
            self._data.write(self.path)
        for name in ("metrics.jsonl", "alarms.jsonl"):
            forget_after(self.path / name, step)
        note_session(self.path, self.accelerator, step)


class Run:
    """A run under way: its log, progress bar and saved states. Only the main process writes."""

    def __init__(
        self,
        opened: OpenedRun,
        step: int,
        parts: Mapping[str, Part],
        watch: Watch,
        write_weights: Callable[[int], None],
        before_saving: Callable[[], object],
    ) -> None:
        """To be made by OpenedRun.resume, after so many steps."""
        self.folder, self.first, self.done = opened.path, step, step
        self._opened, self._config, self._accelerator = opened, opened.config, opened.accelerator
        self._parts, self._watch = parts, watch
        self._write_weights, self._before_saving = write_weights, before_saving
        self._trouble: StorageError | None = None
        self._main: bool = self._accelerator.is_main_process
        self._events = Events(self.folder, step, self.say) if self._main else None
        self._bar: tqdm[Any] | None = (
            console.bar(self._config.steps, "step", self.folder.name, step) if self._main else None
        )
        self._seen, self._began = 0, time.monotonic()
        self._advanced = self._began
        if self._main:
            for entry in log_entries(self.folder / "metrics.jsonl"):
                watch.look(int(entry["step"]), entry)
        if step:  # the stop may have come after the state was saved and before the weights were
            write_weights(step)

    def save(self, step: int) -> None:
        """Save a state that a resume continues from, and the weights; every process calls it and waits until they are
        on disk.

        Raises:
            StorageError: in every process; what was saved before is untouched.
        """
        self._before_saving()
        self._save_state(step)
        self._write_weights(step)

    def _save_state(self, step: int) -> None:

        def save() -> None:
            if self._trouble is not None:
                raise self._trouble
            for name in ("metrics.jsonl", "alarms.jsonl"):
                sync_log(self.folder / name)
            save_state(self.folder / "state", step, self._parts, self._opened.arithmetic.record(), self._config.keep)

        on_main(self._accelerator, save)

    def protected_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of the steps that are left, each fetched under `protected`."""
        batches, done = iter(batches), self.first
        while True:
            with self.protected(done):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch
            done += 1

    @contextmanager
    def protected(self, done: int) -> Iterator[None]:
        """Save the `done` steps before an error of the user's within ends the run: too many images are damaged, say,
        or a data worker was killed.

        Of several processes only one may have met with it, and those that wait for it cannot save.
        """
        try:
            yield
        except UserError:
            saved = states(self.folder / "state")
            if self._accelerator.num_processes == 1 and done > (step_of(saved[0]) if saved else 0):
                self.save(done)
            raise

    def interrupt(self, step: int) -> NoReturn:
        """End the run early, after a save. Raises InterruptionError."""
        self.finish()
        raise InterruptionError(f"{self.folder}: saved step {step} of {self._config.steps}; the same command continues")

    def advance(self, images: int) -> None:
        """One optimizer step over `images` images (of all processes) is done."""
        self._seen, self.done, self._advanced = self._seen + images, self.done + 1, time.monotonic()
        if self._bar is not None:
            self._bar.update()

    @property
    def images_per_second(self) -> float:
        """Since the start of this process, validation and saving included."""
        return self._seen / max(1e-9, time.monotonic() - self._began)

    def log(self, step: int, scalars: Mapping[str, float], show: tuple[str, ...] = ()) -> None:
        """Record scalars at a step, show some of them beside the progress bar, and raise the alarms that begin."""
        if self._events is None:
            return
        self._events.scalars(step, dict(scalars))
        self._append("metrics.jsonl", {"step": step, **scalars})
        if self._bar is not None and show:
            self._bar.set_postfix_str(
                ", ".join(f"{console.label(name, self._config.figures)} {scalars[name]:.4g}" for name in show),
                refresh=False,
            )
        for name, message in self._watch.look(step, scalars):
            self.alarm(step, name, message)

    def alarm(self, step: int, name: str, message: str) -> None:
        """Record that something goes wrong though the training goes on, and say so."""
        self.say(f"step {step}: ALARM {name}: {message}")
        if self._events is None:
            return
        self._events.text(step, f"alarms/{name}", message)
        self._append("alarms.jsonl", {"step": step, "alarm": name, "message": message})

    def say(self, message: str) -> None:
        """One line on the console, above the progress bar."""
        self._opened.say(message)

    def validated(self, step: int, figures: Mapping[str, float]) -> None:
        """Say what a validation after so many steps has found."""
        seconds = time.monotonic() - self._advanced
        self.say(console.validation_line(step, self._config.steps, figures, self._config.figures, seconds))

    def summarise(self, *after: tuple[str, str]) -> None:
        """Say what the finished run came to, and the commands to go on with, each with what it does."""
        seconds = time.monotonic() - self._began
        if self._main:
            print(
                console.summary(
                    self.folder, self._config.figures, self.first, self.done, seconds, self._opened.weights, after
                )
            )

    def log_images(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Images (N, C, H, W) in [-1, 1] as one grid, to samples/NAME-STEP.png and to TensorBoard."""
        if self._events is None:
            return
        grid = make_grid(images.float().clamp(-1, 1).add(1).div(2).cpu(), nrow=columns, padding=2, pad_value=0.5)
        file = io.BytesIO()
        save_image(grid, file, format="png")
        path = self.folder / "samples" / f"{name}-{step:08d}.png"
        mark_folder(path.parent)
        self._written(lambda: write_file(path, file.getvalue()))
        self._events.image(step, name, grid)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        """One line at the end of a log."""
        path = self.folder / name

        def append() -> None:
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise storage_error(path, error) from None

        self._written(append)

    def _written(self, write: Callable[[], None]) -> None:
        """Write in the main process. An error there ends a run of one process; others would wait for this one, and hear
        of it at the next save."""
        try:
            write()
        except StorageError as error:
            if self._accelerator.num_processes == 1:
                raise
            self._trouble = error
