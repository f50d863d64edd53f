"""Weights files from the Hugging Face Hub, named `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.

    hf:OWNER/NAME@REVISION -> download_weights -> CACHE/models--OWNER--NAME/snapshots/COMMIT/tokenizer.safetensors

Only the safetensors files that a command asks for by name are downloaded, never another file of the repository. The
files of one name are all from one commit. The package huggingface_hub (extra `hub`) keeps them in its cache, so the
next command needs no network. Nothing is written into that cache: outputs go to `HubName.outputs`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import ConfigError, UserError, shorten
from stage1_tokenizer.engine.files import NO_SPACE, storage_error

PREFIX = "hf:"
NAME_PATTERN = re.compile(r"hf:([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
"""Name of a repository's folder in the cache of huggingface_hub."""
OUTPUTS = Path("runs/hub")
"""Folder with a folder of outputs for each repository."""
TIMEOUT = 10.0
"""Seconds that the Hub has to answer."""
SHORT_COMMIT = 12
"""Digits of a commit in the name of an output folder."""


class HubName(NamedTuple):
    """A repository of the Hub, and one of its revisions."""

    owner: str
    name: str
    revision: str | None = None
    """A branch, a tag or a commit; None: the newest commit of the main branch."""

    @property
    def repository(self) -> str:
        """The name of the repository, as the Hub has it: OWNER/NAME."""
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        """The name as options have it."""
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")

    @property
    def outputs(self) -> Path:
        """The folder for what is made with these weights, because the cache is not ours to write into."""
        return OUTPUTS / f"{self.owner}--{self.name}@{str(self.revision)[:SHORT_COMMIT]}"


def is_hub_name(given: str | Path) -> bool:
    """Return True if the value of an option names a repository of the Hub and not a path."""
    return isinstance(given, str) and given.startswith(PREFIX)


def parse_hub_name(text: str, option: str) -> HubName:
    """Parse hf:OWNER/NAME or hf:OWNER/NAME@REVISION. Raises ConfigError: it has another form; `option` is named."""
    match = NAME_PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{option} {shorten(text)}: is no name of a repository; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION; "
            "REVISION is a branch, a tag or a commit"
        )
    return HubName(*match.groups())


def import_hub(option: str) -> Any:
    """Import the package huggingface_hub. Raises ConfigError: it is not installed."""
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            f"{option} {PREFIX}...: needs the package huggingface_hub; install it with `pip install "
            "'tessera-images[hub]'`, or give the path of a local folder"
        ) from None


@lru_cache(maxsize=64)
def download_weights(text: str, names: tuple[str, ...], option: str) -> Path:
    """Download the files `names` of a repository, or find them in the cache. Returns the path of the first.

    The files lie in one folder, that of their commit. The commit is printed, so that a later command can name it.

    Raises:
        ConfigError: no such repository, revision or file, no access to it, or no network.
    """
    assert all(name.endswith(".safetensors") for name in names), names
    name = parse_hub_name(text, option)
    hub = import_hub(option)
    revision, files = name.revision, list[Path]()
    for file in names:
        with explain_errors(f"{option} {name}", file):
            files.append(_fetch_file(hub, name, file, revision))
        found = find_hub_name(files[0])
        revision = found.revision if found else revision
    if revision != name.revision:
        print_note(f"{name} is now {name._replace(revision=revision)}; that name always means these files")
    return files[0]


def _fetch_file(hub: Any, name: HubName, file: str, revision: str | None) -> Path:
    """Return a file of a revision from the cache if that cannot have changed, else from the Hub.

    Without a network, the cache has the last say. Raises the errors of huggingface_hub.
    """
    fetch = partial(hub.hf_hub_download, name.repository, file, revision=revision)
    if revision and COMMIT.fullmatch(revision):
        with suppress(FileNotFoundError):  # a file of a commit never changes, so no network is needed
            return Path(fetch(local_files_only=True))
    try:
        # hf_hub_download tries six times within 24 seconds, and prints each of them; this tries once.
        hub.get_hf_file_metadata(hub.hf_hub_url(name.repository, file, revision=revision), timeout=TIMEOUT)
    except Exception as error:
        if not _is_unreachable(error):
            raise
        found = Path(fetch(local_files_only=True))
        print_note(f"{name}: the Hub cannot be reached, so the file in its cache on this machine is used")
        return found
    return Path(fetch())


def _is_unreachable(error: Exception) -> bool:
    """Return True if an error of huggingface_hub means that there is no connection; False if the Hub has answered."""
    answered = hasattr(error, "response")
    return not answered and (isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore")))


def find_hub_name(file: Path) -> HubName | None:
    """Return the repository and commit of a file in the cache of huggingface_hub; None for any other file."""
    snapshots, commit = file.absolute().parent.parent, file.absolute().parent.name
    match = SNAPSHOT.fullmatch(snapshots.parent.name)
    if match is None or snapshots.name != "snapshots":
        return None
    return HubName(match[1], match[2], commit)


@contextmanager
def explain_errors(given: str, file: str = "") -> Iterator[None]:
    """Turn the errors of huggingface_hub into a ConfigError.

    given: option and name, for the message. file: the file that is asked for.

    Raises:
        ConfigError: no such repository, revision or file, no access, or no network.
        StorageError: the disk is full.
    """
    errors = import_module("huggingface_hub.errors")
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        hint = "its owner gives access on request; ask on the page of the repository, then log in with `hf auth login`"
        raise ConfigError(f"{given}: {hint}") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{given}: there is no such repository, or it is private; check the name, or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{given}: the repository has no such revision; give a branch, a tag or a commit") from None
    except errors.LocalEntryNotFoundError:
        raise ConfigError(f"{given}: {_unreachable(file)}") from None
    except errors.EntryNotFoundError:
        raise ConfigError(
            f"{given}: the repository holds no {file} in its top folder; only files that Tessera published are loaded"
        ) from None
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 401)
        if status in (401, 403):
            hint = "the Hub refuses access; log in with `hf auth login`, with a token that may do this"
            raise ConfigError(f"{given}: {hint} ({_first_line(error)})") from None
        raise ConfigError(f"{given}: the Hub answers with an error ({_first_line(error)}); try again later") from None
    except ValueError as error:  # a name that the Hub's rules forbid
        raise ConfigError(f"{given}: {_first_line(error)}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise storage_error(Path(file or given), error) from None
        if not _is_unreachable(error):
            raise
        raise ConfigError(f"{given}: {_unreachable(file)} ({_first_line(error)})") from None


def _unreachable(file: str) -> str:
    cached = f", and {file} is not in its cache on this machine" if file else ""
    return f"the Hub cannot be reached{cached}; check the network and HF_HUB_OFFLINE, or give a local folder"


def _first_line(error: Exception) -> str:
    """Return the type and the first line of an error of another package."""
    lines = str(error).strip().splitlines() or [""]
    return shorten(f"{type(error).__name__}: {lines[0]}", 200)
