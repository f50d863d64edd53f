"""Experiment trackers beside the log files of a run: `--log_with wandb`, or any other tracker that Accelerate knows.

They receive the config at the start of a run, the scalars of metrics.jsonl under the same names, and the grids of
images. A resumed run goes on in the same run of the tracker, if the tracker can do this; its identifier is in
trackers.json. After a resume, steps that the tracker has already are logged again; they have the same values.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType
from numpy.typing import NDArray

from stage1_tokenizer.engine.errors import ConfigError, UserError, shorten
from stage1_tokenizer.engine.files import write_file

TRACKERS_FILE = "trackers.json"
"""File in the run's folder with the identifier of the run in each tracker."""
OURS = "tensorboard"
"""Tracker that each run has without Accelerate (log_file.py)."""


@dataclass(frozen=True)
class TrackerKind:
    """Facts about one of Accelerate's trackers: how a run is named and continued in it, and how it takes images."""

    options: Callable[[str, str], dict[str, Any]] = lambda identifier, name: {}
    """Function of the run's identifier and name that returns arguments of the tracker's start."""
    made_identifier: Callable[[Any], str] | None = None
    """Function of the started tracker that returns the identifier, if the tracker makes it; `options` then gets an
    empty text at the first start."""
    log_image: Callable[[Any, int, str, NDArray[Any], Path], object] = lambda tracker, step, name, image, path: (
        tracker.log_images({name: [image]}, step=step) if hasattr(tracker, "log_images") else None
    )
    """Function of the tracker, step, name, image (H, W, C) uint8 and its PNG file."""


def _trackio_image(tracker: Any, step: int, name: str, image: NDArray[Any], path: Path) -> None:
    import trackio  # noqa: PLC0415  # only for those who use it

    tracker.log({name: trackio.Image(image)}, step=step)


def _log_one_image(tracker: Any, step: int, name: str, image: NDArray[Any], path: Path) -> None:
    tracker.log_images({name: image}, step=step)


KINDS: Mapping[str, TrackerKind] = {
    "wandb": TrackerKind(lambda identifier, name: {"id": identifier, "name": name, "resume": "allow"}),
    "swanlab": TrackerKind(
        lambda identifier, name: {"id": identifier, "experiment_name": name, "resume": "allow"},
    ),
    # trackio knows a run by its name only.
    "trackio": TrackerKind(
        lambda identifier, name: {"name": f"{name}-{identifier[:8]}", "resume": "allow"}, log_image=_trackio_image
    ),
    "mlflow": TrackerKind(
        lambda identifier, name: {"run_id": identifier or None, "run_name": name},
        lambda tracker: str(tracker.tracker.info.run_id),
        lambda tracker, step, name, image, path: tracker.log_artifact(str(path), artifact_path="samples"),
    ),
    "comet_ml": TrackerKind(
        lambda identifier, name: {"experiment_key": identifier},
        log_image=lambda tracker, step, name, image, path: tracker.tracker.log_image(image, name=name, step=step),
    ),
    "aim": TrackerKind(
        lambda identifier, name: {"run_hash": identifier or None},
        lambda tracker: str(tracker.tracker.hash),
        _log_one_image,
    ),
    "clearml": TrackerKind(log_image=_log_one_image),
    "dvclive": TrackerKind(
        lambda identifier, name: {"resume": True},
        log_image=lambda tracker, step, name, image, path: tracker.tracker.log_image(f"{name}.png", image),
    ),
}
"""The trackers that Accelerate has. One that is registered with it later has the defaults of `TrackerKind`."""


def check_trackers(names: Sequence[str]) -> None:
    """Check the names of `--log_with` before any work.

    Raises:
        ConfigError: Accelerate knows no such tracker, or its package is not installed.
    """
    known = sorted(name for name in LOGGER_TYPE_TO_CLASS if name != OURS)
    for name in names:
        if name == OURS:
            raise ConfigError("--log_with tensorboard: each run writes TensorBoard's events anyway; leave it out")
        if name not in known:
            raise ConfigError(f"--log_with {shorten(name)}: there is no such tracker; there are {', '.join(known)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            package = name.replace("_", "-")
            raise ConfigError(
                f"--log_with {name}: its package is not installed; type: pip install {package}. Without it, leave "
                "--log_with out: metrics.jsonl and TensorBoard's events have the same numbers"
            )


class Trackers:
    """The started trackers of a run, in its main process. A tracker that fails later is left out after one message."""

    def __init__(
        self,
        accelerator: Accelerator,
        names: Sequence[str],
        project: str,
        folder: Path,
        tree: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start the trackers, each with a new run, or with the run that the folder's trackers.json names.

        tree: the config of the run, which a new run of a tracker gets.

        Raises:
            ConfigError: a tracker cannot be started, for example without its login.
        """
        self._warn = warn
        self._started: dict[str, Any] = {}
        saved = _read_identifiers(folder / TRACKERS_FILE)
        identifiers = dict(saved)
        for name in dict.fromkeys(names):
            kind = KINDS.get(name, TrackerKind())
            identifier = saved.get(name) or ("" if kind.made_identifier else uuid.uuid4().hex)
            try:
                tracker = _start(accelerator, name, project, folder, kind.options(identifier, folder.name))
                identifiers[name] = kind.made_identifier(tracker) if kind.made_identifier else identifier
                if name not in saved:
                    tracker.store_init_configuration(flatten(tree))
            except UserError:  # raised by a signal
                raise
            except Exception as error:  # whatever the tracker's package raises
                raise ConfigError(
                    f"--log_with {name}: cannot be started ({shorten(error)}). Log in as its package asks, or leave it "
                    "out"
                ) from None
            self._started[name] = tracker
        if identifiers != saved:
            write_file(folder / TRACKERS_FILE, json.dumps(identifiers, indent=1).encode())

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the scalars of a step."""
        self._call(lambda name, tracker: tracker.log(dict(scalars), step=step))

    def log_image(self, step: int, name: str, image: NDArray[Any], path: Path) -> None:
        """Log an image (H, W, C) uint8 of a step, which is also in a PNG file."""
        self._call(
            lambda kind, tracker: KINDS.get(kind, TrackerKind()).log_image(tracker, step, name, image, path),
        )

    def finish(self) -> None:
        """End the trackers' runs."""
        self._call(lambda name, tracker: tracker.finish())
        self._started = {}

    def _call(self, action: Callable[[str, Any], object]) -> None:
        for name, tracker in list(self._started.items()):
            try:
                action(name, tracker)
            except UserError:  # raised by a signal
                raise
            except Exception as error:  # no error of a tracker may end a run
                del self._started[name]
                self._warn(
                    f"the tracker {name} has failed ({shorten(error)}). The run continues without it; metrics.jsonl "
                    "has the same numbers"
                )


def _start(accelerator: Accelerator, name: str, project: str, folder: Path, options: dict[str, Any]) -> Any:
    """Start one tracker by Accelerate, and return it."""
    accelerator.project_configuration.logging_dir = str(folder)  # for trackers that write files
    accelerator.log_with = filter_trackers([name], str(folder))
    accelerator.trackers = []  # init_trackers starts all that are in this list
    accelerator.init_trackers(project, init_kwargs={name: options})
    (tracker,) = accelerator.trackers
    return tracker


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config with dotted keys and plain values; lists become text, because some trackers take no lists."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, (list, tuple)) else value
    return flat


def _read_identifiers(path: Path) -> dict[str, str]:
    """Return the saved identifiers; a missing or damaged file has none, and the trackers then begin new runs."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in saved.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
