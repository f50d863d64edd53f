"""The samples that an evaluation is about: a prior's, made now or found, or pictures of a file or folder."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator

from sampling.evaluation.npz import open_samples
from sampling.evaluation.sources import FolderSource, NpzSource, Source, some
from sampling.output import NOT_COMPARED, Output, is_finished, open_output, picture_names, settings_of
from sampling.picture_files import picture_paths
from sampling.sampling_loop import SAMPLES, PriorSource, assemble, make_missing
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.checkpoint import brief
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.given_weights import sha256_of
from stage1_tokenizer.engine.launch import on_main
from stage1_tokenizer.engine.marker import is_marked
from stage1_tokenizer.engine.names import located

NEAREST = "-nearest.png"
"""How the names of our own pictures of nearest training images end."""


class Samples(NamedTuple):
    """Pictures to be measured."""

    source: Source
    where: Path
    per_second: float | None
    """Pictures made in a second, by all processes together; None where they were there already."""
    of: int
    """How many there are, of which these may be some."""

    @property
    def identity(self) -> str:
        """A hash of the contents of all files that these are read from, in their order."""
        files = self.source.paths if isinstance(self.source, FolderSource) else [self.where]
        return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:32]


def sampled(accelerator: Accelerator, source: PriorSource, n: int, batch_size: int) -> Samples:
    """n pictures of a prior, in RUN/evaluation/samples-DIGEST: the same as `generate.py` would make, an interrupted
    making goes on, and pictures that are there are used again."""
    settings = settings_of(source.sampler.config, {"n": n, "seed": source.seed, **source.settings()})
    told = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    folder = source.loaded.path.parent / "evaluation" / f"samples-{digest}"
    wanted = dict.fromkeys(picture_names(settings), source.picture_shape)
    found = FolderSource([folder / name for name in wanted], source.picture_shape[2])
    if on_main(accelerator, lambda: is_finished(folder)):
        if gone := [path.name for path in found.paths if not path.is_file()]:
            raise BadFileError(
                f"{folder}: was finished, but {len(gone):,} of its pictures are gone, {gone[0]} first; delete it, "
                "and all are made again"
            )
        accelerator.print(f"samples: {one_line(str(folder))}")
        return Samples(found, folder, None, n)
    out: Output = open_output(accelerator, str(folder), folder.parent, settings, wanted)
    accelerator.print(f"sampling {len(out.missing)} pictures to {one_line(str(folder))}")
    seconds = make_missing(accelerator, source, out, batch_size)
    on_main(accelerator, lambda: assemble(source.labels(np.arange(n)), out))
    return Samples(found, folder, len(out.missing) / max(seconds, 1e-9) if len(out.missing) else None, n)


def given(path: Path, n: int | None, seed: int, option: str = "--samples") -> Samples:
    """n pictures (None: all), drawn at random in a folder, or the first of an .npz file as the ADM suite has them.

    option: the one that they were given with, for errors to name.

    Raises:
        ConfigError: there are none.
        BadFileError: the file is damaged or of another kind.
    """
    try:
        path = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ConfigError(f"{option} {located(brief(path))}: there is no such file or folder") from None
    if path.is_dir():
        written = path / SAMPLES  # by generate.py: just its samples, in their order, and not its grid too
        if written.is_file():
            return given(written, n, seed, option)
        return _folder(path, n, seed, option)
    file = open_samples(path)
    return Samples(NpzSource(file, n), path, None, file.n)


def folder_of_results(samples: Path) -> Path:
    """The folder for what was measured of given samples: beside them where that changes nobody's data."""
    ours = samples.is_file() or is_marked(samples)
    return samples.parent if ours else Path("runs/evaluation")


def _folder(path: Path, n: int | None, seed: int, option: str) -> Samples:
    paths = [file for file in picture_paths(path, option) if not file.name.endswith(NEAREST)]  # which we wrote
    if not paths:
        raise ConfigError(f"{option} {path}: holds no pictures")
    chosen = some(n or len(paths), len(paths), seed)
    return Samples(FolderSource([paths[place] for place in chosen], channels=3), path, None, len(paths))
