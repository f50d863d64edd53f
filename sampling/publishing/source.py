"""The run that is published: its weights, checked, and its records without the folders of this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

from sampling.checks.weights import check_pair
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.data.torchvision_sets import READERS, DownloadedConfig
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder, open_run
from stage1_tokenizer.engine.checkpoint import Header, read_weights
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.hub import is_hub_name
from stage1_tokenizer.tokenizer import ORIGIN, TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.prior import PRIOR_FILE, LoadedPrior, load_prior


@dataclass(frozen=True)
class Source:
    """A run with the weights that are published: a tokenizer, or a prior with its tokenizer."""

    run: RunFolder
    tokenizer: LoadedTokenizer
    prior: LoadedPrior | None
    """None: a tokenizer is published."""
    headers: dict[str, Header]
    """Header of each weights file, by the file's name."""

    @classmethod
    def open(cls, path: str) -> Self:
        """Open a run by its folder, or by the weights file in it that is to be published.

        Raises:
            ConfigError: there is no such run, or it has no weights yet.
            BadFileError: a file is damaged, a weight is not finite, or prior and tokenizer do not belong together.
        """
        if is_hub_name(path):
            raise ConfigError(f"RUN {path}: is published already; name the folder of a run on this machine")
        run = open_run(path, PRIOR_FILE)
        is_prior = (run.path / PRIOR_FILE).is_file() and Path(path).name != TOKENIZER_FILE
        name = PRIOR_FILE if is_prior else TOKENIZER_FILE
        if not (run.path / name).is_file():
            raise ConfigError(f"RUN {path}: the folder holds no {name}; the training has written no weights yet")
        for finding in check_pair(run.path / TOKENIZER_FILE, run.path / PRIOR_FILE if is_prior else Path()):
            if finding.verdict == "bad":
                raise BadFileError(f"{finding.path}: {finding.text}")
        prior = load_prior(run.path) if is_prior else None
        kinds = {TOKENIZER_FILE: "tokenizer", PRIOR_FILE: "prior"} if is_prior else {TOKENIZER_FILE: "tokenizer"}
        headers = {file: read_weights(run.path / file, kind)[1] for file, kind in kinds.items()}
        run = RunFolder(run.path, name)
        return cls(run, prior.tokenizer if prior else LoadedTokenizer.load(run.path), prior, headers)

    @property
    def loaded(self) -> LoadedPrior | LoadedTokenizer:
        """The prior, or the tokenizer if there is no prior."""
        return self.prior or self.tokenizer

    @property
    def origins(self) -> dict[str, Header]:
        """The entries of a header on the file of another project, such as its licence, for each imported model.

        The keys are tokenizer and prior; a model that was trained here has none.
        """
        found = {
            header["kind"]: {key.removeprefix(ORIGIN): text for key, text in header.items() if key.startswith(ORIGIN)}
            for header in self.headers.values()
        }
        return {kind: entries for kind, entries in found.items() if entries}


def without_folders(value: Any) -> Any:
    """Return a tree of plain values in which each absolute path is only its last part.

    Published files must not tell how the folders of this machine are named.
    """
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, str):
        return _last_part(value)
    return value


def published_data(tree: Tree) -> Tree:
    """Return the data config of a header without folders of this machine.

    A data set that can be downloaded is named in the folder to which `--data.download` brings it.
    """
    published: Tree = without_folders(tree)
    if published != tree and tree.get("kind") in READERS:
        published["root"] = DownloadedConfig().root
    return published


def published_config(run: RunFolder) -> Tree:
    """Return the config of a run without the keys that name folders of this machine."""
    tree: Tree = without_folders({key: part for key, part in run.config.items() if key not in ("out", "resume")})
    return tree


def published_command(words: Iterable[object]) -> list[str]:
    """Return the words of a command, with absolute paths, also as `--option=PATH`, cut to their last part."""
    published = []
    for word in map(str, words):
        option, equals, value = word.partition("=")
        is_option = option.startswith("-") and equals
        published.append(f"{option}={_last_part(value)}" if is_option else _last_part(word))
    return published


def _last_part(text: str) -> str:
    """Return the last part of an absolute path (of our scripts with their folder), and any other text as it is."""
    for path in (PurePosixPath(text), PureWindowsPath(text)):
        if path.name and (path.is_absolute() or text.startswith("~")):
            is_ours = path.parent.name in {"stage1_tokenizer", "stage2_prior", "sampling"}
            return f"{path.parent.name}/{path.name}" if is_ours else path.name
    return text
