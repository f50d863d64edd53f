"""Trained models that come with the packages, named `pretrained:NAME`.

    pretrained:NAME -> resolve_path -> sampling/pretrained/NAME/  prior.safetensors  tokenizer.safetensors  README.md

Nothing is written into that folder: outputs go to runs/pretrained/NAME.
"""

from pathlib import Path
from typing import NamedTuple

from stage1_tokenizer.engine.errors import ConfigError, shorten

PREFIX = "pretrained:"
FOLDER = Path(__file__).resolve().parents[2] / "sampling" / "pretrained"
"""Folder with a folder for each model. It is data of the package that has the commands, and only this line knows it."""


class PretrainedName(NamedTuple):
    """A trained model that comes with the packages."""

    name: str

    def __str__(self) -> str:
        """The name as options have it."""
        return f"{PREFIX}{self.name}"

    @property
    def outputs(self) -> Path:
        """The folder for what is made with this model."""
        return Path("runs/pretrained") / self.name


def pretrained_names() -> list[PretrainedName]:
    """Return the models that are there, in the order of their names."""
    return [PretrainedName(name) for name in sorted({file.parent.name for file in FOLDER.glob("*/*.safetensors")})]


def resolve_path(given: str | Path, option: str) -> Path:
    """Return the folder of a model that is given by its name, or the path that is given.

    Raises:
        ConfigError: there is no model of this name; the message has the option and lists the names.
    """
    if not (isinstance(given, str) and given.startswith(PREFIX)):
        return Path(given)
    names = pretrained_names()
    if given not in map(str, names):
        known = f"give one of {', '.join(map(str, names))}" if names else f"{FOLDER} holds none"
        raise ConfigError(f"{option} {shorten(given)}: there is no such trained model; {known}")
    return FOLDER / given.removeprefix(PREFIX)


def find_pretrained_name(file: Path) -> PretrainedName | None:
    """Return the name of a model by one of its files; None for any other file."""
    folder = file.absolute().parent
    return PretrainedName(folder.name) if folder.parent.resolve() == FOLDER else None
