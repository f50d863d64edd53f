"""What a training run has around its loop: a folder, a log, a progress bar, and how it resumes."""

import io
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from stage1_tokenizer.config.base import Tree, write_yaml
from stage1_tokenizer.config.run_config import RunConfig
from stage1_tokenizer.data import OpenData
from stage1_tokenizer.data.folder.scan import check_is_no_data
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


class Run:
    """A run's folder and log. Only the main process writes.

    config.yaml, metrics.jsonl (one object per entry: `step` and scalars under their TensorBoard names), alarms.jsonl
    (one per alarm: `step`, `alarm`, `message`), data.json, environment.jsonl, events.out..., samples/, state/.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        tree: Tree,
        accelerator: Accelerator,
        weights: str,
        data: OpenData | None = None,
        *paths: FastPath,
    ) -> None:
        """Open a run, new or begun earlier, and keep other processes from it.

        tree: what the run is to be known by, `config.tree()` or more.
        weights: the name of the file that it is to produce.
        data: what it is trained on.
        paths: fast paths that this training meets (processor.py).

        Raises:
            ConfigError: the folder holds a run of another config or of other data (what differs is listed), weights
                without a state to continue from, or images; is no folder; cannot be written; or is in use by another.
        """
        self.folder, self._config, self._tree, self._weights = folder, config, tree, weights
        self._accelerator = accelerator
        self._main: bool = accelerator.is_main_process
        self._arithmetic = Arithmetic(accelerator, paths)
        self._trouble: StorageError | None = None
        self._changed: list[str] = []
        self._data: DataRecord | None = None
        on_main(accelerator, lambda: self._open(data))
        self._events: Events | None = None
        self._bar: tqdm[Any] | None = None
        self._seen, self._first, self.done = 0, 0, 0
        self._began = self._advanced = time.monotonic()

    def resume(self, parts: Mapping[str, Part], newer: Collection[str] = ()) -> int:
        """Load the newest whole state, or the one that was named, into the parts. Returns the steps done.

        newer: names of parts that a state of an earlier version may lack; these stay as they are then.

        Raises:
            BadFileError: no state is whole, or it does not fit the parts.
        """
        self._accelerator.wait_for_everyone()
        folder = self.folder / "state"
        newest = on_main(self._accelerator, lambda: self._choose(folder))
        step, scalars = (0, {}) if newest is None else self._load(newest, parts, newer)
        begun = f"training {self.folder}" if newest is None else f"continuing {self.folder} from step {step}"
        if step == self._config.steps:
            begun = f"{self.folder} is finished already"
        self._accelerator.print(f"{begun}: {self._config.steps:,} steps of {self._config.batch_size} images")
        self._arithmetic.load(scalars)
        on_main(self._accelerator, lambda: self._begin(step))
        if self._main:
            self._events = Events(self.folder, step, self.say)
            self._bar = console.bar(self._config.steps, "step", self.folder.name, step)
        self._began, self._seen, self._first, self.done = time.monotonic(), 0, step, step
        return step

    def save(self, step: int, parts: Mapping[str, Part], keep: int) -> None:
        """Save a state that `resume` continues from; every process calls it and waits until it is on disk.

        Raises:
            StorageError: in every process; what was saved before is untouched.
        """

        def save() -> None:
            if self._trouble is not None:
                raise self._trouble
            for name in ("metrics.jsonl", "alarms.jsonl"):
                sync_log(self.folder / name)
            save_state(self.folder / "state", step, parts, self._arithmetic.record(), keep)

        on_main(self._accelerator, save)

    def saving(self, batches: Iterator[Batch], first: int, save: Callable[[int], None]) -> Iterator[Batch]:
        """The batches of the steps from `first` on; see `kept`."""
        batches, done = iter(batches), first
        while True:
            with self.kept(done, save):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch
            done += 1

    @contextmanager
    def kept(self, done: int, save: Callable[[int], None]) -> Iterator[None]:
        """Where this meets an error of the user's, because too many pictures are damaged or a data worker was killed,
        the `done` steps are saved before that ends the run.

        Of several processes only one may have met with it, and those that wait for it cannot save.
        """
        try:
            yield
        except UserError:
            saved = states(self.folder / "state")
            if self._accelerator.num_processes == 1 and done > (step_of(saved[0]) if saved else 0):
                save(done)
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
        """Record scalars at a step, and show some of them beside the progress bar."""
        if not self._main:
            return
        assert self._events is not None
        self._events.scalars(step, dict(scalars))
        self._append("metrics.jsonl", {"step": step, **scalars})
        if self._bar is not None and show:
            self._bar.set_postfix_str(
                ", ".join(f"{console.label(name)} {scalars[name]:.4g}" for name in show), refresh=False
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
            console.say(message)

    def validated(self, step: int, figures: Mapping[str, float]) -> None:
        """Say what a validation after so many steps has found."""
        self.say(console.validation_line(step, self._config.steps, figures, time.monotonic() - self._advanced))

    def summarise(self, *after: tuple[str, str]) -> None:
        """Say what the finished run came to, and the commands to go on with, each with what it does."""
        seconds = time.monotonic() - self._began
        if self._main:
            print(console.summary(self.folder, self._first, self.done, seconds, self._weights, after))

    def pictures(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Images (N, C, H, W) in [-1, 1] as one grid, to samples/NAME-STEP.png and to TensorBoard."""
        if not self._main:
            return
        assert self._events is not None
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

    def _open(self, data: OpenData | None) -> None:
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"--out {self.folder}: is a file, not a folder")
        except OSError as error:  # a name that no file can have
            raise ConfigError(f"--out {self.folder!s:.200}: {error.strerror}") from None
        self._data = None if data is None else DataRecord.of(data)
        check_is_no_data(self.folder)
        lock_folder(self.folder)
        if states(self.folder / "state"):
            self._changed = changes(self.folder, self._config, self._tree, self._data)
        elif (self.folder / self._weights).exists():
            raise ConfigError(
                f"{self.folder} holds {self._weights}, but no state to continue from; it would be written over. "
                "Give another --out, or move it away"
            )
        for folder in (self.folder, *(self.folder / name for name in ("state", "samples", "tokens"))):
            sweep(folder)

    def _choose(self, folder: Path) -> Path | None:
        """The state to continue from; one process chooses for all."""
        if self._config.resume == "auto":
            return newest_state(folder, warn=self._accelerator.print)
        return named_state(folder, self._config.resume)

    def _load(self, state: Path, parts: Mapping[str, Part], newer: Collection[str]) -> tuple[int, dict[str, Any]]:
        try:
            step, scalars = load_state(state, parts, newer)
        except BadFileError as error:
            changed = f"\nThe configuration has changed; {listed(self._changed)}" if self._changed else ""
            raise BadFileError(f"{error}{changed}") from None
        if not self._config.allow_changed:
            self._arithmetic.check(self.folder, scalars)
        return step, scalars

    def _begin(self, step: int) -> None:
        """Write what says that the run is now of this configuration and at this step; not before its state fits."""
        drop_later(self.folder / "state", step)
        write_yaml(self.folder / "config.yaml", self._tree)
        if self._data:
            self._data.write(self.folder)
        for name in ("metrics.jsonl", "alarms.jsonl"):
            forget_after(self.folder / name, step)
        note_session(self.folder, self._accelerator, step)

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
