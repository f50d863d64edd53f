"""The data config in the header of a weights file, and options of `data` that change some of its keys."""

import json
from collections.abc import Callable
from pathlib import Path

from stage1_tokenizer.config.base import Config, Tree, merge
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.torchvision_sets import DownloadedConfig
from stage1_tokenizer.engine.checkpoint import read_tensors
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.model_files import read_data_tree


class _DataKey(Config):
    """The data config under the key that it has in the config of a run, so that errors name this key."""

    data: DataConfig


def parse_data_config(tree: Tree, source: str) -> DataConfig:
    """Return the data config of a header as an object, with `download` off: a header may come from anybody, and would
    choose the folder to download into.

    Raises:
        BadFileError: this version has no such data set, or knows other keys of it.
    """
    try:
        data = _DataKey.from_tree({"data": tree}, "header").data
    except ConfigError as error:
        raise BadFileError(f"{source}: its header names data that this version cannot read, {error}") from None
    return data.model_copy(update={"download": False}) if isinstance(data, DownloadedConfig) else data


def with_root(data: DataConfig, root: str | None) -> DataConfig:
    """Return the data's config with its images in another folder, that of the option --root. Images that are drawn have
    no folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if root is None or data.is_drawn:
        return data
    if not Path(root).is_dir():
        raise ConfigError(f"--root {describe_path(root)}: there is no such folder")
    return data.model_copy(update={"root": root})


def moved_data(data: DataConfig, root: str | None) -> DataConfig:
    """Return the data's config with its images in the folder of the option --root; None: where they were.

    Raises:
        ConfigError: there is no such folder, or the images are drawn.
    """
    if root is not None and data.is_drawn:
        raise ConfigError(f"--root {describe_path(root)}: the images are drawn, so they lie in no folder; leave it out")
    return with_root(data, root)


def read_data_config(weights: Path) -> DataConfig:
    """Read the data config of a training from the header of its weights file.

    Raises:
        BadFileError: the file is damaged, or this version cannot read the data config in its header.
    """
    return parse_data_config(read_data_tree(read_tensors(weights)[1], str(weights)), str(weights))


def complete_data_options(tree: Tree, find_weights: Callable[[], Path | None]) -> Tree:
    """Return the tree of a config with a whole `data`. Options of `data` without a kind change keys of the data set
    that a run was trained on; a note on the console says so.

    find_weights: finds the weights file whose header has that data set; None: there is none.

    Raises:
        BadFileError: as `read_data_config`.
    """
    given = tree.get("data")
    if not isinstance(given, dict) or given.get("kind") is not None:
        return tree
    path = find_weights()
    if path is None:
        return tree
    saved = read_data_config(path).tree()
    changed = ", ".join(f"data.{key} {json.dumps(value)}" for key, value in given.items())
    print_note(f"{changed}: changes the data set of {path} (data.kind {saved['kind']}); its other keys stay")
    return {**tree, "data": merge(saved, given)}
