"""A model's weights file: find it, read its header, and rebuild the model from it. Used for tokenizers and priors.

resolve_weights -> checkpoint.read_weights -> read_data_tree, read_step -> rebuild
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.error_messages import quote_value
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.engine.checkpoint import load_strict
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.hub import HubName, download_weights, find_hub_name, is_hub_name
from stage1_tokenizer.engine.pretrained import PretrainedName, find_pretrained_name, resolve_path

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class LoadedModel:
    """A model from a weights file. The base of loaded tokenizers and priors."""

    path: Path
    """The weights file."""

    @property
    def source(self) -> str:
        """The file for messages and records: hf:OWNER/NAME@COMMIT, pretrained:NAME, or its path."""
        return str(find_name(self.path) or self.path)

    @property
    def outputs(self) -> Path:
        """The folder for what is made with this model."""
        return output_folder(self.path)


def resolve_weights(path: str | Path, name: str, option: str, beside: tuple[str, ...] = ()) -> Path:
    """Return `path` if it is a file, or the file `name` in it if it is a folder. `option` is named in errors.

    A name hf:OWNER/NAME or hf:OWNER/NAME@REVISION is downloaded from the Hugging Face Hub, together with the files
    `beside`, which will be looked for in the same folder. A name pretrained:NAME is a model of the packages.

    Raises:
        ConfigError: neither exists.
    """
    if is_hub_name(path):
        return download_weights(str(path), (name, *beside), option)
    path = resolve_path(path, option)
    try:
        is_folder = path.is_dir()
        file = path / name if is_folder else path
        exists = file.is_file()
    except OSError as error:  # the name is too long, or a folder above it cannot be opened
        raise ConfigError(f"{option} {shorten(str(path))}: {error.strerror}") from None
    if not exists:
        hint = f"the folder holds no {name}" if is_folder else "there is no such file or folder"
        raise ConfigError(f"{option} {describe_path(path)}: {hint}")
    return file


def find_name(file: Path) -> HubName | PretrainedName | None:
    """Return the name of a weights file from the Hub or of a model of the packages; None for any other file."""
    return find_hub_name(file) or find_pretrained_name(file)


def output_folder(weights: Path) -> Path:
    """Return the folder for what is made with a weights file: its own folder, or that of its name (`find_name`)."""
    name = find_name(weights)
    return name.outputs if name else weights.parent


def read_step(header: Mapping[str, str], source: str) -> int:
    """Return the training step in a header; 0 if the header has none.

    Raises:
        BadFileError: the entry is not a whole number.
    """
    step = header.get("step", "0")
    if not (step.isascii() and step.isdecimal() and len(step) <= 18):
        raise BadFileError(f"{source}: its header says step {quote_value(step)}, which is not a number of steps")
    return int(step)


def read_data_tree(header: Mapping[str, str], source: str) -> Tree:
    """Return the data config in a header as a tree of plain values, not yet checked against any config class.

    Raises:
        BadFileError: the entry is missing or is not a JSON object.
    """
    try:
        tree = parse_json(header.get("data"))
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise BadFileError(f"{source}: its header does not say which data it was made from")
    return tree


def rebuild(build: Callable[[], ModuleT], tensors: Mapping[str, Tensor], source: str) -> ModuleT:
    """Call `build` and load the weights `tensors` into the model that it returns.

    The model is first built on the meta device, where tensors have shapes but no memory, and compared with the weights.
    So a damaged or hostile header cannot take more memory than the size of its file.

    Raises:
        BadFileError: the model cannot be built, or its weights have other names, shapes or number formats.
    """
    try:
        with torch.device("meta"):
            planned = build()
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise BadFileError(f"{source}: its header describes a model that cannot be built: {error}") from None
    load_strict(planned, {name: tensor.to("meta") for name, tensor in tensors.items()}, source)
    model = build()
    load_strict(model, tensors, source)
    return model
